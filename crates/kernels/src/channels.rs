//! Batch norm of `[outer, channels, inner]`: each channel by its statistics over samples and space,
//! or by given ones.

use super::affine::AffinePair;
use super::grads::{Gradients, Wanted};
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
    assert_eq!(x.len(), shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), shape.channels);
    assert!(weight.is_none_or(|w| w.len() == shape.channels));
    assert!(order == Order::ChannelsFirst || shape.has_planes());
    let batch = planes::Batch {
        dy,
        shape,
        weight,
        stats,
        wanted,
    };
    match order {
        Order::ChannelsLast => planes::backward(|| Transposed::new(x, shape), batch),
        Order::ChannelsFirst if shape.has_planes() => {
            planes::backward(|| InPlace { x, shape }, batch)
        }
        Order::ChannelsFirst => columns::backward(x, dy, shape, weight, stats, wanted),
    }
}
