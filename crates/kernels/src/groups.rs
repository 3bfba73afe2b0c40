//! Group and instance norm of `[outer, channels, inner]`: each group of neighboring channels of a
//! sample, which lie together in memory, by its own statistics, each channel with its own weight
//! and bias.
//!
//! Planes too short for lanes take the weight and bias of every column of a group from an array
//! instead.

use super::activation::{Activate, Activation, ThroughActivation};
use super::affine::{AffinePair, Normal, ScaledNormal};
use super::buffer::{Part, Scratch, fill};
use super::grads::{Gradients, InputGrad};
use super::loops::{ColumnValues, map, map2, sums2};
use super::par;
use super::shape::Shape;
use super::simd::{Elem, Isa, Kernel, LANES, Real, splat};
use super::spread::{Frame, NormalizedBy, Spread};
use super::stats::Stats;
use super::{slice_moments, spread};

/// Groups that are normalized by their own statistics.
#[derive(Debug, Clone, Copy)]
pub struct GroupSpec {
    /// The axes of the tensor.
    pub shape: Shape,
    /// How many groups the channels of a sample make.
    pub num_groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Each channel of each sample has a weight and a bias of its own, instead of each channel.
    pub per_sample: bool,
    /// Follows weight and bias.
    pub activation: Option<Activation>,
}

impl GroupSpec {
    /// How many weights and biases there are.
    fn params(self) -> usize {
        match self.per_sample {
            true => self.shape.outer * self.shape.channels,
            false => self.shape.channels,
        }
    }

    fn channels_per_group(self) -> usize {
        self.shape.channels / self.num_groups
    }

    /// The tensor as a frame.
    fn frame(self, stats: &[Stats]) -> Frame<'_> {
        Frame {
            shape: self.shape,
            by: NormalizedBy::Groups(stats),
            spread: match self.per_sample {
                true => Spread::SampleAndChannel,
                false => Spread::Channel,
            },
        }
    }

    /// The elements of a group.
    fn len(self) -> usize {
        self.channels_per_group() * self.shape.inner
    }

    /// The first weight and bias of group `row`, counted over all samples.
    #[inline(always)]
    fn first_param(self, row: usize) -> usize {
        let group = match self.per_sample {
            true => row,
            false => row % self.num_groups,
        };
        group * self.channels_per_group()
    }

    /// One number for each channel, repeated for each of its columns, where planes are too short
    /// for lanes; else nothing.
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
    fn columns<'a, T: Real, I: Isa>(
        self,
        isa: I,
        spread: &'a [T],
        row: usize,
    ) -> Option<ColumnValues<'a, I, T>> {
        let start = self.first_param(row) * self.shape.inner;
        let columns = spread.get(start..start + self.len())?;
        Some(ColumnValues::new(isa, columns))
    }
}

/// `y`, and what each group was normalized by.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    affine: AffinePair<E::Acc>,
    spec: GroupSpec,
) -> (Vec<E>, Vec<Stats>) {
    let len = spec.len();
    assert_eq!(x.len(), spec.shape.elements());
    assert!(affine.fits(spec.params()));
    let rows = x.len() / len;
    if par::divides(rows, len) {
        let stats = Stats::of_moments(&slice_moments::of_rows(x, len, true), spec.eps);
        let y = spread::normalize(x, spec.frame(&stats), affine, false, spec.activation);
        return (y, stats);
    }
    let per_block = par::items_per_block(rows, len);
    let size = per_block * len;
    let mut stats = vec![Stats::NONE; rows];
    let weight = &spec.spread(affine.weight);
    let bias = &spec.spread(affine.bias);
    let y = fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(y).zip(stats.chunks_mut(per_block));
        let blocks = blocks
            .enumerate()
            .map(|(block, ((x, y), stats))| GroupsForward {
                x,
                y,
                stats,
                first: block * per_block,
                affine,
                weight,
                bias,
                spec,
            });
        match spec.activation {
            None => par::run(x.len(), blocks),
            Some(activation) => {
                let blocks = blocks.map(|groups| ActivatedForward { groups, activation });
                par::run(x.len(), blocks);
            }
        }
    });
    (y, stats)
}

struct GroupsForward<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    stats: &'a mut [Stats],
    /// The first group.
    first: usize,
    affine: AffinePair<'a, E::Acc>,
    weight: &'a [E::Acc],
    bias: &'a [E::Acc],
    spec: GroupSpec,
}

impl<E: Elem> Kernel for GroupsForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (spec, inner) = (self.spec, self.spec.shape.inner);
        let groups = self.x.chunks_exact(spec.len());
        for (i, (x, stats)) in groups.zip(self.stats).enumerate() {
            let row = self.first + i;
            *stats = Stats::of_row(isa, x, true, spec.eps);
            if inner >= LANES {
                for (c, x) in x.chunks_exact(inner).enumerate() {
                    let channel = spec.first_param(row) + c;
                    let normal = ScaledNormal::<I, E::Acc>::new(isa, *stats, self.affine, channel);
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
                continue;
            }
            let weight = spec.columns(isa, self.weight, row);
            let bias = spec.columns(isa, self.bias, row);
            let normal = Normal::<I, E::Acc>::new(isa, *stats);
            self.y.write(
                x.len(),
                #[inline(always)]
                |y| normal.write(isa, x, y, false, weight, bias),
            );
        }
    }
}

/// Groups forward with an activation.
struct ActivatedForward<'a, E: Elem> {
    groups: GroupsForward<'a, E>,
    activation: Activation,
}

impl<E: Elem> Kernel for ActivatedForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            mut groups,
            activation,
        } = self;
        let spec = groups.spec;
        let mut scratch = Scratch::new();
        let all = groups.x.chunks_exact(spec.len()).zip(groups.stats);
        for (i, (x, stats)) in all.enumerate() {
            *stats = Stats::of_row(isa, x, true, spec.eps);
            let group = Group {
                row: groups.first + i,
                x,
                stats: *stats,
            };
            scratch.clear();
            let spread = [groups.weight, groups.bias];
            group.write_wide(isa, spec, groups.affine, spread, &mut scratch);
            let u = scratch.get();
            groups.y.write(
                x.len(),
                #[inline(always)]
                |y| isa.call(Activate { activation, u, y }),
            );
        }
    }
}

/// The gradients of `x`, weight and bias from `dy`.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    affine: AffinePair<E::Acc>,
    stats: &[Stats],
    spec: GroupSpec,
) -> Gradients<E> {
    let (len, params) = (spec.len(), spec.params());
    let rows = x.len() / len;
    assert_eq!(x.len(), spec.shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), rows);
    assert!(affine.fits(params));
    if par::divides(rows, len) {
        let frame = spec.frame(stats);
        return match spec.activation {
            None => backward_passes(x, dy, frame, affine.weight, len),
            Some(activation) => {
                let g = spread::through(x, dy, frame, affine, false, activation);
                backward_passes(x, &g, frame, affine.weight, len)
            }
        };
    }
    let per_block = par::items_per_summing_block(rows, len);
    let size = per_block * len;
    let [spread, spread_bias] = &[affine.weight, affine.bias].map(|p| spec.spread(p));
    let (sums, blocks) = match spec.per_sample {
        true => (per_block * spec.channels_per_group(), 1),
        false => (params, rows.div_ceil(per_block)),
    };
    let mut partial = vec![0f64; 2 * params * blocks];
    let dx = fill(x.len(), size, |dx| {
        let blocks = x.chunks(size).zip(dy.chunks(size)).zip(dx);
        let sums = stats.chunks(per_block).zip(partial.chunks_mut(2 * sums));
        let blocks = blocks.zip(sums).enumerate();
        let blocks = blocks.map(
            |(block, (((x, dy), dx), (stats, partial)))| GroupsBackward::<E, E> {
                x,
                dy,
                dx,
                stats,
                first: block * per_block,
                affine,
                spread,
                spread_bias,
                spec,
                partial,
            },
        );
        match spec.activation {
            None => par::run(x.len(), blocks),
            Some(activation) => {
                let blocks = blocks.map(|groups| ActivatedBackward { groups, activation });
                par::run(x.len(), blocks);
            }
        }
    });
    if spec.per_sample {
        let (mut dweight, mut dbias) = (Vec::with_capacity(params), Vec::with_capacity(params));
        for partial in partial.chunks(2 * sums) {
            let (along, sum) = partial.split_at(partial.len() / 2);
            dweight.extend_from_slice(along);
            dbias.extend_from_slice(sum);
        }
        return Gradients { dx, dweight, dbias };
    }
    let mut dweight = vec![0f64; 2 * params];
    for partial in partial.chunks(2 * params) {
        for (t, p) in dweight.iter_mut().zip(partial) {
            *t += p;
        }
    }
    let dbias = dweight.split_off(params);
    Gradients { dx, dweight, dbias }
}

/// The passes of a backward whose cotangent is `dy`.
fn backward_passes<X: Elem, E: Elem<Acc = X::Acc>>(
    x: &[X],
    dy: &[E],
    frame: Frame,
    weight: Option<&[X::Acc]>,
    len: usize,
) -> Gradients<X> {
    let sums = spread::grad_sums::<X, E, E>(x, dy, frame, weight, true, false);
    let means = spread::means(&sums.sets, len as f64, true);
    Gradients {
        dx: spread::grad_input(x, dy, frame, weight, Some(&means)),
        dweight: sums.dweight,
        dbias: sums.dbias,
    }
}

struct GroupsBackward<'a, E: Elem, D> {
    x: &'a [E],
    dy: &'a [D],
    dx: Part<'a, E>,
    stats: &'a [Stats],
    /// The first group.
    first: usize,
    affine: AffinePair<'a, E::Acc>,
    spread: &'a [E::Acc],
    spread_bias: &'a [E::Acc],
    spec: GroupSpec,
    /// The sums of `dy · x̂` of each weight, or of those of the groups alone, then those of `dy`.
    partial: &'a mut [f64],
}

/// Groups backward with an activation: `dy · act′(u)` of the block first.
struct ActivatedBackward<'a, E: Elem> {
    groups: GroupsBackward<'a, E, E>,
    activation: Activation,
}

impl<E: Elem> Kernel for ActivatedBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { groups, activation } = self;
        let (spec, len) = (groups.spec, groups.spec.len());
        let (mut u, mut g) = (Scratch::new(), Scratch::new());
        let all = groups.x.chunks_exact(len).zip(groups.dy.chunks_exact(len));
        for (i, (x, dy)) in all.enumerate() {
            let group = Group {
                row: groups.first + i,
                x,
                stats: groups.stats[i],
            };
            u.clear();
            let spread = [groups.spread, groups.spread_bias];
            group.write_wide(isa, spec, groups.affine, spread, &mut u);
            let u = u.get();
            g.push(
                len,
                #[inline(always)]
                |g| {
                    isa.call(ThroughActivation {
                        activation,
                        u,
                        dy,
                        g,
                    })
                },
            );
        }
        isa.call(GroupsBackward {
            x: groups.x,
            dy: g.get(),
            dx: groups.dx,
            stats: groups.stats,
            first: groups.first,
            affine: groups.affine,
            spread: groups.spread,
            spread_bias: groups.spread_bias,
            spec,
            partial: groups.partial,
        });
    }
}

/// One group.
#[derive(Clone, Copy)]
struct Group<'a, E> {
    /// Its number, counted over all samples.
    row: usize,
    x: &'a [E],
    stats: Stats,
}

impl<E: Elem> Group<'_, E> {
    /// Adds what an activation follows; `spread` has weight and bias as
    /// [`GroupSpec::spread`] makes them.
    #[inline(always)]
    fn write_wide<I: Isa>(
        &self,
        isa: I,
        spec: GroupSpec,
        affine: AffinePair<E::Acc>,
        spread: [&[E::Acc]; 2],
        u: &mut Scratch<E::Acc>,
    ) {
        let inner = spec.shape.inner;
        if inner >= LANES {
            for (c, x) in self.x.chunks_exact(inner).enumerate() {
                let param = spec.first_param(self.row) + c;
                let normal = ScaledNormal::<I, E::Acc>::new(isa, self.stats, affine, param);
                u.push(
                    inner,
                    #[inline(always)]
                    |u| normal.write(isa, x, u),
                );
            }
            return;
        }
        let [weight, bias] = spread.map(
            #[inline(always)]
            |values| spec.columns(isa, values, self.row),
        );
        let normal = Normal::<I, E::Acc>::new(isa, self.stats);
        u.push(
            self.x.len(),
            #[inline(always)]
            |u| normal.write_wide::<E, E>(isa, self.x, u, false, weight, bias),
        );
    }
}

impl<E: Elem, D: Elem<Acc = E::Acc>> Kernel for GroupsBackward<'_, E, D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (spec, inner) = (self.spec, self.spec.shape.inner);
        let len = spec.len();
        let (dweight, dbias) = self.partial.split_at_mut(self.partial.len() / 2);
        let before = match spec.per_sample {
            true => spec.first_param(self.first),
            false => 0,
        };
        let groups = self.x.chunks_exact(len).zip(self.dy.chunks_exact(len));
        for (i, ((x, dy), stats)) in groups.zip(self.stats).enumerate() {
            let row = self.first + i;
            let first = spec.first_param(row);
            let normal = Normal::<I, E::Acc>::new(isa, *stats);
            let weight = |c: usize| self.affine.weight.map_or(1., |w| w[c].to_f64());
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
                dweight[first - before + c] += a;
                dbias[first - before + c] += s;
                along += a * weight(first + c);
                mean += s * weight(first + c);
            }
            let n = len as f64;
            let grad = InputGrad {
                mean: splat::<I, _>(isa, E::Acc::from_f64(mean / n)),
                along: splat::<I, _>(isa, E::Acc::from_f64(along / n)),
                scale: normal.inv_std,
            };
            if inner >= LANES {
                let planes = x.chunks_exact(inner).zip(dy.chunks_exact(inner));
                for (c, (x, dy)) in planes.enumerate() {
                    let w = splat::<I, _>(isa, E::Acc::from_f64(weight(first + c)));
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
                                |_, x, dy| grad.of(normal.of(x), dy * w),
                            )
                        },
                    );
                }
                continue;
            }
            let w = spec.columns(isa, self.spread, row);
            self.dx.write(
                len,
                #[inline(always)]
                |dx| match w {
                    None => map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |_, x, dy| grad.of(normal.of(x), dy),
                    ),
                    Some(w) => map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |k, x, dy| grad.of(normal.of(x), dy * w.at(k)),
                    ),
                },
            );
        }
    }
}
