//! Layer norm and RMS norm: each row by its own statistics, each column with its own weight and
//! bias.

use std::borrow::Cow;
use std::iter::repeat_with;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activation::{Activation, activate, through};
use super::affine::{AffinePair, Normal};
use super::buffer::{Part, Scratch, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block, whole_chunks};
use super::grads::{Gradients, InputGrad};
use super::loops::{ColumnFactor, ColumnValues, map, map2, store_tail, sums2, tail};
use super::moments::Moments;
use super::par;
use super::shape::Shape;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Real, splat, zero};
use super::spread::{Frame, NormalizedBy, Spread};
use super::stats::Stats;
use super::{slice_moments, spread};

/// Options in which layer norm and RMS norm differ.
#[derive(Debug, Clone, Copy)]
pub struct RowSpec {
    /// The length of a row.
    pub len: usize,
    /// Subtract the mean.
    pub center: bool,
    /// Added to the variance.
    pub eps: f64,
    /// Round the normalized value to the element before it is multiplied by the weight.
    pub round_first: bool,
    /// How many weights and biases there are: each serves a run of neighboring rows, all of them
    /// equally many.
    pub pairs: usize,
    /// Follows weight and bias.
    pub activation: Option<Activation>,
}

impl RowSpec {
    /// How many of `rows` rows have a weight and a bias in common.
    fn rows_per_pair(self, rows: usize) -> usize {
        assert!(self.pairs > 0 && rows.is_multiple_of(self.pairs));
        rows / self.pairs
    }
}

/// `y` for all rows of `x`, and what they were normalized by.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    affine: AffinePair<E::Acc>,
    spec: RowSpec,
) -> (Vec<E>, Vec<Stats>) {
    forward_keeping(x, affine, spec, true)
}

/// [`forward`] that keeps no statistics.
pub(crate) fn inference<E: Elem>(x: &[E], affine: AffinePair<E::Acc>, spec: RowSpec) -> Vec<E> {
    forward_keeping(x, affine, spec, false).0
}

/// [`forward`], with no statistics unless it is to `keep` them.
fn forward_keeping<E: Elem>(
    x: &[E],
    affine: AffinePair<E::Acc>,
    spec: RowSpec,
    keep: bool,
) -> (Vec<E>, Vec<Stats>) {
    let rows = x.len() / spec.len;
    let rows_per_pair = spec.rows_per_pair(rows);
    assert_eq!(x.len(), rows * spec.len);
    assert!(affine.fits(spec.pairs * spec.len));
    if par::divides(rows, spec.len) {
        return forward_divided(x, affine, spec);
    }
    let per_block = par::items_per_block(rows, spec.len);
    let size = per_block * spec.len;
    let mut stats = vec![Stats::NONE; if keep { rows } else { 0 }];
    let y = fill(x.len(), size, |y| {
        let kept = stats
            .chunks_mut(per_block)
            .map(Some)
            .chain(repeat_with(|| None));
        let blocks = x.chunks(size).zip(y).zip(kept).enumerate();
        let blocks = blocks.map(|(block, ((x, y), stats))| RowsForward {
            x,
            y,
            stats,
            first: block * per_block,
            rows_per_pair,
            affine,
            spec,
        });
        match spec.activation {
            None => par::run(x.len(), blocks),
            Some(activation) => {
                let blocks = blocks.map(|rows| ActivatedForward { rows, activation });
                par::run(x.len(), blocks);
            }
        }
    });
    (y, stats)
}

/// Rows as a frame.
fn frame(stats: &[Stats], spec: RowSpec) -> Frame<'_> {
    let (rows, inner) = (stats.len(), spec.len);
    let by = NormalizedBy::Groups(stats);
    if spec.pairs == 1 {
        let shape = Shape {
            outer: rows,
            channels: 1,
            inner,
        };
        return Frame {
            shape,
            by,
            spread: Spread::Column,
        };
    }
    Frame {
        shape: Shape {
            outer: spec.pairs,
            channels: spec.rows_per_pair(rows),
            inner,
        },
        by,
        spread: Spread::SampleAndColumn,
    }
}

/// [`forward`] of rows that are divided among threads, pass by pass.
fn forward_divided<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    affine: AffinePair<X::Acc>,
    spec: RowSpec,
) -> (Vec<E>, Vec<Stats>) {
    let moments = slice_moments::of_rows(x, spec.len, spec.center);
    let stats = Stats::of_moments(&moments, spec.eps);
    let y = spread::normalize(
        x,
        frame(&stats, spec),
        affine,
        spec.round_first,
        spec.activation,
    );
    (y, stats)
}

/// How many rows go forward together, so that they need not wait for each other.
const ROWS: usize = 4;

/// How many rows go backward together, so that the sums of a column are read and written once for
/// all of them. The numbers of more would not stay in registers.
const ROWS_BACKWARD: usize = 2;

/// The longest row for which interleaving [`ROWS`] pays: so many stay in the first-level cache, and
/// one is no longer than a run.
const SHORT: usize = 1024;

struct RowsForward<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    /// Where the statistics are kept.
    stats: Option<&'a mut [Stats]>,
    /// The first row.
    first: usize,
    rows_per_pair: usize,
    affine: AffinePair<'a, E::Acc>,
    spec: RowSpec,
}

/// Runs of rows that have a weight and a bias in common: the pair of each run, and its rows,
/// counted from `first`.
#[inline(always)]
fn runs(
    first: usize,
    rows: usize,
    rows_per_pair: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (from, to) = (
        first / rows_per_pair,
        (first + rows).div_ceil(rows_per_pair),
    );
    (from..to).map(
        #[inline(always)]
        move |pair| {
            let start = (pair * rows_per_pair).max(first);
            let end = ((pair + 1) * rows_per_pair).min(first + rows);
            (pair, start - first..end - first)
        },
    )
}

impl<E: Elem> Kernel for RowsForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let len = self.spec.len;
        for (pair, rows) in runs(self.first, self.x.len() / len, self.rows_per_pair) {
            let norm = Normalizer::new(isa, self.affine.part(pair, len), self.spec);
            let x = &self.x[rows.start * len..rows.end * len];
            for (group, x) in x.chunks(ROWS * len).enumerate() {
                let mut passing = [Stats::NONE; ROWS];
                let stats = match &mut self.stats {
                    Some(stats) => &mut stats[rows.start + group * ROWS..][..x.len() / len],
                    None => &mut passing[..x.len() / len],
                };
                norm.rows(isa, x, &mut self.y, stats);
            }
        }
    }
}

/// Normalization of one row after the other.
struct Normalizer<'a, I: Isa, T: Real> {
    weight: Option<ColumnValues<'a, I, T>>,
    bias: Option<ColumnValues<'a, I, T>>,
    spec: RowSpec,
}

impl<'a, I: Isa, T: Real> Normalizer<'a, I, T> {
    #[inline(always)]
    fn new(isa: I, affine: AffinePair<'a, T>, spec: RowSpec) -> Self {
        Self {
            weight: affine.weight.map(
                #[inline(always)]
                |w| ColumnValues::new(isa, w),
            ),
            bias: affine.bias.map(
                #[inline(always)]
                |b| ColumnValues::new(isa, b),
            ),
            spec,
        }
    }

    /// Writes `y` of a few rows `x`, and what they were normalized by to `stats`.
    ///
    /// Short rows take each step together: the sums of one are formed while those of another are
    /// still on their way to a mean.
    #[inline(always)]
    fn rows<E: Elem<Acc = T>>(&self, isa: I, x: &[E], y: &mut Part<E>, stats: &mut [Stats]) {
        let RowSpec {
            len, center, eps, ..
        } = self.spec;
        let rows = x.chunks_exact(len);
        if len > SHORT || stats.len() < ROWS || !center {
            for (x, stats) in rows.zip(stats) {
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
        for (x, stats) in rows.zip(stats) {
            self.write(isa, *stats, x, y);
        }
    }

    #[inline(always)]
    fn write<X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        stats: Stats,
        x: &[X],
        y: &mut Part<E>,
    ) {
        let normal = Normal::<I, T>::new(isa, stats);
        let round = self.spec.round_first;
        y.write(
            x.len(),
            #[inline(always)]
            |y| normal.write(isa, x, y, round, self.weight, self.bias),
        );
    }

    /// Writes what an activation follows, of a row `x`, with the normalized value rounded to `R`.
    #[inline(always)]
    fn write_wide<'o, R: Elem<Acc = T>, X: Elem<Acc = T>>(
        &self,
        isa: I,
        stats: Stats,
        x: &[X],
        u: &'o mut [MaybeUninit<T>],
    ) -> &'o mut [T] {
        let normal = Normal::<I, T>::new(isa, stats);
        let round = self.spec.round_first;
        normal.write_wide::<R, X>(isa, x, u, round, self.weight, self.bias)
    }

    /// Writes `y` of a row `x`, and returns what it was normalized by.
    #[inline(always)]
    fn row<X: Elem<Acc = T>, E: Elem<Acc = T>>(&self, isa: I, x: &[X], y: &mut Part<E>) -> Stats {
        let stats = Stats::of_row(isa, x, self.spec.center, self.spec.eps);
        self.write(isa, stats, x, y);
        stats
    }
}

/// Rows forward with an activation.
struct ActivatedForward<'a, E: Elem> {
    rows: RowsForward<'a, E>,
    activation: Activation,
}

impl<E: Elem> Kernel for ActivatedForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            mut rows,
            activation,
        } = self;
        let (spec, len) = (rows.spec, rows.spec.len);
        let mut scratch = Scratch::new();
        for (pair, span) in runs(rows.first, rows.x.len() / len, rows.rows_per_pair) {
            let norm = Normalizer::new(isa, rows.affine.part(pair, len), spec);
            let x = &rows.x[span.start * len..span.end * len];
            for (row, x) in span.zip(x.chunks_exact(len)) {
                let stats = Stats::of_row(isa, x, spec.center, spec.eps);
                if let Some(kept) = &mut rows.stats {
                    kept[row] = stats;
                }
                rows.y.write(
                    len,
                    #[inline(always)]
                    |y| {
                        activate(
                            isa,
                            activation,
                            &mut scratch,
                            y,
                            #[inline(always)]
                            |u| norm.write_wide::<E, E>(isa, stats, x, u),
                        )
                    },
                );
            }
        }
    }
}

/// A sum and its norm.
#[derive(Debug, Clone)]
pub struct Added<E, A> {
    /// The sum before it is rounded to the element.
    pub sum: Vec<A>,
    /// The sum; empty where there is nothing to be rounded.
    pub rounded: Vec<E>,
    /// The normalized sum.
    pub y: Vec<E>,
    /// Statistics that each row was normalized by.
    pub stats: Vec<Stats>,
}

/// `x + residual`, and [`forward`] of that sum, row by row.
pub(crate) fn add_forward<E: Elem>(
    x: &[E],
    residual: &[E],
    affine: AffinePair<E::Acc>,
    spec: RowSpec,
) -> Added<E, E::Acc> {
    let rows = x.len() / spec.len;
    assert_eq!(x.len(), rows * spec.len);
    assert_eq!(x.len(), residual.len());
    assert!(affine.fits(spec.len) && spec.pairs == 1);
    let per_block = par::items_per_block(rows, spec.len);
    let size = per_block * spec.len;
    let rounds = size_of::<E>() != size_of::<E::Acc>();
    if par::divides(rows, spec.len) {
        let (sum, rounded) = added(x, residual, rounds);
        let (y, stats) = forward_divided(&sum, affine, spec);
        return Added {
            sum,
            rounded,
            y,
            stats,
        };
    }
    let mut stats = vec![Stats::NONE; rows];
    let (mut y, mut rounded) = (vec![], vec![]);
    let sum = fill(x.len(), size, |sum| {
        rounded = fill(if rounds { x.len() } else { 0 }, size, |mut rounded| {
            y = fill(x.len(), size, |y| {
                let inputs = x.chunks(size).zip(residual.chunks(size));
                let outputs = sum.zip(y).zip(stats.chunks_mut(per_block));
                let blocks = inputs.zip(outputs);
                let blocks = blocks.map(|((x, residual), ((sum, y), stats))| AddedRowsForward {
                    x,
                    residual,
                    sum,
                    rounded: rounded.next(),
                    y,
                    stats,
                    affine,
                    spec,
                });
                par::run(x.len(), blocks);
            });
        });
    });
    Added {
        sum,
        rounded,
        y,
        stats,
    }
}

/// `x + residual`, and the same rounded to the element if it `rounds`.
fn added<E: Elem>(x: &[E], residual: &[E], rounds: bool) -> (Vec<E::Acc>, Vec<E>) {
    let mut rounded = vec![];
    let sum = fill(x.len(), par::PART, |sum| {
        let len = if rounds { x.len() } else { 0 };
        rounded = fill(len, par::PART, |mut rounded| {
            let inputs = x.chunks(par::PART).zip(residual.chunks(par::PART));
            let blocks = inputs.zip(sum).map(|((x, residual), sum)| Add {
                x,
                residual,
                sum,
                rounded: rounded.next(),
            });
            par::run(x.len(), blocks);
        });
    });
    (sum, rounded)
}

struct Add<'a, E: Elem> {
    x: &'a [E],
    residual: &'a [E],
    sum: Part<'a, E::Acc>,
    /// The sum rounded to the element, if that is another type.
    rounded: Option<Part<'a, E>>,
}

impl<E: Elem> Kernel for Add<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let len = self.x.len();
        self.sum.write(
            len,
            #[inline(always)]
            |sum| write_sum(isa, [self.x, self.residual], sum, self.rounded.as_mut()),
        );
    }
}

/// Writes a sum, and the same rounded to the element.
#[inline(always)]
fn write_sum<'o, E: Elem, I: Isa>(
    isa: I,
    [x, residual]: [&[E]; 2],
    sum: &'o mut [MaybeUninit<E::Acc>],
    rounded: Option<&mut Part<E>>,
) -> &'o mut [E::Acc] {
    let sum = map2(
        isa,
        x,
        residual,
        sum,
        #[inline(always)]
        |_, x, residual| x + residual,
    );
    if let Some(rounded) = rounded {
        rounded.write(
            x.len(),
            #[inline(always)]
            |rounded| {
                map(
                    isa,
                    &*sum,
                    rounded,
                    #[inline(always)]
                    |_, sum| sum,
                )
            },
        );
    }
    sum
}

struct AddedRowsForward<'a, E: Elem> {
    x: &'a [E],
    residual: &'a [E],
    sum: Part<'a, E::Acc>,
    /// The sum rounded to the element, if that is another type.
    rounded: Option<Part<'a, E>>,
    y: Part<'a, E>,
    stats: &'a mut [Stats],
    affine: AffinePair<'a, E::Acc>,
    spec: RowSpec,
}

impl<E: Elem> Kernel for AddedRowsForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let len = self.spec.len;
        let norm = Normalizer::new(isa, self.affine, self.spec);
        let rows = self
            .x
            .chunks_exact(len)
            .zip(self.residual.chunks_exact(len));
        for ((x, residual), stats) in rows.zip(self.stats) {
            self.sum.write(
                len,
                #[inline(always)]
                |sum| {
                    let sum = write_sum(isa, [x, residual], sum, self.rounded.as_mut());
                    *stats = norm.row(isa, &*sum, &mut self.y);
                    sum
                },
            );
        }
    }
}

/// The gradients of `x`, weight and bias from `dy`; `dweight` and `dbias` are empty unless `params`
/// are wanted. The element of `x` may be wider than that of `y`, to which the forward rounded.
pub(crate) fn backward<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    affine: AffinePair<X::Acc>,
    stats: &[Stats],
    spec: RowSpec,
    params: bool,
) -> Gradients<X> {
    let len = spec.len;
    let rows_per_pair = spec.rows_per_pair(stats.len());
    assert_eq!(x.len(), stats.len() * len);
    assert_eq!(x.len(), dy.len());
    assert!(affine.fits(spec.pairs * len));
    if par::divides(stats.len(), len) {
        return backward_divided(x, dy, affine, stats, spec, params);
    }
    let blocks = SummingBlocks::new(stats.len(), spec, params);
    let width = if params { len } else { 0 };
    let mut partial = vec![0f64; 2 * width * blocks.sums(stats.len())];
    let (whole, size) = (blocks.whole * len, blocks.rows * len);
    let dx = fill(x.len(), whole, |dx| {
        let mut partials = partial.chunks_mut((2 * width * blocks.pairs).max(1));
        let inputs = x.chunks(whole).zip(dy.chunks(whole));
        let inputs = inputs.flat_map(|(x, dy)| x.chunks(size).zip(dy.chunks(size)));
        let stats = stats.chunks(blocks.whole);
        let stats = stats.flat_map(|stats| stats.chunks(blocks.rows));
        let all = inputs.zip(dx.flat_map(|dx| dx.divide(size))).zip(stats);
        let mut first = 0;
        let all = all.map(|(((x, dy), dx), stats)| {
            let block = RowsBackward::<X, E, E> {
                x,
                dy,
                dx,
                stats,
                first,
                rows_per_pair,
                affine,
                spec,
                partial: partials.next().unwrap_or_default(),
                rounded: PhantomData,
            };
            first += stats.len();
            block
        });
        match spec.activation {
            None => par::run(x.len(), all),
            Some(activation) => {
                let all = all.map(|rows| ActivatedBackward { rows, activation });
                par::run(x.len(), all);
            }
        }
    });
    let [dweight, dbias] = blocks.by_pair(&partial, width);
    Gradients { dx, dweight, dbias }
}

/// Rows by blocks that leave sums for each weight and bias: parts of the rows of one, or all rows
/// of some.
#[derive(Debug, Clone, Copy)]
struct SummingBlocks {
    /// Rows that are cut into blocks by themselves.
    whole: usize,
    /// Rows of a block.
    rows: usize,
    /// Pairs of weight and bias that a block has rows of.
    pairs: usize,
}

impl SummingBlocks {
    fn new(rows: usize, spec: RowSpec, params: bool) -> Self {
        let len = spec.len;
        let rows_per_pair = spec.rows_per_pair(rows);
        let of_pair = match params {
            true => rows_per_block(rows_per_pair, len),
            false => par::items_per_block(rows_per_pair, len),
        };
        if of_pair < rows_per_pair {
            return Self {
                whole: rows_per_pair,
                rows: of_pair,
                pairs: 1,
            };
        }
        let pairs = par::items_per_block(spec.pairs, rows_per_pair * len);
        Self {
            whole: pairs * rows_per_pair,
            rows: pairs * rows_per_pair,
            pairs,
        }
    }

    /// How many sums of a pair the blocks of `rows` rows leave.
    fn sums(self, rows: usize) -> usize {
        match self.whole == self.rows {
            true => rows / (self.whole / self.pairs),
            false => rows / self.whole * self.whole.div_ceil(self.rows),
        }
    }

    /// The gradients of weights and biases of `width` columns from the sums of all blocks.
    fn by_pair(self, partial: &[f64], width: usize) -> [Vec<f64>; 2] {
        let sums = match self.whole == self.rows {
            true => 1,
            false => self.whole.div_ceil(self.rows),
        };
        if partial.len() == 2 * width * sums {
            let mut dweight = combined(partial, 2 * width);
            let dbias = dweight.split_off(width);
            return [dweight, dbias];
        }
        let count = partial.len() / (2 * sums);
        let mut all = [Vec::with_capacity(count), Vec::with_capacity(count)];
        for partial in partial.chunks(2 * width * sums) {
            let of_pair = match sums {
                1 => Cow::Borrowed(partial),
                _ => Cow::Owned(combined(partial, 2 * width)),
            };
            let (dweight, dbias) = of_pair.split_at(width);
            all[0].extend_from_slice(dweight);
            all[1].extend_from_slice(dbias);
        }
        all
    }
}

/// [`backward`] of rows that are divided among threads, pass by pass.
fn backward_divided<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    affine: AffinePair<X::Acc>,
    stats: &[Stats],
    spec: RowSpec,
    params: bool,
) -> Gradients<X> {
    let (frame, round) = (frame(stats, spec), spec.round_first);
    if let Some(activation) = spec.activation {
        let g = spread::through(x, dy, frame, affine, round, activation);
        return backward_passes::<X, X::Acc, E>(x, &g, frame, affine.weight, spec, params);
    }
    backward_passes::<X, E, E>(x, dy, frame, affine.weight, spec, params)
}

/// The passes of a backward whose cotangent is `dy`, of a forward that may have rounded to `R`.
fn backward_passes<X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    frame: Frame,
    weight: Option<&[X::Acc]>,
    spec: RowSpec,
    params: bool,
) -> Gradients<X> {
    let sums = spread::grad_sums::<X, E, R>(x, dy, frame, weight, params, spec.round_first);
    let means = spread::means(&sums.sets, spec.len as f64, spec.center);
    Gradients {
        dx: spread::grad_input(x, dy, frame, weight, Some(&means)),
        dweight: sums.dweight,
        dbias: sums.dbias,
    }
}

struct RowsBackward<'a, X: Elem, E, R> {
    x: &'a [X],
    dy: &'a [E],
    dx: Part<'a, X>,
    stats: &'a [Stats],
    /// The first row.
    first: usize,
    rows_per_pair: usize,
    affine: AffinePair<'a, X::Acc>,
    spec: RowSpec,
    /// The sums of this block for each weight and bias: those of `dy · x̂` for each column, then
    /// those of `dy`; empty if nobody wants them.
    partial: &'a mut [f64],
    /// The element that the forward may have rounded to.
    rounded: PhantomData<R>,
}

impl<X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>> Kernel for RowsBackward<'_, X, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (spec, len) = (self.spec, self.spec.len);
        let mut partials = self.partial.chunks_mut(2 * len);
        for (pair, rows) in runs(self.first, self.stats.len(), self.rows_per_pair) {
            let partial = partials.next().unwrap_or_default();
            let mut sums = ColumnSums::<I, X::Acc, 2>::new(isa, partial);
            let weight = ColumnFactor::new(isa, self.affine.part(pair, len).weight);
            let elements = rows.start * len..rows.end * len;
            let pairs = self.x[elements.clone()]
                .chunks(ROWS_BACKWARD * len)
                .zip(self.dy[elements].chunks(ROWS_BACKWARD * len));
            for ((x, dy), stats) in pairs.zip(self.stats[rows].chunks(ROWS_BACKWARD)) {
                if stats.len() == ROWS_BACKWARD {
                    let rows = RowTile::<X, E, R>::new(x, dy, stats, spec);
                    self.dx.write(
                        x.len(),
                        #[inline(always)]
                        |dx| rows.write::<ROWS_BACKWARD, I>(isa, weight, sums.chunks(), dx),
                    );
                } else {
                    let pairs = x.chunks_exact(len).zip(dy.chunks_exact(len));
                    for ((x, dy), stats) in pairs.zip(stats.chunks(1)) {
                        let row = RowTile::<X, E, R>::new(x, dy, stats, spec);
                        self.dx.write(
                            len,
                            #[inline(always)]
                            |dx| row.write::<1, I>(isa, weight, sums.chunks(), dx),
                        );
                    }
                }
                sums.added(isa, stats.len());
            }
            sums.finish(isa);
        }
    }
}

/// Rows backward with an activation: `dy · act′(u)` of the block first, which then is still in
/// cache.
struct ActivatedBackward<'a, X: Elem, E> {
    rows: RowsBackward<'a, X, E, E>,
    activation: Activation,
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for ActivatedBackward<'_, X, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, activation } = self;
        let (spec, len) = (rows.spec, rows.spec.len);
        let (mut scratch, mut g) = (Scratch::new(), Scratch::new());
        for (pair, span) in runs(rows.first, rows.stats.len(), rows.rows_per_pair) {
            let norm = Normalizer::<I, X::Acc>::new(isa, rows.affine.part(pair, len), spec);
            for row in span {
                let elements = row * len..(row + 1) * len;
                let (x, dy) = (&rows.x[elements.clone()], &rows.dy[elements]);
                let stats = rows.stats[row];
                through(
                    isa,
                    activation,
                    dy,
                    &mut scratch,
                    &mut g,
                    #[inline(always)]
                    |u| norm.write_wide::<E, X>(isa, stats, x, u),
                );
            }
        }
        isa.call(RowsBackward::<X, X::Acc, E> {
            x: rows.x,
            dy: g.get(),
            dx: rows.dx,
            stats: rows.stats,
            first: rows.first,
            rows_per_pair: rows.rows_per_pair,
            affine: rows.affine,
            spec,
            partial: rows.partial,
            rounded: PhantomData,
        });
    }
}

/// A row on its way backward.
#[derive(Clone, Copy)]
struct RowGrad<I: Isa, T: Real> {
    normal: Normal<I, T>,
    input: InputGrad<Lanes<I, T>>,
}

impl<I: Isa, T: Real> RowGrad<I, T> {
    /// `dx` from `x` and from `g`, the gradient of `x̂`.
    #[inline(always)]
    fn of(&self, x: Lanes<I, T>, g: Lanes<I, T>) -> Lanes<I, T> {
        self.input.of(self.normal.of(x), g)
    }
}

/// A few rows that go backward together, of a forward that may have rounded to `R`.
struct RowTile<'a, X, E, R> {
    x: &'a [X],
    dy: &'a [E],
    stats: &'a [Stats],
    spec: RowSpec,
    rounded: PhantomData<R>,
}

impl<'a, X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>> RowTile<'a, X, E, R> {
    #[inline(always)]
    fn new(x: &'a [X], dy: &'a [E], stats: &'a [Stats], spec: RowSpec) -> Self {
        Self {
            x,
            dy,
            stats,
            spec,
            rounded: PhantomData,
        }
    }

    /// Writes `dx` of `N` rows: first the two sums of each, then all of them column by column.
    #[inline(always)]
    fn write<'o, const N: usize, I: Isa>(
        &self,
        isa: I,
        weight: ColumnFactor<I, X::Acc>,
        sums: &mut [[Lanes<I, X::Acc>; 2]],
        dx: &'o mut [MaybeUninit<X>],
    ) -> &'o mut [X] {
        let RowSpec {
            len, round_first, ..
        } = self.spec;
        assert!(self.x.len() == N * len && self.dy.len() == N * len && dx.len() == N * len);
        let start = RowGrad::<I, X::Acc> {
            normal: Normal::new(isa, Stats::NONE),
            input: InputGrad {
                mean: zero::<I, X::Acc>(isa),
                along: zero::<I, X::Acc>(isa),
                scale: zero::<I, X::Acc>(isa),
            },
        };
        let mut rows = [start; N];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = self.row(isa, r, weight);
        }
        if sums.is_empty() {
            for (r, row) in rows.iter().enumerate() {
                let span = r * len..(r + 1) * len;
                map2(
                    isa,
                    &self.x[span.clone()],
                    &self.dy[span.clone()],
                    &mut dx[span],
                    #[inline(always)]
                    |k, x, dy| row.of(x, weight.times(k, dy)),
                );
            }
            // SAFETY: the maps wrote each of the rows that `dx` is made up of.
            return unsafe { dx.assume_init_mut() };
        }
        assert!(sums.len() == len.div_ceil(LANES));
        let (whole, rest) = sums.split_at_mut(len / LANES);
        let (xs, dys) = (
            whole_chunks::<N, X>(self.x, len),
            whole_chunks::<N, E>(self.dy, len),
        );
        let mut row = dx.chunks_exact_mut(len);
        let dxs: [&mut [[MaybeUninit<X>; LANES]]; N] = std::array::from_fn(|_| {
            let row = row.next().unwrap_or_default();
            &mut row.as_chunks_mut::<LANES>().0[..len / LANES]
        });
        for (k, sums) in whole.iter_mut().enumerate() {
            let [mut dweight, mut dbias] = *sums;
            let mut values = [zero::<I, X::Acc>(isa); N];
            for r in 0..N {
                let (x, dy) = (X::load(isa, &xs[r][k]), E::load(isa, &dys[r][k]));
                values[r] = rows[r].of(x, weight.times(k, dy));
                dweight = dweight + dy * rows[r].normal.rounded::<R>(isa, x, round_first);
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
                let value = row.of(x, weight.times(k, dy));
                dweight = dweight + dy * row.normal.rounded::<R>(isa, x, round_first);
                dbias = dbias + dy;
                store_tail(isa, value, &mut dx[span]);
            }
            *sums = [dweight, dbias];
        }
        // SAFETY: the loops stored every chunk and the tail of each of the rows in `dx`.
        unsafe { dx.assume_init_mut() }
    }

    /// Row `r`, with its two sums.
    #[inline(always)]
    fn row<I: Isa>(&self, isa: I, r: usize, weight: ColumnFactor<I, X::Acc>) -> RowGrad<I, X::Acc> {
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
        let mean = |sum: f64| splat::<I, _>(isa, X::Acc::from_f64(sum / len as f64));
        RowGrad {
            normal,
            input: InputGrad {
                mean: mean(if self.spec.center { g } else { 0. }),
                along: mean(self.stats[r].along::<X::Acc>([along, g])),
                scale: normal.inv_std,
            },
        }
    }
}
