//! Weight norm: each row of `v` at its own length `g`.

use super::buffer::{Part, fill};
use super::loops::{map, map2, sums, sums2, tail};
use super::par;
use super::simd::{Elem, Isa, Kernel, Real, Vector, splat};

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

    /// The length of `v`, at least `least`.
    #[inline(always)]
    fn at_least<E: Elem, I: Isa>(isa: I, v: &[E], least: f64) -> Self {
        let length = Self::of(isa, v);
        match length.norm / length.scale < least {
            true => Self {
                norm: least,
                scale: 1.,
                fixed: true,
            },
            false => length,
        }
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
            least,
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
    least: f64,
}

impl<E: Elem> Kernel for WeightForward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let rows = self.v.chunks_exact(self.len);
        for (v, (g, length)) in rows.zip(self.g.iter().zip(self.lengths)) {
            *length = Length::at_least(isa, v, self.least);
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
