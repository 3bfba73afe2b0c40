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
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, Vector, zero};
use super::span::{Columns, chunk, map, map2};

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

/// How many rows fit a second pass from cache.
fn rows_per_pass(width: usize) -> usize {
    (PASS / width.max(1)).clamp(ROWS_PER_RUN, 8 * ROWS_PER_RUN)
}

/// The elements of such a pass.
const PASS: usize = 1 << 16;

/// Sums down the columns: `f(row, k)` added up over `rows` for each chunk `k`, in lanes over [`ROWS_PER_RUN`] rows and then in `f64`. The result
/// has one number for each lane of each chunk; the columns of the last chunk are at its end.
#[inline(always)]
fn column_sums<const N: usize, I: Isa, T: Real>(
    isa: I,
    rows: usize,
    chunks: usize,
    f: impl Fn(usize, usize) -> [Lanes<I, T>; N],
) -> Vec<[[f64; LANES]; N]> {
    let mut totals = vec![[[0f64; LANES]; N]; chunks];
    for first in (0..rows).step_by(ROWS_PER_RUN) {
        let rows = first..(first + ROWS_PER_RUN).min(rows);
        for (k, totals) in totals.iter_mut().enumerate() {
            let mut sums = [zero::<I, T>(isa); N];
            for row in rows.clone() {
                let new = f(row, k);
                for i in 0..N {
                    sums[i] = sums[i] + new[i];
                }
            }
            for i in 0..N {
                let sums = sums[i].to_array();
                for lane in 0..LANES {
                    totals[i][lane] += sums[lane].wide();
                }
            }
        }
    }
    totals
}

/// The columns of [`column_sums`], in order, from the lanes of their chunks.
#[inline(always)]
fn column_of(column: usize, width: usize) -> (usize, usize) {
    let (k, lane) = (column / LANES, column % LANES);
    let missing = ((k + 1) * LANES).saturating_sub(width);
    (k, lane + missing)
}

/// The moments of each column of `x`.
struct ColumnMoments<'a, E> {
    x: &'a [E],
    moments: &'a mut [Moments],
    center: bool,
}

impl<E: Elem> Kernel for ColumnMoments<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.moments.len();
        let chunks = width.div_ceil(LANES);
        for x in self.x.chunks(rows_per_pass(width) * width) {
            let rows = x.len() / width;
            let count = rows as f64;
            let mut shifts = vec![E::Acc::default(); width];
            if self.center {
                let sums = column_sums::<1, I, E::Acc>(
                    isa,
                    rows,
                    chunks,
                    #[inline(always)]
                    |row, k| [chunk(isa, &x[row * width..][..width], k)],
                );
                for (column, shift) in shifts.iter_mut().enumerate() {
                    let (k, lane) = column_of(column, width);
                    *shift = E::Acc::from_wide(sums[k][0][lane] / count);
                }
            }
            let shift = Columns::new(isa, &shifts);
            let sums = column_sums::<2, I, E::Acc>(
                isa,
                rows,
                chunks,
                #[inline(always)]
                |row, k| {
                    let d = chunk(isa, &x[row * width..][..width], k) - shift.at(k);
                    [d, d * d]
                },
            );
            let joint = self.moments[0].joint(count);
            for (column, all) in self.moments.iter_mut().enumerate() {
                let (k, lane) = column_of(column, width);
                // About zero the sums say nothing of a mean: an infinite one would spoil the squares.
                let first = if self.center { sums[k][0][lane] } else { 0. };
                let (rest, second) = (first / count, sums[k][1][lane]);
                *all = all.merge_by(
                    Moments {
                        count,
                        mean: Mean::sum(shifts[column].wide(), rest),
                        m2: second - first * rest,
                    },
                    joint,
                );
            }
        }
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
        let high = Columns::new(isa, &self.spread.high);
        let low = Columns::new(isa, &self.spread.low);
        let inv_std = Columns::new(isa, &self.spread.inv_std);
        let (x, dy) = (self.x, self.dy);
        let sums = column_sums::<2, I, E::Acc>(
            isa,
            x.len() / width,
            width.div_ceil(LANES),
            #[inline(always)]
            |row, k| {
                let x = chunk(isa, &x[row * width..][..width], k);
                let dy = chunk(isa, &dy[row * width..][..width], k);
                let normal = ((x - high.at(k)) - low.at(k)) * inv_std.at(k);
                [dy * normal, dy]
            },
        );
        for (column, (along, sum)) in along.iter_mut().zip(sum).enumerate() {
            let (k, lane) = column_of(column, width);
            *along = sums[k][0][lane];
            *sum = sums[k][1][lane];
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
