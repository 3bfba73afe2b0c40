//! Group and instance norm of `[outer, channels, inner]`: each group of neighboring channels of a sample, which lie together in memory, by its own
//! statistics, each channel with its own weight and bias.
//!
//! Planes too short for lanes take the weight and bias of every column of a group from an array instead.

use std::mem::MaybeUninit;

use super::buffer::filled;
use super::par;
use super::planes::{Affined, Shape};
use super::rows::{self, Affine, Gradients, Stats, row_stats};
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, splat};
use super::span::{Columns, map, map2, sums2};

/// What is normalized by what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) shape: Shape,
    pub(crate) num_groups: usize,
    pub(crate) eps: f64,
}

impl Spec {
    fn channels_per_group(self) -> usize {
        self.shape.channels / self.num_groups
    }

    /// The elements of a group.
    fn len(self) -> usize {
        self.channels_per_group() * self.shape.inner
    }

    /// The first channel of group `row`, counted over all samples.
    #[inline(always)]
    fn first_channel(self, row: usize) -> usize {
        row % self.num_groups * self.channels_per_group()
    }

    /// One number a channel, repeated for each of its columns, where planes are too short for lanes; else nothing.
    fn spread<T: Real>(self, values: Option<&[T]>) -> Vec<T> {
        match values {
            Some(values) if self.shape.inner < LANES => values
                .iter()
                .flat_map(|v| std::iter::repeat_n(*v, self.shape.inner))
                .collect(),
            _ => vec![],
        }
    }

    /// The columns of group `row` in what [`spread`](Self::spread) made.
    #[inline(always)]
    fn columns<'a, T: Elem<Acc = T> + Real, I: Isa>(
        self,
        isa: I,
        spread: &'a [T],
        row: usize,
    ) -> Option<Columns<'a, I, T>> {
        let start = self.first_channel(row) * self.shape.inner;
        let columns = spread.get(start..start + self.len())?;
        Some(Columns::new(isa, columns))
    }
}

pub(crate) fn forward<E: Elem>(x: &[E], affine: Affine<E::Acc>, spec: Spec) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let len = spec.len();
    assert_eq!(x.len(), spec.shape.elements());
    assert!(
        [affine.weight, affine.bias]
            .into_iter()
            .flatten()
            .all(|p| p.len() == spec.shape.channels)
    );
    let rows = x.len() / len;
    let per_block = par::items_per_block(rows, len);
    let level = Level::current();
    let mut stats = vec![Stats::NONE; rows];
    let (weight, bias) = (spec.spread(affine.weight), spec.spread(affine.bias));
    // SAFETY: the blocks cover all groups, and a block writes every element of its groups.
    let y = unsafe {
        filled(x.len(), |y| {
            let blocks = x
                .chunks(per_block * len)
                .zip(y.chunks_mut(per_block * len))
                .zip(stats.chunks_mut(per_block))
                .enumerate()
                .map(|(block, ((x, y), stats))| Forward {
                    x,
                    y,
                    stats,
                    first: block * per_block,
                    affine,
                    weight: &weight,
                    bias: &bias,
                    spec,
                })
                .collect();
            par::run(blocks, x.len(), |block| level.run(block));
        })
    };
    (y, stats)
}

struct Forward<'a, E: Elem> {
    x: &'a [E],
    y: &'a mut [MaybeUninit<E>],
    stats: &'a mut [Stats],
    first: usize,
    affine: Affine<'a, E::Acc>,
    weight: &'a [E::Acc],
    bias: &'a [E::Acc],
    spec: Spec,
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (spec, inner) = (self.spec, self.spec.shape.inner);
        let len = spec.len();
        let groups = self.x.chunks_exact(len).zip(self.y.chunks_exact_mut(len));
        for (i, ((x, y), stats)) in groups.zip(self.stats).enumerate() {
            let row = self.first + i;
            *stats = row_stats(isa, x, true, spec.eps);
            if inner >= LANES {
                let planes = x.chunks_exact(inner).zip(y.chunks_exact_mut(inner));
                for (c, (x, y)) in planes.enumerate() {
                    let affined = Affined::<I, E::Acc>::new(
                        isa,
                        *stats,
                        self.affine,
                        spec.first_channel(row) + c,
                    );
                    map(
                        isa,
                        x,
                        y,
                        #[inline(always)]
                        |_, v| affined.of(v),
                    );
                }
                continue;
            }
            let weight = spec.columns(isa, self.weight, row);
            let bias = spec.columns(isa, self.bias, row);
            rows::Normal::<I, E::Acc>::new(isa, *stats).write(isa, x, y, false, weight, bias);
        }
    }
}

/// What flows back into `x` from `dy`.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    spec: Spec,
) -> Gradients<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let (len, channels) = (spec.len(), spec.shape.channels);
    let rows = x.len() / len;
    assert_eq!(x.len(), spec.shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), rows);
    assert!(weight.is_none_or(|w| w.len() == channels));
    let per_block = par::items_per_block(rows, len);
    let level = Level::current();
    let spread = spec.spread(weight);
    let mut partial = vec![0f64; 2 * channels * rows.div_ceil(per_block)];
    // SAFETY: the blocks cover all groups, and a block writes every element of its groups.
    let dx = unsafe {
        filled(x.len(), |dx| {
            let blocks = x
                .chunks(per_block * len)
                .zip(dy.chunks(per_block * len))
                .zip(dx.chunks_mut(per_block * len))
                .zip(stats.chunks(per_block))
                .zip(partial.chunks_mut(2 * channels))
                .enumerate()
                .map(|(block, ((((x, dy), dx), stats), partial))| Backward {
                    x,
                    dy,
                    dx,
                    stats,
                    first: block * per_block,
                    weight,
                    spread: &spread,
                    spec,
                    partial,
                })
                .collect();
            par::run(blocks, x.len(), |block| level.run(block));
        })
    };
    let mut dweight = vec![0f64; 2 * channels];
    for partial in partial.chunks(2 * channels) {
        for (t, p) in dweight.iter_mut().zip(partial) {
            *t += p;
        }
    }
    let dbias = dweight.split_off(channels);
    Gradients { dx, dweight, dbias }
}

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: &'a mut [MaybeUninit<E>],
    stats: &'a [Stats],
    first: usize,
    weight: Option<&'a [E::Acc]>,
    spread: &'a [E::Acc],
    spec: Spec,
    /// The sums of `dy · x̂` of each channel, then those of `dy`.
    partial: &'a mut [f64],
}

impl<E: Elem> Kernel for Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (spec, inner) = (self.spec, self.spec.shape.inner);
        let len = spec.len();
        let (dweight, dbias) = self.partial.split_at_mut(spec.shape.channels);
        let groups = self.x.chunks_exact(len).zip(self.dy.chunks_exact(len));
        let groups = groups.zip(self.dx.chunks_exact_mut(len)).zip(self.stats);
        for (i, (((x, dy), dx), stats)) in groups.enumerate() {
            let row = self.first + i;
            let first = spec.first_channel(row);
            let normal = rows::Normal::<I, E::Acc>::new(isa, *stats);
            let weight = |c: usize| self.weight.map_or(1., |w| w[c].wide());
            let (mut along, mut mean) = (0., 0.);
            for (c, (x, dy)) in x
                .chunks_exact(inner)
                .zip(dy.chunks_exact(inner))
                .enumerate()
            {
                let [a, s] = sums2(
                    isa,
                    x,
                    dy,
                    #[inline(always)]
                    |_, x, dy| [dy * normal.mean.distance_from_high(x), dy],
                );
                let a = stats.along::<E::Acc>([a, s]);
                dweight[first + c] += a;
                dbias[first + c] += s;
                along += a * weight(first + c);
                mean += s * weight(first + c);
            }
            let n = len as f64;
            let back = Back::<I, E::Acc> {
                normal,
                mean: splat::<I, _>(isa, E::Acc::from_wide(mean / n)),
                along: splat::<I, _>(isa, E::Acc::from_wide(along / n)),
                inv_std: splat::<I, _>(isa, E::Acc::from_wide(stats.inv_std)),
            };
            if inner >= LANES {
                let planes = x.chunks_exact(inner).zip(dy.chunks_exact(inner));
                for (c, ((x, dy), dx)) in planes.zip(dx.chunks_exact_mut(inner)).enumerate() {
                    let w = splat::<I, _>(isa, E::Acc::from_wide(weight(first + c)));
                    map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |_, x, dy| back.of(x, dy * w),
                    );
                }
                continue;
            }
            match spec.columns(isa, self.spread, row) {
                None => map2(
                    isa,
                    x,
                    dy,
                    dx,
                    #[inline(always)]
                    |_, x, dy| back.of(x, dy),
                ),
                Some(w) => map2(
                    isa,
                    x,
                    dy,
                    dx,
                    #[inline(always)]
                    |k, x, dy| back.of(x, dy * w.at(k)),
                ),
            }
        }
    }
}

/// A group on its way back: `dx = inv_std · (g − mean(g) − x̂ · mean(g · x̂))`, with `g` the gradient of `x̂`.
#[derive(Clone, Copy)]
struct Back<I: Isa, T: Real> {
    normal: rows::Normal<I, T>,
    mean: Lanes<I, T>,
    along: Lanes<I, T>,
    inv_std: Lanes<I, T>,
}

impl<I: Isa, T: Elem<Acc = T> + Real> Back<I, T> {
    #[inline(always)]
    fn of(&self, x: Lanes<I, T>, g: Lanes<I, T>) -> Lanes<I, T> {
        ((g - self.mean) - self.normal.of(x) * self.along) * self.inv_std
    }
}
