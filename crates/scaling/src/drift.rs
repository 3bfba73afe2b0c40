//! Drift: metrics, events, reports and options.

use std::fmt;

use super::Nan;

/// A way to tell two samples of a feature apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DriftMetric {
    /// The distance of the means, in standard deviations of the reference.
    MeanShift,
    /// The variance of the recent values over that of the reference.
    VarianceRatio,
    /// The population stability index.
    PopulationStability,
    /// The p-value of the two-sample Kolmogorov–Smirnov test.
    KolmogorovSmirnov,
}

impl fmt::Display for DriftMetric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MeanShift => "mean shift",
            Self::VarianceRatio => "variance ratio",
            Self::PopulationStability => "population stability index",
            Self::KolmogorovSmirnov => "Kolmogorov–Smirnov p-value",
        })
    }
}

/// A metric of a feature has crossed its threshold.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DriftEvent {
    /// Number of rows observed, the last of them included.
    pub step: u64,
    /// The feature, counted along the trailing axes of data.
    pub feature: usize,
    /// Label in messages, with the name if there is one.
    pub name: String,
    /// The metric that crossed its threshold.
    pub metric: DriftMetric,
    /// Its value: above the threshold; for the variance ratio, outside of `1/threshold` to
    /// `threshold`; for the p-value, below it.
    pub value: f64,
    /// The threshold.
    pub threshold: f64,
}

impl fmt::Display for DriftEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            name,
            metric,
            value,
            threshold,
            ..
        } = self;
        write!(
            f,
            "step {step}: {name}: {metric} {value:.3e}, threshold {threshold}"
        )
    }
}

/// All metrics of a feature.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DriftReport {
    /// The feature, counted along the trailing axes of data.
    pub feature: usize,
    /// Label in messages, with the name if there is one.
    pub name: String,
    /// The number of values of the reference.
    pub reference: u64,
    /// The number of recent values.
    pub recent: u64,
    /// (recent mean − reference mean) / reference standard deviation, biased. Infinite where a
    /// constant changed.
    pub mean_shift: f64,
    /// (recent mean − reference mean) in standard errors of it.
    pub mean_z: f64,
    /// Recent variance / reference variance, biased. 1 where both are 0.
    pub variance_ratio: f64,
    /// (recent variance − reference variance) in standard errors of it, which the kurtosis sets.
    pub variance_z: f64,
    /// `Σ (pᵢ − qᵢ) ln(pᵢ / qᵢ)`.
    pub population_stability: f64,
    /// The greatest distance between the distribution functions.
    pub ks_statistic: f64,
    /// The probability of a distance as great, where nothing has changed and values are
    /// independent.
    pub ks_p_value: f64,
}

/// Options of a [`DriftMonitor`](super::DriftMonitor). A threshold of `None` leaves its metric out
/// of the events; reports have all.
///
/// Metrics are looked at again and again, and values of a series are not independent: so the
/// thresholds are far from what one look at independent values would need. Mean and variance must
/// also have moved by more than five standard errors, so that neither a heavy tail nor a short
/// window or reference is taken for a change. The threshold of the population stability index is
/// for windows as long as the default: where nothing changes, the index is about
/// `(bins − 1) · (1/n + 1/m)`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct DriftOptions {
    /// Number of recent values of a feature. Default 200.
    pub window: usize,
    /// Recent values of a feature below which nothing is said of it. Default 200.
    pub min_count: usize,
    /// Metrics are formed each so many rows. Default 10.
    pub check_every: usize,
    /// Rows after an event in which there is none of the same feature. Default 200.
    pub cool_down: usize,
    /// The number of bins of the population stability index, from 2 to 10 000, and the fewest
    /// values that `fit` takes. Default 10.
    pub bins: usize,
    /// Threshold of the absolute mean shift. Default 0.5.
    pub mean_shift: Option<f64>,
    /// Above 1; the ratio may leave `1/threshold` to `threshold` on either side. Default 1.5.
    pub variance_ratio: Option<f64>,
    /// Default 0.25, by usage a large change.
    pub population_stability: Option<f64>,
    /// Threshold of the p-value. Default 1e-6.
    pub ks_p_value: Option<f64>,
    /// Treatment of NaN: refused, or left out, so that it takes no place in the window. Default:
    /// refused.
    pub nan: Nan,
}

impl Default for DriftOptions {
    fn default() -> Self {
        Self {
            window: 200,
            min_count: 200,
            check_every: 10,
            cool_down: 200,
            bins: 10,
            mean_shift: Some(0.5),
            variance_ratio: Some(1.5),
            population_stability: Some(0.25),
            ks_p_value: Some(1e-6),
            nan: Nan::default(),
        }
    }
}
