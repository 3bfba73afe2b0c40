//! Distances between two samples of one feature.

use std::cmp::Ordering;

/// The greatest distance between the distribution functions of two samples, both ascending, neither
/// empty.
pub(super) fn ks_statistic(a: &[f64], b: &[f64]) -> f64 {
    let (mut i, mut j) = (0, 0);
    let mut greatest = 0i128;
    let (m, n) = (a.len() as i128, b.len() as i128);
    while i < a.len() && j < b.len() {
        let here = match a[i].total_cmp(&b[j]) {
            Ordering::Greater => b[j],
            _ => a[i],
        };
        while i < a.len() && a[i] <= here {
            i += 1;
        }
        while j < b.len() && b[j] <= here {
            j += 1;
        }
        // In whole numbers, so that equal distances are equal.
        greatest = greatest.max((i as i128 * n - j as i128 * m).abs());
    }
    greatest as f64 / (m * n) as f64
}

/// Up to this many pairs of values the p-value is exact.
const EXACT: usize = 1 << 20;

/// The probability that two samples of `m` and `n` values of one continuous distribution are at
/// least `statistic` apart.
///
/// Exact where `m · n` is at most 2²⁰; beyond, Kolmogorov's limit
/// `2 Σ (−1)ᵏ⁻¹ exp(−2 k² d² m n / (m + n))`.
pub(super) fn ks_p_value(statistic: f64, m: usize, n: usize) -> f64 {
    match m.saturating_mul(n) <= EXACT {
        true => exact_p_value(statistic, m, n),
        false => {
            let (m, n) = (m as f64, n as f64);
            kolmogorov(statistic * (m / (m + n) * n).sqrt())
        }
    }
}

/// The sample that the next value comes from is a draw without return, so that the orders of all
/// values are the paths of a walk over a grid of `m` by `n`. The probability is that of the walks
/// that leave the band `|i / m − j / n| < statistic`: a sum of positive terms, exact where it is
/// small too.
fn exact_p_value(statistic: f64, m: usize, n: usize) -> f64 {
    // The distance in units of 1 / (m n), which it is a whole number of.
    let limit = (statistic * m as f64 * n as f64).round() as i64;
    if limit <= 0 {
        return 1.;
    }
    let (mut outside, mut first) = (0., 0);
    // Of being at (i, j) without having left the band, for one i and all j.
    let mut here = vec![0.; n + 1];
    here[0] = 1.;
    for i in 0..=m {
        let mut next = vec![0.; n + 1];
        // No walk comes from below the band or gets beyond the first place above it.
        let start = first;
        for j in start..=n {
            let chance = here[j];
            let ahead = i as i64 * n as i64 - j as i64 * m as i64;
            if ahead.abs() >= limit {
                outside += chance;
                if ahead < 0 {
                    break;
                }
                first = j + 1;
                continue;
            }
            let (of_first, of_second) = ((m - i) as f64, (n - j) as f64);
            let left = of_first + of_second;
            if i < m {
                next[j] += chance * of_first / left;
            }
            if j < n {
                here[j + 1] += chance * of_second / left;
            }
        }
        here = next;
    }
    outside.min(1.)
}

/// The probability that Kolmogorov's limiting distribution exceeds `x`.
fn kolmogorov(x: f64) -> f64 {
    if x < 0.2 {
        // 1 to more places than a number has; the series converges too slowly there.
        return 1.;
    }
    let mut sum = 0.;
    let mut sign = 1.;
    for k in 1..=100 {
        let term = (-2. * (k as f64 * x).powi(2)).exp();
        sum += sign * term;
        if term < 1e-18 * sum {
            break;
        }
        sign = -sign;
    }
    (2. * sum).clamp(0., 1.)
}

/// Stand-in for a share of zero in the population stability index.
pub(super) const EMPTY_SHARE: f64 = 1e-4;

/// The population stability index `Σ (pᵢ − qᵢ) · ln(pᵢ / qᵢ)` of counts in the same bins; shares of
/// zero count as 10⁻⁴.
pub(super) fn population_stability(reference: &[u64], recent: &[u64]) -> f64 {
    let shares = |counts: &[u64]| -> Vec<f64> {
        let total = counts.iter().sum::<u64>() as f64;
        let share = |&count: &u64| match count {
            0 => EMPTY_SHARE,
            count => count as f64 / total,
        };
        counts.iter().map(share).collect()
    };
    let pairs = shares(reference).into_iter().zip(shares(recent));
    pairs.map(|(p, q)| (p - q) * (p / q).ln()).sum()
}

/// The inner edges of `bins` bins that hold about as many values each: quantiles of ascending
/// values, by linear interpolation. Edges that fall together are one.
pub(super) fn quantile_edges(ascending: &[f64], bins: usize) -> Vec<f64> {
    let last = ascending.len() - 1;
    let quantile = |k: usize| {
        let position = last as f64 * k as f64 / bins as f64;
        let below = position.floor() as usize;
        let (low, high) = (ascending[below], ascending[(below + 1).min(last)]);
        low + (high - low) * (position - below as f64)
    };
    let mut edges: Vec<f64> = (1..bins).map(quantile).collect();
    edges.dedup();
    edges
}

/// The bin of a value: an edge belongs to the bin above it.
pub(super) fn bin(edges: &[f64], value: f64) -> usize {
    edges.partition_point(|edge| *edge <= value)
}
