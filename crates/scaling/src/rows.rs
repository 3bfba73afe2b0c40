//! Rows of series, and the range of their values.

use std::fmt::Display;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{Features, Moments, Nan, Seen, State, check};

/// Bound of values: the squares of 2⁵³ values below it have a finite sum.
const LARGEST: f64 = f64::from_bits((1023 + 484) << 52);

/// No variance of such values is larger.
pub(super) const LARGEST_VAR: f64 = 16. * LARGEST * LARGEST;

/// Saved moments, if they are those of values that a series may have. Their mean square is an
/// average of squares, and so stays where it is allowed to be whatever is merged to them.
pub(super) fn of_series(state: &State, feature: usize, moments: Moments) -> Result<Moments> {
    let label = state.features().label(feature);
    let (count, mean, m2) = (moments.count(), moments.mean(), moments.m2());
    let error = moments.mean_error();
    let square = if count > 0. { m2 / count } else { m2 } + mean * mean;
    for (what, value, holds) in [
        ("mean", mean, mean.abs() <= 2. * LARGEST),
        ("mean_error", error, error.abs() <= LARGEST),
        ("m2", m2, square <= 4. * LARGEST * LARGEST),
    ] {
        check::saved_value(state.kind(), what, &label, value, holds)?;
    }
    Ok(moments)
}

/// Rows of a series, checked.
pub(super) struct SeriesRows {
    /// One row after the other.
    pub(super) values: Vec<f64>,
    /// Counts of each feature.
    pub(super) seen: Vec<Seen>,
}

impl SeriesRows {
    /// The rows of `x`, which has the features.
    pub(super) fn of(layer: &str, features: &Features, nan: Nan, x: &Tensor) -> Result<Self> {
        check::samples(layer, x)?;
        let wide = x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let values = wide.flatten_all()?.to_vec1::<f64>()?;
        let mut seen = vec![Seen::default(); features.count()];
        for (i, &value) in values.iter().enumerate() {
            let (row, feature) = (i / seen.len(), i % seen.len());
            if value.is_infinite() || (value.is_nan() && nan == Nan::Refuse) {
                check::usable(layer, &features.label(feature), row, value)?;
            }
            if value.abs() > LARGEST {
                summable(layer, &features.label(feature), row, value, LARGEST)?;
            }
            match value.is_nan() {
                true => seen[feature].nan += 1,
                false => seen[feature].values += 1,
            }
        }
        Ok(Self { values, seen })
    }

    /// One row after the other.
    pub(super) fn each(&self) -> impl Iterator<Item = &[f64]> {
        // There is a feature where there are values.
        self.values.chunks(self.seen.len().max(1))
    }
}

/// A value whose squares can be summed.
fn summable(
    layer: &str,
    feature: &dyn Display,
    row: usize,
    value: f64,
    largest: f64,
) -> Result<()> {
    if value.abs() > largest {
        bail!(
            "{layer}: expected values of at most {largest:.2e}, whose squares can be summed, got \
            {value:e} in sample {row} of {feature}; take a larger unit"
        )
    }
    Ok(())
}
