//! Batch norm of `[outer, channels, inner]` that lies in memory as `[outer, inner, channels]`.
//!
//! A position of a sample is a row of channels: lanes run along them, sums down the rows, as in [`columns`](super::columns). What goes out, and the
//! gradient that comes in, has the channels first: some positions of sixteen channels at a time are turned in a tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::buffer::filled;
use super::columns::{Factors, moments, per_channel, per_column};
use super::par;
use super::planes::{Shape, Statistics, Wanted};
use super::rows::{Affine, Gradients, Stats};
use super::shared::Shared;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level};
use super::span::{Columns, chunk};
use super::totals::{ColumnSums, rows_per_block};

/// The positions of a tile: enough that a part of a plane is read and written along a few cache lines, which the processor then fetches ahead.
const POSITIONS: usize = 4 * LANES;

/// Some positions of [`LANES`] channels, in both orders.
struct Tile<E> {
    by_channel: [[E; POSITIONS]; LANES],
    by_position: [[E; LANES]; POSITIONS],
}

impl<E: Elem> Tile<E> {
    fn new() -> Self {
        Self {
            by_channel: [[E::default(); POSITIONS]; LANES],
            by_position: [[E::default(); LANES]; POSITIONS],
        }
    }

    /// Reads the planes of the channels that are new in chunk `k`.
    #[inline(always)]
    fn read(&mut self, from: &[E], shape: Shape, at: &Positions, k: usize) {
        for (lane, channel) in new_channels(shape, k) {
            let from = &from[part(shape, at, channel)];
            match from.first_chunk() {
                Some(from) => self.by_channel[lane] = *from,
                None => self.by_channel[lane][..from.len()].copy_from_slice(from),
            }
        }
        for first in (0..at.range.len()).step_by(LANES) {
            for p in 0..LANES {
                for c in 0..LANES {
                    self.by_position[first + p][c] = self.by_channel[c][first + p];
                }
            }
        }
    }

    /// Writes the planes of the channels that are new in chunk `k`.
    ///
    /// # Safety
    /// Nobody else may have these parts of `out` in use.
    #[inline(always)]
    unsafe fn write(&mut self, out: Shared<E>, shape: Shape, at: &Positions, k: usize) {
        for first in (0..at.range.len()).step_by(LANES) {
            for c in 0..LANES {
                for p in 0..LANES {
                    self.by_channel[c][first + p] = self.by_position[first + p][c];
                }
            }
        }
        for (lane, channel) in new_channels(shape, k) {
            // SAFETY: as the caller promises; parts of different channels do not overlap.
            let out = unsafe { out.part(part(shape, at, channel)) };
            match out.first_chunk_mut() {
                Some(out) => *out = self.by_channel[lane].map(MaybeUninit::new),
                None => {
                    for (out, v) in out.iter_mut().zip(&self.by_channel[lane]) {
                        out.write(*v);
                    }
                }
            }
        }
    }
}

/// The shape in which all positions of all samples are rows.
fn as_rows(shape: Shape) -> Shape {
    Shape {
        outer: shape.outer * shape.inner,
        channels: shape.channels,
        inner: 1,
    }
}

/// Where a few neighboring positions of one sample are.
struct Positions {
    sample: usize,
    /// In the sample.
    range: Range<usize>,
    /// The first of them, counted from the first row of the job.
    row: usize,
}

/// The rows `rows` by tiles, none of which reaches from one sample into the next.
#[inline(always)]
fn tiles(shape: Shape, rows: Range<usize>) -> impl Iterator<Item = Positions> {
    let mut next = rows.start;
    std::iter::from_fn(move || {
        let (sample, from) = (next / shape.inner, next % shape.inner);
        let count = POSITIONS.min(shape.inner - from).min(rows.end - next);
        let row = next - rows.start;
        next += count;
        (count > 0).then_some(Positions {
            sample,
            range: from..from + count,
            row,
        })
    })
}

/// The channels that are new in chunk `k` of a row, by their lanes.
#[inline(always)]
fn new_channels(shape: Shape, k: usize) -> impl Iterator<Item = (usize, usize)> {
    let end = ((k + 1) * LANES).min(shape.channels);
    let new = end - k * LANES;
    (LANES - new..LANES).zip(end - new..end)
}

/// The part of the plane of a channel that `at` covers.
#[inline(always)]
fn part(shape: Shape, at: &Positions, channel: usize) -> Range<usize> {
    let plane = shape.plane(at.sample, channel).start;
    plane + at.range.start..plane + at.range.end
}

pub(crate) fn forward<E: Elem>(
    x: &[E],
    shape: Shape,
    affine: Affine<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(shape.channels));
    let rows = as_rows(shape);
    let per_block = rows_per_block(rows.outer, rows.channels);
    let level = Level::current();
    let stats = moments(x, rows, statistics);
    let factors = Factors::<E::Acc>::new(rows, &stats, affine);
    // SAFETY: the blocks cover all positions, and a block writes each channel of its positions.
    let y = unsafe {
        filled(x.len(), |y| {
            let y = Shared::new(y);
            let jobs = x
                .chunks(per_block * shape.channels)
                .enumerate()
                .map(|(block, x)| Forward {
                    x,
                    first: block * per_block,
                    y,
                    shape,
                    factors: &factors,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    (y, stats)
}

struct Forward<'a, E: Elem> {
    x: &'a [E],
    first: usize,
    y: Shared<'a, E>,
    shape: Shape,
    factors: &'a Factors<E::Acc>,
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.shape.channels;
        let normal = self.factors.lanes(isa);
        let mut tile = Tile::new();
        let rows = self.first..self.first + self.x.len() / width;
        for at in tiles(self.shape, rows) {
            let x = &self.x[at.row * width..][..at.range.len() * width];
            for k in 0..width.div_ceil(LANES) {
                for (row, out) in x.chunks_exact(width).zip(&mut tile.by_position) {
                    *out = E::narrow(isa, normal.of(k, chunk(isa, row, k)));
                }
                // SAFETY: these positions are this job's alone.
                unsafe { tile.write(self.y, self.shape, &at, k) };
            }
        }
    }
}

/// What flows back into `x` from `dy`, whose channels come first, as those of the result.
pub(crate) fn backward<E: Elem>(
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
    assert_eq!(x.len(), shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), shape.channels);
    let rows = as_rows(shape);
    let width = shape.channels;
    let per_block = rows_per_block(rows.outer, width);
    let level = Level::current();
    let affine = Affine { weight, bias: None };
    let factors = Factors::<E::Acc>::new(rows, stats, affine);
    let mut blocks = vec![0f64; 2 * rows.outer.div_ceil(per_block) * width];
    if wanted.own.is_some() || wanted.params {
        let jobs = x
            .chunks(per_block * width)
            .zip(blocks.chunks_mut(2 * width))
            .enumerate()
            .map(|(block, (x, sums))| Sums {
                x,
                dy,
                first: block * per_block,
                shape,
                factors: &factors,
                sums,
            })
            .collect();
        par::run(jobs, x.len(), |job: Sums<E>| level.run(job));
    }
    let [dweight, dbias] = per_channel::<E::Acc>(rows, stats, &blocks);
    let count = shape.per_channel();
    let mean = per_column(rows, |c| match wanted.own {
        Some(true) => dbias[c] / count,
        _ => 0.,
    });
    let along = per_column(rows, |c| match wanted.own {
        Some(_) => dweight[c] / count * stats[c].inv_std,
        None => 0.,
    });
    // SAFETY: the blocks cover all positions, and a block writes each channel of its positions.
    let dx = unsafe {
        filled(x.len(), |dx| {
            let dx = Shared::new(dx);
            let jobs = x
                .chunks(per_block * width)
                .enumerate()
                .map(|(block, x)| Backward {
                    x,
                    dy,
                    dx,
                    first: block * per_block,
                    shape,
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

/// The sums of `dy · (x − high)` of each channel, then those of `dy`.
struct Sums<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    first: usize,
    shape: Shape,
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
        let width = self.shape.channels;
        let normal = self.factors.lanes(isa);
        let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, self.sums);
        let mut tile = Tile::new();
        let rows = self.first..self.first + self.x.len() / width;
        for at in tiles(self.shape, rows) {
            let x = &self.x[at.row * width..][..at.range.len() * width];
            for (k, sums) in columns.chunks().iter_mut().enumerate() {
                tile.read(self.dy, self.shape, &at, k);
                for (row, dy) in x.chunks_exact(width).zip(&tile.by_position) {
                    let dy = E::load(isa, dy);
                    sums[0] = sums[0] + dy * normal.from_high(k, chunk(isa, row, k));
                    sums[1] = sums[1] + dy;
                }
            }
            columns.added(isa, at.range.len());
        }
        columns.finish(isa);
    }
}

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: Shared<'a, E>,
    first: usize,
    shape: Shape,
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
        let width = self.shape.channels;
        let normal = self.factors.lanes(isa);
        let (mean, along) = (Columns::new(isa, self.mean), Columns::new(isa, self.along));
        let mut tile = Tile::new();
        let rows = self.first..self.first + self.x.len() / width;
        for at in tiles(self.shape, rows) {
            let x = &self.x[at.row * width..][..at.range.len() * width];
            for k in 0..width.div_ceil(LANES) {
                tile.read(self.dy, self.shape, &at, k);
                for (row, dy) in x.chunks_exact(width).zip(&mut tile.by_position) {
                    let distance: Lanes<I, E::Acc> = normal.distance(k, chunk(isa, row, k));
                    let g = (E::load(isa, dy) - mean.at(k)) - distance * along.at(k);
                    *dy = E::narrow(isa, g * normal.scale.at(k));
                }
                // SAFETY: these positions are this job's alone.
                unsafe { tile.write(self.dx, self.shape, &at, k) };
            }
        }
    }
}
