//! Messages about data and their features.

use std::collections::HashMap;
use std::fmt::Display;

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

/// The number of elements of axes, which a file may claim to be any.
pub(crate) fn feature_count(axes: &[usize]) -> usize {
    let product = |count: usize, axis: &usize| count.saturating_mul(*axis);
    axes.iter().fold(1, product)
}

/// The trailing axes of data against those of the features. `first` is the first feature that one
/// of them lacks.
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

/// As many names as features. `first` is the first feature that has no name, or the first name that
/// has no feature.
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
            "{layer}: expected data without NaN, got one in sample {row} of {feature}; set nan to \
            Nan::Ignore or leave the sample out"
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
            "{layer}: expected statistics of {feature} that {dtype:?} can hold, got {value}; \
            {remedy}"
        )
    }
    Ok(())
}

/// One weight for each sample.
pub(crate) fn weight_per_sample(layer: &str, samples: usize, weights: &Tensor) -> Result<()> {
    if weights.dims() != [samples] {
        bail!(
            "{layer}: expected one weight for each of the {samples} samples, got sample_weight of \
            shape {:?}",
            weights.dims()
        )
    }
    Ok(())
}

pub(crate) fn usable_weight(layer: &str, sample: usize, weight: f64) -> Result<()> {
    if !(weight.is_finite() && weight >= 0.) {
        bail!(
            "{layer}: expected a sample_weight of 0 or more that is finite, got {weight} for \
            sample {sample}"
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
        "{layer}: expected samples that count alike, got sample_weight; {remedy}, or take \
        StandardScaler, which knows weights"
    )
}
