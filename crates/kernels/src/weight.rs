//! Weight norm: each row of `v` at its own length `g`.

use super::buffer::{Part, fill};
use super::loops::{map, map2, sums, sums2, tail};
use super::par;
use super::simd::{Elem, Isa, Kernel, Real, Vector, splat};

/// A number that keeps the lengths of short rows from zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Floor {
    /// The length of a row that is shorter, in place of its own.
    Below(f64),
    /// The length of a row that is not longer, in place of its own.
    UpTo(f64),
    /// Added to the sum of the squares.
    Inside(f64),
}

/// The length of a row after `scale`, a power of two that keeps its squares from over- and
/// underflow.
#[derive(Debug, Clone, Copy)]
pub struct Length {
    norm: f64,
    scale: f64,
    /// The least length is in place of the row's own, so that it does not change with the row.
    fixed: bool,
}

impl Length {
    const NONE: Self = Self {
        norm: 0.,
        scale: 1.,
        fixed: false,
    };

    /// The length of `v`, kept from zero by `floor`.
    #[inline(always)]
    fn above<E: Elem, I: Isa>(isa: I, v: &[E], floor: Floor) -> Self {
        let length = Self::of(isa, v);
        let norm = length.value();
        let least = |norm: f64| Self {
            norm,
            fixed: true,
            ..Self::NONE
        };
        match floor {
            Floor::Below(shortest) if norm < shortest => least(shortest),
            Floor::UpTo(shortest) if norm <= shortest => least(shortest),
            // Beside the number, what was scaled up is zero.
            Floor::Inside(added) if length.scale > 1. => Self {
                norm: (norm * norm + added).sqrt(),
                ..Self::NONE
            },
            Floor::Inside(added) => Self {
                norm: (length.norm * length.norm + added * length.scale * length.scale).sqrt(),
                ..length
            },
            Floor::Below(_) | Floor::UpTo(_) => length,
        }
    }

    /// The length itself.
    pub fn value(self) -> f64 {
        self.norm / self.scale
    }

    #[inline(always)]
    fn of<E: Elem, I: Isa>(isa: I, v: &[E]) -> Self {
        let [squares] = sums(
            isa,
            v,
            #[inline(always)]
            |v| [v * v],
        );
        // Within these bounds no square that counts was lost, in f32 either.
        if (1e-24..1e30).contains(&squares) {
            return Self {
                norm: squares.sqrt(),
                ..Self::NONE
            };
        }
        let mut largest = 0f64;
        for v in v.chunks(1) {
            let size = tail(isa, v).sum().abs();
            if size > largest || size.is_nan() {
                largest = size;
            }
        }
        if largest == 0. || !largest.is_finite() {
            return Self {
                norm: largest,
                ..Self::NONE
            };
        }
        let scale = (-largest.log2().floor())
            .clamp(-E::Acc::LARGEST_EXPONENT, E::Acc::LARGEST_EXPONENT)
            .exp2();
        let factor = splat::<I, _>(isa, E::Acc::from_f64(scale));
        let [squares] = sums(
            isa,
            v,
            #[inline(always)]
            |v| {
                let v = v * factor;
                [v * v]
            },
        );
        Self {
            norm: squares.sqrt(),
            scale,
            fixed: false,
        }
    }

    /// One over the length; zero for a row of zeros, which has no direction.
    #[inline(always)]
    fn inverse(self) -> f64 {
        if self.norm == 0. { 0. } else { 1. / self.norm }
    }
}

/// `g · v / max(‖v‖, least)` for each row of `len` elements of `v`.
pub(crate) fn forward<E: Elem>(
    v: &[E],
    g: &[E::Acc],
    len: usize,
    least: f64,
) -> (Vec<E>, Vec<Length>) {
    forward_above(v, g, len, Floor::Below(least))
}

/// Each row over its length, and the lengths.
pub(crate) fn unit_forward<E: Elem>(v: &[E], len: usize, floor: Floor) -> (Vec<E>, Vec<Length>) {
    forward_above(v, &ones::<E>(v.len() / len), len, floor)
}

/// The gradient of [`unit_forward`].
pub(crate) fn unit_backward<E: Elem>(v: &[E], dy: &[E], lengths: &[Length], len: usize) -> Vec<E> {
    backward(v, dy, &ones::<E>(lengths.len()), lengths, len).0
}

fn ones<E: Elem>(count: usize) -> Vec<E::Acc> {
    vec![E::Acc::from_f64(1.); count]
}

fn forward_above<E: Elem>(
    v: &[E],
    g: &[E::Acc],
    len: usize,
    floor: Floor,
) -> (Vec<E>, Vec<Length>) {
    assert_eq!(v.len(), g.len() * len);
    let per_block = par::items_per_block(g.len(), len);
    let size = per_block * len;
    let mut lengths = vec![Length::NONE; g.len()];
    let w = fill(v.len(), size, |w| {
        let params = g.chunks(per_block).zip(lengths.chunks_mut(per_block));
        let blocks = v.chunks(size).zip(w).zip(params);
        let blocks = blocks.map(|((v, w), (g, lengths))| WeightForward {
            v,
            w,
            g,
            lengths,
            len,
            floor,
        });
        par::run(v.len(), blocks);
    });
    (w, lengths)
}

struct WeightForward<'a, E: Elem> {
    v: &'a [E],
    w: Part<'a, E>,
    g: &'a [E::Acc],
    lengths: &'a mut [Length],
    len: usize,
    floor: Floor,
}

impl<E: Elem> Kernel for WeightForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let rows = self.v.chunks_exact(self.len);
        for (v, (g, length)) in rows.zip(self.g.iter().zip(self.lengths)) {
            *length = Length::above(isa, v, self.floor);
            let scale = splat::<I, _>(isa, E::Acc::from_f64(length.scale));
            let factor = splat::<I, _>(isa, E::Acc::from_f64(g.to_f64() * length.inverse()));
            self.w.write(
                v.len(),
                #[inline(always)]
                |w| {
                    map(
                        isa,
                        v,
                        w,
                        #[inline(always)]
                        |_, v| (v * scale) * factor,
                    )
                },
            );
        }
    }
}

/// The gradients of `v` and, in `f64`, of `g`, from that of the weight.
pub(crate) fn backward<E: Elem>(
    v: &[E],
    dw: &[E],
    g: &[E::Acc],
    lengths: &[Length],
    len: usize,
) -> (Vec<E>, Vec<f64>) {
    assert_eq!(v.len(), g.len() * len);
    assert_eq!(v.len(), dw.len());
    assert_eq!(lengths.len(), g.len());
    let per_block = par::items_per_block(g.len(), len);
    let size = per_block * len;
    let mut dg = vec![0f64; g.len()];
    let dv = fill(v.len(), size, |dv| {
        let params = g.chunks(per_block).zip(lengths.chunks(per_block));
        let params = params.zip(dg.chunks_mut(per_block));
        let blocks = v.chunks(size).zip(dw.chunks(size)).zip(dv).zip(params);
        let blocks = blocks.map(|(((v, dw), dv), ((g, lengths), dg))| WeightBackward {
            v,
            dw,
            dv,
            g,
            lengths,
            dg,
            len,
        });
        par::run(v.len(), blocks);
    });
    (dv, dg)
}

struct WeightBackward<'a, E: Elem> {
    v: &'a [E],
    dw: &'a [E],
    dv: Part<'a, E>,
    g: &'a [E::Acc],
    lengths: &'a [Length],
    dg: &'a mut [f64],
    len: usize,
}

impl<E: Elem> Kernel for WeightBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let len = self.len;
        let rows = self.v.chunks_exact(len).zip(self.dw.chunks_exact(len));
        let params = self.g.iter().zip(self.lengths).zip(self.dg);
        for ((v, dw), ((g, length), dg)) in rows.zip(params) {
            // The direction is v · unit, or (v · scale) · inverse where one factor would leave the
            // range.
            let inverse = length.inverse();
            let scale = splat::<I, _>(isa, E::Acc::from_f64(length.scale));
            let unit = splat::<I, _>(isa, E::Acc::from_f64(inverse));
            let [along] = sums2(
                isa,
                v,
                dw,
                #[inline(always)]
                |_, v, dw| [dw * ((v * scale) * unit)],
            );
            *dg = along;
            let along = if length.fixed { 0. } else { along };
            let along = splat::<I, _>(isa, E::Acc::from_f64(along));
            let factor = splat::<I, _>(isa, E::Acc::from_f64(g.to_f64() * inverse));
            self.dv.write(
                len,
                #[inline(always)]
                |dv| {
                    map2(
                        isa,
                        v,
                        dw,
                        dv,
                        #[inline(always)]
                        |_, v, dw| ((dw - ((v * scale) * unit) * along) * factor) * scale,
                    )
                },
            );
        }
    }
}

/// The lengths of rows.
pub(crate) fn lengths<E: Elem>(v: &[E], len: usize) -> Vec<Length> {
    assert!(v.len().is_multiple_of(len));
    let count = v.len() / len;
    let per_block = par::items_per_block(count, len);
    let mut lengths = vec![Length::NONE; count];
    let blocks = v
        .chunks(per_block * len)
        .zip(lengths.chunks_mut(per_block))
        .map(|(v, lengths)| Lengths { v, lengths, len });
    par::run(v.len(), blocks);
    lengths
}

struct Lengths<'a, E: Elem> {
    v: &'a [E],
    lengths: &'a mut [Length],
    len: usize,
}

impl<E: Elem> Kernel for Lengths<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (v, length) in self.v.chunks_exact(self.len).zip(self.lengths) {
            *length = Length::of(isa, v);
        }
    }
}

/// The gradient of [`lengths`], zero for a row of zeros.
pub(crate) fn lengths_backward<E: Elem>(
    v: &[E],
    dlengths: &[f64],
    lengths: &[Length],
    len: usize,
) -> Vec<E> {
    assert_eq!(v.len(), dlengths.len() * len);
    assert_eq!(lengths.len(), dlengths.len());
    let per_block = par::items_per_block(lengths.len(), len);
    let size = per_block * len;
    fill(v.len(), size, |dv| {
        let rows = dlengths.chunks(per_block).zip(lengths.chunks(per_block));
        let blocks = v.chunks(size).zip(dv).zip(rows);
        let blocks = blocks.map(|((v, dv), (dlengths, lengths))| LengthsBackward {
            v,
            dv,
            dlengths,
            lengths,
            len,
        });
        par::run(v.len(), blocks);
    })
}

struct LengthsBackward<'a, E: Elem> {
    v: &'a [E],
    dv: Part<'a, E>,
    dlengths: &'a [f64],
    lengths: &'a [Length],
    len: usize,
}

impl<E: Elem> Kernel for LengthsBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let rows = self.v.chunks_exact(self.len);
        for (v, (dlength, length)) in rows.zip(self.dlengths.iter().zip(self.lengths)) {
            let scale = splat::<I, _>(isa, E::Acc::from_f64(length.scale));
            let factor = splat::<I, _>(isa, E::Acc::from_f64(dlength * length.inverse()));
            self.dv.write(
                v.len(),
                #[inline(always)]
                |dv| {
                    map(
                        isa,
                        v,
                        dv,
                        #[inline(always)]
                        |_, v| (v * scale) * factor,
                    )
                },
            );
        }
    }
}
