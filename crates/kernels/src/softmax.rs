//! Softmax of rows, and its logarithm.

use super::buffer::{Part, fill};
use super::loops::{map, map2, sums, sums2, tail};
use super::par;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Real, Vector, splat};

/// The largest element of a row, and the sum of the exponentials of all elements less it.
#[derive(Debug, Clone, Copy)]
pub struct ExpSum {
    largest: f64,
    sum: f64,
}

impl ExpSum {
    const NONE: Self = Self {
        largest: 0.,
        sum: 1.,
    };

    #[inline(always)]
    fn of<E: Elem, I: Isa>(isa: I, x: &[E]) -> Self {
        let largest = largest(isa, x);
        let about = splat::<I, E::Acc>(isa, largest);
        let [sum] = sums(
            isa,
            x,
            #[inline(always)]
            |x| [exp::<I, E::Acc>(isa, x - about)],
        );
        Self {
            largest: largest.to_f64(),
            sum,
        }
    }
}

/// The largest element; NaN is none, and shows in the sum.
#[inline(always)]
fn largest<E: Elem, I: Isa>(isa: I, x: &[E]) -> E::Acc {
    let lowest = E::Acc::from_f64(f64::NEG_INFINITY);
    let mut found = [lowest; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        let lanes = E::load(isa, chunk).to_array();
        for i in 0..LANES {
            found[i] = if lanes[i] > found[i] {
                lanes[i]
            } else {
                found[i]
            };
        }
    }
    if !rest.is_empty() {
        let lanes = tail(isa, x).to_array();
        for i in LANES - rest.len()..LANES {
            found[i] = if lanes[i] > found[i] {
                lanes[i]
            } else {
                found[i]
            };
        }
    }
    let mut largest = lowest;
    for v in found {
        largest = if v > largest { v } else { largest };
    }
    largest
}

/// The exponential of each lane, none of which is above zero but by rounding.
#[inline(always)]
fn exp<I: Isa, T: Real>(isa: I, v: Lanes<I, T>) -> Lanes<I, T> {
    let mut lanes = v.to_array();
    for lane in &mut lanes {
        *lane = lane.exp_of_negative();
    }
    Vector::load(isa, &lanes)
}

/// `x − largest`, in exponentials over their sum or less the logarithm of the sum.
pub(crate) fn forward<E: Elem>(x: &[E], len: usize, log: bool) -> (Vec<E>, Vec<ExpSum>) {
    assert!(x.len().is_multiple_of(len));
    let count = x.len() / len;
    let per_block = par::items_per_block(count, len);
    let size = per_block * len;
    let mut sums = vec![ExpSum::NONE; count];
    let y = fill(x.len(), size, |y| {
        let blocks = x.chunks(size).zip(y).zip(sums.chunks_mut(per_block));
        let blocks = blocks.map(|((x, y), sums)| Softmax {
            x,
            y,
            sums,
            len,
            log,
        });
        par::run(x.len(), blocks);
    });
    (y, sums)
}

struct Softmax<'a, E: Elem> {
    x: &'a [E],
    y: Part<'a, E>,
    sums: &'a mut [ExpSum],
    len: usize,
    log: bool,
}

impl<E: Elem> Kernel for Softmax<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for (x, sum) in self.x.chunks_exact(self.len).zip(self.sums) {
            *sum = ExpSum::of(isa, x);
            let about = splat::<I, E::Acc>(isa, E::Acc::from_f64(sum.largest));
            let last = match self.log {
                true => sum.sum.ln(),
                false => 1. / sum.sum,
            };
            let last = splat::<I, E::Acc>(isa, E::Acc::from_f64(last));
            let log = self.log;
            self.y.write(
                x.len(),
                #[inline(always)]
                |y| {
                    map(
                        isa,
                        x,
                        y,
                        #[inline(always)]
                        |_, x| match log {
                            true => (x - about) - last,
                            false => exp::<I, E::Acc>(isa, x - about) * last,
                        },
                    )
                },
            );
        }
    }
}

/// `y · (dy − Σ dy · y)`, or of the logarithm `dy − y · Σ dy`.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    sums: &[ExpSum],
    len: usize,
    log: bool,
) -> Vec<E> {
    assert_eq!(x.len(), sums.len() * len);
    assert_eq!(x.len(), dy.len());
    let per_block = par::items_per_block(sums.len(), len);
    let size = per_block * len;
    fill(x.len(), size, |dx| {
        let pairs = x.chunks(size).zip(dy.chunks(size));
        let blocks = pairs.zip(dx).zip(sums.chunks(per_block));
        let blocks = blocks.map(|(((x, dy), dx), sums)| SoftmaxBackward {
            x,
            dy,
            dx,
            sums,
            len,
            log,
        });
        par::run(x.len(), blocks);
    })
}

struct SoftmaxBackward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: Part<'a, E>,
    sums: &'a [ExpSum],
    len: usize,
    log: bool,
}

impl<E: Elem> Kernel for SoftmaxBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let rows = self.x.chunks_exact(self.len);
        let rows = rows.zip(self.dy.chunks_exact(self.len));
        for ((x, dy), sum) in rows.zip(self.sums) {
            let about = splat::<I, E::Acc>(isa, E::Acc::from_f64(sum.largest));
            let inverse = splat::<I, E::Acc>(isa, E::Acc::from_f64(1. / sum.sum));
            let log = self.log;
            let [along] = sums2(
                isa,
                x,
                dy,
                #[inline(always)]
                |_, x, dy| match log {
                    true => [dy],
                    false => [dy * (exp::<I, E::Acc>(isa, x - about) * inverse)],
                },
            );
            let along = splat::<I, E::Acc>(isa, E::Acc::from_f64(along));
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
                        |_, x, dy| {
                            let y = exp::<I, E::Acc>(isa, x - about) * inverse;
                            match log {
                                true => dy - y * along,
                                false => y * (dy - along),
                            }
                        },
                    )
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Within two units of the last place, down to where numbers lose digits; zero below.
    #[test]
    fn exponentials_in_f32_are_those_of_f64() {
        let mut x = 0f32;
        while x > -87. {
            let (got, want) = (f64::from(x.exp_of_negative()), f64::from(x).exp());
            assert!(
                (got - want).abs() <= 1.3e-7 * want,
                "{x}: {got:e}, {want:e}"
            );
            x -= 0.000_731 * (1. - x);
        }
        assert_eq!(0f32.exp_of_negative(), 1.);
        for low in [-89f32, -150., -3e38, f32::NEG_INFINITY] {
            assert_eq!(low.exp_of_negative(), 0., "{low}");
        }
        assert!(f32::NAN.exp_of_negative().is_nan());
        let (got, want) = (f64::from(1e-4f32.exp_of_negative()), 1e-4f64.exp());
        assert!((got - want).abs() < 1e-7);
    }

    /// Fewer elements than lanes, all of them negative.
    #[test]
    fn short_rows_have_a_largest_element() {
        for len in [1, 2, 15, 16, 17, 33] {
            let x: Vec<f32> = (0..len).map(|i| -500. - i as f32).collect();
            let (y, sums) = forward(&x, len, false);
            assert_eq!(sums[0].largest, -500., "{len}");
            let total: f32 = y.iter().sum();
            assert!((total - 1.).abs() < 1e-6, "{len}: {total}");
        }
    }
}
