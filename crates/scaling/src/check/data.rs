//! Messages about data and their features.

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

/// Weights of samples, where a scaler has no use for them.
pub(crate) fn no_weights<T>(layer: &str, remedy: &str) -> Result<T> {
    bail!(
        "{layer}: expected samples that count alike, got sample_weight; {remedy}, or take \
        StandardScaler, which knows weights"
    )
}
