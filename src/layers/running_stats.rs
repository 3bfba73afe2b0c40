//! Running statistics: what training leaves for inference.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder};

use super::batch::Batch;
use super::params::{NUM_BATCHES_TRACKED, RUNNING_MEAN, RUNNING_VAR, name_in, path};
use super::shared_state::{Shared, State};
use crate::graph;
use crate::ops::check;
use candle_norm_support::host;

/// The running mean and variance of each channel, and the number of batches that went into them.
///
/// Every training batch updates `r ← (1 − m) · r + m · batch`; the variance takes the unbiased
/// variance of the batch. `m` is the layer's momentum, or one over the number of batches for the
/// cumulative average. The statistics are `f32` (`f64` in an `f64` model), whatever the dtype of
/// the model: in half precision they would stall or overflow.
///
/// They are variables of the model's `VarMap`, so that they are saved and loaded with it, but they
/// are never part of a graph: no optimizer changes them. Threads that train them lose no update,
/// and [`snapshot`](Self::snapshot) and inference never see half of one. Saving or loading the
/// `VarMap` goes from one variable to the next: do it between steps.
///
/// Clones of a layer, and layers built twice from the same variables, share them, and all that is
/// kept beside them: the lock, the counter, a momentum that was [set](Self::set_momentum), a
/// [recalibration](crate::recalibrate) in progress, and `refuse_non_finite`, which holds for all of
/// them once one was built with it. Only the momentum that each was built with is its own.
///
/// [`without_updates`](crate::without_updates) leaves them alone for some forwards;
/// [`pool_updates`](crate::pool_updates) takes in several micro-batches as one batch.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::batch_norm(1, 1e-5, vb)?;
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
    /// Whether training batches change them.
    tracked: bool,
    /// Momentum that this layer was built with.
    momentum: Option<f64>,
    shared: Arc<Shared>,
}

/// Whether a number of batches was reached.
pub(super) enum Reached {
    Known(bool),
    /// 1 or 0.
    OnDevice(Tensor),
}

/// Running statistics as they were at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// The mean of each channel, `[C]`; of [`SwitchNorm`](crate::SwitchNorm) `[1, C, 1]`.
    pub mean: Tensor,
    /// The variance of each channel, of the same shape.
    pub var: Tensor,
    /// The number of batches that went into them.
    pub num_batches_tracked: i64,
}

impl Snapshot {
    /// Statistics of given values, for [`RunningStats::restore`].
    pub fn new(mean: Tensor, var: Tensor, num_batches_tracked: i64) -> Self {
        Self {
            mean,
            var,
            num_batches_tracked,
        }
    }
}

impl State {
    fn counter(&self) -> Result<i64> {
        host::scalar(&self.num_batches_tracked)
    }

    /// The counter with one more batch. At the end of its range it stays there.
    fn next_counter(&self) -> Result<Tensor> {
        let count = &self.num_batches_tracked;
        match host::has(count) {
            true => Tensor::new(self.counter()?.saturating_add(1), &Device::Cpu),
            // Nothing on the device's stream waits for the host.
            false => incremented(&count.as_detached_tensor()),
        }
    }
}

fn incremented(count: &Tensor) -> Result<Tensor> {
    count + count.lt(i64::MAX)?.to_dtype(DType::I64)?
}

impl Inner {
    /// The caller holds the write lock, of which `state` is the proof.
    fn set(&self, state: &State, mean: &Tensor, var: &Tensor, counter: &Tensor) -> Result<()> {
        self.mean.set(mean)?;
        self.var.set(var)?;
        state.num_batches_tracked.set(counter)
    }

    /// A counter beside the statistics.
    fn counter(&self, count: i64) -> Result<Tensor> {
        host::tensor(vec![count], (), self.mean.device())
    }

    fn momentum(&self, state: &State) -> Option<f64> {
        state.momentum.unwrap_or(self.momentum)
    }

    /// The weight of the next batch. Only the cumulative average reads the counter.
    fn next_momentum(&self, state: &State) -> Result<f64> {
        match self.momentum(state) {
            Some(momentum) if state.recalibrations == 0 => Ok(momentum),
            _ => Ok(1. / state.counter()?.saturating_add(1).max(1) as f64),
        }
    }

    /// Mean, variance and counter after a batch that fits, by one kernel where the device has it:
    /// nothing waits for the counter.
    fn updated(&self, state: &State, batch: &Batch) -> Result<Option<[Tensor; 3]>> {
        let counter = &state.num_batches_tracked;
        // A kernel reads all of them on one device, and changes the mean too.
        let (Some(mean), true) = (
            &batch.mean,
            counter.device().same_device(self.mean.device()),
        ) else {
            return Ok(None);
        };
        let momentum = self.momentum(state).filter(|_| state.recalibrations == 0);
        graph::updated(
            self.layer,
            [&self.mean, &self.var, counter].map(|v| v.as_tensor()),
            [mean, &batch.var],
            momentum,
        )
    }

    /// Copies of mean and variance that no later update reaches. The caller holds a lock, of which
    /// the state is the proof.
    fn copies(&self, _: &State) -> Result<[Tensor; 2]> {
        Ok([
            self.mean.as_detached_tensor().copy()?,
            self.var.as_detached_tensor().copy()?,
        ])
    }

    fn check_variance(&self, var: &Tensor) -> Result<()> {
        // Elsewhere the check would wait for the device at every inference.
        match host::has(var) && var.elem_count() > 0 {
            true => non_negative(self.layer, RUNNING_VAR[0], var),
            false => Ok(()),
        }
    }
}

impl RunningStats {
    /// The statistics of a layer: those of `vb` if it tracks any, else neutral ones that belong to
    /// no model.
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
        Self::from_parts(layer, (mean, var), None, momentum, false)
    }

    /// The statistics that `vb` holds, or fresh ones: zero mean, unit variance, no batches. Layers
    /// of this crate have theirs already; this is for a norm of your own, which `layer` names in
    /// messages. [`Norm`](crate::Norm) has an example.
    ///
    /// Names: `running_mean` (also found as `mean`, `moving_mean`), `running_var` (`var`,
    /// `moving_variance`), `num_batches_tracked` (0 if missing).
    ///
    /// # Errors
    /// A momentum outside `[0, 1]`, tensors of another shape, a negative variance, a statistic that
    /// is not finite.
    pub fn from_vb(
        layer: &'static str,
        shape: impl Into<Shape>,
        momentum: Option<f64>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let shape = shape.into();
        check::countable(layer, "a channel axis", shape.dims())?;
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
            Ok(counter) => Some(counter),
            // Checkpoints of PyTorch before 0.4.1, candle-nn, Flax and Keras have none.
            Err(_) if !vb.contains_tensor(NUM_BATCHES_TRACKED) => None,
            Err(e) => return Err(e),
        };
        Self::from_parts(layer, (mean, var), counter, momentum, true)
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
        let (mean_dtype, var_dtype) = (dtype_in(mean.dtype()), dtype_in(var.dtype()));
        let (mean, var) = (mean.to_dtype(mean_dtype)?, var.to_dtype(var_dtype)?);
        Self::from_parts(layer, (mean, var), None, momentum, true)
    }

    fn from_parts(
        layer: &'static str,
        (mean, var): (Tensor, Tensor),
        counter: Option<Tensor>,
        momentum: Option<f64>,
        tracked: bool,
    ) -> Result<Self> {
        check::momentum(layer, momentum)?;
        let (mean, var) = (Var::from_tensor(&mean)?, Var::from_tensor(&var)?);
        let of_model = counter.as_ref().is_some_and(Tensor::is_variable);
        let counter = match counter {
            Some(counter) => Var::from_tensor(&counter)?,
            None => Var::zeros((), DType::I64, mean.device())?,
        };
        let shared = Shared::of(&mean, counter, of_model);
        Ok(Self(Arc::new(Inner {
            layer,
            mean,
            var,
            tracked,
            momentum,
            shared,
        })))
    }

    /// The same, for a layer that refuses batches that are not finite, if `refuse`.
    pub(crate) fn refusing(self, refuse: bool) -> Self {
        if refuse {
            self.0.shared.write().refuse_non_finite = true;
        }
        self
    }

    /// The name of the layer in messages.
    pub(super) fn layer(&self) -> &'static str {
        self.0.layer
    }

    /// Whether training batches change the statistics.
    pub(super) fn are_tracked(&self) -> bool {
        self.0.tracked
    }

    /// Puts the cumulative average in force, in place of any momentum, as often as it is called.
    pub(super) fn start_recalibration(&self) {
        self.0.shared.write().recalibrations += 1;
    }

    /// Takes back one [start](Self::start_recalibration).
    pub(super) fn end_recalibration(&self) {
        self.0.shared.write().recalibrations -= 1;
    }

    /// Whether both are of the same variables, of which they may be for different layers.
    pub(super) fn has_variables_of(&self, other: &Self) -> bool {
        let (a, b) = (&*self.0, &*other.0);
        Arc::ptr_eq(&a.shared, &b.shared) && a.var.id() == b.var.id()
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
        self.0.momentum(&self.0.shared.read())
    }

    /// Sets the weight of a new batch from now on; `None` is the cumulative average.
    ///
    /// For schedules of momentum. It holds for every layer of these variables, built before or
    /// after, in place of what their options say, as long as there is one.
    ///
    /// # Errors
    /// A momentum outside `[0, 1]`; nothing is changed then.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    /// let norm = candle_norm::batch_norm(1, 1e-5, vb)?;
    /// norm.running_stats().unwrap().set_momentum(Some(0.5))?;
    /// norm.forward_train(&Tensor::new(&[[2f64], [6.]], &Device::Cpu)?)?;
    /// assert_eq!(norm.running_mean().to_vec1::<f64>()?, [2.]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn set_momentum(&self, momentum: Option<f64>) -> Result<()> {
        check::momentum(self.0.layer, momentum)?;
        self.0.shared.write().momentum = Some(momentum);
        Ok(())
    }

    /// A copy that no later update reaches, all of it from between two updates.
    ///
    /// # Errors
    /// A negative running variance, which only a direct write to the variable can leave.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let inner = &*self.0;
        let ([mean, var], num_batches_tracked) = {
            let state = inner.shared.read();
            (inner.copies(&state)?, state.counter()?)
        };
        inner.check_variance(&var)?;
        Ok(Snapshot {
            mean,
            var,
            num_batches_tracked,
        })
    }

    /// Copies of mean and variance, both from between two updates: a [`snapshot`](Self::snapshot)
    /// without the counter, which would be read from the device.
    pub(crate) fn mean_and_var(&self) -> Result<[Tensor; 2]> {
        let inner = &*self.0;
        let [mean, var] = inner.copies(&inner.shared.read())?;
        inner.check_variance(&var)?;
        Ok([mean, var])
    }

    /// Back to zero mean, unit variance and no batches.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn reset(&self) -> Result<()> {
        let inner = &*self.0;
        let (zero, one) = (inner.mean.zeros_like()?, inner.var.ones_like()?);
        let counter = inner.counter(0)?;
        let state = inner.shared.write();
        inner.set(&state, &zero.detach(), &one.detach(), &counter)
    }

    /// The statistics by the names that they are saved under.
    pub(crate) fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        let inner = &*self.0;
        vec![
            (RUNNING_MEAN[0], inner.mean.as_tensor().clone()),
            (RUNNING_VAR[0], inner.var.as_tensor().clone()),
            (
                NUM_BATCHES_TRACKED,
                inner.shared.read().num_batches_tracked.as_tensor().clone(),
            ),
        ]
    }

    /// The number of batches that went into the statistics.
    pub(crate) fn num_batches_tracked(&self) -> Result<i64> {
        self.0.shared.read().counter()
    }

    /// Whether `steps` batches went into the statistics, and they are not being recalibrated; where
    /// they are on another device than the host's, a number there, 1 or 0.
    pub(super) fn reached(&self, steps: u64) -> Result<Reached> {
        let state = self.0.shared.read();
        if state.recalibrations > 0 || steps == 0 {
            return Ok(Reached::Known(state.recalibrations == 0));
        }
        let steps = i64::try_from(steps).unwrap_or(i64::MAX);
        let count = &state.num_batches_tracked;
        Ok(match host::has(count) {
            true => Reached::Known(state.counter()? >= steps),
            // Nothing on the device's stream waits for the host.
            false => Reached::OnDevice(count.as_detached_tensor().ge(steps)?),
        })
    }

    /// The weight that the next batch gets.
    pub(crate) fn next_momentum(&self) -> f64 {
        let state = self.0.shared.read();
        self.0.next_momentum(&state).unwrap_or(1.)
    }

    /// `batch` in the shape and dtype of the statistics, refused if it would poison them. `of` is
    /// what a message calls it.
    pub(super) fn fitted(&self, mut batch: Batch, of: impl Fn() -> String) -> Result<Batch> {
        let fit = |t: &Tensor, to: &Var| t.detach().to_dtype(to.dtype())?.reshape(to.shape());
        let mean = batch.mean.as_ref().map(|m| fit(m, &self.0.mean));
        batch.mean = mean.transpose()?;
        batch.var = fit(&batch.var, &self.0.var)?;
        if self.0.shared.read().refuse_non_finite {
            for statistic in batch.mean.iter().chain([&batch.var]) {
                finite_batch(self.0.layer, statistic, &of())?;
            }
        }
        Ok(batch)
    }

    /// Takes in a batch that [fits](Self::fitted).
    pub(super) fn update(&self, batch: &Batch) -> Result<()> {
        let inner = &*self.0;
        let state = inner.shared.write();
        if let Some([mean, var, counter]) = inner.updated(&state, batch)? {
            return inner.set(&state, &mean, &var, &counter);
        }
        let (momentum, counter) = (inner.next_momentum(&state)?, state.next_counter()?);
        let blend = |running: &Var, batch: &Tensor| {
            (running.as_detached_tensor() * (1. - momentum))? + (batch * momentum)?
        };
        let mean = match &batch.mean {
            Some(mean) => blend(&inner.mean, mean)?,
            None => inner.mean.as_detached_tensor().copy()?,
        };
        let var = blend(&inner.var, &batch.var)?;
        inner.set(&state, &mean, &var, &counter)
    }

    /// Puts back what [`snapshot`](Self::snapshot) copied: mean, variance and the number of
    /// batches.
    ///
    /// # Errors
    /// A snapshot of another shape, with a statistic that is not finite, a negative variance or a
    /// negative number of batches; nothing is changed then.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    /// let norm = candle_norm::batch_norm(1, 1e-5, vb)?;
    /// let stats = norm.running_stats().unwrap();
    /// let before = stats.snapshot()?;
    /// norm.forward_train(&Tensor::new(&[[2f64], [6.]], &Device::Cpu)?)?;
    /// stats.restore(&before)?;
    /// assert_eq!(norm.running_mean().to_vec1::<f64>()?, [0.]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        let inner = &*self.0;
        let fit = |name: &str, value: &Tensor, to: &Var, non_negative: bool| {
            check::shape(inner.layer, name, value, to.dims())?;
            let value = value.detach().to_dtype(to.dtype())?;
            check::statistic(inner.layer, name, &value, non_negative)?;
            value.to_device(to.device())?.copy()
        };
        let count = Tensor::new(snapshot.num_batches_tracked, &Device::Cpu)?;
        check::counter(inner.layer, NUM_BATCHES_TRACKED, &count)?;
        self.put(&Snapshot {
            mean: fit(RUNNING_MEAN[0], &snapshot.mean, &inner.mean, false)?,
            var: fit(RUNNING_VAR[0], &snapshot.var, &inner.var, true)?,
            num_batches_tracked: snapshot.num_batches_tracked,
        })
    }

    /// Sets what was there before, whatever it was.
    pub(crate) fn put(&self, before: &Snapshot) -> Result<()> {
        let inner = &*self.0;
        let counter = inner.counter(before.num_batches_tracked)?;
        let state = inner.shared.write();
        inner.set(&state, &before.mean, &before.var, &counter)
    }
}

impl std::fmt::Debug for RunningStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunningStats")
            .field("num_features", &self.0.mean.elem_count())
            .field("dtype", &self.0.mean.dtype())
            .field("momentum", &self.momentum())
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

/// A statistic of a batch, when the layer refuses values that are not finite.
fn finite_batch(layer: &str, statistic: &Tensor, of: &str) -> Result<()> {
    let statistic = statistic.flatten_all()?.to_dtype(DType::F64)?;
    let values = host::vector::<f64>(&statistic)?;
    if let Some(channel) = values.iter().position(|v| !v.is_finite()) {
        bail!(
            "{layer}: expected a finite batch, since refuse_non_finite is set, got {} as a \
            statistic of channel {channel} in {of}; the running statistics are unchanged",
            values[channel]
        )
    }
    Ok(())
}

fn non_negative(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    let lowest = value.flatten_all()?.min(0)?.to_dtype(DType::F64)?;
    let lowest = host::scalar::<f64>(&lowest)?;
    if lowest < 0. {
        bail!("{layer}: expected {name} to be at least 0, got {lowest}")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_on_a_device_counts_as_one_of_the_host() -> Result<()> {
        for (count, next) in [
            (0, 1),
            (41, 42),
            (i64::MAX - 1, i64::MAX),
            (i64::MAX, i64::MAX),
        ] {
            let counter = incremented(&Tensor::new(count, &Device::Cpu)?)?;
            assert_eq!(counter.to_scalar::<i64>()?, next);
        }
        Ok(())
    }
}
