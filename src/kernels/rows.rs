//! Layer norm and RMS norm: each row by its own statistics, each column with its own weight and bias.

use std::mem::MaybeUninit;

use super::buffer::filled;
use super::moments::{Center, Moments};
use super::par;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, Vector, splat, zero};
use super::span::{Columns, map, map2, sums, sums2};

/// What a row is normalized by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stats {
    pub(crate) mean: f64,
    /// Biased; the mean square where the mean is not subtracted.
    pub(crate) var: f64,
    pub(crate) inv_std: f64,
}

impl Stats {
    pub(crate) const NONE: Self = Self {
        mean: 0.,
        var: 0.,
        inv_std: 0.,
    };

    #[inline(always)]
    pub(crate) fn new(mean: f64, var: f64, eps: f64) -> Self {
        Self {
            mean,
            var,
            inv_std: 1. / (var + eps).sqrt(),
        }
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

/// `y` for all rows of `x`, and what they were normalized by.
pub(crate) fn forward<E: Elem>(x: &[E], affine: Affine<E::Acc>, spec: Spec) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let rows = x.len() / spec.len;
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
        let Spec {
            len,
            center,
            eps,
            round_first,
        } = self.spec;
        let weight = self.affine.weight.map(|w| Columns::new(isa, w));
        let bias = self.affine.bias.map(|b| Columns::new(isa, b));
        let rows = self.x.chunks_exact(len).zip(self.y.chunks_exact_mut(len));
        for ((x, y), stats) in rows.zip(self.stats) {
            *stats = row_stats(isa, x, center, eps);
            let mean = Center::<I, E::Acc>::new(isa, stats.mean);
            let inv_std = splat::<I, _>(isa, E::Acc::from_wide(stats.inv_std));
            let normal = |v| {
                let n = mean.distance(v) * inv_std;
                if round_first { E::round(isa, n) } else { n }
            };
            match (&weight, &bias) {
                (None, None) => map(isa, x, y, |_, v| normal(v)),
                (Some(w), None) => map(isa, x, y, |k, v| normal(v) * w.at(k)),
                (None, Some(b)) => map(isa, x, y, |k, v| normal(v) + b.at(k)),
                (Some(w), Some(b)) => map(isa, x, y, |k, v| normal(v) * w.at(k) + b.at(k)),
            }
        }
    }
}

#[inline(always)]
pub(crate) fn row_stats<E: Elem, I: Isa>(isa: I, x: &[E], center: bool, eps: f64) -> Stats {
    let (mean, var) = if center {
        let moments = Moments::of(isa, x);
        (moments.mean, moments.var())
    } else {
        let [squares] = sums(isa, x, |v| [v * v]);
        (0., squares / x.len() as f64)
    };
    Stats::new(mean, var, eps)
}

/// The gradients of a layer: of the input, and, as far as they are wanted, of weight and bias in `f64`.
pub(crate) struct Gradients<E> {
    pub(crate) dx: Vec<E>,
    pub(crate) dweight: Vec<f64>,
    pub(crate) dbias: Vec<f64>,
}

/// What flows back into the rows of `x` from `dy`; `dweight` and `dbias` are empty unless `params` are wanted.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    spec: Spec,
    params: bool,
) -> Gradients<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let len = spec.len;
    let per_block = par::items_per_block(x.len() / len, len).next_multiple_of(ROWS);
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
    let mut total = vec![0f64; 2 * width];
    for partial in partial.chunks(2 * width.max(1)) {
        for (t, p) in total.iter_mut().zip(partial) {
            *t += p;
        }
    }
    let dbias = total.split_off(width);
    Gradients {
        dx,
        dweight: total,
        dbias,
    }
}

/// How many rows go through the columns together, so that the sums of a column stay in registers.
const ROWS: usize = 4;

/// How many rows are added up in the accumulator's precision.
const ROWS_PER_RUN: usize = 8 * ROWS;

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<E>],
    stats: &'a [Stats],
    weight: Option<&'a [E::Acc]>,
    spec: Spec,
    /// The sums of this block: those of `dy · x̂` for each column, then those of `dy`; empty if nobody wants them.
    partial: &'a mut [f64],
}

impl<E: Elem> Kernel for Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.weight.map(|w| Columns::new(isa, w)) {
            None => self.rows(isa, |_, v| v),
            Some(w) => self.rows(isa, move |k, v| v * w.at(k)),
        }
    }
}

/// A row on its way back: `dx = inv_std · (g − a − x̂ · b)`, with `g` the gradient of `x̂`.
#[derive(Clone, Copy)]
struct Row<I: Isa, T: Real> {
    mean: Center<I, T>,
    inv_std: Lanes<I, T>,
    a: Lanes<I, T>,
    b: Lanes<I, T>,
}

impl<E: Elem> Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    /// `scale(k, dy)` is `dy · weight` in chunk `k`.
    #[inline(always)]
    fn rows<I: Isa>(
        self,
        isa: I,
        scale: impl Fn(usize, Lanes<I, E::Acc>) -> Lanes<I, E::Acc> + Copy,
    ) {
        let len = self.spec.len;
        let width = self.partial.len() / 2;
        let chunks = len.div_ceil(LANES);
        let mut sums = vec![[zero::<I, E::Acc>(isa); 2]; if width > 0 { chunks } else { 0 }];
        let run = ROWS_PER_RUN;
        let xs = self.x.chunks(run * len).zip(self.dy.chunks(run * len));
        let runs = xs
            .zip(self.dx.chunks_mut(run * len))
            .zip(self.stats.chunks(run));
        for (((x, dy), dx), stats) in runs {
            let quads = x.chunks(ROWS * len).zip(dy.chunks(ROWS * len));
            let quads = quads.zip(dx.chunks_mut(ROWS * len)).zip(stats.chunks(ROWS));
            for (((x, dy), dx), stats) in quads {
                match <&[Stats; ROWS]>::try_from(stats) {
                    Ok(stats) => self
                        .spec
                        .group::<ROWS, E, I>(isa, x, dy, dx, stats, &mut sums, scale),
                    Err(_) => {
                        let rows = x.chunks(len).zip(dy.chunks(len)).zip(dx.chunks_mut(len));
                        for (((x, dy), dx), stats) in rows.zip(stats) {
                            self.spec
                                .group::<1, E, I>(isa, x, dy, dx, &[*stats], &mut sums, scale);
                        }
                    }
                }
            }
            flush::<I, E::Acc>(isa, &mut sums, self.partial, width);
        }
    }
}

/// Adds the lanes of the columns to the totals, and starts them anew.
#[inline(always)]
fn flush<I: Isa, T: Real>(isa: I, sums: &mut [[Lanes<I, T>; 2]], totals: &mut [f64], width: usize) {
    let whole = width / LANES;
    let (dweight, dbias) = totals.split_at_mut(width);
    for (k, sums) in sums.iter_mut().enumerate() {
        let (from, skip) = if k < whole {
            (k * LANES, 0)
        } else {
            (whole * LANES, LANES - (width - whole * LANES))
        };
        for (total, lanes) in [&mut *dweight, &mut *dbias].into_iter().zip(&*sums) {
            for (t, v) in total[from..].iter_mut().zip(&lanes.to_array()[skip..]) {
                *t += v.wide();
            }
        }
        *sums = [zero::<I, T>(isa); 2];
    }
}

impl Spec {
    /// `N` rows at once: first the two sums of each, then all of them column by column.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn group<const N: usize, E: Elem, I: Isa>(
        self,
        isa: I,
        x: &[E],
        dy: &[E],
        dx: &mut [MaybeUninit<E>],
        stats: &[Stats; N],
        sums: &mut [[Lanes<I, E::Acc>; 2]],
        scale: impl Fn(usize, Lanes<I, E::Acc>) -> Lanes<I, E::Acc> + Copy,
    ) {
        let len = self.len;
        let none = zero::<I, E::Acc>(isa);
        let mut rows = stats.map(|s| Row {
            mean: Center::<I, E::Acc>::new(isa, s.mean),
            inv_std: splat::<I, _>(isa, E::Acc::from_wide(s.inv_std)),
            a: none,
            b: none,
        });
        for (r, row) in rows.iter_mut().enumerate() {
            let span = r * len..(r + 1) * len;
            let (x, dy) = (&x[span.clone()], &dy[span]);
            let n = len as f64;
            let Row { mean, inv_std, .. } = *row;
            let [g, gx] = sums2(isa, x, dy, |k, x, dy| {
                let g = scale(k, dy);
                [g, g * (mean.distance(x) * inv_std)]
            });
            row.b = splat::<I, _>(isa, E::Acc::from_wide(gx / n));
            if self.center {
                row.a = splat::<I, _>(isa, E::Acc::from_wide(g / n));
            }
        }
        let back = |row: &Row<I, E::Acc>, k: usize, x: Lanes<I, E::Acc>, dy: Lanes<I, E::Acc>| {
            let normal = row.mean.distance(x) * row.inv_std;
            let dx = row.inv_std * ((scale(k, dy) - row.a) - normal * row.b);
            (normal, dx)
        };
        if sums.is_empty() {
            for (r, row) in rows.iter().enumerate() {
                let span = r * len..(r + 1) * len;
                let (x, dy) = (&x[span.clone()], &dy[span.clone()]);
                map2(isa, x, dy, &mut dx[span], |k, x, dy| back(row, k, x, dy).1);
            }
            return;
        }
        let whole = len / LANES;
        let rest = len - whole * LANES;
        let (whole_sums, rest_sums) = sums.split_at_mut(whole);
        for (k, sums) in whole_sums.iter_mut().enumerate() {
            let [mut dweight, mut dbias] = *sums;
            for (r, row) in rows.iter().enumerate() {
                let at = r * len + k * LANES;
                let (x, dy) = (load::<E, I>(isa, x, at), load::<E, I>(isa, dy, at));
                let (normal, value) = back(row, k, x, dy);
                dweight = dweight + dy * self.rounded::<E, I>(isa, normal);
                dbias = dbias + dy;
                if let Some(out) = dx[at..].first_chunk_mut() {
                    E::store(isa, value, out);
                }
            }
            *sums = [dweight, dbias];
        }
        if let Some(sums) = rest_sums.first_mut() {
            for (r, row) in rows.iter().enumerate() {
                let span = r * len..(r + 1) * len;
                let (x, dy) = (&x[span.clone()], &dy[span.clone()]);
                let (x, dy) = (super::span::tail(isa, x), super::span::tail(isa, dy));
                let (normal, value) = back(row, whole, x, dy);
                let dweight = dy * self.rounded::<E, I>(isa, normal);
                sums[0] = sums[0] + dweight.keep_last(rest);
                sums[1] = sums[1] + dy.keep_last(rest);
                super::span::store_tail(isa, value, &mut dx[span]);
            }
        }
    }

    /// The normalized value as the weight was multiplied by it.
    #[inline(always)]
    fn rounded<E: Elem, I: Isa>(self, isa: I, normal: Lanes<I, E::Acc>) -> Lanes<I, E::Acc> {
        if self.round_first {
            E::round(isa, normal)
        } else {
            normal
        }
    }
}

#[inline(always)]
fn load<E: Elem, I: Isa>(isa: I, x: &[E], at: usize) -> Lanes<I, E::Acc> {
    match x[at..].first_chunk() {
        Some(chunk) => E::load(isa, chunk),
        None => zero::<I, E::Acc>(isa),
    }
}
