//! Gated RMS norm: rows that are multiplied by a function of a second input, before they are
//! normalized or after it, each group of neighboring columns by its own statistics.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::activation::{Activation, ThroughActivation, activate};
use super::affine::Normal;
use super::buffer::{Part, Scratch, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block};
use super::grads::InputGrad;
use super::loops::{ColumnFactor, map, map2, sums2};
use super::par;
use super::simd::{Elem, Isa, Kernel, Lanes, Real, splat, zero};
use super::stats::Stats;

/// Where the gate acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `y = rms(x · act(z)) · w`.
    Before,
    /// `y = rms(x) · w · act(z)`.
    After,
}

/// Options of gated RMS norm.
#[derive(Debug, Clone, Copy)]
pub struct GatedSpec {
    /// The length of a row.
    pub len: usize,
    /// The length of a group of columns, which divides that of a row.
    pub group: usize,
    /// Added to the mean square.
    pub eps: f64,
    /// Round the normalized value to the element before it is multiplied by the weight.
    pub round_first: bool,
    /// Where the gate acts.
    pub gate: Gate,
    /// Function of the gate.
    pub activation: Activation,
}

/// The gradients of gated RMS norm: of the input, of the gate if there is one, and, as far as it is
/// wanted, of the weight in `f64`.
#[derive(Debug, Clone)]
pub struct GatedGradients<E, G> {
    /// Of the input.
    pub dx: Vec<E>,
    /// Of the gate; empty if there is none.
    pub dgate: Vec<G>,
    /// Of the weight.
    pub dweight: Vec<f64>,
}

/// `y`, and what each group of each row was normalized by.
pub(crate) fn forward<E: Elem, G: Elem<Acc = E::Acc>>(
    x: &[E],
    gate: Option<&[G]>,
    weight: Option<&[E::Acc]>,
    spec: GatedSpec,
) -> (Vec<E>, Vec<Stats>) {
    let rows = checked(x, gate, weight, spec);
    let groups = spec.len / spec.group;
    let per_block = par::items_per_block(rows, spec.len);
    let size = per_block * spec.len;
    let mut stats = vec![Stats::NONE; rows * groups];
    let y = fill(x.len(), size, |y| {
        let stats = stats.chunks_mut(per_block * groups);
        let blocks = x.chunks(size).zip(y).zip(stats).enumerate();
        let blocks = blocks.map(|(block, ((x, y), stats))| GatedForward {
            x,
            gate: gate.map(|gate| &gate[block * size..][..x.len()]),
            y,
            stats,
            weight,
            spec,
        });
        par::run(x.len(), blocks);
    });
    (y, stats)
}

/// Asserts that lengths fit, and returns the number of rows.
fn checked<E: Elem, G>(
    x: &[E],
    gate: Option<&[G]>,
    weight: Option<&[E::Acc]>,
    spec: GatedSpec,
) -> usize {
    assert!(spec.group > 0 && spec.len.is_multiple_of(spec.group));
    assert!(x.len().is_multiple_of(spec.len));
    assert!(gate.is_none_or(|gate| gate.len() == x.len()));
    assert!(weight.is_none_or(|w| w.len() == spec.len));
    x.len() / spec.len
}

/// A part of values that there may be.
#[inline(always)]
fn of_group<T>(values: Option<&[T]>, start: usize, len: usize) -> Option<&[T]> {
    values.map(
        #[inline(always)]
        |values| &values[start..start + len],
    )
}

struct GatedForward<'a, E: Elem, G> {
    x: &'a [E],
    gate: Option<&'a [G]>,
    y: Part<'a, E>,
    stats: &'a mut [Stats],
    weight: Option<&'a [E::Acc]>,
    spec: GatedSpec,
}

impl<E: Elem, G: Elem<Acc = E::Acc>> Kernel for GatedForward<'_, E, G> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (spec, group) = (self.spec, self.spec.group);
        let (mut opened, mut h) = (Scratch::<E::Acc>::new(), Scratch::<E::Acc>::new());
        let mut scratch = Scratch::new();
        let groups = spec.len / group;
        for (i, x) in self.x.chunks_exact(group).enumerate() {
            let weight = of_group(self.weight, i % groups * group, group);
            let weight = ColumnFactor::new(isa, weight);
            opened.clear();
            if let Some(gate) = of_group(self.gate, i * group, group) {
                let activation = spec.activation;
                opened.push(
                    group,
                    #[inline(always)]
                    |out| {
                        activate(
                            isa,
                            activation,
                            &mut scratch,
                            out,
                            #[inline(always)]
                            |z| converted(isa, gate, z),
                        )
                    },
                );
            }
            let is_before = spec.gate == Gate::Before && self.gate.is_some();
            h.clear();
            if is_before {
                h.push(
                    group,
                    #[inline(always)]
                    |h| product(isa, x, opened.get(), h),
                );
                self.stats[i] = Stats::of_row(isa, h.get(), false, spec.eps);
            } else {
                self.stats[i] = Stats::of_row(isa, x, false, spec.eps);
            }
            let normal = Normal::<I, E::Acc>::new(isa, self.stats[i]);
            let round = spec.round_first;
            self.y.write(
                group,
                #[inline(always)]
                |y| match (is_before, self.gate) {
                    (true, _) => map(
                        isa,
                        h.get(),
                        y,
                        #[inline(always)]
                        |k, h| weight.times(k, normal.rounded::<E>(isa, h, round)),
                    ),
                    (false, Some(_)) => map2(
                        isa,
                        x,
                        opened.get(),
                        y,
                        #[inline(always)]
                        |k, x, a| weight.times(k, normal.rounded::<E>(isa, x, round)) * a,
                    ),
                    (false, None) => map(
                        isa,
                        x,
                        y,
                        #[inline(always)]
                        |k, x| weight.times(k, normal.rounded::<E>(isa, x, round)),
                    ),
                },
            );
        }
    }
}

/// `a · b`.
#[inline(always)]
fn product<'o, A: Elem, B: Elem<Acc = A::Acc>, O: Elem<Acc = A::Acc>, I: Isa>(
    isa: I,
    a: &[A],
    b: &[B],
    out: &'o mut [MaybeUninit<O>],
) -> &'o mut [O] {
    map2(
        isa,
        a,
        b,
        out,
        #[inline(always)]
        |_, a, b| a * b,
    )
}

/// `x` in another type.
#[inline(always)]
fn converted<'o, X: Elem, O: Elem<Acc = X::Acc>, I: Isa>(
    isa: I,
    x: &[X],
    out: &'o mut [MaybeUninit<O>],
) -> &'o mut [O] {
    map(
        isa,
        x,
        out,
        #[inline(always)]
        |_, x| x,
    )
}

/// The gradients of [`forward`]; that of the weight is empty unless `params` are wanted.
pub(crate) fn backward<E: Elem, G: Elem<Acc = E::Acc>>(
    x: &[E],
    gate: Option<&[G]>,
    dy: &[E],
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    spec: GatedSpec,
    params: bool,
) -> GatedGradients<E, G> {
    let rows = checked(x, gate, weight, spec);
    let groups = spec.len / spec.group;
    assert!(dy.len() == x.len() && stats.len() == rows * groups);
    let per_block = match params {
        true => rows_per_block(rows, spec.len),
        false => par::items_per_block(rows, spec.len),
    };
    let size = per_block * spec.len;
    let width = if params { spec.len } else { 0 };
    let mut partial = vec![0f64; width * rows.div_ceil(per_block)];
    let mut dgate = vec![];
    let dx = fill(x.len(), size, |dx| {
        dgate = fill(gate.map_or(0, <[G]>::len), size, |mut dgate| {
            let mut partials = partial.chunks_mut(width.max(1));
            let pairs = x.chunks(size).zip(dy.chunks(size)).zip(dx);
            let blocks = pairs.zip(stats.chunks(per_block * groups)).enumerate();
            let blocks = blocks.map(|(block, (((x, dy), dx), stats))| GatedBackward {
                x,
                gate: gate.map(|gate| &gate[block * size..][..x.len()]),
                dy,
                dx,
                dgate: dgate.next(),
                stats,
                weight,
                spec,
                partial: partials.next().unwrap_or_default(),
                elements: PhantomData,
            });
            par::run(x.len(), blocks);
        });
    });
    GatedGradients {
        dx,
        dgate,
        dweight: combined(&partial, width),
    }
}

struct GatedBackward<'a, E: Elem, G> {
    x: &'a [E],
    gate: Option<&'a [G]>,
    dy: &'a [E],
    dx: Part<'a, E>,
    dgate: Option<Part<'a, G>>,
    stats: &'a [Stats],
    weight: Option<&'a [E::Acc]>,
    spec: GatedSpec,
    /// The sums of `g · x̂` of each column; empty if nobody wants them.
    partial: &'a mut [f64],
    elements: PhantomData<G>,
}

/// State of a row between two steps.
struct RowScratch<T> {
    /// The function of the gate.
    opened: Scratch<T>,
    /// The gate.
    z: Scratch<T>,
    /// Values to normalize.
    h: Scratch<T>,
    /// The gradient of what the weight gives.
    g: Scratch<T>,
    /// The normalized values.
    normal: Scratch<T>,
    /// The gradient of what is normalized.
    dh: Scratch<T>,
    /// Factor of the slope in the gradient of the gate.
    rest: Scratch<T>,
}

impl<T: Copy> RowScratch<T> {
    fn new() -> Self {
        Self {
            opened: Scratch::new(),
            z: Scratch::new(),
            h: Scratch::new(),
            g: Scratch::new(),
            normal: Scratch::new(),
            dh: Scratch::new(),
            rest: Scratch::new(),
        }
    }

    #[inline(always)]
    fn clear(&mut self) {
        let all = [
            &mut self.opened,
            &mut self.z,
            &mut self.h,
            &mut self.g,
            &mut self.normal,
            &mut self.dh,
            &mut self.rest,
        ];
        all.into_iter().for_each(Scratch::clear);
    }
}

impl<E: Elem, G: Elem<Acc = E::Acc>> Kernel for GatedBackward<'_, E, G> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let (spec, len) = (self.spec, self.spec.len);
        let groups = len / spec.group;
        let weight = ColumnFactor::new(isa, self.weight);
        let mut sums = ColumnSums::<I, E::Acc, 1>::new(isa, self.partial);
        let wants_sums = !sums.chunks().is_empty();
        let mut s = RowScratch::new();
        let rows = self.x.chunks_exact(len).zip(self.dy.chunks_exact(len));
        for (row, (x, dy)) in rows.enumerate() {
            s.clear();
            let gate = of_group(self.gate, row * len, len);
            let activation = spec.activation;
            if let Some(gate) = gate {
                s.opened.push(
                    len,
                    #[inline(always)]
                    |out| {
                        activate(
                            isa,
                            activation,
                            &mut s.z,
                            out,
                            #[inline(always)]
                            |z| converted(isa, gate, z),
                        )
                    },
                );
            }
            let (is_before, is_after) = match (gate, spec.gate) {
                (None, _) => (false, false),
                (Some(_), Gate::Before) => (true, false),
                (Some(_), Gate::After) => (false, true),
            };
            let opened = s.opened.get();
            s.h.push(
                len,
                #[inline(always)]
                |h| match is_before {
                    true => product(isa, x, opened, h),
                    false => converted(isa, x, h),
                },
            );
            s.g.push(
                len,
                #[inline(always)]
                |g| match is_after {
                    true => product(isa, dy, opened, g),
                    false => converted(isa, dy, g),
                },
            );
            for i in 0..groups {
                let start = i * spec.group;
                let weight = of_group(self.weight, start, spec.group);
                let span = start..start + spec.group;
                let group = GroupOfRow {
                    h: &s.h.get()[span.clone()],
                    g: &s.g.get()[span],
                    weight: ColumnFactor::new(isa, weight),
                    stats: self.stats[row * groups + i],
                    round: spec.round_first,
                };
                group.write::<E>(isa, &mut s.normal, &mut s.dh);
            }
            let (normal, dh) = (s.normal.get(), s.dh.get());
            if wants_sums {
                sums.add2(
                    isa,
                    normal,
                    s.g.get(),
                    #[inline(always)]
                    |_, n, g| [g * n],
                );
            }
            self.dx.write(
                len,
                #[inline(always)]
                |dx| match is_before {
                    true => product(isa, dh, opened, dx),
                    false => converted(isa, dh, dx),
                },
            );
            let Some(dgate) = &mut self.dgate else {
                continue;
            };
            let (u, dy) = (s.z.get(), if is_before { x } else { dy });
            s.rest.push(
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
            let rest = s.rest.get();
            dgate.write(
                len,
                #[inline(always)]
                |dgate| match is_before {
                    true => product(isa, dh, rest, dgate),
                    false => map2(
                        isa,
                        normal,
                        rest,
                        dgate,
                        #[inline(always)]
                        |k, n, rest| weight.times(k, n * rest),
                    ),
                },
            );
        }
        sums.finish(isa);
    }
}

/// A group of columns of a row on its way backward.
struct GroupOfRow<'a, I: Isa, T: Real> {
    h: &'a [T],
    g: &'a [T],
    weight: ColumnFactor<'a, I, T>,
    stats: Stats,
    round: bool,
}

impl<I: Isa, T: Real + Elem<Acc = T>> GroupOfRow<'_, I, T> {
    /// Adds the normalized values, and the gradients of what is normalized.
    #[inline(always)]
    fn write<E: Elem<Acc = T>>(&self, isa: I, normals: &mut Scratch<T>, dh: &mut Scratch<T>) {
        let normal = Normal::<I, T>::new(isa, self.stats);
        let weight = self.weight;
        let len = self.h.len();
        let [along] = sums2(
            isa,
            self.h,
            self.g,
            #[inline(always)]
            |k, h, g| [weight.times(k, g) * h],
        );
        let along = along * self.stats.inv_std / len as f64;
        let grad = InputGrad::<Lanes<I, T>> {
            mean: zero::<I, T>(isa),
            along: splat::<I, _>(isa, T::from_f64(along)),
            scale: normal.inv_std,
        };
        normals.push(
            len,
            #[inline(always)]
            |out| {
                map(
                    isa,
                    self.h,
                    out,
                    #[inline(always)]
                    |_, h| normal.rounded::<E>(isa, h, self.round),
                )
            },
        );
        dh.push(
            len,
            #[inline(always)]
            |out| {
                map2(
                    isa,
                    self.h,
                    self.g,
                    out,
                    #[inline(always)]
                    |k, h, g| grad.of(normal.of(h), weight.times(k, g)),
                )
            },
        );
    }
}
