//! A second set of weights: the average of those that training goes through.

mod check;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;

use super::checkpoint;
use super::optim::is_statistic;
use crate::support::files;

const LAYER: &str = "AveragedModel";

/// Metadata key of the number of updates in a file.
const NUM_UPDATES: &str = "candle_norm.num_updates";

/// Weighting of the past in an [`AveragedModel`].
///
/// At the n-th update the average a takes in the weights w by a ← d · a + (1 − d) · w; the first
/// copies them (d = 0).
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Average {
    /// All updates alike: d = 1 − 1/n. Stochastic weight averaging (Izmailov et al., 2018,
    /// [arXiv:1803.05407](https://arxiv.org/abs/1803.05407)): update once an epoch, at a high
    /// learning rate, near the end.
    Equal,
    /// Exponentially: d by the schedule. Update after every step.
    Exponential(Decay),
}

/// The schedule of d, the weight that an exponential average keeps.
///
/// ```
/// use candle_norm::{Decay, Warmup};
///
/// let constant = Decay { decay: 0.99, ..Default::default() };
/// assert_eq!([1, 2, 3].map(|n| constant.at(n)), [0., 0.99, 0.99]);
///
/// let warmup = Decay { decay: 0.99, warmup: Some(Warmup::default()), ..Default::default() };
/// assert!(warmup.at(2) < 0.4 && warmup.at(100) < 0.96);
/// assert_eq!(warmup.at(10_000), 0.99);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Decay {
    /// Limit of d, between 0 and 1. Default 0.999, PyTorch's; 0.9999 is usual for long
    /// trainings of images.
    pub decay: f64,
    /// A rise of d from 0, for early weights are far from good. Default none.
    pub warmup: Option<Warmup>,
    /// The least d of the warm-up, at most `decay`. Default 0.
    pub min_decay: f64,
    /// So many updates copy the weights before the average begins. Default 0.
    pub update_after: u64,
}

/// d = 1 − (1 + n / γ)^−p after n updates, as in timm's `ModelEmaV3`. With γ = 1, a power of 2/3
/// reaches 0.999 at 31 600 updates and
/// 0.9999 at 1 000 000; 3/4 reaches 0.999 at 10 000 and 0.9999 at 215 400.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Warmup {
    /// γ. Default 1.
    pub gamma: f64,
    /// p. Default 2/3.
    pub power: f64,
}

impl Default for Decay {
    fn default() -> Self {
        Self {
            decay: 0.999,
            warmup: None,
            min_decay: 0.,
            update_after: 0,
        }
    }
}

impl Default for Warmup {
    fn default() -> Self {
        Self {
            gamma: 1.,
            power: 2. / 3.,
        }
    }
}

impl Decay {
    /// d at the n-th update, from 1 on.
    pub fn at(&self, update: u64) -> f64 {
        let step = update.saturating_sub(self.update_after).saturating_sub(1);
        match self.warmup {
            _ if step == 0 => 0.,
            None => self.decay,
            Some(Warmup { gamma, power }) => {
                let rise = 1. - (1. + step as f64 / gamma).powf(-power);
                rise.min(self.decay).max(self.min_decay)
            }
        }
    }
}

impl Average {
    /// d at the n-th update, from 1 on.
    pub fn decay_at(&self, update: u64) -> f64 {
        match self {
            Average::Equal => 1. - 1. / update.max(1) as f64,
            Average::Exponential(decay) => decay.at(update),
        }
    }
}

/// Options of an [`AveragedModel`]. A number converts into the exponential average of that decay,
/// a [`Decay`] into that of the schedule, an [`Average`] into itself.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct AveragedModelOptions {
    /// Weighting of the past. Default: exponential, with a decay of 0.999.
    pub average: Average,
    /// Whether running means and variances are averaged too, as in timm; otherwise they are copied,
    /// as in PyTorch. Default `false`.
    pub average_statistics: bool,
}

impl Default for AveragedModelOptions {
    fn default() -> Self {
        Average::Exponential(Decay::default()).into()
    }
}

impl From<Average> for AveragedModelOptions {
    fn from(average: Average) -> Self {
        Self {
            average,
            average_statistics: false,
        }
    }
}

impl From<f64> for AveragedModelOptions {
    fn from(decay: f64) -> Self {
        let decay = Decay {
            decay,
            ..Default::default()
        };
        decay.into()
    }
}

impl From<Decay> for AveragedModelOptions {
    fn from(decay: Decay) -> Self {
        Average::Exponential(decay).into()
    }
}

/// An average of the weights of a model in training, which often predicts better than the last of
/// them.
///
/// Parameters are averaged, in `f32` where the model is of half precision. Running means and
/// variances are copied, or averaged too
/// ([`average_statistics`](AveragedModelOptions::average_statistics)); counters of batches and
/// other integers are copied.
///
/// The averages have variables of their own. [`evaluate`](Self::evaluate) puts them into the model
/// for as long as a function runs.
///
/// ```
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap, loss};
/// use candle_norm::{AveragedModel, NormConfig, trainable_vars};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let model = "batch".parse::<NormConfig>()?.linear(4, 1, vb)?;
/// let mut averaged = AveragedModel::new(&vars, 0.99)?;
///
/// let xs = Tensor::rand(-1f32, 1., (16, 4), &Device::Cpu)?;
/// let ys = xs.sum_keepdim(1)?;
/// let mut optimizer = AdamW::new_lr(trainable_vars(&vars), 0.01)?;
/// for _ in 0..20 {
///     optimizer.backward_step(&loss::mse(&model.forward_t(&xs, true)?, &ys)?)?;
///     averaged.update()?;
/// }
/// let error = averaged.evaluate(|| loss::mse(&model.forward_t(&xs, false)?, &ys))?;
/// # assert!(error.to_scalar::<f32>()?.is_finite());
///
/// // A file that any model of these variables loads, and from which the average goes on.
/// let file = std::env::temp_dir().join("candle-norm-averaged.safetensors");
/// averaged.save(&file)?;
/// let mut resumed = AveragedModel::new(&vars, 0.99)?;
/// resumed.load(&file)?;
/// assert_eq!(resumed.num_updates(), 20);
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Statistics that are copied are those of the last weights. With equal weights, and wherever they
/// matter, compute them anew for the averaged ones: the averages keep what
/// [`recalibrate`](crate::recalibrate) finds while they are in the model.
///
/// ```
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{Average, AveragedModel, batch_norm, recalibrate};
///
/// let vars = VarMap::new();
/// let norm = batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let mut averaged = AveragedModel::new(&vars, Average::Equal)?;
/// // ... train, and update once an epoch ...
/// averaged.update()?;
/// averaged.evaluate(|| {
///     let batch = Tensor::new(&[[4f32], [6.]], &Device::Cpu)?;
///     recalibrate(&[&norm], [batch], |xs| norm.forward_t(xs, true))
/// })?;
/// let mean = || norm.running_mean().to_vec1::<f32>();
/// assert_eq!(mean()?, [0.]);
/// assert_eq!(averaged.evaluate(mean)?, [5.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Nothing else may use the model while a method runs, not even for inference: it goes from one
/// variable to the next, and a forward would see some of the old values and some of the new ones.
pub struct AveragedModel {
    model: VarMap,
    averages: VarMap,
    options: AveragedModelOptions,
    num_updates: u64,
    /// The values of the model while the averages are in it.
    own: Option<BTreeMap<String, Tensor>>,
}

/// The variables of a map, by name.
type Vars<'a> = MutexGuard<'a, HashMap<String, Var>>;

fn lock(vars: &VarMap) -> Vars<'_> {
    vars.data().lock().unwrap_or_else(PoisonError::into_inner)
}

impl AveragedModel {
    /// An average of the variables that `vars` has now. Build the model first; the values that it
    /// has are the average until the first [`update`](Self::update).
    ///
    /// # Errors
    /// No variables; a decay outside of 0 to 1, a least decay above it, a warm-up without a
    /// positive gamma and power.
    pub fn new(vars: &VarMap, options: impl Into<AveragedModelOptions>) -> Result<Self> {
        let options = options.into();
        if let Average::Exponential(Decay {
            decay,
            warmup,
            min_decay,
            ..
        }) = options.average
        {
            check::decay(LAYER, "decay", decay)?;
            check::decay(LAYER, "min_decay", min_decay)?;
            check::min_decay(LAYER, min_decay, decay)?;
            if let Some(Warmup { gamma, power }) = warmup {
                check::positive(LAYER, "gamma", gamma)?;
                check::positive(LAYER, "power", power)?;
            }
        }
        let averages = VarMap::new();
        {
            let model = lock(vars);
            check::at_least_one(
                LAYER,
                "variable in the VarMap; build the model first",
                model.len(),
            )?;
            let mut own = lock(&averages);
            for (name, var) in model.iter() {
                let start = var.as_detached_tensor().to_dtype(dtype_of(var))?;
                own.insert(name.clone(), Var::from_tensor(&start.copy()?)?);
            }
        }
        Ok(Self {
            model: vars.clone(),
            averages,
            options,
            num_updates: 0,
            own: None,
        })
    }

    /// Takes in the weights that the model has now. Call it after the step of the optimizer.
    ///
    /// # Errors
    /// The averages are in the model; it has other variables than before. Nothing is changed then.
    pub fn update(&mut self) -> Result<()> {
        let next = self.num_updates.saturating_add(1);
        self.update_with(self.options.average.decay_at(next))
    }

    /// [`update`](Self::update) by a decay of your own schedule: the average keeps `decay` of
    /// itself.
    ///
    /// # Errors
    /// As [`update`](Self::update); a decay outside of 0 to 1.
    pub fn update_with(&mut self, decay: f64) -> Result<()> {
        check::decay(LAYER, "decay", decay)?;
        check::swapped(LAYER, "update", self.own.is_some())?;
        self.same_variables()?;
        let averages = lock(&self.averages);
        for (name, var) in lock(&self.model).iter() {
            let Some(average) = averages.get(name) else {
                continue;
            };
            let value = var.as_detached_tensor().to_dtype(average.dtype())?;
            let counts = value.dtype().is_int();
            let copied = counts || (is_statistic(name) && !self.options.average_statistics);
            if copied || decay == 0. {
                average.set(&value)?;
            } else {
                let old = average.as_detached_tensor();
                // What does not change stays what it is, to the bit.
                let new = (&old + ((value - &old)? * (1. - decay))?)?;
                average.set(&new)?;
            }
        }
        self.num_updates = self.num_updates.saturating_add(1);
        Ok(())
    }

    /// Number of updates so far.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// The averages, under the names of the model: for a second model, built by
    /// `VarBuilder::from_varmap`, that is always the averaged one.
    pub fn vars(&self) -> &VarMap {
        &self.averages
    }

    /// Runs `f` with the averages in the model, and puts the model's own values back, also when `f`
    /// fails or panics.
    ///
    /// # Errors
    /// Errors of `f`, and those of [`swap_in`](Self::swap_in).
    pub fn evaluate<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        self.swap_in()?;
        let back = Back(self);
        let outcome = f();
        back.0.swap_out()?;
        outcome
    }

    /// Puts the averages into the variables of the model, in their dtype, and keeps the model's own
    /// values for [`swap_out`](Self::swap_out). To end a training with the averages, swap them in
    /// and save the model.
    ///
    /// # Errors
    /// They are in it already; the model has other variables than before. Nothing is changed then.
    pub fn swap_in(&mut self) -> Result<()> {
        check::swapped(LAYER, "swap_in", self.own.is_some())?;
        self.same_variables()?;
        let (model, averages) = (lock(&self.model), lock(&self.averages));
        let mut own = BTreeMap::new();
        let mut values = vec![];
        for (name, var) in model.iter() {
            own.insert(name.clone(), var.as_detached_tensor().copy()?);
            if let Some(average) = averages.get(name) {
                values.push((var, average.as_detached_tensor().to_dtype(var.dtype())?));
            }
        }
        // Before the first of them is set, so that they can all be put back.
        self.own = Some(own);
        let set = (values.into_iter()).try_for_each(|(var, value)| var.set(&value));
        drop((model, averages));
        if set.is_err() {
            self.put_back()?;
        }
        set
    }

    /// Puts the model's own values back. Statistics that were computed in the meantime stay with
    /// the averages.
    ///
    /// # Errors
    /// The averages are not in the model; a variable has another shape or dtype than before.
    /// Nothing is changed then.
    pub fn swap_out(&mut self) -> Result<()> {
        let own = check::not_swapped(LAYER, self.own.as_ref())?;
        {
            let model = lock(&self.model);
            let fits = |var: &Var, t: &Tensor| var.shape() == t.shape() && var.dtype() == t.dtype();
            let differs = own
                .iter()
                .find(|(name, value)| model.get(*name).is_some_and(|var| !fits(var, value)));
            let differs = differs.map(|(name, _)| name.as_str());
            check::same_variables(LAYER, differs)?;
        }
        self.keep_statistics()?;
        self.put_back()
    }

    /// Sets the variables to the model's own values, which are kept until the last is there.
    fn put_back(&mut self) -> Result<()> {
        let model = lock(&self.model);
        for (name, value) in self.own.iter().flatten() {
            if let Some(var) = model.get(name) {
                var.set(value)?;
            }
        }
        drop(model);
        self.own = None;
        Ok(())
    }

    /// Takes the statistics of a model that has the averages in it.
    fn keep_statistics(&self) -> Result<()> {
        if self.own.is_none() {
            return Ok(());
        }
        let averages = lock(&self.averages);
        for (name, var) in lock(&self.model).iter() {
            if let Some(average) = averages.get(name).filter(|_| is_statistic(name)) {
                average.set(&var.as_detached_tensor().to_dtype(average.dtype())?)?;
            }
        }
        Ok(())
    }

    /// Writes the averages and the number of updates to a safetensors file, which appears whole or
    /// not at all. The names are the model's: [`checkpoint::load_into`] loads it as a model.
    ///
    /// # Errors
    /// Those of the file system and of devices; a file that was there before is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.keep_statistics()?;
        let mut named = BTreeMap::new();
        for (name, var) in lock(&self.averages).iter() {
            let value = var.as_detached_tensor().to_device(&Device::Cpu)?;
            named.insert(name.clone(), value);
        }
        let metadata = [(NUM_UPDATES.to_string(), self.num_updates.to_string())];
        let bytes = safetensors::serialize(named, Some(metadata.into()));
        let path = path.as_ref();
        let bytes = check::written(LAYER, path, bytes)?;
        check::written(LAYER, path, files::write(path, &bytes))
    }

    /// Goes on from a file that [`save`](Self::save) wrote. The options are those of
    /// [`new`](Self::new).
    ///
    /// # Errors
    /// The averages are in the model; a file that cannot be read, is not of an `AveragedModel`, or
    /// is of another model. Nothing is changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        check::swapped(LAYER, "load", self.own.is_some())?;
        let path = path.as_ref();
        let header = check::file(LAYER, path, files::header(path))?;
        let num_updates = check::of_averages(LAYER, path, saved_updates(&header))?;
        let remedy = "make the AveragedModel of the model that was averaged";
        checkpoint::load_whole(&self.averages, path, remedy)?;
        self.num_updates = num_updates;
        Ok(())
    }

    /// Checks that the model has the variables that are averaged, and no others.
    fn same_variables(&self) -> Result<()> {
        let (model, averages) = (lock(&self.model), lock(&self.averages));
        let mut differ: Vec<&str> = (model.iter())
            .filter(|(n, v)| averages.get(*n).is_none_or(|a| a.shape() != v.shape()))
            .chain(averages.iter().filter(|(n, _)| !model.contains_key(*n)))
            .map(|(name, _)| name.as_str())
            .collect();
        differ.sort_unstable();
        check::same_variables(LAYER, differ.first().copied())
    }
}

impl std::fmt::Debug for AveragedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AveragedModel")
            .field("options", &self.options)
            .field("num_updates", &self.num_updates)
            .field("swapped_in", &self.own.is_some())
            .finish_non_exhaustive()
    }
}

/// Puts the model's own values back when it is dropped, if they are not yet.
struct Back<'a>(&'a mut AveragedModel);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if self.0.own.is_some() {
            let _ = self.0.swap_out();
        }
    }
}

/// The dtype that a variable is averaged in.
fn dtype_of(var: &Var) -> DType {
    match var.dtype() {
        DType::F64 => DType::F64,
        dtype if dtype.is_int() => dtype,
        _ => DType::F32,
    }
}

/// The number of updates that the header of a safetensors file has.
fn saved_updates(header: &[u8]) -> Option<u64> {
    let header: serde_json::Value = serde_json::from_slice(header).ok()?;
    let text = header.get("__metadata__")?.get(NUM_UPDATES)?;
    text.as_str()?.parse().ok()
}
