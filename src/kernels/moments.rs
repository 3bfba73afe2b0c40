//! Mean and variance, in two passes over a run that stays in cache; runs are merged as Chan, Golub and LeVeque do.

use super::simd::{Elem, Isa, Lanes, Real};
use super::span::{RUN, sums};

/// How many values, their mean, and the sum of their squared distances from it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Moments {
    pub(crate) count: f64,
    pub(crate) mean: f64,
    pub(crate) m2: f64,
}

impl Moments {
    /// The moments of `x`.
    #[inline(always)]
    pub(crate) fn of<E: Elem, I: Isa>(isa: I, x: &[E]) -> Self {
        let mut all = Self::default();
        for run in x.chunks(RUN) {
            all = all.merge(Self::of_run(isa, run));
        }
        all
    }

    /// The mean of a run is first rounded to the accumulator: distances from a number of that precision are exact where it
    /// matters, and what they leave of the mean is added in `f64`.
    #[inline(always)]
    fn of_run<E: Elem, I: Isa>(isa: I, x: &[E]) -> Self {
        let count = x.len() as f64;
        let [sum] = sums(isa, x, |v| [v]);
        let shift = E::Acc::from_wide(sum / count);
        let about = Lanes::splat(shift);
        let [first, second] = sums(isa, x, |v| {
            let d = v - about;
            [d, d * d]
        });
        let rest = first / count;
        Self {
            count,
            mean: shift.wide() + rest,
            m2: second - first * rest,
        }
    }

    /// The moments of both.
    #[inline(always)]
    pub(crate) fn merge(self, other: Self) -> Self {
        if self.count == 0. {
            return other;
        }
        let count = self.count + other.count;
        let distance = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + distance * (other.count / count),
            m2: self.m2 + other.m2 + distance * distance * (self.count * other.count / count),
        }
    }

    /// The biased variance.
    #[inline(always)]
    pub(crate) fn var(self) -> f64 {
        let var = self.m2 / self.count;
        // Not `max`, which would make 0 of a NaN.
        if var < 0. { 0. } else { var }
    }
}

/// A mean to twice the precision of the accumulator, to be taken off in two steps: the first is exact for values near it.
#[derive(Clone, Copy)]
pub(crate) struct Center<T> {
    high: Lanes<T>,
    low: Lanes<T>,
}

impl<T: Real> Center<T> {
    #[inline(always)]
    pub(crate) fn new(mean: f64) -> Self {
        let high = T::from_wide(mean);
        Self {
            high: Lanes::splat(high),
            low: Lanes::splat(T::from_wide(mean - high.wide())),
        }
    }

    #[inline(always)]
    pub(crate) fn distance(self, v: Lanes<T>) -> Lanes<T> {
        (v - self.high) - self.low
    }
}
