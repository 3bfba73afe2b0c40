//! Whether scaled data can be held in `f16`.

use std::fmt;

use candle_core::{DType, Device, Result, Tensor};

use super::check;
use super::moments::columns;
use super::{Moments, Scaler};

/// The largest number of `f16`. What lies above it and below 65 520 is rounded to it, and from
/// there on to infinity.
const LARGEST: f64 = 65504.;

/// The least number of `f16` that has all of its 11 bits.
const LEAST: f64 = 1. / 16384.;

/// The distance of neighbors among the `f16` from 1 to 2.
const STEP: f64 = 1. / 1024.;

/// Reason why `f16` cannot hold a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HalfProblem {
    /// A value is beyond ±65 504, the largest number of `f16`; from 65 520 on it becomes infinite.
    Overflow,
    /// The standard deviation is below 2⁻¹⁴, where `f16` runs out of bits; below 2⁻²⁵ values become
    /// zero.
    Underflow,
    /// The standard deviation is below the distance of neighboring `f16` at the largest value: what
    /// tells samples apart is rounded away.
    Resolution,
}

/// A feature that leaves the range or the resolution of `f16` after scaling.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HalfFinding {
    /// The index of the feature.
    pub feature: usize,
    /// Label in messages.
    pub label: String,
    /// The problem.
    pub problem: HalfProblem,
    /// The largest absolute value of the scaled feature.
    pub largest: f64,
    /// Its standard deviation.
    pub spread: f64,
    /// The power of two nearest to 1 that the scaled feature can be multiplied with to fit; none
    /// where no factor helps, but a center would.
    pub scale: Option<f64>,
}

impl fmt::Display for HalfFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            label,
            largest,
            spread,
            ..
        } = self;
        match self.problem {
            HalfProblem::Overflow => write!(f, "{label} reaches {largest:.4e}, f16 ends at 65504")?,
            HalfProblem::Underflow => write!(
                f,
                "{label} varies by {spread:.4e}, f16 loses bits below {LEAST:.2e}"
            )?,
            HalfProblem::Resolution => write!(
                f,
                "{label} varies by {spread:.4e} at {largest:.4e}, where f16 are {:.2e} apart",
                power_below(*largest) * STEP
            )?,
        }
        match self.scale {
            Some(scale) => write!(f, "; multiply it by {scale}, a power of two"),
            None => write!(f, "; subtract a center, no factor helps"),
        }
    }
}

/// The features of `x` that leave the range or the resolution of `f16` once `scaler` has scaled
/// them. Empty where all fit.
///
/// # Errors
/// As [`Scaler::transform`]; no samples.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{HalfProblem, MaxAbsScaler, Scaler, StandardScaler, half_precision};
///
/// // A day in 2024, in seconds since 1970: divided by the largest, all are 1 to three digits.
/// let seconds = Tensor::new(&[1_704_067_200f64, 1_704_110_400., 1_704_153_599.], &Device::Cpu)?;
/// let (by_size, by_spread) = (MaxAbsScaler::default(), StandardScaler::default());
/// by_size.fit(&seconds)?;
/// by_spread.fit(&seconds)?;
/// let findings = half_precision(&by_size, &seconds)?;
/// assert_eq!((findings[0].problem, findings[0].scale), (HalfProblem::Resolution, None));
/// assert!(half_precision(&by_spread, &seconds)?.is_empty());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn half_precision(scaler: &dyn Scaler, x: &Tensor) -> Result<Vec<HalfFinding>> {
    check::samples(scaler.kind(), x)?;
    let x = x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    // Features and data of one state of the scaler, also while other threads feed it.
    let scaler = scaler.snapshot();
    let (y, features) = (scaler.transform(&x)?, scaler.features());
    let width = y.dims()[1..].iter().product();
    let mut found = vec![(Moments::default(), 0f64); width];
    columns(&y, |feature, values| {
        let numbers: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
        let (moments, largest) = &mut found[feature];
        *moments = moments.merge(Moments::of_values(&numbers));
        *largest = numbers.iter().fold(*largest, |l, v| l.max(v.abs()));
        Ok(())
    })?;
    let findings = found.into_iter().enumerate();
    let findings = findings.filter_map(|(feature, (moments, largest))| {
        let spread = moments.var().sqrt();
        let problem = problem(largest, spread)?;
        Some(HalfFinding {
            feature,
            label: features.label(feature).to_string(),
            problem,
            largest,
            spread,
            scale: remedy(largest, spread),
        })
    });
    Ok(findings.collect())
}

fn problem(largest: f64, spread: f64) -> Option<HalfProblem> {
    if largest > LARGEST {
        Some(HalfProblem::Overflow)
    } else if !varies(spread) {
        None
    } else if spread < power_below(largest) * STEP {
        Some(HalfProblem::Resolution)
    } else if spread < LEAST {
        Some(HalfProblem::Underflow)
    } else {
        None
    }
}

/// A feature that does not vary has nothing to lose but its range.
fn varies(spread: f64) -> bool {
    spread > 0.
}

/// The power of two nearest to 1 that leaves no problem.
fn remedy(largest: f64, spread: f64) -> Option<f64> {
    let scales = (1..=1022).flat_map(|exponent| [2f64.powi(-exponent), 2f64.powi(exponent)]);
    scales
        .into_iter()
        .find(|scale| problem(largest * scale, spread * scale).is_none())
}

/// The greatest power of two that is not above `v`.
fn power_below(v: f64) -> f64 {
    f64::from_bits(v.to_bits() & (0x7ff << 52))
}
