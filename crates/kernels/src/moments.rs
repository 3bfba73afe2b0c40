//! Mean and variance, in two passes over a run that stays in cache; runs are merged as Chan, Golub
//! and LeVeque do.

use super::loops::{RUN, run_sums, sums};
use super::simd::{Elem, Isa, Lanes, Real, splat};

/// A mean in two numbers, of which the second is what the first was rounded by: twice the precision
/// of `f64`, and so of every accumulator.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mean {
    /// The mean, rounded.
    pub high: f64,
    /// Remainder beside `high`.
    pub low: f64,
}

impl Mean {
    /// `a + b`, exactly (Knuth's two-sum).
    #[inline(always)]
    pub(crate) fn sum(a: f64, b: f64) -> Self {
        let high = a + b;
        let back = high - a;
        Self {
            high,
            low: (a - (high - back)) + (b - back),
        }
    }

    /// This and `distance`, which is small beside it.
    #[inline(always)]
    fn plus(self, distance: f64) -> Self {
        Self::sum(self.high, self.low + distance)
    }

    #[inline(always)]
    fn minus(self, other: Self) -> f64 {
        (self.high - other.high) + (self.low - other.low)
    }
}

impl From<f64> for Mean {
    fn from(high: f64) -> Self {
        Self { high, low: 0. }
    }
}

/// How many values, their mean, and the sum of their squared distances from it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moments {
    pub(crate) count: f64,
    pub(crate) mean: Mean,
    pub(crate) m2: f64,
}

impl Moments {
    /// The moments of a slice of any length.
    #[inline(always)]
    pub(crate) fn of<E: Elem, I: Isa>(isa: I, x: &[E]) -> Self {
        let mut all = Self::default();
        for run in x.chunks(RUN) {
            all = all.merge(Self::of_run(isa, run.len(), || std::iter::once(run)));
        }
        all
    }

    /// The moments about zero of a slice of any length: the variance is then the mean square.
    #[inline(always)]
    pub(crate) fn of_squares<E: Elem, I: Isa>(isa: I, x: &[E]) -> Self {
        let [m2] = sums(
            isa,
            x,
            #[inline(always)]
            |v| [v * v],
        );
        Self {
            count: x.len() as f64,
            mean: Mean::default(),
            m2,
        }
    }

    /// The moments of slices of together `count` elements, about [`RUN`] of them.
    ///
    /// Their mean is first rounded to the accumulator: distances from a number of that precision
    /// are exact where it matters, and what they leave of the mean is added in `f64`.
    #[inline(always)]
    pub(crate) fn of_run<'a, E: Elem, I: Isa, S: Iterator<Item = &'a [E]>>(
        isa: I,
        count: usize,
        slices: impl Fn() -> S,
    ) -> Self {
        let shift = Self::shift(isa, count, slices());
        Self::about(isa, count, shift, slices())
    }

    /// The mean of a run, rounded to the accumulator.
    #[inline(always)]
    pub(crate) fn shift<'a, E: Elem, I: Isa>(
        isa: I,
        count: usize,
        slices: impl Iterator<Item = &'a [E]>,
    ) -> E::Acc {
        let [sum] = run_sums(
            isa,
            slices,
            #[inline(always)]
            |v| [v],
        );
        E::Acc::from_f64(sum / count as f64)
    }

    /// The moments of a run whose mean is near `shift`.
    #[inline(always)]
    pub(crate) fn about<'a, E: Elem, I: Isa>(
        isa: I,
        count: usize,
        shift: E::Acc,
        slices: impl Iterator<Item = &'a [E]>,
    ) -> Self {
        let count = count as f64;
        let about = splat::<I, _>(isa, shift);
        let [first, second] = run_sums(
            isa,
            slices,
            #[inline(always)]
            |v| {
                let d = v - about;
                [d, d * d]
            },
        );
        let rest = first / count;
        Self {
            count,
            mean: Mean::sum(shift.to_f64(), rest),
            m2: second - first * rest,
        }
    }

    /// The same about zero instead of the mean: the variance is then the mean square.
    #[inline(always)]
    pub(crate) fn about_zero<'a, E: Elem, I: Isa>(
        isa: I,
        count: usize,
        slices: impl Iterator<Item = &'a [E]>,
    ) -> Self {
        let [m2] = run_sums(
            isa,
            slices,
            #[inline(always)]
            |v| [v * v],
        );
        Self {
            count: count as f64,
            mean: Mean::default(),
            m2,
        }
    }

    /// How many values.
    pub fn count(self) -> f64 {
        self.count
    }

    /// The mean.
    pub fn mean(self) -> f64 {
        self.mean.high
    }

    /// Rounding error of [`mean`](Self::mean).
    pub fn mean_error(self) -> f64 {
        self.mean.low
    }

    /// The sum of the squared distances from the mean.
    pub fn m2(self) -> f64 {
        self.m2
    }

    /// The variance by n − 1 in place of n, which is NaN for one value.
    pub fn unbiased_var(self) -> f64 {
        self.m2.max(0.) / (self.count - 1.)
    }

    /// Moments from what [`count`](Self::count), [`mean`](Self::mean),
    /// [`mean_error`](Self::mean_error) and [`m2`](Self::m2) returned.
    pub fn from_parts(count: f64, mean: f64, mean_error: f64, m2: f64) -> Self {
        Self {
            count,
            mean: Mean {
                high: mean,
                low: mean_error,
            },
            m2,
        }
    }

    /// The moments of both.
    #[inline(always)]
    pub fn merge(self, other: Self) -> Self {
        self.merge_by(other, self.joint(other.count))
    }

    /// How moments of `count` more values are merged into these.
    #[inline(always)]
    pub(crate) fn joint(self, count: f64) -> Joint {
        let total = self.count + count;
        Joint {
            total,
            share: count / total,
        }
    }

    #[inline(always)]
    pub(crate) fn merge_by(self, other: Self, joint: Joint) -> Self {
        if self.count == 0. {
            return other;
        }
        let distance = other.mean.minus(self.mean);
        Self {
            count: joint.total,
            mean: self.mean.plus(distance * joint.share),
            m2: self.m2 + other.m2 + distance * distance * (self.count * joint.share),
        }
    }

    /// The biased variance.
    #[inline(always)]
    pub fn var(self) -> f64 {
        let var = self.m2 / self.count;
        // Not `max`, which would make 0 of a NaN.
        if var < 0. { 0. } else { var }
    }
}

/// The count of two sets of values, and the share of the second: the same for all columns.
#[derive(Clone, Copy)]
pub(crate) struct Joint {
    total: f64,
    share: f64,
}

/// A mean as two numbers of the accumulator.
#[inline(always)]
pub(crate) fn parts<T: Real>(mean: Mean) -> (T, T) {
    let high = T::from_f64(mean.high);
    (high, T::from_f64(rest(mean, high)))
}

/// Remainder of a mean beside `high`.
#[inline(always)]
fn rest<T: Real>(mean: Mean, high: T) -> f64 {
    (mean.high - high.to_f64()) + mean.low
}

/// `Σ w · (x − mean)` from `Σ w · (x − high)`, whose distances are exact near the mean, and `Σ w`.
/// Taken off each distance, the rest of the mean would be rounded alike for many `x`, and in a long
/// sum that adds up.
#[inline(always)]
pub(crate) fn about_mean<T: Real>(mean: Mean, about_high: f64, sum: f64) -> f64 {
    let rest = rest(mean, T::from_f64(mean.high));
    // Not where it is zero and the sum infinite.
    if rest == 0. {
        about_high
    } else {
        about_high - rest * sum
    }
}

/// A mean to twice the precision of the accumulator, to be taken off in two steps: the first is
/// exact for values near it.
#[derive(Clone, Copy)]
pub(crate) struct Center<I: Isa, T: Real> {
    high: Lanes<I, T>,
    low: Lanes<I, T>,
}

impl<I: Isa, T: Real> Center<I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, mean: Mean) -> Self {
        let (high, low) = parts::<T>(mean);
        Self {
            high: splat::<I, _>(isa, high),
            low: splat::<I, _>(isa, low),
        }
    }

    #[inline(always)]
    pub(crate) fn distance(self, v: Lanes<I, T>) -> Lanes<I, T> {
        (v - self.high) - self.low
    }

    /// The distance from the first number of the mean, for [`about_mean`].
    #[inline(always)]
    pub(crate) fn distance_from_high(self, v: Lanes<I, T>) -> Lanes<I, T> {
        v - self.high
    }
}
