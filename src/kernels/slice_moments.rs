//! Moments of slices, without a layer around them.

use super::moments::Moments;
use super::par;
use super::simd::{Elem, Isa, Kernel, Level};

struct OfSlice<'a, E>(&'a [E]);

impl<E: Elem> Kernel for OfSlice<'_, E> {
    type Output = Moments;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Moments {
        Moments::of(isa, self.0)
    }
}

/// The moments of a slice of any length, on the calling thread.
pub(crate) fn of_slice<E: Elem>(x: &[E]) -> Moments {
    Level::current().run(OfSlice(x))
}

struct OfRows<'a, E> {
    x: &'a [E],
    len: usize,
    moments: &'a mut [Moments],
}

impl<E: Elem> Kernel for OfRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (x, moments) in self.x.chunks_exact(self.len).zip(self.moments) {
            *moments = Moments::of(isa, x);
        }
    }
}

/// The moments of each row of `len` elements.
pub(crate) fn of_rows<E: Elem>(x: &[E], len: usize) -> Vec<Moments> {
    let rows = x.len() / len;
    assert_eq!(x.len(), rows * len);
    let per_block = par::items_per_block(rows, len);
    let mut moments = vec![Moments::default(); rows];
    let blocks = x.chunks(per_block * len).zip(moments.chunks_mut(per_block));
    par::run(
        x.len(),
        blocks.map(|(x, moments)| OfRows { x, len, moments }),
    );
    moments
}
