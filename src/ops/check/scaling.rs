//! Messages about data, its features, and files of scalers.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;

use candle_core::{DType, Result, Tensor, bail};

/// Data of features: `[N, features...]`, a float tensor of at least one sample.
pub(crate) fn samples(layer: &str, x: &Tensor) -> Result<()> {
    super::float(layer, "data", x)?;
    if x.rank() == 0 || x.dims()[0] == 0 {
        bail!(
            "{layer}: expected data [N, features...] of at least one sample, got shape {:?}",
            x.dims()
        )
    }
    if feature_count(&x.dims()[1..]) == 0 {
        bail!(
            "{layer}: expected data [N, features...] of at least one feature, got shape {:?}",
            x.dims()
        )
    }
    Ok(())
}

/// Saved axes of one feature at least.
pub(crate) fn some_features(layer: &str, axes: &[usize]) -> Result<()> {
    if feature_count(axes) == 0 {
        bail!("{layer}: expected axes of at least one feature in the saved state, got {axes:?}")
    }
    Ok(())
}

/// A count that an `f64` holds exactly, as files have it.
pub(crate) fn countable(
    layer: &str,
    what: &str,
    feature: &dyn Display,
    count: u64,
    most: u64,
) -> Result<()> {
    if count > most {
        bail!(
            "{layer}: expected at most {most} {what} of {feature} in all, got {count}; fit it anew"
        )
    }
    Ok(())
}

/// The number of elements of axes, which a file may claim to be any.
pub(crate) fn feature_count(axes: &[usize]) -> usize {
    let product = |count: usize, axis: &usize| count.saturating_mul(*axis);
    axes.iter().fold(1, product)
}

/// The trailing axes of data against those of the features. `first` is the first feature that one of them lacks.
pub(crate) fn feature_shape(
    layer: &str,
    expected: &[usize],
    got: &[usize],
    first: &dyn Display,
) -> Result<()> {
    if expected != got {
        let (expected_count, count) = (feature_count(expected), feature_count(got));
        let what = match count.cmp(&expected_count) {
            std::cmp::Ordering::Less => format!("{count}: {first} is missing"),
            std::cmp::Ordering::Greater => format!("{count}: {first} is too many"),
            std::cmp::Ordering::Equal => {
                format!("the axes {got:?}; reshape the data: {first} would be another")
            }
        };
        bail!("{layer}: expected {expected_count} features of axes {expected:?}, got {what}")
    }
    Ok(())
}

/// As many names as features. `first` is the first feature that has no name, or the first name that has no feature.
pub(crate) fn name_count(
    layer: &str,
    names: usize,
    features: usize,
    first: &dyn Display,
) -> Result<()> {
    if names != features {
        let what = match features < names {
            true => "has no data",
            false => "has no name",
        };
        bail!(
            "{layer}: expected as many features as names, {names}, got {features}: {first} {what}"
        )
    }
    Ok(())
}

pub(crate) fn same_name(layer: &str, index: usize, expected: &str, got: &str) -> Result<()> {
    if expected != got {
        bail!("{layer}: expected feature {index} to be {expected:?}, got {got:?}")
    }
    Ok(())
}

pub(crate) fn distinct_names(layer: &str, names: &[String]) -> Result<()> {
    let mut seen = HashMap::new();
    for (index, name) in names.iter().enumerate() {
        if let Some(first) = seen.insert(name, index) {
            bail!("{layer}: expected distinct names, got {name:?} for features {first} and {index}")
        }
    }
    Ok(())
}

/// Infinite data, and NaN where it is refused.
pub(crate) fn usable(layer: &str, feature: &dyn Display, row: usize, value: f64) -> Result<()> {
    match value {
        v if v.is_nan() => bail!(
            "{layer}: expected data without NaN, got one in sample {row} of {feature}; set nan to Nan::Ignore or leave the sample out"
        ),
        v if v.is_infinite() => {
            bail!("{layer}: expected finite data, got {v} in sample {row} of {feature}")
        }
        _ => Ok(()),
    }
}

/// Data that have a value of any feature.
pub(crate) fn has_values(layer: &str, values: u64) -> Result<()> {
    if values == 0 {
        bail!("{layer}: expected at least one value of any feature, got only NaN")
    }
    Ok(())
}

/// One weight for each sample.
pub(crate) fn weight_per_sample(layer: &str, samples: usize, weights: &Tensor) -> Result<()> {
    if weights.dims() != [samples] {
        bail!(
            "{layer}: expected one weight for each of the {samples} samples, got sample_weight of shape {:?}",
            weights.dims()
        )
    }
    Ok(())
}

pub(crate) fn usable_weight(layer: &str, sample: usize, weight: f64) -> Result<()> {
    if !(weight.is_finite() && weight >= 0.) {
        bail!(
            "{layer}: expected a sample_weight of 0 or more that is finite, got {weight} for sample {sample}"
        )
    }
    Ok(())
}

/// Weights of which one at least counts.
pub(crate) fn some_weight(layer: &str, sum: f64) -> Result<()> {
    if !(sum > 0. && sum.is_finite()) {
        bail!("{layer}: expected a sample_weight with a sum above 0 and finite, got {sum}")
    }
    Ok(())
}

/// Weights of samples, where a scaler has no use for them.
pub(crate) fn no_weights<T>(layer: &str, remedy: &str) -> Result<T> {
    bail!(
        "{layer}: expected samples that count alike, got sample_weight; {remedy}, or take StandardScaler, which knows weights"
    )
}

/// One number, such as a term of a loss.
pub(crate) fn scalar(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    if value.elem_count() != 1 {
        bail!(
            "{layer}: expected {name} as one number, got shape {:?}; take its mean",
            value.dims()
        )
    }
    Ok(())
}

/// As many as there are names.
pub(crate) fn term_count(
    layer: &str,
    expected: usize,
    got: usize,
    first: &dyn Display,
) -> Result<()> {
    if expected != got {
        let what = match got < expected {
            true => "is missing",
            false => "is too many",
        };
        bail!("{layer}: expected {expected} terms, got {got}: {first} {what}")
    }
    Ok(())
}

/// What has been fitted.
pub(crate) fn fitted<T>(layer: &str, fitted: Option<T>) -> Result<T> {
    match fitted {
        Some(fitted) => Ok(fitted),
        None => {
            bail!("{layer}: expected a fitted scaler, got one without data; call fit or restore it")
        }
    }
}

/// A statistic that the dtype of a computation can hold.
pub(crate) fn representable(
    layer: &str,
    feature: &dyn Display,
    value: f64,
    dtype: DType,
) -> Result<()> {
    if !value.is_finite() {
        let remedy = match dtype {
            DType::F64 => "take a larger unit",
            _ => "convert the data to F64, or to a larger unit",
        };
        bail!(
            "{layer}: expected statistics of {feature} that {dtype:?} can hold, got {value}; {remedy}"
        )
    }
    Ok(())
}

/// An option that has a range.
pub(crate) fn option(
    layer: &str,
    name: &str,
    holds: bool,
    expected: &str,
    got: &dyn Display,
) -> Result<()> {
    if !holds {
        bail!("{layer}: expected {name} {expected}, got {got}")
    }
    Ok(())
}

/// What a scaler of this kind cannot do at all.
pub(crate) fn unsupported<T>(layer: &str, what: &str, remedy: &str) -> Result<T> {
    bail!("{layer}: expected {what}, got a call that needs it; {remedy}")
}

pub(crate) fn kind(layer: &str, got: &str) -> Result<()> {
    if layer != got {
        bail!("{layer}: expected the state of a {layer}, got that of a {got}")
    }
    Ok(())
}

pub(crate) fn version(layer: &str, expected: u32, got: u32) -> Result<()> {
    if expected != got {
        bail!(
            "{layer}: expected state of version {expected}, got version {got}; it was written by another version of candle-norm"
        )
    }
    Ok(())
}

/// Something of a saved state.
pub(crate) fn present<T>(layer: &str, what: &str, found: Option<T>) -> Result<T> {
    match found {
        Some(found) => Ok(found),
        None => {
            bail!("{layer}: expected {what} in the saved state, got none; the file is not whole")
        }
    }
}

pub(crate) fn well_formed<T, E: Display>(
    layer: &str,
    what: &str,
    parsed: std::result::Result<T, E>,
) -> Result<T> {
    match parsed {
        Ok(parsed) => Ok(parsed),
        Err(e) => bail!("{layer}: expected {what} of the saved state to be well-formed, got: {e}"),
    }
}

pub(crate) fn saved_length(layer: &str, what: &str, expected: usize, got: usize) -> Result<()> {
    if expected != got {
        bail!("{layer}: expected {expected} values of {what} in the saved state, got {got}")
    }
    Ok(())
}

/// A saved statistic in its range.
pub(crate) fn saved_value(
    layer: &str,
    what: &str,
    feature: &dyn Display,
    value: f64,
    holds: bool,
) -> Result<()> {
    if !holds {
        bail!("{layer}: expected a possible {what} of {feature} in the saved state, got {value}")
    }
    Ok(())
}

/// What a file operation said.
pub(crate) fn file<T, E: Display>(
    layer: &str,
    path: &Path,
    done: std::result::Result<T, E>,
) -> Result<T> {
    match done {
        Ok(done) => Ok(done),
        Err(e) => bail!(
            "{layer}: expected a whole safetensors file at {}, got: {e}",
            path.display()
        ),
    }
}

/// What writing a file said.
pub(crate) fn written<T, E: Display>(
    layer: &str,
    path: &Path,
    done: std::result::Result<T, E>,
) -> Result<T> {
    match done {
        Ok(done) => Ok(done),
        Err(e) => bail!(
            "{layer}: expected to write a safetensors file at {}, got: {e}; what was there before is as it was",
            path.display()
        ),
    }
}

/// A file that may be written over. `lost` is what it holds that would not be there any more.
pub(crate) fn nothing_lost(layer: &str, path: &Path, lost: Option<&str>) -> Result<()> {
    if let Some(lost) = lost {
        bail!(
            "{layer}: expected a file of this scaler alone at {}, or none, got one that also holds {lost:?}; add the scaler to it by Archive: read, replace, write",
            path.display()
        )
    }
    Ok(())
}

/// A part that a file does not have. `others` are the names of its tensors that belong to no part.
pub(crate) fn no_part<T>(
    layer: &str,
    prefix: &str,
    file: Option<&Path>,
    parts: &[String],
    others: &[String],
) -> Result<T> {
    const SHOWN: usize = 4;
    let file = file.map_or(String::new(), |file| format!(" {}", file.display()));
    let tensors = match others {
        [] => String::from("no other tensors"),
        few if few.len() <= SHOWN => format!("the tensors {few:?}"),
        all => {
            let (first, more) = (&all[..SHOWN], all.len() - SHOWN);
            format!("the tensors {first:?} and {more} more")
        }
    };
    let has = |part: &str| parts.iter().any(|p| p == part);
    let remedy = if parts.is_empty() {
        String::from(
            "its tensors are those of a model alone: add scalers by Archive::put, or save a Pipeline",
        )
    } else if has("pipeline") {
        String::from("it is the file of a Pipeline: read it by Pipeline::load")
    } else if has("scaler") {
        String::from("it is the file of a scaler: read it by scaling::load")
    } else {
        format!(
            "read one of its parts: Archive::read(file)?.state({:?})",
            parts[0]
        )
    };
    bail!(
        "{layer}: expected a part {prefix:?} in the file{file}, got the parts {parts:?} and {tensors}; {remedy}"
    )
}

/// A dtype that safetensors files are written of: candle holds others, which it cannot bring back
/// out.
pub(crate) fn writable(layer: &str, name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0 => bail!(
            "{layer}: expected tensors of a dtype that can be written, got {name:?} of {dtype:?}, which candle can only read; leave it in a file of its own"
        ),
        _ => Ok(()),
    }
}

/// A tensor of a file.
pub(crate) fn loaded<T, E: Display>(
    layer: &str,
    path: &Path,
    name: &str,
    dtype: impl std::fmt::Debug,
    loaded: std::result::Result<T, E>,
) -> Result<T> {
    match loaded {
        Ok(loaded) => Ok(loaded),
        Err(e) => bail!(
            "{layer}: expected tensors of a dtype that candle holds in {}, got {name:?} of {dtype:?}: {e}",
            path.display()
        ),
    }
}

/// A part of a pipeline that has been fitted before it is saved.
pub(crate) fn fitted_part(layer: &str, part: &str, kind: &str, fitted: bool) -> Result<()> {
    if !fitted {
        bail!(
            "{layer}: expected fitted {part}, got a {kind} without data; fit it to the training data before the pipeline is saved"
        )
    }
    Ok(())
}

/// A name that nothing in the file has yet.
pub(crate) fn free_name(layer: &str, name: &str, taken: bool) -> Result<()> {
    if taken {
        bail!(
            "{layer}: expected names that are not in use and do not begin with the prefix of a state, got {name:?} twice; choose another prefix"
        )
    }
    Ok(())
}

/// A kind that a state can be of.
pub(crate) fn known_kind<T>(kinds: &[&str], got: &str) -> Result<T> {
    let layer = "scaling";
    let remedy = match got {
        "DriftMonitor" | "LossBalancer" => format!("; call {got}::from_state"),
        "Pipeline" => String::from("; call Pipeline::load"),
        _ => String::new(),
    };
    bail!("{layer}: expected the state of one of {kinds:?}, got that of a {got:?}{remedy}")
}
