//! Transposition of tiles of sixteen by sixteen elements, which are moved as they are.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use super::LANES;

/// Plain numbers.
///
/// # Safety
/// Every byte of a value must be initialized, and all bytes of such a value make one when they are
/// copied.
pub(crate) unsafe trait Plain: Copy {}

/// A place for an element, which may have been written before or not.
///
/// # Safety
/// It must have the layout of `E`, and be such a place whatever value of `E` its bytes are.
pub(crate) unsafe trait Place<E> {
    fn put(&mut self, value: E);
}

// SAFETY: an element is laid out as itself.
unsafe impl<E: Plain> Place<E> for E {
    #[inline(always)]
    fn put(&mut self, value: E) {
        *self = value;
    }
}

// SAFETY: `MaybeUninit<E>` has the layout of `E` and takes any bytes.
unsafe impl<E: Plain> Place<E> for MaybeUninit<E> {
    #[inline(always)]
    fn put(&mut self, value: E) {
        self.write(value);
    }
}

macro_rules! plain {
    ($($t:ty),+) => {
        $(
            // SAFETY: a number without padding.
            unsafe impl Plain for $t {}
        )+
    };
}
plain!(f16, bf16, f32, f64);
#[cfg(test)]
plain!(u16, u32, u128);

/// The tile at the start of sixteen rows, none of which may be shorter than that.
#[inline(always)]
pub(crate) fn tile<'a, E>(row: impl Fn(usize) -> &'a [E]) -> [&'a [E; LANES]; LANES] {
    let mut rows = [&row(0).as_chunks().0[0]; LANES];
    for i in 1..LANES {
        rows[i] = &row(i).as_chunks().0[0];
    }
    rows
}

/// Writes element `c` of row `r` to `out[c · stride + r]`.
#[inline(always)]
pub(crate) fn transpose_tile<E: Plain, P: Place<E>>(
    rows: [&[E; LANES]; LANES],
    out: &mut [P],
    stride: usize,
) {
    assert!(stride >= LANES && out.len() >= (LANES - 1) * stride + LANES);
    #[cfg(target_arch = "x86_64")]
    match size_of::<E>() {
        2 => return transpose_blocks::<8, E, P>(rows, out, stride, unpack::of_2_bytes),
        4 => return transpose_blocks::<4, E, P>(rows, out, stride, unpack::of_4_bytes),
        8 => return transpose_blocks::<2, E, P>(rows, out, stride, unpack::of_8_bytes),
        _ => {}
    }
    for (r, row) in rows.into_iter().enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * stride + r].put(*v);
        }
    }
}

/// Prefetches the cache line of `v`, where the processor has an instruction for it.
#[inline(always)]
pub(crate) fn prefetch<E>(v: &E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch changes nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(v).cast());
    }
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128};

/// Transposition by blocks of `N` by `N`, a row of which fills 16 bytes.
///
/// Each round interleaves the rows that are half a block apart, which moves an element by one bit
/// of its position; after as many rounds as `N` has bits, rows are columns.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_blocks<const N: usize, E: Plain, P: Place<E>>(
    rows: [&[E; LANES]; LANES],
    out: &mut [P],
    stride: usize,
    unpack: impl Fn(__m128i, __m128i) -> [__m128i; 2],
) {
    assert!(N * size_of::<E>() == 16);
    for r in (0..LANES).step_by(N) {
        for c in (0..LANES).step_by(N) {
            // SAFETY: SSE2 is part of x86-64.
            let mut block = [unsafe { _mm_setzero_si128() }; N];
            for i in 0..N {
                let from = &rows[r + i][c..c + N];
                // SAFETY: the slice has 16 initialized bytes, and any of them make a register.
                block[i] = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
            }
            for _ in 0..N.ilog2() {
                let half = block;
                for i in 0..N / 2 {
                    [block[2 * i], block[2 * i + 1]] = unpack(half[i], half[i + N / 2]);
                }
            }
            for i in 0..N {
                let to = &mut out[(c + i) * stride + r..][..N];
                // SAFETY: the slice has 16 bytes, and the rounds moved whole elements, so that
                // they are values of `E`.
                unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), block[i]) };
            }
        }
    }
}

/// The elements of two registers interleaved.
#[cfg(target_arch = "x86_64")]
mod unpack {
    use std::arch::x86_64::*;

    macro_rules! unpack {
        ($name:ident, $low:ident, $high:ident) => {
            #[inline(always)]
            pub(super) fn $name(a: __m128i, b: __m128i) -> [__m128i; 2] {
                // SAFETY: SSE2 is part of x86-64.
                unsafe { [$low(a, b), $high(a, b)] }
            }
        };
    }
    unpack!(of_2_bytes, _mm_unpacklo_epi16, _mm_unpackhi_epi16);
    unpack!(of_4_bytes, _mm_unpacklo_epi32, _mm_unpackhi_epi32);
    unpack!(of_8_bytes, _mm_unpacklo_epi64, _mm_unpackhi_epi64);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transposes<E: Plain + PartialEq + std::fmt::Debug>(element: impl Fn(usize) -> E) {
        let stride = LANES + 3;
        let rows: [[E; LANES]; LANES] =
            std::array::from_fn(|r| std::array::from_fn(|c| element(r * LANES + c)));
        let mut out = vec![element(999); LANES * stride];
        transpose_tile(rows.each_ref(), &mut out, stride);
        for (i, v) in out.iter().enumerate() {
            let (c, r) = (i / stride, i % stride);
            let want = if r < LANES { rows[r][c] } else { element(999) };
            assert_eq!(*v, want, "row {r}, column {c}");
        }
    }

    #[test]
    fn elements_of_any_size_go_where_they_belong() {
        transposes(|i| i as u16);
        transposes(|i| i as f32);
        transposes(|i| i as f64);
        transposes(|i| i as u128);
    }

    #[test]
    fn a_tile_is_the_start_of_every_row() {
        let rows: Vec<f32> = (0..LANES * 20).map(|i| i as f32).collect();
        let tile = tile(|r| &rows[r * 20 + 3..]);
        for (r, row) in tile.iter().enumerate() {
            assert_eq!(row[5], rows[r * 20 + 8]);
        }
    }

    #[test]
    #[should_panic]
    fn a_row_that_is_too_short_has_no_tile() {
        let row = [0f32; LANES];
        tile(|r| &row[usize::from(r == 15)..]);
    }
}
