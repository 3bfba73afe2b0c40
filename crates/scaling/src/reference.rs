//! The reference that recent values are compared with.

use super::drift::DriftReport;
use super::two_samples::{bin, ks_p_value, ks_statistic, population_stability, quantile_edges};
use super::{Moments, Seen};

/// The fewest values that have a variance.
pub(super) const LEAST_VALUES: usize = 2;

/// The values of a feature that are numbers, ascending.
pub(super) fn ascending(values: &[f64], feature: usize, features: usize) -> Vec<f64> {
    let column = values.iter().skip(feature).step_by(features);
    let mut numbers: Vec<f64> = column.copied().filter(|v| !v.is_nan()).collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

/// Columns as rows, one after the other, the last value of each in the last. A column with fewer
/// values than another has NaN before them.
pub(super) fn aligned(columns: &[Vec<f64>]) -> Vec<f64> {
    let features = columns.len();
    let rows = columns.iter().map(Vec::len).max().unwrap_or(0);
    let mut values = vec![f64::NAN; rows * features];
    for (feature, column) in columns.iter().enumerate() {
        let first = rows - column.len();
        for (row, value) in column.iter().enumerate() {
            values[(first + row) * features + feature] = *value;
        }
    }
    values
}

fn counts(edges: &[f64], values: &[f64]) -> Vec<u64> {
    let mut counts = vec![0; edges.len() + 1];
    for value in values {
        counts[bin(edges, *value)] += 1;
    }
    counts
}

/// `a / b`, and `same` where both are 0.
fn ratio(a: f64, b: f64, same: f64) -> f64 {
    match a == 0. && b == 0. {
        true => same,
        false => a / b,
    }
}

/// The mean and the variance of values, and how much their squared distances from the mean differ
/// among themselves.
#[derive(Debug, Clone, Copy)]
struct Spread {
    moments: Moments,
    /// 0 where it is below the resolution of an `f64` at the mean.
    var: f64,
    /// The kurtosis less 1: the variance of the squared distances in units of the squared variance.
    /// 0 where nothing varies.
    excess: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let moments = Moments::of_values(values);
        let (mean, error, std) = (moments.mean(), moments.mean_error(), moments.var().sqrt());
        let varies = std > f64::EPSILON * mean.abs();
        // In standard deviations, whose fourth powers no value takes beyond `f64`.
        let square = |v: &f64| ((v - mean - error) / std).powi(2);
        let excess = || {
            let squares: Vec<f64> = values.iter().map(square).collect();
            Moments::of_values(&squares).var()
        };
        Self {
            moments,
            var: if varies { moments.var() } else { 0. },
            excess: if varies { excess() } else { 0. },
        }
    }

    /// The mean of `now` less this one; 0 where both are constants that rounding alone tells apart.
    fn shift(&self, now: &Self) -> f64 {
        let (a, b) = (now.moments, self.moments);
        let shift = (a.mean() - b.mean()) + (a.mean_error() - b.mean_error());
        let rounding = f64::EPSILON * a.mean().abs().max(b.mean().abs());
        match self.var == 0. && now.var == 0. && shift.abs() <= rounding {
            true => 0.,
            false => shift,
        }
    }

    /// The distance of the means, and that of the variances, to `now`: each in its standard error,
    /// by what both sets of values have of it together.
    fn distances(&self, now: &Self) -> [f64; 2] {
        let scale = self.var.max(now.var).sqrt();
        if scale == 0. {
            return [ratio(self.shift(now), 0., 0.), 0.];
        }
        let part = |of: &Self| (of.var.sqrt() / scale).powi(2);
        let (then, later) = (part(self), part(now));
        let (m, n) = (self.moments.count(), now.moments.count());
        let error = |of_then: f64, of_later: f64| {
            let pooled = (of_then * m + of_later * n) / (m + n);
            (pooled * (1. / m + 1. / n)).sqrt()
        };
        let of_squares = error(then * then * self.excess, later * later * now.excess);
        [
            self.shift(now) / scale / error(then, later),
            ratio(later - then, of_squares, 0.),
        ]
    }
}

/// One feature of the reference.
#[derive(Debug)]
pub(super) struct Column {
    ascending: Vec<f64>,
    spread: Spread,
    /// The bins of the population stability index, and how many values are in each.
    edges: Vec<f64>,
    counts: Vec<u64>,
}

impl Column {
    pub(super) fn new(ascending: Vec<f64>, bins: usize) -> Self {
        let edges = quantile_edges(&ascending, bins);
        Self {
            spread: Spread::of(&ascending),
            counts: counts(&edges, &ascending),
            edges,
            ascending,
        }
    }

    /// All metrics of `recent`, ascending and not empty, against this.
    pub(super) fn compare(&self, recent: &[f64], feature: usize, name: String) -> DriftReport {
        let (then, now) = (self.spread, Spread::of(recent));
        let [mean_z, variance_z] = then.distances(&now);
        let ks_statistic = ks_statistic(&self.ascending, recent);
        DriftReport {
            feature,
            name,
            reference: self.ascending.len() as u64,
            recent: recent.len() as u64,
            mean_shift: ratio(then.shift(&now), then.var.sqrt(), 0.),
            mean_z,
            variance_ratio: ratio(now.var, then.var, 1.),
            variance_z,
            population_stability: population_stability(&self.counts, &counts(&self.edges, recent)),
            ks_statistic,
            ks_p_value: ks_p_value(ks_statistic, self.ascending.len(), recent.len()),
        }
    }
}

/// Rows, one after the other, and what each feature says of them.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) values: Vec<f64>,
    pub(super) columns: Vec<Column>,
    pub(super) seen: Vec<Seen>,
}
