//! Checks of statistics, and of batches that have any.

use candle_core::{DType, Result, Tensor, bail};

use super::float;
use candle_norm_support::host;

/// A mean of one value is that value, and its unbiased variance is 0/0: nothing is learned and the
/// running statistics are lost.
pub(crate) fn more_than_one_value(layer: &str, values: usize, x: &Tensor) -> Result<()> {
    if values == 1 {
        bail!(
            "{layer}: expected more than 1 value per channel when training, got input size {:?}; \
            use a larger batch, frozen() statistics, or GroupNorm",
            x.dims()
        )
    }
    Ok(())
}

/// A running statistic as it comes from a checkpoint or a caller.
pub(crate) fn statistic(layer: &str, name: &str, value: &Tensor, non_negative: bool) -> Result<()> {
    float(layer, name, value)?;
    let values = host::vector::<f64>(&value.flatten_all()?.to_dtype(DType::F64)?)?;
    for (channel, v) in values.into_iter().enumerate() {
        if !v.is_finite() {
            bail!("{layer}: expected {name} to be finite, got {v} at channel {channel}")
        }
        if non_negative && v < 0. {
            bail!("{layer}: expected {name} to be at least 0, got {v} at channel {channel}")
        }
    }
    Ok(())
}

/// A number of batches as it comes from a checkpoint, which may have made a float of it.
pub(crate) fn counter(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    let count = host::scalar::<f64>(&value.to_dtype(DType::F64)?)?;
    if !(count >= 0. && count.fract() == 0.) {
        bail!("{layer}: expected {name} to be a whole number of at least 0, got {count}")
    }
    Ok(())
}
