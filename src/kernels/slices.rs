//! What a slice says by itself, without a layer around it.

use super::moments::Moments;
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
pub(crate) fn moments<E: Elem>(x: &[E]) -> Moments {
    Level::current().run(OfSlice(x))
}
