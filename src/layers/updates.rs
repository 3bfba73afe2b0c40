//! When training batches go into running statistics: at once, all together at the end of a scope,
//! or not at all.

use std::cell::RefCell;

use candle_core::Result;

use super::batch::{Batch, Kind};
use super::running_stats::RunningStats;

/// Treatment of the batches that layers train on in a scope.
enum Frame {
    Ignore,
    Apply,
    Pool(Vec<(RunningStats, Batch)>),
}

thread_local! {
    /// The scopes that this thread is in, the innermost last.
    static FRAMES: RefCell<Vec<Frame>> = const { RefCell::new(vec![]) };
}

/// A scope of this thread, left when it is dropped, also by a panic.
pub(super) struct Scope {
    depth: usize,
}

impl Scope {
    fn open(frame: Frame) -> Self {
        FRAMES.with_borrow_mut(|frames| {
            frames.push(frame);
            Self {
                depth: frames.len() - 1,
            }
        })
    }

    /// Scope in which batches are applied at once, whatever the scope around it pools.
    pub(super) fn applying() -> Self {
        Self::open(Frame::Apply)
    }

    /// Leaves the scope. Returns what it pooled.
    fn close(self) -> Vec<(RunningStats, Batch)> {
        let frames = FRAMES.with_borrow_mut(|frames| frames.split_off(self.depth));
        match frames.into_iter().next() {
            Some(Frame::Pool(pooled)) => pooled,
            _ => vec![],
        }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // Layers that only the scope still holds are dropped outside of it.
        let _left = FRAMES.with_borrow_mut(|frames| match self.depth < frames.len() {
            true => frames.split_off(self.depth),
            false => vec![],
        });
    }
}

/// Batch of this `kind` that the innermost scope has pooled for the variables of `stats`.
fn pooled_in<'a>(
    frames: &'a mut [Frame],
    stats: &RunningStats,
    kind: Kind,
) -> Option<&'a mut Batch> {
    let Some(Frame::Pool(pooled)) = frames.last_mut() else {
        return None;
    };
    let same = |(s, b): &&mut (RunningStats, Batch)| s.has_variables_of(stats) && b.kind == kind;
    pooled.iter_mut().find(same).map(|(_, batch)| batch)
}

/// Hands `batch` to the scope that this thread is in. Returns it where it is to be applied now.
pub(super) fn offer(stats: &RunningStats, batch: Batch) -> Result<Option<Batch>> {
    let (ignored, pools) = FRAMES.with_borrow(|frames| {
        let ignored = frames.iter().any(|f| matches!(f, Frame::Ignore));
        (ignored, matches!(frames.last(), Some(Frame::Pool(_))))
    });
    if ignored {
        return Ok(None);
    }
    if !pools {
        return Ok(Some(batch));
    }
    // Operations on tensors are left out of the borrow: what runs on this thread meanwhile may be a
    // layer too.
    let mut batch = batch.wide()?;
    let find = |frames: &mut Vec<Frame>| pooled_in(frames, stats, batch.kind).cloned();
    if let Some(before) = FRAMES.with_borrow_mut(find) {
        batch = before.pooled(&batch)?;
    }
    FRAMES.with_borrow_mut(|frames| {
        if let Some(before) = pooled_in(frames, stats, batch.kind) {
            *before = batch;
        } else if let Some(Frame::Pool(pooled)) = frames.last_mut() {
            pooled.push((stats.clone(), batch));
        }
    });
    Ok(None)
}

/// Runs `f`, in which no forward in training changes running statistics or their counters.
///
/// For forwards beside the one that counts: activations that are computed again for the backward
/// (activation checkpointing), the second step of sharpness-aware minimization, gradient penalties.
/// The layers normalize by their batch as ever, and return the same errors.
///
/// The scope is one of this thread, as [`with_path`](crate::with_path) is: other threads that train
/// the layer go on updating it, and a forward that `f` hands to another thread is not in it. On a
/// thread of rayon's pool that waits, rayon may run another task of the pool, which is then in the
/// scope too: do not train other layers in tasks of the same pool meanwhile. Scopes nest, and a
/// panic in `f` ends the scope. [`RunningStats::reset`], [`RunningStats::restore`] and
/// [`RunningStats::set_momentum`] act in it as they do outside.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{batch_norm, without_updates};
///
/// let vars = VarMap::new();
/// let norm = batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu))?;
/// let x = Tensor::new(&[[2f64], [6.]], &Device::Cpu)?;
/// norm.forward_t(&x, true)?;
/// let again = without_updates(|| norm.forward_t(&x, true))?;
/// assert_eq!(again.dims(), [2, 1]);
/// assert_eq!(norm.running_mean().to_vec1::<f64>()?, [0.4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn without_updates<T>(f: impl FnOnce() -> T) -> T {
    let _scope = Scope::open(Frame::Ignore);
    f()
}

/// Runs `f`, and then updates the running statistics of each layer that trained in it once, as by
/// one batch.
///
/// For gradients that are accumulated over micro-batches. BatchNorm's running mean and variance are
/// then what one batch of all of them had left, `(Σ (nₖ − 1) vₖ + Σ nₖ (mₖ − m)²) / (n − 1)`, where
/// an update for each micro-batch would leave out how far their means mₖ are from the mean m of all
/// n values. SwitchNorm's are pooled in the same way, InstanceNorm's averaged over all samples.
/// Micro-batches may differ in size. The update has the weight of one batch, and counts as one.
///
/// Only the statistics for inference are pooled. **Each micro-batch is still normalized by its own
/// statistics**: output and gradients are those of small batches, and training is not the same as
/// with one large batch. Where that matters, take a norm that does not depend on the batch, such as
/// [`GroupNorm`](crate::GroupNorm), or [`frozen`](crate::BatchNorm::frozen) statistics. On the
/// composed path the means that are pooled are rounded to `f32` first, in a model that is not
/// `f64`.
///
/// The scope is one of this thread, with the same limits as [`without_updates`]: forwards on other
/// threads update at once. In a scope within a scope, the outer one gets what the inner one pooled;
/// within [`without_updates`] nothing is pooled. Layers built from the same variables pool
/// together. [`recalibrate`](crate::recalibrate) takes its own batches one by one.
///
/// # Errors
/// Errors of `f`. Then no statistics change, also those of the micro-batches before; the same if
/// `f` panics.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Optimizer, SGD, VarBuilder, VarMap, loss};
/// use candle_norm::{batch_norm, pool_updates, trainable_vars};
///
/// let vars = VarMap::new();
/// let norm = batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu))?;
/// let mut optimizer = SGD::new(trainable_vars(&vars), 0.1)?;
/// let target = Tensor::new(&[[0f64], [1.]], &Device::Cpu)?;
/// let micro_batches = [[[0f64], [2.]], [[4.], [6.]]];
/// let micro_batches = micro_batches.map(|b| Tensor::new(&b, &Device::Cpu).unwrap());
/// let loss = pool_updates(|| {
///     let losses = micro_batches.iter().map(|x| loss::mse(&norm.forward_train(x)?, &target));
///     let losses = losses.collect::<candle_core::Result<Vec<_>>>()?;
///     Tensor::stack(&losses, 0)?.mean_all()
/// })?;
/// optimizer.backward_step(&loss)?;
/// // A tenth of the mean of 0, 2, 4 and 6, and of their unbiased variance, to nine tenths of 1.
/// let stats = norm.running_stats().unwrap().snapshot()?;
/// assert!((stats.mean.to_vec1::<f64>()?[0] - 0.3).abs() < 1e-12);
/// assert!((stats.var.to_vec1::<f64>()?[0] - (0.9 + 0.1 * 20. / 3.)).abs() < 1e-12);
/// assert_eq!(stats.num_batches_tracked, 1);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn pool_updates<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let scope = Scope::open(Frame::Pool(vec![]));
    let result = f()?;
    let mut ready = vec![];
    for (stats, batch) in scope.close() {
        // The scope around this one, if there is one.
        if let Some(batch) = offer(&stats, batch)? {
            let fitted = stats.fitted(batch, || "micro-batches that were pooled".to_string())?;
            ready.push((fitted, stats));
        }
    }
    for (batch, stats) in ready {
        stats.update(&batch)?;
    }
    Ok(result)
}
