//! Weight and bias that are spread over a tensor in any way, after a normalization by given
//! statistics or without one.
//!
//! A tensor `[outer, channels, inner]` is taken plane by plane. All elements of a plane have the
//! same statistics, and either the same weight and bias or one for each column.

use std::borrow::Cow;
use std::iter::{StepBy, repeat_n};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activation::{Activation, ThroughActivation, activate};
use super::affine::{AffinePair, Normal, ScaledNormal};
use super::buffer::{Part, Scratch, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block};
use super::grads::{Gradients, InputGrad};
use super::loops::{ColumnFactor, ColumnValues, map, map2, sums2};
use super::par;
use super::shape::Shape;
use super::simd::{Elem, Isa, Kernel, LANES, Real, splat};
use super::stats::Stats;

/// How weight and bias are spread over a tensor `[outer, channels, inner]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// One for each place of a plane, `[inner]`: the columns of rows.
    Column,
    /// One for each channel, `[channels]`.
    Channel,
    /// One for each channel of each sample, `[outer, channels]`.
    SampleAndChannel,
    /// One for each place of a plane of each sample, `[outer, inner]`.
    SampleAndColumn,
    /// One for each element of a sample, `[channels, inner]`.
    Element,
    /// One for each element, `[outer, channels, inner]`.
    SampleAndElement,
}

impl Spread {
    /// How many values there are.
    pub fn count(self, shape: Shape) -> usize {
        let Shape {
            outer,
            channels,
            inner,
        } = shape;
        match self {
            Spread::Column => inner,
            Spread::Channel => channels,
            Spread::SampleAndChannel => outer * channels,
            Spread::SampleAndColumn => outer * inner,
            Spread::Element => channels * inner,
            Spread::SampleAndElement => shape.elements(),
        }
    }
}

/// Statistics that the elements of a tensor are normalized by, before weight and bias.
#[derive(Debug, Clone, Copy)]
pub enum NormalizedBy<'a> {
    /// Nothing: scale and shift alone.
    Nothing,
    /// The statistics of each channel.
    Channels(&'a [Stats]),
    /// The statistics of each group of neighboring channels, sample by sample. With one group, or
    /// one channel, these are the statistics of rows.
    Groups(&'a [Stats]),
}

impl NormalizedBy<'_> {
    /// How many sets of statistics there are.
    pub(crate) fn count(self) -> usize {
        match self {
            NormalizedBy::Nothing => 0,
            NormalizedBy::Channels(stats) | NormalizedBy::Groups(stats) => stats.len(),
        }
    }
}

/// A tensor as [`Float::normalize`](super::Float::normalize) takes it.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The axes of the tensor.
    pub shape: Shape,
    /// Statistics that it is normalized by.
    pub by: NormalizedBy<'a>,
    /// How weight and bias are spread.
    pub spread: Spread,
}

/// Sums over a gradient.
#[derive(Debug, Clone)]
pub struct GradSums {
    /// The gradient of the weight; empty if it is not wanted.
    pub dweight: Vec<f64>,
    /// The gradient of the bias; empty if it is not wanted.
    pub dbias: Vec<f64>,
    /// For each of the statistics, the sums of `g · x̂` and of `g`, with `g` the gradient of `x̂`.
    pub sets: Vec<[f64; 2]>,
}

/// Planes that have their weight and bias in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slots {
    /// All of them.
    One,
    /// Those of a channel.
    Channel,
    /// Those of a sample.
    Sample,
    /// None.
    Plane,
}

/// A [`Frame`] by planes that lanes are worth, if there are any.
#[derive(Debug, Clone, Copy)]
struct Planes<'a> {
    shape: Shape,
    by: NormalizedBy<'a>,
    slots: Slots,
    /// A slot has one value for each column.
    each: bool,
    /// How often a value of the caller's stands in a slot, side by side.
    repeat: usize,
    /// The elements of the pieces that a plane is divided into: all of it, if it is not.
    piece: usize,
}

/// The parts of an output, block by block.
type BlockParts<'p, T> = Box<dyn Iterator<Item = Part<'p, T>> + 'p>;

/// The first element of a block: of a plane, or of a piece of one.
#[derive(Debug, Clone, Copy)]
struct Start {
    plane: usize,
    column: usize,
}

impl<'a> Planes<'a> {
    fn new(frame: Frame<'a>) -> Self {
        let planes = Self::of_slots(frame);
        let inner = planes.shape.inner;
        Self {
            piece: match par::divides(planes.count(), inner) {
                true => par::PART,
                false => inner,
            },
            ..planes
        }
    }

    fn of_slots(frame: Frame<'a>) -> Self {
        let Frame { shape, by, spread } = frame;
        let (slots, each) = match spread {
            Spread::Column => (Slots::One, true),
            Spread::Channel => (Slots::Channel, false),
            Spread::SampleAndChannel => (Slots::Plane, false),
            Spread::SampleAndColumn => (Slots::Sample, true),
            Spread::Element => (Slots::Channel, true),
            Spread::SampleAndElement => (Slots::Plane, true),
        };
        let planes = Self {
            shape,
            by,
            slots,
            each,
            repeat: 1,
            piece: shape.inner,
        };
        let groups = match by {
            NormalizedBy::Nothing => 1,
            NormalizedBy::Groups(stats) => stats.len() / shape.outer,
            NormalizedBy::Channels(_) => shape.channels,
        };
        let by_channel = matches!(slots, Slots::Channel | Slots::Plane);
        if shape.inner >= LANES || groups == shape.channels || !by_channel {
            return planes;
        }
        // The channels of a group lie together: a plane of all of them has columns.
        Self {
            shape: Shape {
                outer: shape.outer,
                channels: groups,
                inner: shape.channels / groups * shape.inner,
            },
            slots: match slots {
                Slots::Channel if groups == 1 => Slots::One,
                slots => slots,
            },
            each: true,
            repeat: if each { 1 } else { shape.inner },
            ..planes
        }
    }

    /// How many planes there are.
    fn count(self) -> usize {
        self.shape.outer * self.shape.channels
    }

    fn is_divided(self) -> bool {
        self.piece < self.shape.inner
    }

    /// Lengths of what is cut into blocks, and of blocks: planes and pieces of them, or many planes
    /// and the same.
    fn lengths(self) -> [usize; 2] {
        let inner = self.shape.inner;
        if self.is_divided() {
            return [inner, self.piece];
        }
        [par::items_per_block(self.count(), inner) * inner; 2]
    }

    /// The blocks of a tensor.
    fn blocks<T>(self, x: &[T]) -> impl Iterator<Item = &[T]> {
        let [whole, block] = self.lengths();
        x.chunks(whole).flat_map(move |x| x.chunks(block))
    }

    /// Where each block starts.
    fn starts(self) -> impl Iterator<Item = Start> {
        let ([whole, block], inner) = (self.lengths(), self.shape.inner);
        let len = self.shape.elements();
        let wholes = (0..len).step_by(whole);
        let starts = wholes.flat_map(move |at| (at..(at + whole).min(len)).step_by(block));
        starts.map(move |at| Start {
            plane: at / inner,
            column: at % inner,
        })
    }

    /// A tensor whose blocks `jobs` writes.
    fn fill<T: Copy>(self, jobs: impl for<'p> FnOnce(BlockParts<'p, T>)) -> Vec<T> {
        let [whole, block] = self.lengths();
        fill(self.shape.elements(), whole, |wholes| {
            jobs(Box::new(wholes.flat_map(move |part| part.divide(block))));
        })
    }

    /// Index of the statistics that a plane is normalized by.
    #[inline(always)]
    fn set(self, plane: usize) -> usize {
        match self.by {
            NormalizedBy::Nothing => 0,
            NormalizedBy::Channels(_) => plane % self.shape.channels,
            NormalizedBy::Groups(stats) => plane / (self.count() / stats.len()),
        }
    }

    #[inline(always)]
    fn stats(self, plane: usize) -> Stats {
        match self.by {
            NormalizedBy::Nothing => Stats::IDENTITY,
            NormalizedBy::Channels(stats) | NormalizedBy::Groups(stats) => stats[self.set(plane)],
        }
    }

    /// The slot of a plane.
    #[inline(always)]
    fn slot(self, plane: usize) -> usize {
        match self.slots {
            Slots::One => 0,
            Slots::Channel => plane % self.shape.channels,
            Slots::Sample => plane / self.shape.channels,
            Slots::Plane => plane,
        }
    }

    /// The planes of each slot; if there is one slot, those of parts of it.
    fn planes_of_slots(self) -> Vec<StepBy<Range<usize>>> {
        let (count, channels) = (self.count(), self.shape.channels);
        match self.slots {
            Slots::One if self.is_divided() => vec![(0..count).step_by(1)],
            Slots::One => {
                let per_part = rows_per_block(count, self.shape.inner);
                let starts = (0..count).step_by(per_part);
                let parts = starts.map(|start| (start..(start + per_part).min(count)).step_by(1));
                parts.collect()
            }
            Slots::Channel => (0..channels)
                .map(|channel| (channel..count).step_by(channels))
                .collect(),
            Slots::Sample => (0..count)
                .step_by(channels)
                .map(|start| (start..start + channels).step_by(1))
                .collect(),
            Slots::Plane => (0..count)
                .map(|plane| (plane..plane + 1).step_by(1))
                .collect(),
        }
    }

    /// The values of the caller as they stand in slots.
    fn in_slots<T: Copy>(self, values: Option<&[T]>) -> Option<Cow<'_, [T]>> {
        let values = values?;
        Some(match self.repeat {
            1 => Cow::Borrowed(values),
            repeat => {
                let repeated = values.iter().flat_map(|v| repeat_n(*v, repeat));
                Cow::Owned(repeated.collect())
            }
        })
    }

    /// The sums of the caller's values from those of slots.
    fn of_values(self, sums: Vec<f64>) -> Vec<f64> {
        match self.repeat {
            1 => sums,
            repeat => sums.chunks(repeat).map(|sums| sums.iter().sum()).collect(),
        }
    }

    /// The values of the slot of a plane, one for each of `len` columns from the start on.
    #[inline(always)]
    fn columns<T>(self, values: Option<&[T]>, start: Start, len: usize) -> Option<&[T]> {
        let first = self.slot(start.plane) * self.shape.inner + start.column;
        values.map(
            #[inline(always)]
            |values| &values[first..first + len],
        )
    }

    /// The value of the slot of a plane, or one.
    #[inline(always)]
    fn factor<T: Real>(self, values: Option<&[T]>, plane: usize) -> f64 {
        values.map_or(1., |values| values[self.slot(plane)].to_f64())
    }
}

fn check<T>(frame: Frame, elements: usize, params: [Option<&[T]>; 2]) {
    let Frame { shape, by, spread } = frame;
    assert!(elements == shape.elements() && elements > 0);
    let count = spread.count(shape);
    assert!(params.into_iter().flatten().all(|p| p.len() == count));
    match by {
        NormalizedBy::Nothing => {}
        NormalizedBy::Channels(stats) => assert!(stats.len() == shape.channels),
        NormalizedBy::Groups(stats) => {
            let groups = stats.len() / shape.outer;
            assert!(groups > 0 && stats.len() == shape.outer * groups);
            assert!(shape.channels.is_multiple_of(groups));
        }
    }
}

/// `y = x̂ · weight + bias`, with `x̂` rounded to the element first, if it is to be.
pub(crate) fn normalize<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    frame: Frame,
    affine: AffinePair<X::Acc>,
    round: bool,
    activation: Option<Activation>,
) -> Vec<E> {
    check(frame, x.len(), [affine.weight, affine.bias]);
    let planes = Planes::new(frame);
    let (weight, bias) = (planes.in_slots(affine.weight), planes.in_slots(affine.bias));
    let affine = AffinePair {
        weight: weight.as_deref(),
        bias: bias.as_deref(),
    };
    planes.fill(|y| {
        let blocks = planes.starts().zip(planes.blocks(x)).zip(y);
        let blocks = blocks.map(|((start, x), y)| SpreadNormalize {
            x,
            y,
            start,
            planes,
            affine,
            round,
            activation,
        });
        par::run(x.len(), blocks);
    })
}

struct SpreadNormalize<'a, X: Elem, E> {
    x: &'a [X],
    y: Part<'a, E>,
    start: Start,
    planes: Planes<'a>,
    affine: AffinePair<'a, X::Acc>,
    round: bool,
    activation: Option<Activation>,
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for SpreadNormalize<'_, X, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (planes, mut start) = (self.planes, self.start);
        let mut scratch = Scratch::new();
        for x in self.x.chunks(planes.shape.inner) {
            let plane = PlaneNormal::new(isa, planes, start, x.len(), self.affine, self.round);
            self.y.write(
                x.len(),
                #[inline(always)]
                |y| match self.activation {
                    None => plane.write(isa, x, y),
                    Some(activation) => activate(
                        isa,
                        activation,
                        &mut scratch,
                        y,
                        #[inline(always)]
                        |u| plane.write_wide::<E, X>(isa, x, u),
                    ),
                },
            );
            start.plane += 1;
        }
    }
}

/// Normalization, weight and bias of a plane, or of a piece of one.
enum PlaneNormal<'a, I: Isa, T: Real> {
    /// One weight and bias for each column.
    Columns {
        normal: Normal<I, T>,
        weight: Option<ColumnValues<'a, I, T>>,
        bias: Option<ColumnValues<'a, I, T>>,
        round: bool,
    },
    /// One for all of it.
    Whole(ScaledNormal<I, T>),
}

impl<'a, I: Isa, T: Real> PlaneNormal<'a, I, T> {
    #[inline(always)]
    fn new(
        isa: I,
        planes: Planes<'a>,
        start: Start,
        len: usize,
        affine: AffinePair<'a, T>,
        round: bool,
    ) -> Self {
        let stats = planes.stats(start.plane);
        if !planes.each {
            let slot = planes.slot(start.plane);
            return Self::Whole(ScaledNormal::new(isa, stats, affine, slot));
        }
        let [weight, bias] = [affine.weight, affine.bias].map(
            #[inline(always)]
            |values| {
                planes.columns(values, start, len).map(
                    #[inline(always)]
                    |values| ColumnValues::new(isa, values),
                )
            },
        );
        Self::Columns {
            normal: Normal::new(isa, stats),
            weight,
            bias,
            round,
        }
    }

    /// `x̂ · weight + bias`, with `x̂` rounded to `E`, if it is to be.
    #[inline(always)]
    fn write<'o, X: Elem<Acc = T>, E: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        y: &'o mut [MaybeUninit<E>],
    ) -> &'o mut [E] {
        match self {
            Self::Columns {
                normal,
                weight,
                bias,
                round,
            } => normal.write(isa, x, y, *round, *weight, *bias),
            Self::Whole(normal) => normal.write(isa, x, y),
        }
    }

    /// [`write`](Self::write) in the accumulator's precision, with `x̂` rounded to `R`.
    #[inline(always)]
    fn write_wide<'o, R: Elem<Acc = T>, X: Elem<Acc = T>>(
        &self,
        isa: I,
        x: &[X],
        u: &'o mut [MaybeUninit<T>],
    ) -> &'o mut [T] {
        match self {
            Self::Columns {
                normal,
                weight,
                bias,
                round,
            } => normal.write_wide::<R, X>(isa, x, u, *round, *weight, *bias),
            Self::Whole(normal) => normal.write(isa, x, u),
        }
    }
}

/// `dy · act′(u)` with `u = x̂ · weight + bias`, the cotangent of what [`normalize`] does before
/// its activation.
pub(crate) fn through<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    frame: Frame,
    affine: AffinePair<X::Acc>,
    round: bool,
    activation: Activation,
) -> Vec<X::Acc> {
    check(frame, x.len(), [affine.weight, affine.bias]);
    assert!(dy.len() == x.len());
    let planes = Planes::new(frame);
    let (weight, bias) = (planes.in_slots(affine.weight), planes.in_slots(affine.bias));
    let affine = AffinePair {
        weight: weight.as_deref(),
        bias: bias.as_deref(),
    };
    planes.fill(|g| {
        let pairs = planes.blocks(x).zip(planes.blocks(dy));
        let blocks = planes.starts().zip(pairs).zip(g);
        let blocks = blocks.map(|((start, (x, dy)), g)| SpreadThrough {
            x,
            dy,
            g,
            start,
            planes,
            affine,
            round,
            activation,
        });
        par::run(x.len(), blocks);
    })
}

struct SpreadThrough<'a, X: Elem, E> {
    x: &'a [X],
    dy: &'a [E],
    g: Part<'a, X::Acc>,
    start: Start,
    planes: Planes<'a>,
    affine: AffinePair<'a, X::Acc>,
    round: bool,
    activation: Activation,
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for SpreadThrough<'_, X, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (planes, mut start) = (self.planes, self.start);
        let inner = planes.shape.inner;
        let mut scratch = Scratch::new();
        for (x, dy) in self.x.chunks(inner).zip(self.dy.chunks(inner)) {
            let plane = PlaneNormal::new(isa, planes, start, x.len(), self.affine, self.round);
            scratch.clear();
            scratch.push(
                x.len(),
                #[inline(always)]
                |u| plane.write_wide::<E, X>(isa, x, u),
            );
            let u = scratch.get();
            self.g.write(
                x.len(),
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
            start.plane += 1;
        }
    }
}

/// A tensor that is scaled and shifted alone.
fn unnormalized(shape: Shape, spread: Spread) -> Frame<'static> {
    Frame {
        shape,
        by: NormalizedBy::Nothing,
        spread,
    }
}

/// `y = x · weight + bias`.
pub(crate) fn scale_shift<E: Elem>(
    x: &[E],
    shape: Shape,
    affine: AffinePair<E::Acc>,
    spread: Spread,
) -> Vec<E> {
    normalize(x, unnormalized(shape, spread), affine, false, None)
}

/// The gradients of [`scale_shift`].
pub(crate) fn scale_shift_backward<E: Elem>(
    x: &[E],
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    spread: Spread,
    params: bool,
) -> Gradients<E> {
    let frame = unnormalized(shape, spread);
    let sums = grad_sums::<E, E, E>(x, dy, frame, weight, params, false);
    Gradients {
        dx: grad_input(x, dy, frame, weight, None),
        dweight: sums.dweight,
        dbias: sums.dbias,
    }
}

/// The gradients of weight and bias, if `params` are wanted, and the sums that `grad_input` takes
/// the means of. `round` and `R` are those of [`normalize`].
pub(crate) fn grad_sums<X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    frame: Frame,
    weight: Option<&[X::Acc]>,
    params: bool,
    round: bool,
) -> GradSums {
    check(frame, x.len(), [weight, None]);
    assert!(dy.len() == x.len());
    let planes = Planes::new(frame);
    let weight = planes.in_slots(weight);
    let weight = weight.as_deref();
    let mut all = GradSums {
        dweight: vec![],
        dbias: vec![],
        sets: vec![[0.; 2]; frame.by.count()],
    };
    if params && planes.each {
        [all.dweight, all.dbias] =
            column_grads::<X, E, R>(x, dy, planes, round).map(|sums| planes.of_values(sums));
    } else if params {
        let count = frame.spread.count(frame.shape);
        (all.dweight, all.dbias) = (vec![0.; count], vec![0.; count]);
    }
    let from_planes = params && !planes.each;
    if !from_planes && all.sets.is_empty() {
        return all;
    }
    let sums = plane_sums(x, dy, planes, weight);
    for (plane, [along, sum]) in sums.into_iter().enumerate() {
        if from_planes {
            all.dweight[planes.slot(plane)] += along;
            all.dbias[planes.slot(plane)] += sum;
        }
        if let Some(set) = all.sets.get_mut(planes.set(plane)) {
            let factor = match planes.each {
                true => 1.,
                false => planes.factor(weight, plane),
            };
            set[0] += along * factor;
            set[1] += sum * factor;
        }
    }
    all
}

/// The sums of `g · x̂` and of `g` of each plane; where a plane has one weight, without it.
fn plane_sums<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    planes: Planes,
    weight: Option<&[X::Acc]>,
) -> Vec<[f64; 2]> {
    let pieces = planes.shape.inner.div_ceil(planes.piece);
    let per_block = planes.lengths()[1].div_ceil(planes.shape.inner);
    let mut sums = vec![[0f64; 2]; planes.count() * pieces];
    let pairs = planes.blocks(x).zip(planes.blocks(dy));
    let blocks = planes.starts().zip(pairs).zip(sums.chunks_mut(per_block));
    let blocks = blocks.map(|((start, (x, dy)), sums)| SpreadPlaneSums {
        x,
        dy,
        start,
        planes,
        weight,
        sums,
    });
    par::run(x.len(), blocks);
    let planes = sums.chunks(pieces);
    let added = planes.map(|pieces| {
        let add = |a: [f64; 2], b: &[f64; 2]| [a[0] + b[0], a[1] + b[1]];
        pieces[1..].iter().fold(pieces[0], add)
    });
    added.collect()
}

struct SpreadPlaneSums<'a, X: Elem, E> {
    x: &'a [X],
    dy: &'a [E],
    start: Start,
    planes: Planes<'a>,
    weight: Option<&'a [X::Acc]>,
    sums: &'a mut [[f64; 2]],
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for SpreadPlaneSums<'_, X, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (planes, mut start) = (self.planes, self.start);
        let inner = planes.shape.inner;
        let pairs = self.x.chunks(inner).zip(self.dy.chunks(inner));
        for ((x, dy), sums) in pairs.zip(self.sums) {
            let stats = planes.stats(start.plane);
            let normal = Normal::<I, X::Acc>::new(isa, stats);
            let weight = self.weight.filter(|_| planes.each);
            let weight = ColumnFactor::new(isa, planes.columns(weight, start, x.len()));
            let [along, sum] = sums2(
                isa,
                x,
                dy,
                #[inline(always)]
                |k, x, dy| {
                    let g = weight.times(k, dy);
                    [g * normal.mean.distance_from_high(x), g]
                },
            );
            *sums = [stats.along::<X::Acc>([along, sum]), sum];
            start.plane += 1;
        }
    }
}

/// The sums of `dy · x̂` and of `dy` of each column of each slot.
fn column_grads<X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    planes: Planes,
    round: bool,
) -> [Vec<f64>; 2] {
    let (inner, piece) = (planes.shape.inner, planes.piece);
    let slots = planes.planes_of_slots();
    let mut sums = vec![0f64; 2 * inner * slots.len()];
    let (per_job, part) = match planes.is_divided() {
        true => (1, 2 * piece),
        false => {
            let slots_per_job = par::items_per_block(slots.len(), x.len() / slots.len());
            (slots_per_job, slots_per_job * 2 * inner)
        }
    };
    let jobs = slots
        .chunks(per_job)
        .zip(sums.chunks_mut(per_job * 2 * inner));
    let jobs = jobs.flat_map(|(slots, sums)| {
        let parts = sums.chunks_mut(part).enumerate();
        parts.map(move |(i, sums)| SpreadColumnSums::<X, E, R> {
            x,
            dy,
            planes,
            slots,
            columns: i * piece..(i * piece + piece).min(inner),
            round,
            rounded: PhantomData,
            sums,
        })
    });
    par::run(x.len(), jobs);
    if planes.slots == Slots::One && slots.len() > 1 {
        let mut dweight = combined(&sums, 2 * inner);
        let dbias = dweight.split_off(inner);
        return [dweight, dbias];
    }
    let (mut dweight, mut dbias) = (vec![], vec![]);
    for sums in sums
        .chunks(2 * inner)
        .flat_map(|sums| sums.chunks(2 * piece))
    {
        let (along, sum) = sums.split_at(sums.len() / 2);
        dweight.extend_from_slice(along);
        dbias.extend_from_slice(sum);
    }
    [dweight, dbias]
}

struct SpreadColumnSums<'a, X, E, R> {
    x: &'a [X],
    dy: &'a [E],
    planes: Planes<'a>,
    slots: &'a [StepBy<Range<usize>>],
    columns: Range<usize>,
    round: bool,
    rounded: PhantomData<R>,
    sums: &'a mut [f64],
}

impl<X: Elem, E: Elem<Acc = X::Acc>, R: Elem<Acc = X::Acc>> Kernel
    for SpreadColumnSums<'_, X, E, R>
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (planes, width) = (self.planes, self.columns.len());
        for (slot, sums) in self.slots.iter().zip(self.sums.chunks_mut(2 * width)) {
            let mut columns = ColumnSums::<I, X::Acc, 2>::new(isa, sums);
            for plane in slot.clone() {
                let normal = Normal::<I, X::Acc>::new(isa, planes.stats(plane));
                let first = plane * planes.shape.inner + self.columns.start;
                columns.add2(
                    isa,
                    &self.x[first..first + width],
                    &self.dy[first..first + width],
                    #[inline(always)]
                    |_, x, dy| [dy * normal.rounded::<R>(isa, x, self.round), dy],
                );
            }
            columns.finish(isa);
        }
    }
}

/// The means of sums over `count` elements; the second is zero where the mean is not `center`ed.
pub(crate) fn means(sums: &[[f64; 2]], count: f64, center: bool) -> Vec<[f64; 2]> {
    let means = sums
        .iter()
        .map(|[along, sum]| [along / count, if center { sum / count } else { 0. }]);
    means.collect()
}

/// `dx`, from the means of `g · x̂` and of `g` of each set, if its statistics move with `x`.
pub(crate) fn grad_input<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    frame: Frame,
    weight: Option<&[X::Acc]>,
    means: Option<&[[f64; 2]]>,
) -> Vec<X> {
    check(frame, x.len(), [weight, None]);
    assert!(dy.len() == x.len());
    let sets = frame.by.count();
    assert!(means.is_none_or(|means| means.len() == sets));
    let means = means.filter(|_| sets > 0);
    let planes = Planes::new(frame);
    let weight = planes.in_slots(weight);
    let weight = weight.as_deref();
    planes.fill(|dx| {
        let pairs = planes.blocks(x).zip(planes.blocks(dy));
        let blocks = planes.starts().zip(pairs).zip(dx);
        let blocks = blocks.map(|((start, (x, dy)), dx)| SpreadInputGrad {
            x,
            dy,
            dx,
            start,
            planes,
            weight,
            means,
        });
        par::run(x.len(), blocks);
    })
}

struct SpreadInputGrad<'a, X: Elem, E> {
    x: &'a [X],
    dy: &'a [E],
    dx: Part<'a, X>,
    start: Start,
    planes: Planes<'a>,
    weight: Option<&'a [X::Acc]>,
    means: Option<&'a [[f64; 2]]>,
}

impl<X: Elem, E: Elem<Acc = X::Acc>> Kernel for SpreadInputGrad<'_, X, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (planes, mut start) = (self.planes, self.start);
        let inner = planes.shape.inner;
        let pairs = self.x.chunks(inner).zip(self.dy.chunks(inner));
        for (x, dy) in pairs {
            let plane = start.plane;
            let stats = planes.stats(plane);
            let normal = Normal::<I, X::Acc>::new(isa, stats);
            let weight = self.weight.filter(|_| planes.each);
            let weight = ColumnFactor::new(isa, planes.columns(weight, start, x.len()));
            let factor = match planes.each {
                true => 1.,
                false => planes.factor(self.weight, plane),
            };
            start.plane += 1;
            let Some(means) = self.means else {
                let scale = splat::<I, _>(isa, X::Acc::from_f64(stats.inv_std * factor));
                self.dx.write(
                    x.len(),
                    #[inline(always)]
                    |dx| {
                        map(
                            isa,
                            dy,
                            dx,
                            #[inline(always)]
                            |k, dy| weight.times(k, dy) * scale,
                        )
                    },
                );
                continue;
            };
            let [along, mean] = means[planes.set(plane)];
            let grad = InputGrad {
                mean: splat::<I, _>(isa, X::Acc::from_f64(mean)),
                along: splat::<I, _>(isa, X::Acc::from_f64(along)),
                scale: normal.inv_std,
            };
            let factor = splat::<I, _>(isa, X::Acc::from_f64(factor));
            self.dx.write(
                x.len(),
                #[inline(always)]
                |dx| {
                    map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |k, x, dy| grad.of(normal.of(x), weight.times(k, dy) * factor),
                    )
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(outer: usize, channels: usize, inner: usize) -> usize {
        let planes = Planes::new(Frame {
            shape: Shape {
                outer,
                channels,
                inner,
            },
            by: NormalizedBy::Nothing,
            spread: Spread::Channel,
        });
        let starts: Vec<_> = planes.starts().collect();
        let x = vec![0u8; outer * channels * inner];
        assert_eq!(planes.blocks(&x).count(), starts.len());
        let elements = starts.iter().map(|at| at.plane * inner + at.column);
        assert!(elements.is_sorted());
        starts.len()
    }

    #[test]
    fn a_machine_of_many_cores_has_work() {
        assert!(blocks(1, 1, 1 << 23) >= 128);
        assert!(blocks(1, 3, 1 << 20) >= 128);
        assert!(blocks(32, 3, 224 * 224) >= 96);
        assert!(blocks(8, 256, 56 * 56) >= 128);
        assert!(blocks(1024, 64, 7 * 7) >= 128);
    }

    #[test]
    fn small_tensors_are_few_blocks() {
        assert_eq!(blocks(1, 1, 4096), 1);
        assert_eq!(blocks(4, 1, 768), 1);
    }
}
