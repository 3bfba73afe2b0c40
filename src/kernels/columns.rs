//! Batch norm where a channel has few neighbors in memory: `[N, C]`, or planes of fewer elements than there are lanes.
//!
//! The tensor is taken as rows of `channels · inner` columns. Lanes run along the columns, sums down the rows; columns of one channel are merged at
//! the end.

use std::mem::MaybeUninit;

use super::buffer::filled;
use super::moments::{Mean, Moments, parts};
use super::par;
use super::planes::{Shape, Statistics};
use super::rows::{Affine, Gradients, Stats};
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, Vector, splat, zero};
use super::span::{Columns, map, map2, tail};

/// How many rows are added up in the accumulator's precision.
const ROWS_PER_RUN: usize = 64;

/// One number for each column, in the accumulator's precision.
fn per_column<T: Real>(shape: Shape, f: impl Fn(usize) -> f64) -> Vec<T> {
    (0..shape.channels)
        .flat_map(
            #[inline(always)]
            |channel| std::iter::repeat_n(T::from_wide(f(channel)), shape.inner),
        )
        .collect()
}

/// The statistics of a channel for each of its columns.
struct Spread<T> {
    high: Vec<T>,
    low: Vec<T>,
    inv_std: Vec<T>,
}

impl<T: Real> Spread<T> {
    fn new(shape: Shape, stats: &[Stats]) -> Self {
        Self {
            high: per_column(shape, |c| parts::<T>(stats[c].mean).0.wide()),
            low: per_column(shape, |c| parts::<T>(stats[c].mean).1.wide()),
            inv_std: per_column(shape, |c| stats[c].inv_std),
        }
    }
}

pub(super) fn forward<E: Elem>(
    x: &[E],
    shape: Shape,
    affine: Affine<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let width = shape.channels * shape.inner;
    let per_block = par::items_per_block(shape.outer, width);
    let level = Level::current();
    let stats: Vec<Stats> = match statistics {
        Statistics::Given(given) => given.to_vec(),
        Statistics::Own { center, eps } => {
            let mut blocks = vec![Moments::default(); shape.outer.div_ceil(per_block) * width];
            let jobs = x
                .chunks(per_block * width)
                .zip(blocks.chunks_mut(width))
                .map(|(x, moments)| ColumnMoments { x, moments, center })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
            let mut moments = vec![Moments::default(); shape.channels];
            for block in blocks.chunks(width) {
                for (channel, columns) in moments.iter_mut().zip(block.chunks(shape.inner)) {
                    for column in columns {
                        *channel = channel.merge(*column);
                    }
                }
            }
            moments
                .iter()
                .map(
                    #[inline(always)]
                    |m| Stats::new(m.mean, m.var(), eps),
                )
                .collect()
        }
    };
    let spread = Spread::<E::Acc>::new(shape, &stats);
    let scale = per_column(shape, |c| {
        stats[c].inv_std * affine.weight.map_or(1., |w| w[c].wide())
    });
    let bias = per_column(shape, |c| affine.bias.map_or(0., |b| b[c].wide()));
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
    let y = unsafe {
        filled(x.len(), |y| {
            let jobs = x
                .chunks(per_block * width)
                .zip(y.chunks_mut(per_block * width))
                .map(|(x, y)| Forward {
                    x,
                    y,
                    spread: &spread,
                    scale: &scale,
                    bias: &bias,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    (y, stats)
}

/// The moments of each column of `x`.
struct ColumnMoments<'a, E> {
    x: &'a [E],
    moments: &'a mut [Moments],
    center: bool,
}

impl<E: Elem> Kernel for ColumnMoments<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.moments.len();
        for run in self.x.chunks(ROWS_PER_RUN * width) {
            let count = (run.len() / width) as f64;
            for (at, lanes) in column_chunks(width) {
                let all = chunk_moments(isa, run, width, at, lanes, self.center);
                let (shift, rest, m2) = (all[0].to_array(), all[1].to_array(), all[2].to_array());
                for (i, all) in self.moments[at..at + lanes].iter_mut().enumerate() {
                    let i = LANES - lanes + i;
                    let rest = rest[i].wide() / count;
                    *all = all.merge(Moments {
                        count,
                        mean: Mean::sum(shift[i].wide(), rest),
                        m2: m2[i].wide() - rest * rest * count,
                    });
                }
            }
        }
    }
}

/// The first column and the number of columns of each chunk; those of the last one are at its end.
#[inline(always)]
fn column_chunks(width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..width)
        .step_by(LANES)
        .map(move |at| (at, LANES.min(width - at)))
}

/// The lanes of a row for the chunk that starts at column `at` and has `lanes` columns.
#[inline(always)]
fn lanes_at<E: Elem, I: Isa>(isa: I, row: &[E], at: usize, lanes: usize) -> Lanes<I, E::Acc> {
    match row[at..].first_chunk() {
        Some(chunk) if lanes == LANES => E::load(isa, chunk),
        _ => tail(isa, row),
    }
}

/// A first mean of each column, what is left of the sums, and the sums of squares about it.
#[inline(always)]
fn chunk_moments<E: Elem, I: Isa>(
    isa: I,
    run: &[E],
    width: usize,
    at: usize,
    lanes: usize,
    center: bool,
) -> [Lanes<I, E::Acc>; 3] {
    let mut shift = zero::<I, E::Acc>(isa);
    if center {
        for row in run.chunks_exact(width) {
            shift = shift + lanes_at(isa, row, at, lanes);
        }
        let each = E::Acc::from_wide(1. / (run.len() / width) as f64);
        shift = shift * splat::<I, _>(isa, each);
    }
    let (mut rest, mut m2) = (zero::<I, E::Acc>(isa), zero::<I, E::Acc>(isa));
    for row in run.chunks_exact(width) {
        let d = lanes_at(isa, row, at, lanes) - shift;
        rest = rest + d;
        m2 = m2 + d * d;
    }
    if center {
        [shift, rest, m2]
    } else {
        [shift, zero::<I, E::Acc>(isa), m2]
    }
}

struct Forward<'a, E: Elem> {
    x: &'a [E],
    y: &'a mut [MaybeUninit<E>],
    spread: &'a Spread<E::Acc>,
    scale: &'a [E::Acc],
    bias: &'a [E::Acc],
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.scale.len();
        let high = Columns::new(isa, &self.spread.high);
        let low = Columns::new(isa, &self.spread.low);
        let scale = Columns::new(isa, self.scale);
        let bias = Columns::new(isa, self.bias);
        for (x, y) in self
            .x
            .chunks_exact(width)
            .zip(self.y.chunks_exact_mut(width))
        {
            map(
                isa,
                x,
                y,
                #[inline(always)]
                |k, v| ((v - high.at(k)) - low.at(k)) * scale.at(k) + bias.at(k),
            );
        }
    }
}

pub(super) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    own: Option<bool>,
) -> Gradients<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let width = shape.channels * shape.inner;
    let per_block = par::items_per_block(shape.outer, width);
    let level = Level::current();
    let spread = Spread::<E::Acc>::new(shape, stats);
    let mut blocks = vec![0f64; 2 * shape.outer.div_ceil(per_block) * width];
    let jobs = x
        .chunks(per_block * width)
        .zip(dy.chunks(per_block * width))
        .zip(blocks.chunks_mut(2 * width))
        .map(|((x, dy), sums)| ColumnSums {
            x,
            dy,
            spread: &spread,
            sums,
        })
        .collect();
    par::run(jobs, x.len(), |job| level.run(job));
    let mut dweight = vec![0f64; shape.channels];
    let mut dbias = vec![0f64; shape.channels];
    for block in blocks.chunks(2 * width) {
        let (along, sum) = block.split_at(width);
        for (totals, columns) in [(&mut dweight, along), (&mut dbias, sum)] {
            for (total, columns) in totals.iter_mut().zip(columns.chunks(shape.inner)) {
                *total += columns.iter().sum::<f64>();
            }
        }
    }
    let count = shape.per_channel();
    let of_own = |v: f64| if own.is_some() { v / count } else { 0. };
    let scale = per_column(shape, |c| {
        stats[c].inv_std * weight.map_or(1., |w| w[c].wide())
    });
    let mean = per_column(shape, |c| {
        if own == Some(true) {
            dbias[c] / count
        } else {
            0.
        }
    });
    let along = per_column(shape, |c| of_own(dweight[c]) * stats[c].inv_std);
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
    let dx = unsafe {
        filled(x.len(), |dx| {
            let jobs = x
                .chunks(per_block * width)
                .zip(dy.chunks(per_block * width))
                .zip(dx.chunks_mut(per_block * width))
                .map(|((x, dy), dx)| Backward {
                    x,
                    dy,
                    dx,
                    spread: &spread,
                    scale: &scale,
                    mean: &mean,
                    along: &along,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    Gradients { dx, dweight, dbias }
}

/// The sums of `dy · x̂` of each column, then those of `dy`.
struct ColumnSums<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    spread: &'a Spread<E::Acc>,
    sums: &'a mut [f64],
}

impl<E: Elem> Kernel for ColumnSums<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (along, sum) = self.sums.split_at_mut(self.sums.len() / 2);
        let width = along.len();
        let Spread { high, low, inv_std } = self.spread;
        let runs = self
            .x
            .chunks(ROWS_PER_RUN * width)
            .zip(self.dy.chunks(ROWS_PER_RUN * width));
        for (x, dy) in runs {
            for (at, lanes) in column_chunks(width) {
                let high = lanes_at(isa, high, at, lanes);
                let low = lanes_at(isa, low, at, lanes);
                let inv_std = lanes_at(isa, inv_std, at, lanes);
                let (mut a, mut s) = (zero::<I, E::Acc>(isa), zero::<I, E::Acc>(isa));
                for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
                    let (x, dy) = (lanes_at(isa, x, at, lanes), lanes_at(isa, dy, at, lanes));
                    a = a + dy * (((x - high) - low) * inv_std);
                    s = s + dy;
                }
                for (totals, lanes_of) in [(&mut *along, a), (&mut *sum, s)] {
                    let new = &lanes_of.to_array()[LANES - lanes..];
                    for (total, v) in totals[at..at + lanes].iter_mut().zip(new) {
                        *total += v.wide();
                    }
                }
            }
        }
    }
}

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<E>],
    spread: &'a Spread<E::Acc>,
    scale: &'a [E::Acc],
    mean: &'a [E::Acc],
    along: &'a [E::Acc],
}

impl<E: Elem> Kernel for Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.scale.len();
        let high = Columns::new(isa, &self.spread.high);
        let low = Columns::new(isa, &self.spread.low);
        let scale = Columns::new(isa, self.scale);
        let mean = Columns::new(isa, self.mean);
        let along = Columns::new(isa, self.along);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(width)) {
            map2(
                isa,
                x,
                dy,
                dx,
                #[inline(always)]
                |k, x, dy| {
                    let distance = (x - high.at(k)) - low.at(k);
                    ((dy - mean.at(k)) - distance * along.at(k)) * scale.at(k)
                },
            );
        }
    }
}
