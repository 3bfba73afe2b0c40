//! Batch norm of `[outer, channels, inner]`: each channel by its statistics over samples and space,
//! or by given ones.
//!
//! Planes too short for lanes go through [`columns`], and all others through [`planes`], with a
//! reader for the order of `x`. Few long channels are divided among threads: by [`spread`], plane
//! by plane, or by [`columns`], sample by sample.

use std::borrow::Cow;

use super::activation::Activation;
use super::affine::AffinePair;
use super::grads::{Gradients, Wanted};
use super::moments::Moments;
use super::readers::{InPlace, Transposed};
use super::shape::{Order, Shape};
use super::simd::{Elem, Real};
use super::spread::{Frame, NormalizedBy, Spread};
use super::stats::{Statistics, Stats};
use super::{columns, par, planes, slice_moments, spread, transpose};

/// How channels are gone through.
enum Way {
    Columns,
    Divided,
    InPlace,
    Transposed,
}

impl Way {
    fn of(order: Order, shape: Shape) -> Self {
        /// Planes from this length on are worth moments and sums of their own.
        const LONG: usize = 1 << 8;
        assert!(order == Order::ChannelsFirst || shape.has_planes());
        let divides = par::divides(shape.channels, shape.outer * shape.inner);
        let first = order == Order::ChannelsFirst;
        if !shape.has_planes() || (divides && first && shape.inner < LONG) {
            Way::Columns
        } else if divides && shape.inner >= LONG {
            Way::Divided
        } else if first {
            Way::InPlace
        } else {
            Way::Transposed
        }
    }
}

/// `x` with its channels first.
fn channels_first<E: Elem>(x: &[E], order: Order, shape: Shape) -> Cow<'_, [E]> {
    match order {
        Order::ChannelsFirst => Cow::Borrowed(x),
        Order::ChannelsLast => Cow::Owned(transpose::transposed(
            x,
            [shape.outer, shape.inner, shape.channels],
        )),
    }
}

/// The batch as a frame.
fn frame(shape: Shape, stats: &[Stats]) -> Frame<'_> {
    Frame {
        shape,
        by: NormalizedBy::Channels(stats),
        spread: Spread::Channel,
    }
}

/// `y`, and what each channel was normalized by. The result has its channels first, whatever the
/// order of `x`.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    order: Order,
    shape: Shape,
    affine: AffinePair<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>) {
    activated_forward(x, order, shape, affine, statistics, None)
}

/// [`forward`] with an activation after it.
fn activated_forward<E: Elem>(
    x: &[E],
    order: Order,
    shape: Shape,
    affine: AffinePair<E::Acc>,
    statistics: Statistics,
    activation: Option<Activation>,
) -> (Vec<E>, Vec<Stats>) {
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(shape.channels));
    match Way::of(order, shape) {
        Way::Columns => columns::forward(x, shape, affine, statistics, activation),
        Way::InPlace => {
            let reader = || InPlace { x, shape };
            planes::forward(reader, shape, affine, statistics, activation, false)
        }
        Way::Transposed => {
            let reader = || Transposed::new(x, shape);
            planes::forward(reader, shape, affine, statistics, activation, false)
        }
        Way::Divided => {
            let x = channels_first(x, order, shape);
            let stats = match statistics {
                Statistics::Given(given) => given.to_vec(),
                Statistics::Own { center, eps } => {
                    Stats::of_moments(&divided_moments(&x, shape, center), eps)
                }
            };
            let y = spread::normalize(&x, frame(shape, &stats), affine, false, activation);
            (y, stats)
        }
    }
}

/// The moments of each channel; about zero where they are not `center`ed.
pub(crate) fn moments<E: Elem>(x: &[E], order: Order, shape: Shape, center: bool) -> Vec<Moments> {
    assert_eq!(x.len(), shape.elements());
    match Way::of(order, shape) {
        Way::Columns => columns::moments(x, shape, center),
        Way::InPlace => planes::moments(|| InPlace { x, shape }, shape, center),
        Way::Transposed => planes::moments(|| Transposed::new(x, shape), shape, center),
        Way::Divided => divided_moments(&channels_first(x, order, shape), shape, center),
    }
}

/// Steps after the normalization of a batch.
#[derive(Debug)]
pub struct Following<'a, T> {
    /// Weight and bias.
    pub affine: AffinePair<'a, T>,
    /// How these are spread.
    pub spread: Spread,
    /// Behind them.
    pub activation: Option<Activation>,
}

impl<T> Clone for Following<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Following<'_, T> {}

/// [`forward`] with weights and biases of any spread, and an activation.
pub(crate) fn spread_forward<E: Elem>(
    x: &[E],
    order: Order,
    shape: Shape,
    following: Following<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>) {
    let Following {
        affine,
        spread,
        activation,
    } = following;
    if spread == Spread::Channel {
        return activated_forward(x, order, shape, affine, statistics, activation);
    }
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(spread.count(shape)));
    match (spread, Way::of(order, shape)) {
        (Spread::SampleAndChannel, Way::InPlace) => {
            let reader = || InPlace { x, shape };
            return planes::forward(reader, shape, affine, statistics, activation, true);
        }
        (Spread::SampleAndChannel, Way::Transposed) => {
            let reader = || Transposed::new(x, shape);
            return planes::forward(reader, shape, affine, statistics, activation, true);
        }
        _ => {}
    }
    let stats = match statistics {
        Statistics::Given(given) => given.to_vec(),
        Statistics::Own { center, eps } => {
            Stats::of_moments(&moments(x, order, shape, center), eps)
        }
    };
    let frame = Frame {
        spread,
        ..frame(shape, &stats)
    };
    let x = channels_first(x, order, shape);
    let y = spread::normalize(&x, frame, affine, false, activation);
    (y, stats)
}

/// The gradients of [`spread_forward`].
pub(crate) fn spread_backward<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    following: Following<E::Acc>,
    stats: &[Stats],
    wanted: Wanted,
) -> Gradients<E> {
    let Following {
        affine,
        spread,
        activation,
    } = following;
    if spread == Spread::Channel {
        return activated_backward(x, order, dy, shape, following, stats, wanted);
    }
    check_backward::<E>(x, dy, shape, None, stats);
    assert!(affine.fits(spread.count(shape)));
    let batch = planes::Batch {
        dy,
        shape,
        affine,
        stats,
        activation,
        per_sample: true,
    };
    match (spread, Way::of(order, shape)) {
        (Spread::SampleAndChannel, Way::InPlace) => {
            return planes::sampled_backward(|| InPlace { x, shape }, batch, wanted);
        }
        (Spread::SampleAndChannel, Way::Transposed) => {
            return planes::sampled_backward(|| Transposed::new(x, shape), batch, wanted);
        }
        _ => {}
    }
    let x = channels_first(x, order, shape);
    let frame = Frame {
        spread,
        ..frame(shape, stats)
    };
    match activation {
        None => spread_passes(&x, dy, frame, affine.weight, wanted),
        Some(activation) => {
            let g = spread::through(&x, dy, frame, affine, false, activation);
            spread_passes(&x, &g, frame, affine.weight, wanted)
        }
    }
}

/// The passes of a backward whose cotangent is `dy`.
fn spread_passes<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    frame: Frame,
    weight: Option<&[E::Acc]>,
    wanted: Wanted,
) -> Gradients<E> {
    let sums = spread::grad_sums::<E, D, D>(x, dy, frame, weight, wanted.params, false);
    let means = wanted
        .own
        .map(|center| spread::means(&sums.sets, frame.shape.per_channel(), center));
    Gradients {
        dx: spread::grad_input(x, dy, frame, weight, means.as_deref()),
        dweight: sums.dweight,
        dbias: sums.dbias,
    }
}

/// The moments of all planes, merged in the order of the samples.
fn divided_moments<E: Elem>(x: &[E], shape: Shape, center: bool) -> Vec<Moments> {
    let planes = slice_moments::of_rows(x, shape.inner, center);
    let mut channels = vec![Moments::default(); shape.channels];
    for planes in planes.chunks(shape.channels) {
        for (channel, plane) in channels.iter_mut().zip(planes) {
            *channel = channel.merge(*plane);
        }
    }
    channels
}

/// The gradients of `x`, whatever its order, and of weight and bias, from `dy`: `dx` and `dy` have
/// their channels first.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    wanted: Wanted,
) -> Gradients<E> {
    let following = Following {
        affine: AffinePair { weight, bias: None },
        spread: Spread::Channel,
        activation: None,
    };
    activated_backward(x, order, dy, shape, following, stats, wanted)
}

/// [`backward`] of a forward with an activation, which needs the bias too.
fn activated_backward<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    following: Following<E::Acc>,
    stats: &[Stats],
    wanted: Wanted,
) -> Gradients<E> {
    let Following {
        affine, activation, ..
    } = following;
    let weight = affine.weight;
    check_backward::<E>(x, dy, shape, weight, stats);
    assert!(affine.fits(shape.channels));
    let batch = planes::Batch {
        dy,
        shape,
        affine,
        stats,
        activation,
        per_sample: false,
    };
    match (Way::of(order, shape), activation) {
        (Way::Columns, None) => columns::backward(x, dy, shape, weight, stats, wanted),
        (Way::Columns, Some(activation)) => {
            let g = columns::through(x, dy, shape, affine, stats, activation);
            columns::backward(x, &g, shape, weight, stats, wanted)
        }
        (Way::InPlace, _) => planes::backward(|| InPlace { x, shape }, batch, wanted),
        (Way::Transposed, _) => planes::backward(|| Transposed::new(x, shape), batch, wanted),
        (Way::Divided, activation) => {
            let x = channels_first(x, order, shape);
            let frame = frame(shape, stats);
            match activation {
                None => divided_passes(&x, dy, frame, weight, wanted),
                Some(activation) => {
                    let g = spread::through(&x, dy, frame, affine, false, activation);
                    divided_passes(&x, &g, frame, weight, wanted)
                }
            }
        }
    }
}

/// The passes of a backward whose cotangent is `dy`, channels being divided.
fn divided_passes<E: Elem, D: Elem<Acc = E::Acc>>(
    x: &[E],
    dy: &[D],
    frame: Frame,
    weight: Option<&[E::Acc]>,
    wanted: Wanted,
) -> Gradients<E> {
    let params = wanted.params || wanted.own.is_some();
    let sums = spread::grad_sums::<E, D, D>(x, dy, frame, None, params, false);
    let means = wanted.own.map(|center| {
        let means = spread::means(&sums.sets, frame.shape.per_channel(), center);
        weighted(&means, weight)
    });
    Gradients {
        dx: spread::grad_input(x, dy, frame, weight, means.as_deref()),
        dweight: sums.dweight,
        dbias: sums.dbias,
    }
}

/// The means of a gradient of `x̂` from those of the gradient of `y`.
fn weighted<T: Real>(means: &[[f64; 2]], weight: Option<&[T]>) -> Vec<[f64; 2]> {
    let means = means.iter().enumerate().map(|(channel, means)| {
        let weight = weight.map_or(1., |w| w[channel].to_f64());
        means.map(|mean| mean * weight)
    });
    means.collect()
}

/// The sums of `dy · x̂` and of `dy` of each channel, which are the gradients of weight and bias.
pub(crate) fn grad_sums<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    stats: &[Stats],
) -> [Vec<f64>; 2] {
    check_backward::<E>(x, dy, shape, None, stats);
    let batch = planes::Batch {
        dy,
        shape,
        affine: AffinePair::NONE,
        stats,
        activation: None,
        per_sample: false,
    };
    match Way::of(order, shape) {
        Way::Columns => columns::grad_sums(x, dy, shape, stats),
        Way::InPlace => planes::grad_sums(|| InPlace { x, shape }, batch),
        Way::Transposed => planes::grad_sums(|| Transposed::new(x, shape), batch),
        Way::Divided => {
            let x = channels_first(x, order, shape);
            let sums = spread::grad_sums::<E, E, E>(&x, dy, frame(shape, stats), None, true, false);
            [sums.dweight, sums.dbias]
        }
    }
}

/// `dx`, with its channels first, from the means of `dy · x̂` and of `dy` of each channel.
pub(crate) fn grad_input<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    means: &[[f64; 2]],
) -> Vec<E> {
    check_backward::<E>(x, dy, shape, weight, stats);
    assert_eq!(means.len(), shape.channels);
    let batch = planes::Batch {
        dy,
        shape,
        affine: AffinePair { weight, bias: None },
        stats,
        activation: None,
        per_sample: false,
    };
    match Way::of(order, shape) {
        Way::Columns => columns::grad_input(x, dy, shape, weight, stats, means),
        Way::InPlace => planes::grad_input(|| InPlace { x, shape }, batch, means),
        Way::Transposed => planes::grad_input(|| Transposed::new(x, shape), batch, means),
        Way::Divided => {
            let x = channels_first(x, order, shape);
            let means = weighted(means, weight);
            spread::grad_input(&x, dy, frame(shape, stats), weight, Some(&means))
        }
    }
}

/// Asserts that lengths fit the shape.
fn check_backward<E: Elem>(
    x: &[E],
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
) {
    assert_eq!(x.len(), shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), shape.channels);
    assert!(weight.is_none_or(|w| w.len() == shape.channels));
}
