//! Weight and bias that are spread over a tensor in any way, behind a normalization by given
//! statistics or behind none.
//!
//! A tensor `[outer, channels, inner]` is taken plane by plane. All elements of a plane have the
//! same statistics, and either the same weight and bias or one for each column.

use std::borrow::Cow;
use std::iter::{StepBy, repeat_n};
use std::ops::Range;

use super::affine::{AffinePair, Normal, ScaledNormal};
use super::buffer::{Part, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block};
use super::grads::InputGrad;
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
        }
    }
}

/// What the elements of a tensor are normalized by before weight and bias are applied.
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

/// A tensor as [`Float::normalize`](super::Float::normalize) takes it.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The axes of the tensor.
    pub shape: Shape,
    /// What it is normalized by.
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

/// Which planes have their weight and bias in common.
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
}

impl<'a> Planes<'a> {
    fn new(frame: Frame<'a>) -> Self {
        let Frame { shape, by, spread } = frame;
        let (slots, each) = match spread {
            Spread::Column => (Slots::One, true),
            Spread::Channel => (Slots::Channel, false),
            Spread::SampleAndChannel => (Slots::Plane, false),
            Spread::SampleAndColumn => (Slots::Sample, true),
            Spread::Element => (Slots::Channel, true),
        };
        let planes = Self {
            shape,
            by,
            slots,
            each,
            repeat: 1,
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

    /// Which of the statistics a plane is normalized by.
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

    /// The values of the slot of a plane, one for each column.
    #[inline(always)]
    fn columns<T>(self, values: Option<&[T]>, plane: usize) -> Option<&[T]> {
        let inner = self.shape.inner;
        let start = self.slot(plane) * inner;
        values.map(
            #[inline(always)]
            |values| &values[start..start + inner],
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

/// `y = x̂ · weight + bias`.
pub(crate) fn normalize<E: Elem>(x: &[E], frame: Frame, affine: AffinePair<E::Acc>) -> Vec<E> {
    check(frame, x.len(), [affine.weight, affine.bias]);
    let planes = Planes::new(frame);
    let (weight, bias) = (planes.in_slots(affine.weight), planes.in_slots(affine.bias));
    let affine = AffinePair {
        weight: weight.as_deref(),
        bias: bias.as_deref(),
    };
    let per_block = par::items_per_block(planes.count(), planes.shape.inner);
    let size = per_block * planes.shape.inner;
    fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(y).enumerate();
        let blocks = blocks.map(|(block, (x, y))| SpreadNormalize {
            x,
            y,
            first: block * per_block,
            planes,
            affine,
        });
        par::run(x.len(), blocks);
    })
}

struct SpreadNormalize<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    /// The first plane.
    first: usize,
    planes: Planes<'a>,
    affine: AffinePair<'a, E::Acc>,
}

impl<E: Elem> Kernel for SpreadNormalize<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (planes, inner) = (self.planes, self.planes.shape.inner);
        for (i, x) in self.x.chunks_exact(inner).enumerate() {
            let plane = self.first + i;
            let stats = planes.stats(plane);
            if planes.each {
                let normal = Normal::<I, E::Acc>::new(isa, stats);
                let [weight, bias] = [self.affine.weight, self.affine.bias].map(
                    #[inline(always)]
                    |values| {
                        planes.columns(values, plane).map(
                            #[inline(always)]
                            |values| ColumnValues::new(isa, values),
                        )
                    },
                );
                self.y.write(
                    inner,
                    #[inline(always)]
                    |y| normal.write(isa, x, y, false, weight, bias),
                );
            } else {
                let slot = planes.slot(plane);
                let normal = ScaledNormal::<I, E::Acc>::new(isa, stats, self.affine, slot);
                self.y.write(
                    inner,
                    #[inline(always)]
                    |y| {
                        map(
                            isa,
                            x,
                            y,
                            #[inline(always)]
                            |_, x| normal.of(x),
                        )
                    },
                );
            }
        }
    }
}

/// The gradients of weight and bias, if `params` are wanted, and the sums that `grad_input` takes
/// the means of.
pub(crate) fn grad_sums<E: Elem>(
    x: &[E],
    dy: &[E],
    frame: Frame,
    weight: Option<&[E::Acc]>,
    params: bool,
) -> GradSums {
    check(frame, x.len(), [weight, None]);
    assert!(dy.len() == x.len());
    let planes = Planes::new(frame);
    let weight = planes.in_slots(weight);
    let weight = weight.as_deref();
    let sets = match frame.by {
        NormalizedBy::Nothing => 0,
        NormalizedBy::Channels(stats) | NormalizedBy::Groups(stats) => stats.len(),
    };
    let mut all = GradSums {
        dweight: vec![],
        dbias: vec![],
        sets: vec![[0.; 2]; sets],
    };
    if params && planes.each {
        [all.dweight, all.dbias] = column_grads(x, dy, planes).map(|sums| planes.of_values(sums));
    } else if params {
        let count = frame.spread.count(frame.shape);
        (all.dweight, all.dbias) = (vec![0.; count], vec![0.; count]);
    }
    let from_planes = params && !planes.each;
    if !from_planes && sets == 0 {
        return all;
    }
    for (plane, [along, sum]) in plane_sums(x, dy, planes, weight).into_iter().enumerate() {
        if from_planes {
            all.dweight[planes.slot(plane)] += along;
            all.dbias[planes.slot(plane)] += sum;
        }
        if let Some(set) = all.sets.get_mut(planes.set(plane)) {
            let factor = if planes.each {
                1.
            } else {
                planes.factor(weight, plane)
            };
            set[0] += along * factor;
            set[1] += sum * factor;
        }
    }
    all
}

/// The sums of `g · x̂` and of `g` of each plane; where a plane has one weight, without it.
fn plane_sums<E: Elem>(
    x: &[E],
    dy: &[E],
    planes: Planes,
    weight: Option<&[E::Acc]>,
) -> Vec<[f64; 2]> {
    let per_block = par::items_per_block(planes.count(), planes.shape.inner);
    let size = per_block * planes.shape.inner;
    let mut sums = vec![[0f64; 2]; planes.count()];
    let pairs = x.chunks(size).zip(dy.chunks(size));
    let blocks = pairs.zip(sums.chunks_mut(per_block)).enumerate();
    let blocks = blocks.map(|(block, ((x, dy), sums))| SpreadPlaneSums {
        x,
        dy,
        first: block * per_block,
        planes,
        weight,
        sums,
    });
    par::run(x.len(), blocks);
    sums
}

struct SpreadPlaneSums<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    /// The first plane.
    first: usize,
    planes: Planes<'a>,
    weight: Option<&'a [E::Acc]>,
    sums: &'a mut [[f64; 2]],
}

impl<E: Elem> Kernel for SpreadPlaneSums<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (planes, inner) = (self.planes, self.planes.shape.inner);
        let pairs = self.x.chunks_exact(inner).zip(self.dy.chunks_exact(inner));
        for (i, ((x, dy), sums)) in pairs.zip(self.sums).enumerate() {
            let plane = self.first + i;
            let stats = planes.stats(plane);
            let normal = Normal::<I, E::Acc>::new(isa, stats);
            let weight = self.weight.filter(|_| planes.each);
            let weight = ColumnFactor::new(isa, planes.columns(weight, plane));
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
            *sums = [stats.along::<E::Acc>([along, sum]), sum];
        }
    }
}

/// The sums of `dy · x̂` and of `dy` of each column of each slot.
fn column_grads<E: Elem>(x: &[E], dy: &[E], planes: Planes) -> [Vec<f64>; 2] {
    let inner = planes.shape.inner;
    let slots = planes.planes_of_slots();
    let mut sums = vec![0f64; 2 * inner * slots.len()];
    let per_job = par::items_per_block(slots.len(), x.len() / slots.len());
    let jobs = slots
        .chunks(per_job)
        .zip(sums.chunks_mut(per_job * 2 * inner));
    let jobs = jobs.map(|(slots, sums)| SpreadColumnSums {
        x,
        dy,
        planes,
        slots,
        sums,
    });
    par::run(x.len(), jobs);
    if planes.slots == Slots::One {
        let mut dweight = combined(&sums, 2 * inner);
        let dbias = dweight.split_off(inner);
        return [dweight, dbias];
    }
    let (mut dweight, mut dbias) = (vec![], vec![]);
    for sums in sums.chunks(2 * inner) {
        let (along, sum) = sums.split_at(inner);
        dweight.extend_from_slice(along);
        dbias.extend_from_slice(sum);
    }
    [dweight, dbias]
}

struct SpreadColumnSums<'a, E> {
    x: &'a [E],
    dy: &'a [E],
    planes: Planes<'a>,
    slots: &'a [StepBy<Range<usize>>],
    sums: &'a mut [f64],
}

impl<E: Elem> Kernel for SpreadColumnSums<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (planes, inner) = (self.planes, self.planes.shape.inner);
        for (slot, sums) in self.slots.iter().zip(self.sums.chunks_mut(2 * inner)) {
            let mut columns = ColumnSums::<I, E::Acc, 2>::new(isa, sums);
            for plane in slot.clone() {
                let normal = Normal::<I, E::Acc>::new(isa, planes.stats(plane));
                let span = plane * inner..(plane + 1) * inner;
                columns.add2(
                    isa,
                    &self.x[span.clone()],
                    &self.dy[span],
                    #[inline(always)]
                    |_, x, dy| [dy * normal.of(x), dy],
                );
            }
            columns.finish(isa);
        }
    }
}

/// `dx`, from the means of `g · x̂` and of `g` of each set, if its statistics move with `x`.
pub(crate) fn grad_input<E: Elem>(
    x: &[E],
    dy: &[E],
    frame: Frame,
    weight: Option<&[E::Acc]>,
    means: Option<&[[f64; 2]]>,
) -> Vec<E> {
    check(frame, x.len(), [weight, None]);
    assert!(dy.len() == x.len());
    let sets = match frame.by {
        NormalizedBy::Nothing => 0,
        NormalizedBy::Channels(stats) | NormalizedBy::Groups(stats) => stats.len(),
    };
    assert!(means.is_none_or(|means| means.len() == sets));
    let means = means.filter(|_| sets > 0);
    let planes = Planes::new(frame);
    let weight = planes.in_slots(weight);
    let weight = weight.as_deref();
    let per_block = par::items_per_block(planes.count(), planes.shape.inner);
    let size = per_block * planes.shape.inner;
    fill(x.len(), size, |dx| {
        let blocks = x.chunks(size).zip(dy.chunks(size)).zip(dx).enumerate();
        let blocks = blocks.map(|(block, ((x, dy), dx))| SpreadInputGrad {
            x,
            dy,
            dx,
            first: block * per_block,
            planes,
            weight,
            means,
        });
        par::run(x.len(), blocks);
    })
}

struct SpreadInputGrad<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: Part<'a, E>,
    /// The first plane.
    first: usize,
    planes: Planes<'a>,
    weight: Option<&'a [E::Acc]>,
    means: Option<&'a [[f64; 2]]>,
}

impl<E: Elem> Kernel for SpreadInputGrad<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (planes, inner) = (self.planes, self.planes.shape.inner);
        let pairs = self.x.chunks_exact(inner).zip(self.dy.chunks_exact(inner));
        for (i, (x, dy)) in pairs.enumerate() {
            let plane = self.first + i;
            let stats = planes.stats(plane);
            let normal = Normal::<I, E::Acc>::new(isa, stats);
            let weight = self.weight.filter(|_| planes.each);
            let weight = ColumnFactor::new(isa, planes.columns(weight, plane));
            let factor = match planes.each {
                true => 1.,
                false => planes.factor(self.weight, plane),
            };
            let Some(means) = self.means else {
                let scale = splat::<I, _>(isa, E::Acc::from_f64(stats.inv_std * factor));
                self.dx.write(
                    inner,
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
                mean: splat::<I, _>(isa, E::Acc::from_f64(mean)),
                along: splat::<I, _>(isa, E::Acc::from_f64(along)),
                scale: normal.inv_std,
            };
            let factor = splat::<I, _>(isa, E::Acc::from_f64(factor));
            self.dx.write(
                inner,
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
