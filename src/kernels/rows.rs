//! Layer norm and RMS norm: each row by its own statistics, each column with its own weight and bias.

use std::mem::MaybeUninit;

use super::buffer::{filled, written};
use super::moments::{Center, Mean, Moments, about_mean};
use super::par;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, splat, zero};
use super::span::{Columns, map, map2, store_tail, sums, sums2, tail};
use super::totals::{ColumnSums, combined, rows_per_block, whole_chunks};

/// What a row is normalized by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stats {
    pub(crate) mean: Mean,
    /// Biased; the mean square where the mean is not subtracted.
    pub(crate) var: f64,
    pub(crate) inv_std: f64,
}

impl Stats {
    pub(crate) const NONE: Self = Self {
        mean: Mean { high: 0., low: 0. },
        var: 0.,
        inv_std: 0.,
    };

    #[inline(always)]
    pub(crate) fn new(mean: Mean, var: f64, eps: f64) -> Self {
        Self {
            mean,
            var,
            inv_std: 1. / (var + eps).sqrt(),
        }
    }
}

impl Stats {
    /// `Σ w · x̂` from `Σ w · (x − high)` and `Σ w`.
    #[inline(always)]
    pub(crate) fn along<T: Real>(self, [about_high, sum]: [f64; 2]) -> f64 {
        about_mean::<T>(self.mean, about_high, sum) * self.inv_std
    }
}

/// What layer norm and RMS norm differ in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    /// The length of a row.
    pub(crate) len: usize,
    /// Subtract the mean.
    pub(crate) center: bool,
    pub(crate) eps: f64,
    /// Round the normalized value to the element before it is multiplied by the weight.
    pub(crate) round_first: bool,
}

/// The weight and bias of each column, in the accumulator's precision.
#[derive(Debug)]
pub(crate) struct Affine<'a, T> {
    pub(crate) weight: Option<&'a [T]>,
    pub(crate) bias: Option<&'a [T]>,
}

impl<T> Clone for Affine<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Affine<'_, T> {}

impl<T> Affine<'_, T> {
    /// Whether what there is has `len` values.
    pub(crate) fn fits(&self, len: usize) -> bool {
        let params = [self.weight, self.bias].into_iter().flatten();
        params.into_iter().all(|p| p.len() == len)
    }
}

/// `y` for all rows of `x`, and what they were normalized by.
pub(crate) fn forward<E: Elem>(x: &[E], affine: Affine<E::Acc>, spec: Spec) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let rows = x.len() / spec.len;
    assert_eq!(x.len(), rows * spec.len);
    assert!(affine.fits(spec.len));
    let per_block = par::items_per_block(rows, spec.len);
    let level = Level::current();
    let mut stats = vec![Stats::NONE; rows];
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
    let y = unsafe {
        filled(x.len(), |y| {
            let blocks = x
                .chunks(per_block * spec.len)
                .zip(y.chunks_mut(per_block * spec.len))
                .zip(stats.chunks_mut(per_block))
                .map(|((x, y), stats)| Forward {
                    x,
                    y,
                    stats,
                    affine,
                    spec,
                })
                .collect();
            par::run(blocks, x.len(), |block| level.run(block));
        })
    };
    (y, stats)
}

/// How many rows go forward together, so that they need not wait for each other.
const ROWS: usize = 4;

/// How many rows go back together, so that the sums of a column are read and written once for all of them. The numbers of more would not
/// stay in registers.
const ROWS_BACK: usize = 2;

/// The longest row that does not fill the time of its own sums. A few of them stay in the first-level cache, and one is no longer than a run.
const SHORT: usize = 1024;

struct Forward<'a, E: Elem> {
    x: &'a [E],
    y: &'a mut [MaybeUninit<E>],
    stats: &'a mut [Stats],
    affine: Affine<'a, E::Acc>,
    spec: Spec,
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let len = self.spec.len;
        let norm = Normalizer::new(isa, self.affine, self.spec);
        let groups = self.x.chunks(ROWS * len).zip(self.y.chunks_mut(ROWS * len));
        for ((x, y), stats) in groups.zip(self.stats.chunks_mut(ROWS)) {
            norm.rows(isa, x, y, stats);
        }
    }
}

/// What takes one row after the other forward.
struct Normalizer<'a, I: Isa, T: Real> {
    weight: Option<Columns<'a, I, T>>,
    bias: Option<Columns<'a, I, T>>,
    spec: Spec,
}

impl<'a, I: Isa, T: Elem<Acc = T> + Real> Normalizer<'a, I, T> {
    #[inline(always)]
    fn new(isa: I, affine: Affine<'a, T>, spec: Spec) -> Self {
        Self {
            weight: affine.weight.map(
                #[inline(always)]
                |w| Columns::new(isa, w),
            ),
            bias: affine.bias.map(
                #[inline(always)]
                |b| Columns::new(isa, b),
            ),
            spec,
        }
    }

    /// Writes `y` of a few rows `x`, and what they were normalized by to `stats`.
    ///
    /// Short rows take each step together: the sums of one are formed while those of another are still on their way to a mean.
    #[inline(always)]
    fn rows<E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[E],
        y: &mut [MaybeUninit<E>],
        stats: &mut [Stats],
    ) {
        let Spec {
            len, center, eps, ..
        } = self.spec;
        let rows = x.chunks_exact(len).zip(y.chunks_exact_mut(len));
        if len > SHORT || stats.len() < ROWS || !center {
            for ((x, y), stats) in rows.zip(stats) {
                *stats = self.row(isa, x, y);
            }
            return;
        }
        let mut shifts = [T::default(); ROWS];
        for (x, shift) in x.chunks_exact(len).zip(&mut shifts) {
            *shift = Moments::shift(isa, len, std::iter::once(x));
        }
        let mut moments = [Moments::default(); ROWS];
        for ((x, shift), moments) in x.chunks_exact(len).zip(shifts).zip(&mut moments) {
            *moments = Moments::about(isa, len, shift, std::iter::once(x));
        }
        for (moments, stats) in moments.into_iter().zip(&mut *stats) {
            *stats = Stats::new(moments.mean, moments.var(), eps);
        }
        for ((x, y), stats) in rows.zip(stats) {
            self.write(isa, *stats, x, y);
        }
    }

    #[inline(always)]
    fn write<X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        stats: Stats,
        x: &[X],
        y: &mut [MaybeUninit<E>],
    ) {
        let normal = Normal::<I, T>::new(isa, stats);
        normal.write(isa, x, y, self.spec.round_first, self.weight, self.bias);
    }

    /// Writes `y` of a row `x`, and returns what it was normalized by.
    #[inline(always)]
    fn row<X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        y: &mut [MaybeUninit<E>],
    ) -> Stats {
        let stats = row_stats(isa, x, self.spec.center, self.spec.eps);
        self.write(isa, stats, x, y);
        stats
    }
}

/// What [`add_forward`] makes of all rows.
pub(crate) struct Added<E: Elem> {
    /// Before it is rounded to the element.
    pub(crate) sum: Vec<E::Acc>,
    /// Empty where there is nothing to be rounded.
    pub(crate) rounded: Vec<E>,
    pub(crate) y: Vec<E>,
    pub(crate) stats: Vec<Stats>,
}

/// `x + residual`, and [`forward`] of that sum, row by row.
pub(crate) fn add_forward<E: Elem>(
    x: &[E],
    residual: &[E],
    affine: Affine<E::Acc>,
    spec: Spec,
) -> Added<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let rows = x.len() / spec.len;
    assert_eq!(x.len(), rows * spec.len);
    assert_eq!(x.len(), residual.len());
    assert!(affine.fits(spec.len));
    let per_block = par::items_per_block(rows, spec.len);
    let size = per_block * spec.len;
    let level = Level::current();
    let rounds = size_of::<E>() != size_of::<E::Acc>();
    let mut stats = vec![Stats::NONE; rows];
    let (mut y, mut rounded) = (vec![], vec![]);
    let mut fill = |sum: &mut [MaybeUninit<E::Acc>],
                    rounded: &mut [MaybeUninit<E>],
                    y: &mut [MaybeUninit<E>]| {
        let mut none: Vec<&mut [MaybeUninit<E>]> = vec![];
        none.resize_with(x.len().div_ceil(size), || &mut []);
        let inputs = x.chunks(size).zip(residual.chunks(size));
        let outputs = sum.chunks_mut(size).zip(y.chunks_mut(size));
        let blocks = inputs
            .zip(outputs)
            .zip(rounded.chunks_mut(size).chain(none))
            .zip(stats.chunks_mut(per_block))
            .map(|((((x, residual), (sum, y)), rounded), stats)| AddForward {
                x,
                residual,
                sum,
                rounded,
                y,
                stats,
                affine,
                spec,
            })
            .collect();
        par::run(blocks, x.len(), |block| level.run(block));
    };
    let round_to = if rounds { x.len() } else { 0 };
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows, to all outputs that have any.
    let sum = unsafe {
        filled(x.len(), |sum| {
            rounded = filled(round_to, |rounded| {
                y = filled(x.len(), |y| fill(sum, rounded, y));
            });
        })
    };
    Added {
        sum,
        rounded,
        y,
        stats,
    }
}

struct AddForward<'a, E: Elem> {
    x: &'a [E],
    residual: &'a [E],
    sum: &'a mut [MaybeUninit<E::Acc>],
    /// Empty, or as long as the sum.
    rounded: &'a mut [MaybeUninit<E>],
    y: &'a mut [MaybeUninit<E>],
    stats: &'a mut [Stats],
    affine: Affine<'a, E::Acc>,
    spec: Spec,
}

impl<E: Elem> Kernel for AddForward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let len = self.spec.len;
        let norm = Normalizer::new(isa, self.affine, self.spec);
        let mut rounded = self.rounded.chunks_exact_mut(len);
        let inputs = self
            .x
            .chunks_exact(len)
            .zip(self.residual.chunks_exact(len));
        let outputs = self
            .sum
            .chunks_exact_mut(len)
            .zip(self.y.chunks_exact_mut(len));
        for (((x, residual), (sum, y)), stats) in inputs.zip(outputs).zip(self.stats) {
            map2(
                isa,
                x,
                residual,
                sum,
                #[inline(always)]
                |_, x, residual| x + residual,
            );
            // SAFETY: the map has written every element of the row.
            let sum = unsafe { written(sum) };
            if let Some(rounded) = rounded.next() {
                map(
                    isa,
                    sum,
                    rounded,
                    #[inline(always)]
                    |_, sum| sum,
                );
            }
            *stats = norm.row(isa, sum, y);
        }
    }
}

/// `x̂ = (x − mean) · inv_std`.
#[derive(Clone, Copy)]
pub(crate) struct Normal<I: Isa, T: Real> {
    pub(crate) mean: Center<I, T>,
    inv_std: Lanes<I, T>,
}

impl<I: Isa, T: Elem<Acc = T> + Real> Normal<I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, stats: Stats) -> Self {
        Self {
            mean: Center::<I, T>::new(isa, stats.mean),
            inv_std: splat::<I, _>(isa, T::from_wide(stats.inv_std)),
        }
    }

    #[inline(always)]
    pub(crate) fn of(&self, x: Lanes<I, T>) -> Lanes<I, T> {
        self.mean.distance(x) * self.inv_std
    }

    /// `x̂` as the weight is multiplied by it: rounded to `E` or not.
    #[inline(always)]
    fn rounded<E: Elem<Acc = T>>(&self, isa: I, x: Lanes<I, T>, round: bool) -> Lanes<I, T> {
        let normal = self.of(x);
        if round { E::round(isa, normal) } else { normal }
    }

    /// `y = x̂ · weight + bias`, column by column.
    #[inline(always)]
    pub(crate) fn write<X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        y: &mut [MaybeUninit<E>],
        round: bool,
        weight: Option<Columns<I, T>>,
        bias: Option<Columns<I, T>>,
    ) {
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
}

#[inline(always)]
pub(crate) fn row_stats<E: Elem, I: Isa>(isa: I, x: &[E], center: bool, eps: f64) -> Stats {
    let (mean, var) = if center {
        let moments = Moments::of(isa, x);
        (moments.mean, moments.var())
    } else {
        let [squares] = sums(
            isa,
            x,
            #[inline(always)]
            |v| [v * v],
        );
        (Mean::default(), squares / x.len() as f64)
    };
    Stats::new(mean, var, eps)
}

/// The gradients of a layer: of the input, and, as far as they are wanted, of weight and bias in `f64`.
pub(crate) struct Gradients<E> {
    pub(crate) dx: Vec<E>,
    pub(crate) dweight: Vec<f64>,
    pub(crate) dbias: Vec<f64>,
}

/// What flows back into the rows of `x` from `dy`; `dweight` and `dbias` are empty unless `params` are wanted. The element of `x` may be wider
/// than that of `y`, to which the forward rounded.
pub(crate) fn backward<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    weight: Option<&[X::Acc]>,
    stats: &[Stats],
    spec: Spec,
    params: bool,
) -> Gradients<X>
where
    X::Acc: Elem<Acc = X::Acc>,
{
    let len = spec.len;
    assert_eq!(x.len(), stats.len() * len);
    assert_eq!(x.len(), dy.len());
    assert!(weight.is_none_or(|w| w.len() == len));
    let per_block = if params {
        rows_per_block(stats.len(), len)
    } else {
        par::items_per_block(stats.len(), len)
    };
    let level = Level::current();
    let blocks = x.len().div_ceil(per_block * len);
    let width = if params { len } else { 0 };
    let mut partial = vec![0f64; 2 * width * blocks];
    let mut none: Vec<&mut [f64]> = Vec::new();
    none.resize_with(if params { 0 } else { blocks }, || &mut []);
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
    let dx = unsafe {
        filled(x.len(), |dx| {
            let partials = partial.chunks_mut((2 * width).max(1)).chain(none);
            let blocks = x
                .chunks(per_block * len)
                .zip(dy.chunks(per_block * len))
                .zip(dx.chunks_mut(per_block * len))
                .zip(stats.chunks(per_block))
                .zip(partials)
                .map(|((((x, dy), dx), stats), partial)| Backward {
                    x,
                    dy,
                    dx,
                    stats,
                    weight,
                    spec,
                    partial,
                })
                .collect();
            par::run(blocks, x.len(), |block| level.run(block));
        })
    };
    let mut dweight = combined(&partial, 2 * width);
    let dbias = dweight.split_off(width);
    Gradients { dx, dweight, dbias }
}

struct Backward<'a, X: Elem, E> {
    x: &'a [X],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<X>],
    stats: &'a [Stats],
    weight: Option<&'a [X::Acc]>,
    spec: Spec,
    /// The sums of this block: those of `dy · x̂` for each column, then those of `dy`; empty if nobody wants them.
    partial: &'a mut [f64],
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for Backward<'_, X, E>
where
    X::Acc: Elem<Acc = X::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let len = self.spec.len;
        let mut sums = ColumnSums::<I, X::Acc, 2>::new(isa, self.partial);
        let weight = Weight(self.weight.map(|w| Columns::new(isa, w)));
        let pairs = self
            .x
            .chunks(ROWS_BACK * len)
            .zip(self.dy.chunks(ROWS_BACK * len));
        let groups = pairs.zip(self.dx.chunks_mut(ROWS_BACK * len));
        for (((x, dy), dx), stats) in groups.zip(self.stats.chunks(ROWS_BACK)) {
            if stats.len() == ROWS_BACK {
                let rows = Rows {
                    x,
                    dy,
                    dx,
                    stats,
                    spec: self.spec,
                };
                rows.run::<ROWS_BACK, I>(isa, weight, sums.chunks());
            } else {
                let pairs = x.chunks_exact(len).zip(dy.chunks_exact(len));
                let rows = pairs.zip(dx.chunks_exact_mut(len));
                for (((x, dy), dx), stats) in rows.zip(stats.chunks(1)) {
                    let row = Rows {
                        x,
                        dy,
                        dx,
                        stats,
                        spec: self.spec,
                    };
                    row.run::<1, I>(isa, weight, sums.chunks());
                }
            }
            sums.added(isa, stats.len());
        }
        sums.finish(isa);
    }
}

/// The weight of each column, or one.
#[derive(Clone, Copy)]
struct Weight<'a, I: Isa, T: Real>(Option<Columns<'a, I, T>>);

impl<I: Isa, T: Elem<Acc = T> + Real> Weight<'_, I, T> {
    /// `v` times the weights of chunk `k`.
    #[inline(always)]
    fn times(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        match &self.0 {
            Some(weight) => v * weight.at(k),
            None => v,
        }
    }
}

/// A row on its way back: `dx = inv_std · (g − a − x̂ · b)`, with `g` the gradient of `x̂`.
#[derive(Clone, Copy)]
struct Back<I: Isa, T: Real> {
    normal: Normal<I, T>,
    a: Lanes<I, T>,
    b: Lanes<I, T>,
}

impl<I: Isa, T: Elem<Acc = T> + Real> Back<I, T> {
    #[inline(always)]
    fn of(&self, normal: Lanes<I, T>, g: Lanes<I, T>) -> Lanes<I, T> {
        self.normal.inv_std * ((g - self.a) - normal * self.b)
    }
}

/// A few rows that go back together.
struct Rows<'a, X, E> {
    x: &'a [X],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<X>],
    stats: &'a [Stats],
    spec: Spec,
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Rows<'_, X, E>
where
    X::Acc: Elem<Acc = X::Acc>,
{
    /// `N` rows: first the two sums of each, then all of them column by column.
    #[inline(always)]
    fn run<const N: usize, I: Isa>(
        self,
        isa: I,
        weight: Weight<I, X::Acc>,
        sums: &mut [[Lanes<I, X::Acc>; 2]],
    ) {
        let Spec {
            len, round_first, ..
        } = self.spec;
        let start = Back::<I, X::Acc> {
            normal: Normal::new(isa, Stats::NONE),
            a: zero::<I, X::Acc>(isa),
            b: zero::<I, X::Acc>(isa),
        };
        let mut rows = [start; N];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = self.sums(isa, r, weight);
        }
        if sums.is_empty() {
            for (r, row) in rows.iter().enumerate() {
                let span = r * len..(r + 1) * len;
                map2(
                    isa,
                    &self.x[span.clone()],
                    &self.dy[span.clone()],
                    &mut self.dx[span],
                    #[inline(always)]
                    |k, x, dy| row.of(row.normal.of(x), weight.times(k, dy)),
                );
            }
            return;
        }
        let (whole, rest) = sums.split_at_mut(len / LANES);
        let (xs, dys) = (
            whole_chunks::<N, X>(self.x, len),
            whole_chunks::<N, E>(self.dy, len),
        );
        let mut row = self.dx.chunks_exact_mut(len);
        let dxs: [&mut [[MaybeUninit<X>; LANES]]; N] = std::array::from_fn(|_| {
            let row = row.next().unwrap_or_default();
            &mut row.as_chunks_mut::<LANES>().0[..len / LANES]
        });
        for (k, sums) in whole.iter_mut().enumerate() {
            let [mut dweight, mut dbias] = *sums;
            let mut values = [zero::<I, X::Acc>(isa); N];
            for r in 0..N {
                let (x, dy) = (X::load(isa, &xs[r][k]), E::load(isa, &dys[r][k]));
                values[r] = rows[r].of(rows[r].normal.of(x), weight.times(k, dy));
                dweight = dweight + dy * rows[r].normal.rounded::<E>(isa, x, round_first);
                dbias = dbias + dy;
            }
            for r in 0..N {
                X::store(isa, values[r], &mut dxs[r][k]);
            }
            *sums = [dweight, dbias];
        }
        let k = len / LANES;
        for sums in rest {
            let [mut dweight, mut dbias] = *sums;
            for (r, row) in rows.iter().enumerate() {
                let span = r * len..(r + 1) * len;
                let (x, dy) = (&self.x[span.clone()], &self.dy[span.clone()]);
                let (x, dy) = (tail(isa, x), tail(isa, dy));
                let value = row.of(row.normal.of(x), weight.times(k, dy));
                dweight = dweight + dy * row.normal.rounded::<E>(isa, x, round_first);
                dbias = dbias + dy;
                store_tail(isa, value, &mut self.dx[span]);
            }
            *sums = [dweight, dbias];
        }
    }

    /// Row `r`, with its two sums.
    #[inline(always)]
    fn sums<I: Isa>(&self, isa: I, r: usize, weight: Weight<I, X::Acc>) -> Back<I, X::Acc> {
        let len = self.spec.len;
        let span = r * len..(r + 1) * len;
        let normal = Normal::<I, X::Acc>::new(isa, self.stats[r]);
        let [along, g] = sums2(
            isa,
            &self.x[span.clone()],
            &self.dy[span],
            #[inline(always)]
            |k, x, dy| {
                let g = weight.times(k, dy);
                [g * normal.mean.distance_from_high(x), g]
            },
        );
        let mean = |sum: f64| splat::<I, _>(isa, X::Acc::from_wide(sum / len as f64));
        Back {
            normal,
            a: mean(if self.spec.center { g } else { 0. }),
            b: mean(self.stats[r].along::<X::Acc>([along, g])),
        }
    }
}
