//! How data get to a scaler: checked, feature by feature, in `f64`.

use std::fmt;
use std::str::FromStr;

use candle_core::{Result, Tensor};

use super::{Features, Moments, Seen};
use crate::ops::{self, check};

/// What becomes of NaN in data that a scaler is fitted to. In data that it transforms, NaN stays NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
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
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "ignore" => Ok(Self::Ignore),
            _ => Err(format!("{text:?} is neither refuse nor ignore")),
        }
    }
}

/// The moments of values. Where they do not vary, rounding may leave squared distances just below zero, which a file would be refused for.
pub(super) fn moments_of(values: &[f64]) -> Moments {
    let moments = Moments::of_values(values);
    let (count, mean, error) = (moments.count(), moments.mean(), moments.mean_error());
    match moments.m2() < 0. {
        true => Moments::from_parts(count, mean, error, 0.),
        false => moments,
    }
}

/// Calls `take(feature, values)` with the values of each feature of `x` that are numbers, in blocks of samples; returns what was seen.
pub(super) fn each_feature(
    layer: &str,
    features: &Features,
    nan: Nan,
    x: &Tensor,
    mut take: impl FnMut(usize, &[f64]) -> Result<()>,
) -> Result<Vec<Seen>> {
    check::scaling::samples(layer, x)?;
    let mut seen = vec![Seen::default(); features.count()];
    let mut numbers = vec![];
    ops::columns(x, |feature, values| {
        let before = seen[feature];
        let count = values.len() as u64;
        for (i, &value) in values.iter().enumerate() {
            if value.is_infinite() || (value.is_nan() && nan == Nan::Refuse) {
                let row = (before.values + before.nan) as usize + i;
                check::scaling::usable(layer, &features.label(feature), row, value)?;
            }
        }
        let values = match values.iter().any(|v| v.is_nan()) {
            false => values,
            true => {
                numbers.clear();
                numbers.extend(values.iter().filter(|v| !v.is_nan()));
                &numbers
            }
        };
        let numbers = values.len() as u64;
        seen[feature] = before.plus(Seen {
            values: numbers,
            nan: count - numbers,
        });
        take(feature, values)
    })?;
    Ok(seen)
}
