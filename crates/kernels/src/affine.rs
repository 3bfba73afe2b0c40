//! Weight and bias, and the normalized values that they are applied to.

use std::mem::MaybeUninit;

use super::loops::{ColumnValues, map};
use super::moments::Center;
use super::simd::{Elem, Isa, Lanes, Real, splat, zero};
use super::stats::Stats;

/// The weight and bias of each column or channel, in the accumulator's precision.
#[derive(Debug)]
pub struct AffinePair<'a, T> {
    /// The factors; none is one everywhere.
    pub weight: Option<&'a [T]>,
    /// The summands; none is zero everywhere.
    pub bias: Option<&'a [T]>,
}

impl<T> Clone for AffinePair<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for AffinePair<'_, T> {}

impl<T> AffinePair<'_, T> {
    /// Neither weight nor bias.
    pub const NONE: Self = Self {
        weight: None,
        bias: None,
    };

    /// Whether weight and bias, as far as there are any, have `len` values.
    pub(crate) fn fits(&self, len: usize) -> bool {
        let params = [self.weight, self.bias].into_iter().flatten();
        params.into_iter().all(|p| p.len() == len)
    }

    /// The values of part `index`, of `len` values each.
    #[inline(always)]
    pub(crate) fn part(self, index: usize, len: usize) -> Self {
        let [weight, bias] = [self.weight, self.bias].map(
            #[inline(always)]
            |values| part(values, index, len),
        );
        Self { weight, bias }
    }
}

/// Part `index`, of `len` values, of values that there may be.
#[inline(always)]
pub(crate) fn part<T>(values: Option<&[T]>, index: usize, len: usize) -> Option<&[T]> {
    values.map(
        #[inline(always)]
        |values| &values[index * len..(index + 1) * len],
    )
}

/// `x̂ = (x − mean) · inv_std`.
#[derive(Clone, Copy)]
pub(crate) struct Normal<I: Isa, T: Real> {
    pub(crate) mean: Center<I, T>,
    pub(crate) inv_std: Lanes<I, T>,
}

impl<I: Isa, T: Real> Normal<I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, stats: Stats) -> Self {
        Self {
            mean: Center::<I, T>::new(isa, stats.mean),
            inv_std: splat::<I, _>(isa, T::from_f64(stats.inv_std)),
        }
    }

    #[inline(always)]
    pub(crate) fn of(&self, x: Lanes<I, T>) -> Lanes<I, T> {
        self.mean.distance(x) * self.inv_std
    }

    /// `x̂` as the weight is multiplied by it: rounded to `E` or not.
    #[inline(always)]
    pub(crate) fn rounded<E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: Lanes<I, T>,
        round: bool,
    ) -> Lanes<I, T> {
        let normal = self.of(x);
        if round { E::round(isa, normal) } else { normal }
    }

    /// `y = x̂ · weight + bias`, column by column.
    #[inline(always)]
    pub(crate) fn write<'o, X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        y: &'o mut [MaybeUninit<E>],
        round: bool,
        weight: Option<ColumnValues<I, T>>,
        bias: Option<ColumnValues<I, T>>,
    ) -> &'o mut [E] {
        match (weight, bias) {
            (None, None) => map(
                isa,
                x,
                y,
                #[inline(always)]
                |_, x| self.rounded::<E>(isa, x, round),
            ),
            (Some(w), None) => map(
                isa,
                x,
                y,
                #[inline(always)]
                |k, x| self.rounded::<E>(isa, x, round) * w.at(k),
            ),
            (None, Some(b)) => map(
                isa,
                x,
                y,
                #[inline(always)]
                |k, x| self.rounded::<E>(isa, x, round) + b.at(k),
            ),
            (Some(w), Some(b)) => map(
                isa,
                x,
                y,
                #[inline(always)]
                |k, x| self.rounded::<E>(isa, x, round) * w.at(k) + b.at(k),
            ),
        }
    }

    /// [`write`](Self::write) in the accumulator's precision, with `x̂` rounded to `R`, if it is to
    /// be rounded: for what an activation follows, beside which the choices in the loop are cheap.
    #[inline(always)]
    pub(crate) fn write_wide<'o, R: Elem<Acc = T>, X: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        u: &'o mut [MaybeUninit<T>],
        round: bool,
        weight: Option<ColumnValues<I, T>>,
        bias: Option<ColumnValues<I, T>>,
    ) -> &'o mut [T] {
        map(
            isa,
            x,
            u,
            #[inline(always)]
            |k, x| {
                let normal = self.rounded::<R>(isa, x, round);
                let scaled = match &weight {
                    Some(weight) => normal * weight.at(k),
                    None => normal,
                };
                match &bias {
                    Some(bias) => scaled + bias.at(k),
                    None => scaled,
                }
            },
        )
    }
}

/// `(x − mean) · inv_std · weight + bias` with one weight and one bias.
#[derive(Clone, Copy)]
pub(crate) struct ScaledNormal<I: Isa, T: Real> {
    center: Center<I, T>,
    scale: Lanes<I, T>,
    bias: Lanes<I, T>,
}

impl<I: Isa, T: Real> ScaledNormal<I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, stats: Stats, affine: AffinePair<T>, channel: usize) -> Self {
        let weight = affine.weight.map_or(1., |w| w[channel].to_f64());
        Self {
            center: Center::new(isa, stats.mean),
            scale: splat::<I, _>(isa, T::from_f64(stats.inv_std * weight)),
            bias: affine
                .bias
                .map_or(zero::<I, T>(isa), |b| splat::<I, _>(isa, b[channel])),
        }
    }

    #[inline(always)]
    pub(crate) fn of(self, x: Lanes<I, T>) -> Lanes<I, T> {
        self.center.distance(x) * self.scale + self.bias
    }

    /// The values for `x`.
    #[inline(always)]
    pub(crate) fn write<'o, X: Elem<Acc = T>, E: Elem<Acc = T>>(
        self,
        isa: I,
        x: &[X],
        y: &'o mut [MaybeUninit<E>],
    ) -> &'o mut [E] {
        map(
            isa,
            x,
            y,
            #[inline(always)]
            |_, x| self.of(x),
        )
    }
}
