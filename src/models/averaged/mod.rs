//! A second set of weights: the average of those that training goes through.

mod check;
mod options;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;

pub use options::{Average, AveragedModelOptions, Decay, Warmup};

use super::checkpoint;
use super::optim::{is_statistic, is_vector};
use candle_norm_support::files;

const LAYER: &str = "AveragedModel";

/// Metadata key of the number of updates in a file.
const NUM_UPDATES: &str = "candle_norm.num_updates";

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
            let counts = value.dtype().is_int() || is_vector(name);
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
