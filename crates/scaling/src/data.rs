//! Data on their way to a scaler: checked, feature by feature, in `f64`.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::check;
use super::moments::columns;
use super::{Features, Moments, ParseOptionError, Seen};

/// Treatment of NaN in data that a scaler is fitted to. In data that it transforms, NaN stays NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Nan {
    /// An error that names the sample and the feature.
    #[default]
    Refuse,
    /// Left out and counted, as scikit-learn does; other values of the same sample are taken.
    Ignore,
}

impl fmt::Display for Nan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refuse => "refuse",
            Self::Ignore => "ignore",
        })
    }
}

impl FromStr for Nan {
    type Err = ParseOptionError;

    fn from_str(text: &str) -> std::result::Result<Self, ParseOptionError> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "ignore" => Ok(Self::Ignore),
            _ => Err(ParseOptionError::new(text, "refuse nor ignore")),
        }
    }
}

/// The moments of values. Where they do not vary, rounding may leave squared distances just below
/// zero, which a file would be refused for.
pub(super) fn moments_of(values: &[f64]) -> Moments {
    let moments = Moments::of_values(values);
    let (count, mean, error) = (moments.count(), moments.mean(), moments.mean_error());
    match moments.m2() < 0. {
        true => Moments::from_parts(count, mean, error, 0.),
        false => moments,
    }
}

/// The weights of the samples of `x`.
pub(super) fn sample_weights(layer: &str, x: &Tensor, weights: &Tensor) -> Result<Vec<f64>> {
    weight_per_sample(layer, x.dims()[0], weights)?;
    let weights = weights.detach().to_device(&Device::Cpu)?;
    let weights = weights.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    for (sample, weight) in weights.iter().enumerate() {
        usable_weight(layer, sample, *weight)?;
    }
    let sum = weights.iter().sum();
    some_weight(layer, sum)?;
    Ok(weights)
}

/// The moments of values that count by their weights, in the unit of which the count is. Blocks are
/// short, so that sums lose nothing.
pub(super) fn weighted_moments(values: &[f64], weights: &[f64]) -> Moments {
    const BLOCK: usize = 256;
    let blocks = values.chunks(BLOCK).zip(weights.chunks(BLOCK));
    blocks.fold(Moments::default(), |all, (values, weights)| {
        let weight: f64 = weights.iter().sum();
        let pairs = || values.iter().zip(weights);
        let about = pairs().map(|(v, w)| v * (w / weight)).sum::<f64>();
        let rest = pairs()
            .map(|(v, w)| (v - about) * (w / weight))
            .sum::<f64>();
        let mean = about + rest;
        let m2 = pairs().map(|(v, w)| w * ((v - about) - rest).powi(2)).sum();
        // What the sum was rounded by.
        let error = rest - (mean - about);
        all.merge(Moments::from_parts(weight, mean, error, m2))
    })
}

/// Calls `take(feature, values, weights)` with the values of each feature of `x` that are numbers,
/// in blocks of samples, and with the weights of their samples if there are weights; returns what
/// was seen. A sample without weight counts as none.
pub(super) fn each_feature(
    layer: &str,
    features: &Features,
    nan: Nan,
    x: &Tensor,
    weights: Option<&[f64]>,
    mut take: impl FnMut(usize, &[f64], Option<&[f64]>) -> Result<()>,
) -> Result<Vec<Seen>> {
    check::samples(layer, x)?;
    let mut seen = vec![Seen::default(); features.count()];
    // Of each feature, the samples that were taken.
    let mut rows = vec![0; features.count()];
    let (mut numbers, mut their_weights) = (vec![], vec![]);
    columns(x, |feature, values| {
        let first = rows[feature];
        rows[feature] += values.len();
        let weights = weights.map(|all| &all[first..first + values.len()]);
        let counts = |i: usize| weights.is_none_or(|weights| weights[i] > 0.);
        let mut missing = 0;
        for (i, &value) in values.iter().enumerate().filter(|(i, _)| counts(*i)) {
            if value.is_infinite() || (value.is_nan() && nan == Nan::Refuse) {
                check::usable(layer, &features.label(feature), first + i, value)?;
            }
            missing += u64::from(value.is_nan());
        }
        let taken = |i: &usize| counts(*i) && !values[*i].is_nan();
        let values = match weights.is_none() && missing == 0 {
            true => values,
            false => {
                numbers.clear();
                numbers.extend((0..values.len()).filter(taken).map(|i| values[i]));
                &numbers
            }
        };
        let weights = weights.map(|weights| {
            their_weights.clear();
            their_weights.extend((0..weights.len()).filter(taken).map(|i| weights[i]));
            &their_weights[..]
        });
        seen[feature] = seen[feature].plus(Seen {
            values: values.len() as u64,
            nan: missing,
        });
        take(feature, values, weights)
    })?;
    Ok(seen)
}

/// One weight for each sample.
fn weight_per_sample(layer: &str, samples: usize, weights: &Tensor) -> Result<()> {
    if weights.dims() != [samples] {
        bail!(
            "{layer}: expected one weight for each of the {samples} samples, got sample_weight of \
            shape {:?}",
            weights.dims()
        )
    }
    Ok(())
}

fn usable_weight(layer: &str, sample: usize, weight: f64) -> Result<()> {
    if !(weight.is_finite() && weight >= 0.) {
        bail!(
            "{layer}: expected a sample_weight of 0 or more that is finite, got {weight} for \
            sample {sample}"
        )
    }
    Ok(())
}

/// Weights of which one at least counts.
fn some_weight(layer: &str, sum: f64) -> Result<()> {
    if !(sum > 0. && sum.is_finite()) {
        bail!("{layer}: expected a sample_weight with a sum above 0 and finite, got {sum}")
    }
    Ok(())
}
