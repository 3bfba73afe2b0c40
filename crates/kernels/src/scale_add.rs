//! A residual and a branch that is scaled.

use super::buffer::{Part, fill};
use super::loops::{ColumnValues, map2};
use super::par;
use super::shape::Shape;
use super::simd::{Elem, Isa, Kernel, splat};
use super::spread::Spread;

/// `y = residual + x · weight`.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    residual: &[E],
    shape: Shape,
    weight: &[E::Acc],
    spread: Spread,
) -> Vec<E> {
    assert!(x.len() == shape.elements() && !x.is_empty());
    assert_eq!(residual.len(), x.len());
    assert_eq!(weight.len(), spread.count(shape));
    let inner = shape.inner;
    let per_block = par::items_per_block(x.len() / inner, inner);
    let size = per_block * inner;
    fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(residual.chunks(size)).zip(y);
        let blocks = blocks
            .enumerate()
            .map(|(block, ((x, residual), y))| ScaleAdd {
                x,
                residual,
                y,
                first: block * per_block,
                shape,
                weight,
                spread,
            });
        par::run(x.len(), blocks);
    })
}

struct ScaleAdd<'a, E: Elem> {
    x: &'a [E],
    residual: &'a [E],
    y: Part<'a, E>,
    /// Index of the first plane.
    first: usize,
    shape: Shape,
    weight: &'a [E::Acc],
    spread: Spread,
}

impl<E: Elem> Kernel for ScaleAdd<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let Shape {
            channels, inner, ..
        } = self.shape;
        let pairs = self.x.chunks(inner).zip(self.residual.chunks(inner));
        for (plane, (x, residual)) in (self.first..).zip(pairs) {
            let columns = match self.spread {
                Spread::Column => Some(0),
                Spread::SampleAndColumn => Some(plane / channels),
                Spread::Element => Some(plane % channels),
                Spread::SampleAndElement => Some(plane),
                Spread::Channel | Spread::SampleAndChannel => None,
            };
            if let Some(slot) = columns {
                let weight = &self.weight[slot * inner..][..inner];
                let weight = ColumnValues::new(isa, weight);
                self.y.write(
                    x.len(),
                    #[inline(always)]
                    |y| {
                        map2(
                            isa,
                            x,
                            residual,
                            y,
                            #[inline(always)]
                            |k, x, residual| residual + x * weight.at(k),
                        )
                    },
                );
                continue;
            }
            let slot = match self.spread {
                Spread::Channel => plane % channels,
                _ => plane,
            };
            let weight = splat::<I, E::Acc>(isa, self.weight[slot]);
            self.y.write(
                x.len(),
                #[inline(always)]
                |y| {
                    map2(
                        isa,
                        x,
                        residual,
                        y,
                        #[inline(always)]
                        |_, x, residual| residual + x * weight,
                    )
                },
            );
        }
    }
}
