//! Statistics that elements are normalized by.

use super::moments::{Mean, Moments, about_mean};
use super::simd::{Elem, Isa, Real};

/// Statistics that a row, group or channel is normalized by.
#[derive(Debug, Clone, Copy)]
pub struct Stats {
    /// The mean; zero where it is not subtracted.
    pub mean: Mean,
    /// The biased variance; the mean square where the mean is not subtracted.
    pub var: f64,
    /// `1 / √(var + ε)`.
    pub inv_std: f64,
}

impl Stats {
    pub(crate) const NONE: Self = Self {
        mean: Mean { high: 0., low: 0. },
        var: 0.,
        inv_std: 0.,
    };

    /// Those that leave elements as they are.
    pub(crate) const IDENTITY: Self = Self {
        var: 1.,
        inv_std: 1.,
        ..Self::NONE
    };

    /// Those of a mean and a biased variance.
    #[inline(always)]
    pub fn new(mean: Mean, var: f64, eps: f64) -> Self {
        Self {
            mean,
            var,
            inv_std: 1. / (var + eps).sqrt(),
        }
    }

    /// Those of a row: about its mean, or about zero if it is not `center`ed.
    #[inline(always)]
    pub(crate) fn of_row<E: Elem, I: Isa>(isa: I, x: &[E], center: bool, eps: f64) -> Self {
        let moments = match center {
            true => Moments::of(isa, x),
            false => Moments::of_squares(isa, x),
        };
        Self::new(moments.mean, moments.var(), eps)
    }

    /// Those of each of some moments.
    pub(crate) fn of_moments(moments: &[Moments], eps: f64) -> Vec<Self> {
        let stats = moments.iter().map(
            #[inline(always)]
            |m| Self::new(m.mean, m.var(), eps),
        );
        stats.collect()
    }

    /// `Σ w · x̂` from `Σ w · (x − high)` and `Σ w`.
    #[inline(always)]
    pub(crate) fn along<T: Real>(self, [about_high, sum]: [f64; 2]) -> f64 {
        about_mean::<T>(self.mean, about_high, sum) * self.inv_std
    }
}

/// Where the statistics of the channels of a batch come from.
#[derive(Debug, Clone, Copy)]
pub enum Statistics<'a> {
    /// The batch, those of each channel, about their means or about zero.
    Own {
        /// Subtract the mean.
        center: bool,
        /// Added to the variance.
        eps: f64,
    },
    /// The caller, one for each channel.
    Given(&'a [Stats]),
}
