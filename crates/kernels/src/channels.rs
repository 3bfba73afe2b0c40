//! Batch norm of `[outer, channels, inner]`: each channel by its statistics over samples and space,
//! or by given ones.

use super::affine::AffinePair;
use super::grads::{Gradients, Wanted};
use super::moments::Moments;
use super::readers::{InPlace, Transposed};
use super::shape::{Order, Shape};
use super::simd::Elem;
use super::stats::{Statistics, Stats};
use super::{columns, planes};

/// `y`, and what each channel was normalized by. The result has its channels first, whatever the
/// order of `x`.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    order: Order,
    shape: Shape,
    affine: AffinePair<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>) {
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(shape.channels));
    assert!(order == Order::ChannelsFirst || shape.has_planes());
    match order {
        Order::ChannelsLast => {
            planes::forward(|| Transposed::new(x, shape), shape, affine, statistics)
        }
        Order::ChannelsFirst if shape.has_planes() => {
            planes::forward(|| InPlace { x, shape }, shape, affine, statistics)
        }
        Order::ChannelsFirst => columns::forward(x, shape, affine, statistics),
    }
}

/// The moments of each channel; about zero where they are not `center`ed.
pub(crate) fn moments<E: Elem>(x: &[E], order: Order, shape: Shape, center: bool) -> Vec<Moments> {
    assert_eq!(x.len(), shape.elements());
    assert!(order == Order::ChannelsFirst || shape.has_planes());
    match order {
        Order::ChannelsLast => planes::moments(|| Transposed::new(x, shape), shape, center),
        Order::ChannelsFirst if shape.has_planes() => {
            planes::moments(|| InPlace { x, shape }, shape, center)
        }
        Order::ChannelsFirst => columns::moments(x, shape, center),
    }
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
    check_backward::<E>(x, order, dy, shape, weight, stats);
    let batch = planes::Batch {
        dy,
        shape,
        weight,
        stats,
    };
    match order {
        Order::ChannelsLast => planes::backward(|| Transposed::new(x, shape), batch, wanted),
        Order::ChannelsFirst if shape.has_planes() => {
            planes::backward(|| InPlace { x, shape }, batch, wanted)
        }
        Order::ChannelsFirst => columns::backward(x, dy, shape, weight, stats, wanted),
    }
}

/// The sums of `dy · x̂` and of `dy` of each channel, which are the gradients of weight and bias.
pub(crate) fn grad_sums<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    stats: &[Stats],
) -> [Vec<f64>; 2] {
    check_backward::<E>(x, order, dy, shape, None, stats);
    let batch = planes::Batch {
        dy,
        shape,
        weight: None,
        stats,
    };
    match order {
        Order::ChannelsLast => planes::grad_sums(|| Transposed::new(x, shape), batch),
        Order::ChannelsFirst if shape.has_planes() => {
            planes::grad_sums(|| InPlace { x, shape }, batch)
        }
        Order::ChannelsFirst => columns::grad_sums(x, dy, shape, stats),
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
    check_backward::<E>(x, order, dy, shape, weight, stats);
    assert_eq!(means.len(), shape.channels);
    let batch = planes::Batch {
        dy,
        shape,
        weight,
        stats,
    };
    match order {
        Order::ChannelsLast => planes::grad_input(|| Transposed::new(x, shape), batch, means),
        Order::ChannelsFirst if shape.has_planes() => {
            planes::grad_input(|| InPlace { x, shape }, batch, means)
        }
        Order::ChannelsFirst => columns::grad_input(x, dy, shape, weight, stats, means),
    }
}

/// Asserts that lengths and order fit the shape.
fn check_backward<E: Elem>(
    x: &[E],
    order: Order,
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
) {
    assert_eq!(x.len(), shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), shape.channels);
    assert!(weight.is_none_or(|w| w.len() == shape.channels));
    assert!(order == Order::ChannelsFirst || shape.has_planes());
}
