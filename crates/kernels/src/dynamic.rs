//! A bounded function of scaled values in place of a normalization, with a weight and a bias behind
//! it: dynamic tanh and its kin.

use std::iter::repeat_n;

use super::activation::{Squash, squashed};
use super::buffer::{Part, fill};
use super::column_sums::{ColumnSums, combined, rows_per_block};
use super::loops::{ColumnValues, map, map2, sums2};
use super::par;
use super::simd::{Elem, Isa, Kernel, LANES, splat};

/// The axes of a tensor `[rows, len]` and the function that it is given to.
#[derive(Debug, Clone, Copy)]
pub struct DynamicSpec {
    /// The length of a row: its columns, or a plane of one channel.
    pub len: usize,
    /// The number of channels of a sample, whose planes are rows; none where columns are channels.
    pub channels: Option<usize>,
    /// Function of the values.
    pub squash: Squash,
}

/// Numbers that a layer has learned: those of all elements, and one of each channel.
#[derive(Debug, Clone, Copy)]
pub struct DynamicParams<'a, T> {
    /// Factor of the input.
    pub alpha: T,
    /// Added to the product.
    pub shift: T,
    /// Factor of the function.
    pub weight: &'a [T],
    /// Added to it.
    pub bias: &'a [T],
}

/// The gradients of all arguments; but for that of the input, zeros and empty unless they are
/// wanted.
#[derive(Debug, Clone)]
pub struct DynamicGradients<E> {
    /// Of the input.
    pub dx: Vec<E>,
    /// Of the factor of the input.
    pub dalpha: f64,
    /// Of what is added to the product.
    pub dshift: f64,
    /// Of the weight.
    pub dweight: Vec<f64>,
    /// Of the bias.
    pub dbias: Vec<f64>,
}

/// Planes that are too short for lanes, as columns that a sample has once: values repeated.
struct Repeated<T> {
    spec: DynamicSpec,
    values: Option<[Vec<T>; 2]>,
}

impl<T: Copy> Repeated<T> {
    fn new(spec: DynamicSpec, params: DynamicParams<T>) -> Self {
        match spec.channels {
            Some(channels) if spec.len < LANES => {
                let all = |values: &[T]| -> Vec<T> {
                    let repeated = values.iter().flat_map(|v| repeat_n(*v, spec.len));
                    repeated.collect()
                };
                Self {
                    spec: DynamicSpec {
                        len: channels * spec.len,
                        channels: None,
                        ..spec
                    },
                    values: Some([all(params.weight), all(params.bias)]),
                }
            }
            _ => Self { spec, values: None },
        }
    }

    fn params<'a>(&'a self, params: DynamicParams<'a, T>) -> DynamicParams<'a, T> {
        match &self.values {
            Some([weight, bias]) => DynamicParams {
                weight,
                bias,
                ..params
            },
            None => params,
        }
    }
}

fn check<T>(elements: usize, spec: DynamicSpec, params: DynamicParams<T>) {
    assert!(spec.len > 0 && elements.is_multiple_of(spec.len));
    let count = spec.channels.unwrap_or(spec.len);
    assert!(params.weight.len() == count && params.bias.len() == count);
    assert!((elements / spec.len).is_multiple_of(spec.channels.unwrap_or(1)));
}

/// `y = weight · f(alpha · x + shift) + bias`.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    params: DynamicParams<E::Acc>,
    spec: DynamicSpec,
) -> Vec<E> {
    check(x.len(), spec, params);
    let repeated = Repeated::new(spec, params);
    let (spec, params) = (repeated.spec, repeated.params(params));
    let per_block = par::items_per_block(x.len() / spec.len, spec.len);
    let size = per_block * spec.len;
    fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(y).enumerate();
        let blocks = blocks.map(|(block, (x, y))| DynamicForward {
            x,
            y,
            first: block * per_block,
            params,
            spec,
        });
        par::run(x.len(), blocks);
    })
}

struct DynamicForward<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    /// Index of the first row.
    first: usize,
    params: DynamicParams<'a, E::Acc>,
    spec: DynamicSpec,
}

impl<E: Elem> Kernel for DynamicForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.spec.squash {
            Squash::Tanh => self.of(isa, Squash::Tanh),
            Squash::Erf => self.of(isa, Squash::Erf),
        }
    }
}

impl<E: Elem> DynamicForward<'_, E> {
    #[inline(always)]
    fn of<I: Isa>(mut self, isa: I, squash: Squash) {
        let params = self.params;
        let alpha = splat::<I, E::Acc>(isa, params.alpha);
        let shift = splat::<I, E::Acc>(isa, params.shift);
        let Some(channels) = self.spec.channels else {
            let weight = ColumnValues::new(isa, params.weight);
            let bias = ColumnValues::new(isa, params.bias);
            for x in self.x.chunks_exact(self.spec.len) {
                self.y.write(
                    x.len(),
                    #[inline(always)]
                    |y| {
                        map(
                            isa,
                            x,
                            y,
                            #[inline(always)]
                            |k, x| {
                                let u = alpha * x + shift;
                                let [value, _] = squashed::<E::Acc, I>(isa, squash, u);
                                value * weight.at(k) + bias.at(k)
                            },
                        )
                    },
                );
            }
            return;
        };
        let rows = self.x.chunks_exact(self.spec.len);
        for (row, x) in (self.first..).zip(rows) {
            let channel = row % channels;
            let weight = splat::<I, E::Acc>(isa, params.weight[channel]);
            let bias = splat::<I, E::Acc>(isa, params.bias[channel]);
            self.y.write(
                x.len(),
                #[inline(always)]
                |y| {
                    map(
                        isa,
                        x,
                        y,
                        #[inline(always)]
                        |_, x| {
                            let u = alpha * x + shift;
                            let [value, _] = squashed::<E::Acc, I>(isa, squash, u);
                            value * weight + bias
                        },
                    )
                },
            );
        }
    }
}

/// How many sums are formed of each channel: of the gradients of weight, bias, factor and shift.
const SUMS: usize = 4;

/// The gradients of [`forward`]; those of the parameters if `wanted`.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    params: DynamicParams<E::Acc>,
    spec: DynamicSpec,
    wanted: bool,
) -> DynamicGradients<E> {
    check(x.len(), spec, params);
    assert!(dy.len() == x.len());
    let (short, repeated) = (spec.len, Repeated::new(spec, params));
    let (spec, params) = (repeated.spec, repeated.params(params));
    let (rows, len) = (x.len() / spec.len, spec.len);
    let per_block = match wanted {
        true => rows_per_block(rows, len),
        false => par::items_per_block(rows, len),
    };
    let size = per_block * len;
    // A block leaves the sums of each column, or of each of its rows.
    let width = match spec.channels {
        _ if !wanted => 0,
        None => SUMS * len,
        Some(_) => SUMS * per_block,
    };
    let mut partial = vec![0f64; width * rows.div_ceil(per_block)];
    let dx = fill(x.len(), size, |dx| {
        let mut partials = partial.chunks_mut(width.max(1));
        let blocks = x.chunks(size).zip(dy.chunks(size)).zip(dx).enumerate();
        let blocks = blocks.map(|(block, ((x, dy), dx))| DynamicBackward {
            x,
            dy,
            dx,
            first: block * per_block,
            params,
            spec,
            partial: partials.next().unwrap_or_default(),
        });
        par::run(x.len(), blocks);
    });
    let mut sums = match spec.channels {
        _ if !wanted => vec![],
        None => {
            let sums = combined(&partial, width);
            let of_column = |column: usize| std::array::from_fn(|i| sums[i * len + column]);
            let columns = (0..len).map(of_column);
            columns.collect::<Vec<[f64; SUMS]>>()
        }
        Some(channels) => {
            let mut sums = vec![[0f64; SUMS]; channels];
            for (row, part) in partial.as_chunks::<SUMS>().0.iter().take(rows).enumerate() {
                add(&mut sums[row % channels], part);
            }
            sums
        }
    };
    if repeated.values.is_some() {
        let total = |sums: &[[f64; SUMS]]| {
            let mut total = [0f64; SUMS];
            sums.iter().for_each(|part| add(&mut total, part));
            total
        };
        sums = sums.chunks(short).map(total).collect();
    }
    DynamicGradients {
        dx,
        dalpha: sums.iter().map(|sums| sums[2]).sum(),
        dshift: sums.iter().map(|sums| sums[3]).sum(),
        dweight: sums.iter().map(|sums| sums[0]).collect(),
        dbias: sums.iter().map(|sums| sums[1]).collect(),
    }
}

fn add(sums: &mut [f64; SUMS], part: &[f64; SUMS]) {
    for i in 0..SUMS {
        sums[i] += part[i];
    }
}

struct DynamicBackward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: Part<'a, E>,
    /// Index of the first row.
    first: usize,
    params: DynamicParams<'a, E::Acc>,
    spec: DynamicSpec,
    /// The first sum of every column, then the next, or all sums of each row; empty if nobody wants
    /// them.
    partial: &'a mut [f64],
}

impl<E: Elem> Kernel for DynamicBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.spec.squash {
            Squash::Tanh => self.of(isa, Squash::Tanh),
            Squash::Erf => self.of(isa, Squash::Erf),
        }
    }
}

impl<E: Elem> DynamicBackward<'_, E> {
    #[inline(always)]
    fn of<I: Isa>(mut self, isa: I, squash: Squash) {
        let params = self.params;
        let len = self.spec.len;
        let alpha = splat::<I, E::Acc>(isa, params.alpha);
        let shift = splat::<I, E::Acc>(isa, params.shift);
        let rows = self.x.chunks_exact(len).zip(self.dy.chunks_exact(len));
        let Some(channels) = self.spec.channels else {
            let weight = ColumnValues::new(isa, params.weight);
            let wants_sums = !self.partial.is_empty();
            let mut sums = ColumnSums::<I, E::Acc, SUMS>::new(isa, self.partial);
            for (x, dy) in rows {
                self.dx.write(
                    len,
                    #[inline(always)]
                    |dx| match wants_sums {
                        true => sums.add_and_map(
                            isa,
                            (x, dy, dx),
                            #[inline(always)]
                            |k, x, dy| {
                                let u = alpha * x + shift;
                                let [value, slope] = squashed::<E::Acc, I>(isa, squash, u);
                                let g = dy * weight.at(k) * slope;
                                [dy * value, dy, g * x, g]
                            },
                            #[inline(always)]
                            |k, x, dy| {
                                let u = alpha * x + shift;
                                let [_, slope] = squashed::<E::Acc, I>(isa, squash, u);
                                dy * weight.at(k) * slope * alpha
                            },
                        ),
                        false => map2(
                            isa,
                            x,
                            dy,
                            dx,
                            #[inline(always)]
                            |k, x, dy| {
                                let u = alpha * x + shift;
                                let [_, slope] = squashed::<E::Acc, I>(isa, squash, u);
                                dy * weight.at(k) * slope * alpha
                            },
                        ),
                    },
                );
            }
            sums.finish(isa);
            return;
        };
        let mut partial = self.partial.as_chunks_mut::<SUMS>().0.iter_mut();
        for (row, (x, dy)) in (self.first..).zip(rows) {
            let weight = splat::<I, E::Acc>(isa, params.weight[row % channels]);
            if let Some(sums) = partial.next() {
                *sums = sums2(
                    isa,
                    x,
                    dy,
                    #[inline(always)]
                    |_, x, dy| {
                        let u = alpha * x + shift;
                        let [value, slope] = squashed::<E::Acc, I>(isa, squash, u);
                        let g = dy * weight * slope;
                        [dy * value, dy, g * x, g]
                    },
                );
            }
            self.dx.write(
                len,
                #[inline(always)]
                |dx| {
                    map2(
                        isa,
                        x,
                        dy,
                        dx,
                        #[inline(always)]
                        |_, x, dy| {
                            let u = alpha * x + shift;
                            let [_, slope] = squashed::<E::Acc, I>(isa, squash, u);
                            dy * weight * slope * alpha
                        },
                    )
                },
            );
        }
    }
}
