//! Running statistics: what training leaves for inference.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::params::{NUM_BATCHES_TRACKED, RUNNING_MEAN, RUNNING_VAR, name_in, path};
use crate::ops::{BatchStatistics, check};

/// The running mean and variance of each channel, and the number of batches that went into them.
///
/// Every training batch updates `r ← (1 − m) · r + m · batch`; the variance takes the unbiased variance of the batch. `m` is
/// the layer's momentum, or one over the number of batches for the cumulative average. The statistics are `f32`
/// (`f64` in an `f64` model), whatever the dtype of the model: in half precision they would stall or overflow.
///
/// They are variables of the model's `VarMap`, so that they are saved and loaded with it, but they are never part of a
/// graph: no optimizer changes them. Clones of a layer, and layers built twice from the same variables, share them;
/// threads that train them lose no update, and [`snapshot`](Self::snapshot) and inference never see half of one. Saving
/// or loading the `VarMap` goes from one variable to the next: do it between steps.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let norm = candle_norm::batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// norm.forward_t(&Tensor::new(&[[0f32], [20.]], &Device::Cpu)?, true)?;
/// let stats = norm.running_stats().unwrap().snapshot()?;
/// assert_eq!((stats.mean.to_vec1::<f32>()?, stats.num_batches_tracked), (vec![1.], 1));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct RunningStats(Arc<Inner>);

struct Inner {
    layer: &'static str,
    mean: Var,
    var: Var,
    num_batches_tracked: Var,
    momentum: Option<f64>,
    /// While statistics are recalibrated, the cumulative average stands in for the momentum.
    recalibrating: AtomicBool,
}

/// Running statistics as they were at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The mean of each channel, `[C]`; of [`SwitchNorm`](crate::SwitchNorm) `[1, C, 1]`.
    pub mean: Tensor,
    /// The variance of each channel, of the same shape.
    pub var: Tensor,
    /// The number of batches that went into them.
    pub num_batches_tracked: i64,
}

/// One lock for each set of variables, found by the identity of the running mean. Sets may share a lock: it is never held
/// while another is taken.
static LOCKS: [RwLock<()>; 64] = [const { RwLock::new(()) }; 64];

impl Inner {
    fn lock(&self) -> &'static RwLock<()> {
        let mut hasher = DefaultHasher::new();
        self.mean.id().hash(&mut hasher);
        &LOCKS[hasher.finish() as usize % LOCKS.len()]
    }

    fn read(&self) -> RwLockReadGuard<'static, ()> {
        self.lock().read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'static, ()> {
        self.lock().write().unwrap_or_else(PoisonError::into_inner)
    }

    fn counter(&self) -> Result<i64> {
        self.num_batches_tracked.to_scalar::<i64>()
    }

    /// The caller holds the write lock.
    fn set(&self, mean: &Tensor, var: &Tensor, num_batches_tracked: i64) -> Result<()> {
        let counter = Tensor::new(num_batches_tracked, self.mean.device())?;
        self.mean.set(mean)?;
        self.var.set(var)?;
        self.num_batches_tracked.set(&counter)
    }
}

impl RunningStats {
    /// The statistics of a layer: those of `vb` if it tracks any, else neutral ones that belong to no model.
    pub(crate) fn new(
        layer: &'static str,
        shape: impl Into<Shape>,
        momentum: Option<f64>,
        track: bool,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let shape = shape.into();
        check::countable(layer, "a channel axis", shape.dims())?;
        if track {
            return Self::from_vb(layer, shape, momentum, vb);
        }
        let dtype = dtype_in(vb.dtype());
        let mean = Tensor::zeros(&shape, dtype, vb.device())?;
        let var = Tensor::ones(&shape, dtype, vb.device())?;
        Self::from_values(layer, mean, var, momentum)
    }

    /// The statistics that `vb` holds, or fresh ones: zero mean, unit variance, no batches.
    fn from_vb(
        layer: &'static str,
        shape: Shape,
        momentum: Option<f64>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let dtype = dtype_in(vb.dtype());
        let get = |names: &[&str], initial: f64| -> Result<_> {
            let name = name_in(vb, names);
            let value = vb.get_with_hints_dtype(&shape, name, Init::Const(initial), dtype)?;
            let name = path(vb, name);
            check::dtype(layer, &name, &value, dtype)?;
            Ok((name, value))
        };
        let (mean_name, mean) = get(RUNNING_MEAN, 0.)?;
        let (var_name, var) = get(RUNNING_VAR, 1.)?;
        check::statistic(layer, &mean_name, &mean, false)?;
        check::statistic(layer, &var_name, &var, true)?;
        let zero = Init::Const(0.);
        let counter = match vb.get_with_hints_dtype((), NUM_BATCHES_TRACKED, zero, DType::I64) {
            Ok(counter) => counter,
            // Checkpoints of PyTorch before 0.4.1, candle-nn, Flax and Keras have none.
            Err(_) if !vb.contains_tensor(NUM_BATCHES_TRACKED) => zero_counter(vb.device())?,
            Err(e) => return Err(e),
        };
        Self::from_parts(layer, mean, var, counter, momentum)
    }

    /// Statistics of given values, which stay shared where they are variables of the right dtype.
    pub(crate) fn from_values(
        layer: &'static str,
        mean: Tensor,
        var: Tensor,
        momentum: Option<f64>,
    ) -> Result<Self> {
        check::statistic(layer, RUNNING_MEAN[0], &mean, false)?;
        check::statistic(layer, RUNNING_VAR[0], &var, true)?;
        let counter = zero_counter(mean.device())?;
        let (mean_dtype, var_dtype) = (dtype_in(mean.dtype()), dtype_in(var.dtype()));
        let (mean, var) = (mean.to_dtype(mean_dtype)?, var.to_dtype(var_dtype)?);
        Self::from_parts(layer, mean, var, counter, momentum)
    }

    fn from_parts(
        layer: &'static str,
        mean: Tensor,
        var: Tensor,
        num_batches_tracked: Tensor,
        momentum: Option<f64>,
    ) -> Result<Self> {
        check::momentum(layer, momentum)?;
        Ok(Self(Arc::new(Inner {
            layer,
            mean: Var::from_tensor(&mean)?,
            var: Var::from_tensor(&var)?,
            num_batches_tracked: Var::from_tensor(&num_batches_tracked)?,
            momentum,
            recalibrating: AtomicBool::new(false),
        })))
    }

    /// The live mean. Reading it and the variance one after the other may see two updates: see
    /// [`snapshot`](Self::snapshot).
    pub fn mean(&self) -> &Tensor {
        &self.0.mean
    }

    /// The live variance.
    pub fn var(&self) -> &Tensor {
        &self.0.var
    }

    /// The weight of a new batch; `None` for the cumulative average.
    pub fn momentum(&self) -> Option<f64> {
        self.0.momentum
    }

    /// A copy that no later update reaches, all of it from between two updates.
    ///
    /// # Errors
    /// A negative running variance, which only a direct write to the variable can leave.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let inner = &*self.0;
        let snapshot = {
            let _guard = inner.read();
            Snapshot {
                mean: inner.mean.as_detached_tensor().copy()?,
                var: inner.var.as_detached_tensor().copy()?,
                num_batches_tracked: inner.counter()?,
            }
        };
        // Elsewhere the check would wait for the device at every inference.
        if snapshot.var.device().is_cpu() && snapshot.var.elem_count() > 0 {
            check::non_negative(inner.layer, RUNNING_VAR[0], &snapshot.var)?;
        }
        Ok(snapshot)
    }

    /// Back to zero mean, unit variance and no batches.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn reset(&self) -> Result<()> {
        let inner = &*self.0;
        let (zero, one) = (inner.mean.zeros_like()?, inner.var.ones_like()?);
        let _guard = inner.write();
        inner.set(&zero.detach(), &one.detach(), 0)
    }

    /// The statistics by the names that they are saved under.
    pub(crate) fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        let inner = &*self.0;
        vec![
            (RUNNING_MEAN[0], inner.mean.as_tensor().clone()),
            (RUNNING_VAR[0], inner.var.as_tensor().clone()),
            (
                NUM_BATCHES_TRACKED,
                inner.num_batches_tracked.as_tensor().clone(),
            ),
        ]
    }

    /// The weight that the next batch gets.
    pub(crate) fn next_momentum(&self) -> f64 {
        let inner = &*self.0;
        inner
            .momentum
            .unwrap_or_else(|| 1. / (inner.counter().unwrap_or(0) + 1) as f64)
    }

    /// Takes in the statistics of one batch; without `with_mean`, only its variance.
    pub(crate) fn update(&self, batch: &BatchStatistics, with_mean: bool) -> Result<()> {
        let inner = &*self.0;
        let _guard = inner.write();
        let tracked = inner.counter()?.saturating_add(1);
        let momentum = match inner.momentum {
            Some(m) if !inner.recalibrating.load(Ordering::Relaxed) => m,
            _ => 1. / tracked.max(1) as f64,
        };
        let blend = |running: &Var, batch: &Tensor| {
            let batch = batch.detach().to_dtype(running.dtype())?;
            let batch = batch.reshape(running.shape())?;
            (running.as_detached_tensor() * (1. - momentum))? + (batch * momentum)?
        };
        let mean = if with_mean {
            blend(&inner.mean, &batch.mean)?
        } else {
            inner.mean.as_detached_tensor().copy()?
        };
        let var = blend(&inner.var, &batch.var)?;
        inner.set(&mean, &var, tracked)
    }

    /// Restores what a snapshot kept.
    fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        let inner = &*self.0;
        let _guard = inner.write();
        inner.set(&snapshot.mean, &snapshot.var, snapshot.num_batches_tracked)
    }
}

impl std::fmt::Debug for RunningStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunningStats")
            .field("num_features", &self.0.mean.elem_count())
            .field("dtype", &self.0.mean.dtype())
            .field("momentum", &self.0.momentum)
            .finish()
    }
}

/// The dtype of statistics in a model of dtype `model`.
fn dtype_in(model: DType) -> DType {
    match model {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

fn zero_counter(device: &Device) -> Result<Tensor> {
    Tensor::new(0i64, device)
}

/// Recomputes running statistics as the plain average over `batches`, as PyTorch's `update_bn` does.
///
/// For networks whose statistics no longer fit their weights: averaged weights, a changed data set, training at small
/// batches. `forward` runs the model in training mode; every batch should be equally large. The layers' own momentum is
/// back in force afterwards. Returns the number of batches.
///
/// # Errors
/// What `forward` returns; no batches, or a layer that `forward` did not run in training mode; no statistics in `norms`. The
/// statistics are then what they were before.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{batch_norm, recalibrate};
///
/// let vars = VarMap::new();
/// let norm = batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let batches = [[[0f32], [2.]], [[4.], [6.]]].map(|b| Tensor::new(&b, &Device::Cpu).unwrap());
/// recalibrate(&[&norm], batches, |x| norm.forward_t(x, true))?;
/// assert_eq!(norm.running_mean().to_vec1::<f32>()?, [3.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn recalibrate(
    norms: &[&dyn crate::Norm],
    batches: impl IntoIterator<Item = Tensor>,
    mut forward: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<usize> {
    let stats: Vec<&RunningStats> = norms.iter().filter_map(|n| n.running_stats()).collect();
    check::at_least_one("recalibrate", "layer with running statistics", stats.len())?;
    let before = stats
        .iter()
        .map(|s| s.snapshot())
        .collect::<Result<Vec<_>>>()?;
    let run = || {
        let _cumulative = Recalibrating::start(&stats);
        for s in &stats {
            s.reset()?;
        }
        let mut count = 0;
        for batch in batches {
            forward(&batch)?;
            count += 1;
        }
        for s in &stats {
            let updates = s.0.counter()?;
            check::at_least_one(
                "recalibrate",
                "batch that trains each layer",
                updates as usize,
            )?;
        }
        Ok(count)
    };
    let outcome = run();
    if outcome.is_err() {
        for (s, snapshot) in stats.iter().zip(&before) {
            s.restore(snapshot)?;
        }
    }
    outcome
}

/// Puts the cumulative average in force until it is dropped, also when the model panics.
struct Recalibrating<'a>(&'a [&'a RunningStats]);

impl<'a> Recalibrating<'a> {
    fn start(stats: &'a [&'a RunningStats]) -> Self {
        for s in stats {
            s.0.recalibrating.store(true, Ordering::Relaxed);
        }
        Self(stats)
    }
}

impl Drop for Recalibrating<'_> {
    fn drop(&mut self) {
        for s in self.0 {
            s.0.recalibrating.store(false, Ordering::Relaxed);
        }
    }
}
