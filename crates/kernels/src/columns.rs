//! Batch norm where a channel has few neighbors in memory: `[N, C]`, or planes of fewer elements
//! than there are lanes.
//!
//! The tensor is taken as rows of `channels · inner` columns. Lanes run along the columns, sums
//! down the rows; columns of one channel are merged at the end.

use std::mem::MaybeUninit;

use super::activation::{Activation, ThroughActivation, activate};
use super::affine::AffinePair;
use super::buffer::{Part, Scratch, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block};
use super::grads::{Gradients, InputGrad, Wanted};
use super::loops::{ColumnValues, map, map2};
use super::moments::{Mean, Moments, parts};
use super::par;
use super::shape::Shape;
use super::simd::{Elem, Isa, Kernel, Lanes, Real};
use super::stats::{Statistics, Stats};

/// One number for each column, in the accumulator's precision.
fn per_column<T: Real>(shape: Shape, f: impl Fn(usize) -> f64) -> Vec<T> {
    (0..shape.channels)
        .flat_map(
            #[inline(always)]
            |channel| std::iter::repeat_n(T::from_f64(f(channel)), shape.inner),
        )
        .collect()
}

/// Factors that a channel is normalized by, for each of its columns.
struct Factors<T> {
    high: Vec<T>,
    low: Vec<T>,
    scale: Vec<T>,
    bias: Vec<T>,
}

impl<T: Real> Factors<T> {
    fn new(shape: Shape, stats: &[Stats], affine: AffinePair<T>) -> Self {
        let weight = |c: usize| affine.weight.map_or(1., |w| w[c].to_f64());
        Self {
            high: per_column(shape, |c| parts::<T>(stats[c].mean).0.to_f64()),
            low: per_column(shape, |c| parts::<T>(stats[c].mean).1.to_f64()),
            scale: per_column(shape, |c| stats[c].inv_std * weight(c)),
            bias: per_column(shape, |c| affine.bias.map_or(0., |b| b[c].to_f64())),
        }
    }

    #[inline(always)]
    fn lanes<I: Isa>(&self, isa: I) -> FactorLanes<'_, I, T> {
        FactorLanes {
            high: ColumnValues::new(isa, &self.high),
            low: ColumnValues::new(isa, &self.low),
            scale: ColumnValues::new(isa, &self.scale),
            bias: ColumnValues::new(isa, &self.bias),
        }
    }
}

/// [`Factors`] in lanes.
#[derive(Clone, Copy)]
struct FactorLanes<'a, I: Isa, T: Real> {
    high: ColumnValues<'a, I, T>,
    low: ColumnValues<'a, I, T>,
    scale: ColumnValues<'a, I, T>,
    bias: ColumnValues<'a, I, T>,
}

impl<I: Isa, T: Real> FactorLanes<'_, I, T> {
    /// The result for chunk `k` of a row.
    #[inline(always)]
    fn of(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        self.distance(k, v) * self.scale.at(k) + self.bias.at(k)
    }

    /// The results for a row.
    #[inline(always)]
    fn write<'o, X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        y: &'o mut [MaybeUninit<E>],
    ) -> &'o mut [E] {
        map(
            isa,
            x,
            y,
            #[inline(always)]
            |k, x| self.of(k, x),
        )
    }

    /// The distance from the mean.
    #[inline(always)]
    fn distance(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        (v - self.high.at(k)) - self.low.at(k)
    }

    /// The distance from the first number of the mean, for
    /// [`about_mean`](super::moments::about_mean).
    #[inline(always)]
    fn past_high(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        v - self.high.at(k)
    }
}

/// The moments of each channel; about zero where they are not `center`ed.
pub(crate) fn moments<E: Elem>(x: &[E], shape: Shape, center: bool) -> Vec<Moments> {
    let width = shape.channels * shape.inner;
    let per_block = rows_per_block(shape.outer, width);
    let mut blocks = vec![Moments::default(); shape.outer.div_ceil(per_block) * width];
    let jobs = x.chunks(per_block * width).zip(blocks.chunks_mut(width));
    par::run(
        x.len(),
        jobs.map(|(x, moments)| ColumnMoments { x, moments, center }),
    );
    merged(&blocks, shape)
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
    par::for_each(jobs, blocks.len(), |(job, moments)| {
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

pub(crate) fn forward<E: Elem>(
    x: &[E],
    shape: Shape,
    affine: AffinePair<E::Acc>,
    statistics: Statistics,
    activation: Option<Activation>,
) -> (Vec<E>, Vec<Stats>) {
    let width = shape.channels * shape.inner;
    let size = rows_per_block(shape.outer, width) * width;
    let stats: Vec<Stats> = match statistics {
        Statistics::Given(given) => given.to_vec(),
        Statistics::Own { center, eps } => Stats::of_moments(&moments(x, shape, center), eps),
    };
    let factors = &Factors::<E::Acc>::new(shape, &stats, affine);
    let y = fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(y);
        par::run(
            x.len(),
            blocks.map(|(x, y)| ColumnsForward {
                x,
                y,
                factors,
                activation,
            }),
        );
    });
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

impl<E: Elem> Kernel for ColumnMoments<'_, E> {
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
                    *shift = E::Acc::from_f64(*sum / count);
                }
            }
            let shift = ColumnValues::new(isa, &shifts);
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
                // About zero the sums say nothing of a mean: an infinite one would spoil the
                // squares.
                let first = if self.center { first[column] } else { 0. };
                let rest = first / count;
                *all = all.merge_by(
                    Moments {
                        count,
                        mean: Mean::sum(shifts[column].to_f64(), rest),
                        m2: second[column] - first * rest,
                    },
                    joint,
                );
            }
        }
    }
}

struct ColumnsForward<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    factors: &'a Factors<E::Acc>,
    activation: Option<Activation>,
}

impl<E: Elem> Kernel for ColumnsForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let width = self.factors.scale.len();
        let normal = self.factors.lanes(isa);
        let mut scratch = Scratch::new();
        for x in self.x.chunks_exact(width) {
            self.y.write(
                width,
                #[inline(always)]
                |y| match self.activation {
                    None => normal.write(isa, x, y),
                    Some(activation) => activate(
                        isa,
                        activation,
                        &mut scratch,
                        y,
                        #[inline(always)]
                        |u| normal.write(isa, x, u),
                    ),
                },
            );
        }
    }
}

/// `dy · act′(u)`, the cotangent of what [`forward`] does before its activation.
pub(crate) fn through<E: Elem>(
    x: &[E],
    dy: &[E],
    shape: Shape,
    affine: AffinePair<E::Acc>,
    stats: &[Stats],
    activation: Activation,
) -> Vec<E::Acc> {
    let width = shape.channels * shape.inner;
    let size = rows_per_block(shape.outer, width) * width;
    let factors = &Factors::<E::Acc>::new(shape, stats, affine);
    fill(x.len(), size, |g| {
        let blocks = x.chunks(size).zip(dy.chunks(size)).zip(g);
        let blocks = blocks.map(|((x, dy), g)| ColumnsThrough {
            x,
            dy,
            g,
            factors,
            activation,
        });
        par::run(x.len(), blocks);
    })
}

struct ColumnsThrough<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    g: Part<'a, E::Acc>,
    factors: &'a Factors<E::Acc>,
    activation: Activation,
}

impl<E: Elem> Kernel for ColumnsThrough<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let width = self.factors.scale.len();
        let normal = self.factors.lanes(isa);
        let mut scratch = Scratch::new();
        for (x, dy) in self.x.chunks_exact(width).zip(self.dy.chunks_exact(width)) {
            scratch.clear();
            scratch.push(
                width,
                #[inline(always)]
                |u| normal.write(isa, x, u),
            );
            let u = scratch.get();
            self.g.write(
                width,
                #[inline(always)]
                |g| {
                    isa.call(ThroughActivation {
                        activation: self.activation,
                        u,
                        dy,
                        g,
                    })
                },
            );
        }
    }
}

pub(crate) fn backward<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    wanted: Wanted,
) -> Gradients<E> {
    let Some(center) = wanted.own else {
        return through_given(x, dy, shape, weight, stats, wanted.params);
    };
    let [dweight, dbias] = grad_sums(x, dy, shape, stats);
    let count = shape.per_channel();
    let means = dweight.iter().zip(&dbias);
    let means: Vec<_> = means
        .map(|(along, sum)| [along / count, if center { sum / count } else { 0. }])
        .collect();
    let dx = grad_input(x, dy, shape, weight, stats, &means);
    Gradients { dx, dweight, dbias }
}

/// The gradients through statistics that do not move with `x`: all in one sweep.
fn through_given<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    params: bool,
) -> Gradients<E> {
    let width = shape.channels * shape.inner;
    let per_block = rows_per_block(shape.outer, width);
    let size = per_block * width;
    let factors = &Factors::<E::Acc>::new(shape, stats, AffinePair { weight, bias: None });
    let mut sums = vec![0f64; 2 * shape.outer.div_ceil(per_block) * width];
    let dx = fill(x.len(), size, |dx| {
        let pairs = x.chunks(size).zip(dy.chunks(size));
        let blocks = pairs.zip(sums.chunks_mut(2 * width)).zip(dx);
        let blocks = blocks.map(|(((x, dy), sums), dx)| ColumnsGivenBackward {
            sums: ColumnGradSums {
                x,
                dy,
                factors,
                sums,
            },
            dx,
            params,
        });
        par::run(x.len(), blocks);
    });
    let [dweight, dbias] = per_channel::<E::Acc>(shape, stats, &sums);
    Gradients { dx, dweight, dbias }
}

/// The sums of `dy · x̂` and of `dy` of each channel.
pub(crate) fn grad_sums<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    shape: Shape,
    stats: &[Stats],
) -> [Vec<f64>; 2] {
    let width = shape.channels * shape.inner;
    let per_block = rows_per_block(shape.outer, width);
    let size = per_block * width;
    let factors = &Factors::<E::Acc>::new(shape, stats, AffinePair::NONE);
    let mut sums = vec![0f64; 2 * shape.outer.div_ceil(per_block) * width];
    let pairs = x.chunks(size).zip(dy.chunks(size));
    let blocks = pairs.zip(sums.chunks_mut(2 * width));
    let blocks = blocks.map(|((x, dy), sums)| ColumnGradSums {
        x,
        dy,
        factors,
        sums,
    });
    par::run(x.len(), blocks);
    per_channel::<E::Acc>(shape, stats, &sums)
}

/// `dx` from the means of `dy · x̂` and of `dy` of each channel.
pub(crate) fn grad_input<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    means: &[[f64; 2]],
) -> Vec<E> {
    let width = shape.channels * shape.inner;
    let size = rows_per_block(shape.outer, width) * width;
    let factors = &Factors::<E::Acc>::new(shape, stats, AffinePair { weight, bias: None });
    let along = &per_column(shape, |c| means[c][0] * stats[c].inv_std);
    let mean = &per_column(shape, |c| means[c][1]);
    fill(x.len(), size, |dx| {
        let blocks = x.chunks(size).zip(dy.chunks(size)).zip(dx);
        let blocks = blocks.map(|((x, dy), dx)| ColumnsInputGrad {
            x,
            dy,
            dx,
            factors,
            mean,
            along,
        });
        par::run(x.len(), blocks);
    })
}

/// The sums of `dy · x̂` and of `dy` of each channel, from those that each block has of its
/// columns.
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
struct ColumnGradSums<'a, E: Elem, D> {
    x: &'a [E],
    dy: &'a [D],
    factors: &'a Factors<E::Acc>,
    sums: &'a mut [f64],
}

impl<E: Elem, D: Elem<Acc = E::Acc>> Kernel for ColumnGradSums<'_, E, D> {
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

/// Backward through statistics that do not depend on `x`: `dx = dy · scale`, and the sums where
/// anybody wants them.
struct ColumnsGivenBackward<'a, E: Elem, D> {
    sums: ColumnGradSums<'a, E, D>,
    dx: Part<'a, E>,
    params: bool,
}

impl<E: Elem, D: Elem<Acc = E::Acc>> Kernel for ColumnsGivenBackward<'_, E, D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let width = self.sums.sums.len() / 2;
        let normal = self.sums.factors.lanes(isa);
        let dys = self.sums.dy.chunks_exact(width);
        if !self.params {
            for dy in dys {
                self.dx.write(
                    width,
                    #[inline(always)]
                    |dx| {
                        map(
                            isa,
                            dy,
                            dx,
                            #[inline(always)]
                            |k, dy| dy * normal.scale.at(k),
                        )
                    },
                );
            }
            return;
        }
        let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, self.sums.sums);
        for (x, dy) in self.sums.x.chunks_exact(width).zip(dys) {
            self.dx.write(
                width,
                #[inline(always)]
                |dx| {
                    columns.add_and_map(
                        isa,
                        (x, dy, dx),
                        #[inline(always)]
                        |k, x, dy| [dy * normal.past_high(k, x), dy],
                        #[inline(always)]
                        |k, _, dy| dy * normal.scale.at(k),
                    )
                },
            );
        }
        columns.finish(isa);
    }
}

/// The gradient of `x` from what is the same for each column.
struct ColumnsInputGrad<'a, E: Elem, D> {
    x: &'a [E],
    dy: &'a [D],
    dx: Part<'a, E>,
    factors: &'a Factors<E::Acc>,
    mean: &'a [E::Acc],
    along: &'a [E::Acc],
}

impl<E: Elem, D: Elem<Acc = E::Acc>> Kernel for ColumnsInputGrad<'_, E, D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let width = self.mean.len();
        let normal = self.factors.lanes(isa);
        let mean = ColumnValues::new(isa, self.mean);
        let along = ColumnValues::new(isa, self.along);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for (x, dy) in rows {
            self.dx.write(
                width,
                #[inline(always)]
                |dx| {
                    map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |k, x, dy| {
                            let grad = InputGrad {
                                mean: mean.at(k),
                                along: along.at(k),
                                scale: normal.scale.at(k),
                            };
                            grad.of(normal.distance(k, x), dy)
                        },
                    )
                },
            );
        }
    }
}
