//! Loading what `VarMap::load` cannot.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::PoisonError;

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::VarMap;

use crate::layers::params::{ALIASES, NUM_BATCHES_TRACKED, RUNNING_MEAN, RUNNING_VAR};
use crate::ops::check;

/// What [`load_into`] did, and what it did not find.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a variable that the file lacks keeps its value"]
pub struct LoadReport {
    /// The variables that were set.
    pub loaded: Vec<String>,
    /// Of these, the ones that the file has under another name: the variable's, the file's.
    pub renamed: Vec<(String, String)>,
    /// Counters of batches that the file lacks beside its statistics, set to 0.
    pub counters_reset: Vec<String>,
    /// Variables that the file lacks, left as they were.
    pub missing: Vec<String>,
    /// Tensors of the file that no variable took.
    pub unexpected: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} variables loaded", self.loaded.len())?;
        let renamed: Vec<_> = self
            .renamed
            .iter()
            .map(|(variable, file)| format!("{variable} from {file}"))
            .collect();
        for (what, names) in [
            ("renamed", &renamed),
            ("counters set to 0", &self.counters_reset),
            ("missing in the file", &self.missing),
            ("unexpected in the file", &self.unexpected),
        ] {
            if !names.is_empty() {
                write!(f, "; {what}: {}", names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// Sets the variables of `vars` to the tensors of the safetensors file at `path`.
///
/// Unlike `VarMap::load`, it takes
/// - a file without `num_batches_tracked`, such as one of candle-nn's BatchNorm: the counter is then 0;
/// - other names: `gamma`, `beta`, `scale`, `mean`, `var`, `moving_mean`, `moving_variance`, `weight_g`, `weight_v`;
/// - other floating-point dtypes than the variables': half-precision statistics become `f32`;
/// - a file that lacks variables or has more, and says so in its report.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{batch_norm, checkpoint};
///
/// // As candle-nn saves a BatchNorm, without a counter.
/// let file = std::env::temp_dir().join("candle-norm-load-into.safetensors");
/// let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
/// let names = ["weight", "bias", "running_mean", "running_var"];
/// let tensors = names.map(|name| (format!("bn.{name}"), ones.clone())).into_iter().collect();
/// candle_core::safetensors::save(&tensors, &file)?;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = batch_norm(2, 1e-5, vb.pp("bn"))?;
/// let report = checkpoint::load_into(&vars, &file)?;
/// assert_eq!(report.counters_reset, ["bn.num_batches_tracked"]);
/// assert_eq!(bn.running_mean().to_vec1::<f32>()?, [1., 1.]);
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A file that cannot be read, a tensor of another shape or kind, a running variance that is negative, a statistic that is not
/// finite: the message names the tensor, and no variable is changed.
pub fn load_into(vars: &VarMap, path: impl AsRef<Path>) -> Result<LoadReport> {
    load(vars, path.as_ref(), false)
}

/// [`load_into`] that takes only a file with all variables, counters apart, and nothing else.
///
/// # Errors
/// As [`load_into`]; also variables that the file lacks and tensors that no variable takes, all of them named. No variable is
/// changed then.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{checkpoint, layer_norm};
///
/// let file = std::env::temp_dir().join("candle-norm-load-into-strict.safetensors");
/// let weight = Tensor::ones(2, DType::F32, &Device::Cpu)?;
/// candle_core::safetensors::save(&[("weight", weight)].into(), &file)?;
///
/// let vars = VarMap::new();
/// layer_norm(2, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let error = checkpoint::load_into_strict(&vars, &file).unwrap_err();
/// assert!(error.to_string().contains(r#"missing: ["bias"]"#));
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn load_into_strict(vars: &VarMap, path: impl AsRef<Path>) -> Result<LoadReport> {
    load(vars, path.as_ref(), true)
}

fn load(vars: &VarMap, path: &Path, strict: bool) -> Result<LoadReport> {
    let tensors = match candle_core::safetensors::load(path, &Device::Cpu) {
        Ok(tensors) => tensors,
        Err(e) => bail!("cannot read {}: {e}", path.display()),
    };
    set(vars, &tensors, &path.display().to_string(), strict)
}

/// Sets all variables to `tensors`, which must be all of them and nothing else, as [`load_into_strict`] does. `source` is what a message calls
/// the tensors.
pub(crate) fn set_all(
    vars: &VarMap,
    tensors: &HashMap<String, Tensor>,
    source: &str,
) -> Result<()> {
    set(vars, tensors, source, true).map(|_| ())
}

fn set(
    vars: &VarMap,
    tensors: &HashMap<String, Tensor>,
    source: &str,
    strict: bool,
) -> Result<LoadReport> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut report = LoadReport::default();
    let mut values = vec![];
    let mut unexpected: BTreeSet<&String> = tensors.keys().collect();
    for (name, var) in sorted(&vars) {
        let Some((found, tensor)) = find(name, tensors) else {
            if last_part(name) == NUM_BATCHES_TRACKED && has_statistics(name, tensors) {
                report.counters_reset.push(name.clone());
                values.push((var, var.zeros_like()?.detach()));
            } else {
                report.missing.push(name.clone());
            }
            continue;
        };
        unexpected.remove(found);
        if found != name {
            report.renamed.push((name.clone(), found.clone()));
        }
        report.loaded.push(name.clone());
        values.push((var, value_for(name, var, found, tensor)?));
    }
    report.unexpected = unexpected.into_iter().cloned().collect();
    if strict && !(report.missing.is_empty() && report.unexpected.is_empty()) {
        bail!(
            "{source}: expected exactly the tensors of the model; missing: {:?}, unexpected: {:?}",
            report.missing,
            report.unexpected
        )
    }
    for (var, value) in values {
        var.set(&value)?;
    }
    Ok(report)
}

/// The variables in the order of their names, so that reports and messages do not depend on the map.
fn sorted(vars: &HashMap<String, Var>) -> Vec<(&String, &Var)> {
    let mut sorted: Vec<_> = vars.iter().collect();
    sorted.sort_by_key(|(name, _)| *name);
    sorted
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The tensor for the variable `name`: under that name, or under an alias of its last part in the same place.
fn find<'a>(name: &str, tensors: &'a HashMap<String, Tensor>) -> Option<(&'a String, &'a Tensor)> {
    if let Some(exact) = tensors.get_key_value(name) {
        return Some(exact);
    }
    ALIASES.iter().find_map(|names| {
        let prefix = name.strip_suffix(names[0])?;
        if !(prefix.is_empty() || prefix.ends_with('.')) {
            return None;
        }
        names[1..]
            .iter()
            .find_map(|alias| tensors.get_key_value(&format!("{prefix}{alias}")))
    })
}

/// Whether the file has the statistics that the counter `name` belongs to: without them it says nothing about its batches.
fn has_statistics(name: &str, tensors: &HashMap<String, Tensor>) -> bool {
    let prefix = name.strip_suffix(NUM_BATCHES_TRACKED).unwrap_or(name);
    [RUNNING_MEAN[0], RUNNING_VAR[0]]
        .iter()
        .any(|statistic| find(&format!("{prefix}{statistic}"), tensors).is_some())
}

/// `tensor` as the variable holds it, checked.
fn value_for(name: &str, var: &Var, found: &str, tensor: &Tensor) -> Result<Tensor> {
    let counter = last_part(name) == NUM_BATCHES_TRACKED;
    let tensor = match counter && tensor.elem_count() == 1 {
        true => tensor.reshape(())?,
        false => tensor.clone(),
    };
    if tensor.dims() != var.dims() {
        bail!(
            "{found}: expected shape {:?}, got {:?}",
            var.dims(),
            tensor.dims()
        )
    }
    if !counter && tensor.dtype().is_int() != var.dtype().is_int() {
        bail!(
            "{found}: expected dtype {:?}, got {:?}",
            var.dtype(),
            tensor.dtype()
        )
    }
    let tensor = match tensor.dtype() {
        // candle 0.11.1 never comes back from converting these to f64.
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?,
        DType::F8E8M0 | DType::F6E2M3 | DType::F6E3M2 | DType::F4 => bail!(
            "{found}: expected dtype {:?}, got {:?}, which candle cannot convert",
            var.dtype(),
            tensor.dtype()
        ),
        _ => tensor,
    };
    if counter {
        check::counter("checkpoint", found, &tensor)?;
    }
    let value = tensor.to_dtype(var.dtype())?;
    // As the variable holds it: what is finite in f64 need not be so in f32.
    let variance = last_part(name) == RUNNING_VAR[0];
    if variance || last_part(name) == RUNNING_MEAN[0] {
        check::statistic("checkpoint", found, &value, variance)?;
    }
    value.to_device(var.device())
}
