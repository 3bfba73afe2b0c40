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

impl Moments {
    /// The moments of `values`, formed on the calling thread.
    ///
    /// ```
    /// use candle_norm_kernels::Moments;
    ///
    /// let whole = Moments::of_values(&[1., 2., 4., 9.]);
    /// assert_eq!((whole.count(), whole.mean(), whole.var()), (4., 4., 9.5));
    /// let parts = Moments::of_values(&[1., 2.]).merge(Moments::of_values(&[4., 9.]));
    /// assert_eq!(parts, whole);
    /// ```
    pub fn of_values(values: &[f64]) -> Self {
        Level::current().run(OfSlice(values))
    }
}

struct OfRows<'a, E> {
    x: &'a [E],
    len: usize,
    center: bool,
    moments: &'a mut [Moments],
}

impl<E: Elem> Kernel for OfRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (x, moments) in self.x.chunks_exact(self.len).zip(self.moments) {
            *moments = match self.center {
                true => Moments::of(isa, x),
                false => Moments::of_squares(isa, x),
            };
        }
    }
}

/// The moments of each row of `len` elements; about zero where they are not `center`ed.
pub(crate) fn of_rows<E: Elem>(x: &[E], len: usize, center: bool) -> Vec<Moments> {
    let rows = x.len() / len;
    assert_eq!(x.len(), rows * len);
    if par::divides(rows, len) {
        return of_divided_rows(x, len, center);
    }
    of_whole_rows(x, len, center)
}

/// Rows that are divided: the moments of all parts, merged in their order.
fn of_divided_rows<E: Elem>(x: &[E], len: usize, center: bool) -> Vec<Moments> {
    let parts: Vec<_> = x
        .chunks(len)
        .flat_map(|row| row.chunks(par::PART))
        .collect();
    let mut moments = vec![Moments::default(); parts.len()];
    let jobs = parts.into_iter().zip(moments.chunks_mut(1));
    let jobs = jobs.map(|(x, moments)| OfRows {
        x,
        len: x.len(),
        center,
        moments,
    });
    par::run(x.len(), jobs);
    let rows = moments.chunks(len.div_ceil(par::PART));
    rows.map(|parts| {
        parts
            .iter()
            .copied()
            .fold(Moments::default(), Moments::merge)
    })
    .collect()
}

fn of_whole_rows<E: Elem>(x: &[E], len: usize, center: bool) -> Vec<Moments> {
    let rows = x.len() / len;
    let per_block = par::items_per_block(rows, len);
    let mut moments = vec![Moments::default(); rows];
    let blocks = x.chunks(per_block * len).zip(moments.chunks_mut(per_block));
    par::run(
        x.len(),
        blocks.map(|(x, moments)| OfRows {
            x,
            len,
            center,
            moments,
        }),
    );
    moments
}
