//! Batch norm where a channel has few neighbors in memory: `[N, C]`, or planes of fewer elements than there are lanes.
//!
//! The tensor is taken as rows of `channels · inner` columns. Lanes run along the columns, sums down the rows; columns of one channel are merged at
//! the end.

use std::mem::MaybeUninit;

use super::buffer::filled;
use super::moments::{Mean, Moments, parts};
use super::par;
use super::planes::{Shape, Statistics, Wanted};
use super::rows::{Affine, Gradients, Stats};
use super::simd::{Elem, Isa, Kernel, Lanes, Level, Real};
use super::span::{Columns, map, map2};
use super::totals::{ColumnSums, combined, rows_per_block};

/// One number for each column, in the accumulator's precision.
fn per_column<T: Real>(shape: Shape, f: impl Fn(usize) -> f64) -> Vec<T> {
    (0..shape.channels)
        .flat_map(
            #[inline(always)]
            |channel| std::iter::repeat_n(T::from_wide(f(channel)), shape.inner),
        )
        .collect()
}

/// What a channel is normalized by, for each of its columns.
struct Factors<T> {
    high: Vec<T>,
    low: Vec<T>,
    scale: Vec<T>,
    bias: Vec<T>,
}

impl<T: Elem<Acc = T> + Real> Factors<T> {
    fn new(shape: Shape, stats: &[Stats], affine: Affine<T>) -> Self {
        let weight = |c: usize| affine.weight.map_or(1., |w| w[c].wide());
        Self {
            high: per_column(shape, |c| parts::<T>(stats[c].mean).0.wide()),
            low: per_column(shape, |c| parts::<T>(stats[c].mean).1.wide()),
            scale: per_column(shape, |c| stats[c].inv_std * weight(c)),
            bias: per_column(shape, |c| affine.bias.map_or(0., |b| b[c].wide())),
        }
    }

    #[inline(always)]
    fn lanes<I: Isa>(&self, isa: I) -> FactorLanes<'_, I, T> {
        FactorLanes {
            high: Columns::new(isa, &self.high),
            low: Columns::new(isa, &self.low),
            scale: Columns::new(isa, &self.scale),
            bias: Columns::new(isa, &self.bias),
        }
    }
}

/// [`Factors`] in lanes.
#[derive(Clone, Copy)]
struct FactorLanes<'a, I: Isa, T: Real> {
    high: Columns<'a, I, T>,
    low: Columns<'a, I, T>,
    scale: Columns<'a, I, T>,
    bias: Columns<'a, I, T>,
}

impl<I: Isa, T: Elem<Acc = T> + Real> FactorLanes<'_, I, T> {
    /// The result for chunk `k` of a row.
    #[inline(always)]
    fn of(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        self.distance(k, v) * self.scale.at(k) + self.bias.at(k)
    }

    /// The distance from the mean.
    #[inline(always)]
    fn distance(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        (v - self.high.at(k)) - self.low.at(k)
    }

    /// The distance from the first number of the mean, for [`about_mean`](super::moments::about_mean).
    #[inline(always)]
    fn past_high(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        v - self.high.at(k)
    }
}

/// What each channel is normalized by: what is given, or what `x` gives.
fn moments<E: Elem>(x: &[E], shape: Shape, statistics: Statistics) -> Vec<Stats>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let (center, eps) = match statistics {
        Statistics::Given(given) => return given.to_vec(),
        Statistics::Own { center, eps } => (center, eps),
    };
    let width = shape.channels * shape.inner;
    let per_block = rows_per_block(shape.outer, width);
    let level = Level::current();
    let mut blocks = vec![Moments::default(); shape.outer.div_ceil(per_block) * width];
    let jobs = x
        .chunks(per_block * width)
        .zip(blocks.chunks_mut(width))
        .map(|(x, moments)| ColumnMoments { x, moments, center })
        .collect();
    par::run(jobs, x.len(), |job| level.run(job));
    let moments = merged(&blocks, shape);
    let stats = moments.iter().map(
        #[inline(always)]
        |m| Stats::new(m.mean, m.var(), eps),
    );
    stats.collect()
}

/// The moments of each channel, from those that each block has of its columns.
fn merged(blocks: &[Moments], shape: Shape) -> Vec<Moments> {
    /// So many channels are worth a thread.
    const CHANNELS: usize = 1 << 7;
    let Shape {
        channels, inner, ..
    } = shape;
    let width = channels * inner;
    // Every channel has as many values in a column of a block as the others.
    let mut all = Moments::default();
    let mut steps = vec![];
    for block in blocks.chunks(width) {
        for column in &block[..inner] {
            let joint = all.joint(column.count);
            steps.push(joint);
            all = all.merge_by(*column, joint);
        }
    }
    let mut moments = vec![Moments::default(); channels];
    let jobs = moments.chunks_mut(CHANNELS).enumerate().collect();
    par::run(jobs, blocks.len(), |(job, moments)| {
        for (block, steps) in blocks.chunks(width).zip(steps.chunks(inner)) {
            let columns = block[job * CHANNELS * inner..].chunks(inner);
            for (channel, columns) in moments.iter_mut().zip(columns) {
                for (column, joint) in columns.iter().zip(steps) {
                    *channel = channel.merge_by(*column, *joint);
                }
            }
        }
    });
    moments
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
    let per_block = rows_per_block(shape.outer, width);
    let level = Level::current();
    let stats = moments(x, shape, statistics);
    let factors = Factors::<E::Acc>::new(shape, &stats, affine);
    // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
    let y = unsafe {
        filled(x.len(), |y| {
            let jobs = x
                .chunks(per_block * width)
                .zip(y.chunks_mut(per_block * width))
                .map(|(x, y)| Forward {
                    x,
                    y,
                    factors: &factors,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    (y, stats)
}

/// How many rows fit a second pass from cache.
fn rows_per_pass(width: usize) -> usize {
    (PASS / width.max(1)).clamp(64, 512)
}

/// The elements of such a pass.
const PASS: usize = 1 << 16;

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
        for x in self.x.chunks(rows_per_pass(width) * width) {
            let count = (x.len() / width) as f64;
            let mut sums = vec![0f64; 2 * width];
            let mut shifts = vec![E::Acc::default(); width];
            if self.center {
                let mut columns = ColumnSums::<I, E::Acc, 1>::new(isa, &mut sums[..width]);
                // One after the other: rows side by side are not fetched ahead.
                for row in x.chunks_exact(width) {
                    columns.add(
                        isa,
                        row,
                        #[inline(always)]
                        |_, v| [v],
                    );
                }
                columns.finish(isa);
                for (shift, sum) in shifts.iter_mut().zip(&sums) {
                    *shift = E::Acc::from_wide(*sum / count);
                }
            }
            let shift = Columns::new(isa, &shifts);
            sums.fill(0.);
            let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, &mut sums);
            columns.add_rows(
                isa,
                x,
                #[inline(always)]
                |k, v| {
                    let d = v - shift.at(k);
                    [d, d * d]
                },
            );
            columns.finish(isa);
            let (first, second) = sums.split_at(width);
            let joint = self.moments[0].joint(count);
            for (column, all) in self.moments.iter_mut().enumerate() {
                // About zero the sums say nothing of a mean: an infinite one would spoil the squares.
                let first = if self.center { first[column] } else { 0. };
                let rest = first / count;
                *all = all.merge_by(
                    Moments {
                        count,
                        mean: Mean::sum(shifts[column].wide(), rest),
                        m2: second[column] - first * rest,
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
    factors: &'a Factors<E::Acc>,
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.factors.scale.len();
        let normal = self.factors.lanes(isa);
        let rows = self.x.chunks_exact(width);
        for (x, y) in rows.zip(self.y.chunks_exact_mut(width)) {
            map(
                isa,
                x,
                y,
                #[inline(always)]
                |k, v| normal.of(k, v),
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
    wanted: Wanted,
) -> Gradients<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let width = shape.channels * shape.inner;
    let per_block = rows_per_block(shape.outer, width);
    let level = Level::current();
    let factors = Factors::<E::Acc>::new(shape, stats, Affine { weight, bias: None });
    let mut blocks = vec![0f64; 2 * shape.outer.div_ceil(per_block) * width];
    let pairs = x
        .chunks(per_block * width)
        .zip(dy.chunks(per_block * width))
        .zip(blocks.chunks_mut(2 * width));
    let sums_of = |((x, dy), sums)| Sums {
        x,
        dy,
        factors: &factors,
        sums,
    };
    let Some(center) = wanted.own else {
        // SAFETY: the blocks cover all rows, and a block writes every element of its rows.
        let dx = unsafe {
            filled(x.len(), |dx| {
                let jobs = pairs
                    .zip(dx.chunks_mut(per_block * width))
                    .map(|(pair, dx)| Given {
                        sums: sums_of(pair),
                        dx,
                        params: wanted.params,
                    })
                    .collect();
                par::run(jobs, x.len(), |job| level.run(job));
            })
        };
        let [dweight, dbias] = per_channel::<E::Acc>(shape, stats, &blocks);
        return Gradients { dx, dweight, dbias };
    };
    let jobs = pairs.map(sums_of).collect();
    par::run(jobs, x.len(), |job: Sums<E>| level.run(job));
    let [dweight, dbias] = per_channel::<E::Acc>(shape, stats, &blocks);
    let count = shape.per_channel();
    let mean = per_column(shape, |c| if center { dbias[c] / count } else { 0. });
    let along = per_column(shape, |c| dweight[c] / count * stats[c].inv_std);
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
                    factors: &factors,
                    mean: &mean,
                    along: &along,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    Gradients { dx, dweight, dbias }
}

/// The sums of `dy · x̂` and of `dy` of each channel, from those that each block has of its columns.
fn per_channel<T: Real>(shape: Shape, stats: &[Stats], blocks: &[f64]) -> [Vec<f64>; 2] {
    let columns = combined(blocks, 2 * shape.channels * shape.inner);
    let (about_high, sum) = columns.split_at(columns.len() / 2);
    let [mut along, sum] = [about_high, sum].map(|columns| -> Vec<f64> {
        let channels = columns.chunks(shape.inner);
        channels.map(|columns| columns.iter().sum()).collect()
    });
    for ((along, sum), stats) in along.iter_mut().zip(&sum).zip(stats) {
        *along = stats.along::<T>([*along, *sum]);
    }
    [along, sum]
}

/// The sums of `dy · (x − high)` of each column, then those of `dy`.
struct Sums<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    factors: &'a Factors<E::Acc>,
    sums: &'a mut [f64],
}

impl<E: Elem> Kernel for Sums<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.sums.len() / 2;
        let normal = self.factors.lanes(isa);
        let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, self.sums);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for (x, dy) in rows {
            columns.add2(
                isa,
                x,
                dy,
                #[inline(always)]
                |k, x, dy| [dy * normal.past_high(k, x), dy],
            );
        }
        columns.finish(isa);
    }
}

/// Back through statistics that do not depend on `x`: `dx = dy · scale`, and the sums where anybody wants them.
struct Given<'a, E: Elem> {
    sums: Sums<'a, E>,
    dx: &'a mut [MaybeUninit<E>],
    params: bool,
}

impl<E: Elem> Kernel for Given<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.sums.sums.len() / 2;
        let normal = self.sums.factors.lanes(isa);
        let rows = self.sums.dy.chunks_exact(width);
        let rows = rows.zip(self.dx.chunks_exact_mut(width));
        if !self.params {
            for (dy, dx) in rows {
                map(
                    isa,
                    dy,
                    dx,
                    #[inline(always)]
                    |k, dy| dy * normal.scale.at(k),
                );
            }
            return;
        }
        let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, self.sums.sums);
        for (x, (dy, dx)) in self.sums.x.chunks_exact(width).zip(rows) {
            columns.add_and_map(
                isa,
                (x, dy, dx),
                #[inline(always)]
                |k, x, dy| [dy * normal.past_high(k, x), dy],
                #[inline(always)]
                |k, _, dy| dy * normal.scale.at(k),
            );
        }
        columns.finish(isa);
    }
}

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<E>],
    factors: &'a Factors<E::Acc>,
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
        let width = self.mean.len();
        let normal = self.factors.lanes(isa);
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
                    let g = (dy - mean.at(k)) - normal.distance(k, x) * along.at(k);
                    g * normal.scale.at(k)
                },
            );
        }
    }
}
