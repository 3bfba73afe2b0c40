//! Tiles of sixteen by sixteen elements, rows to columns. Elements are moved as they are, whatever their type.

use super::LANES;

/// Writes element `c` of row `r` to `out[c · stride + r]`.
#[inline(always)]
pub(crate) fn turn<E: Copy>(rows: [&[E; LANES]; LANES], out: &mut [E], stride: usize) {
    assert!(stride >= LANES && out.len() >= (LANES - 1) * stride + LANES);
    #[cfg(target_arch = "x86_64")]
    match size_of::<E>() {
        2 => return blocks::<8, E>(rows, out, stride, unpack::of_2_bytes),
        4 => return blocks::<4, E>(rows, out, stride, unpack::of_4_bytes),
        8 => return blocks::<2, E>(rows, out, stride, unpack::of_8_bytes),
        _ => {}
    }
    for (r, row) in rows.into_iter().enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * stride + r] = *v;
        }
    }
}

/// Has the line of `v` fetched into the cache, where the processor can be asked to.
#[inline(always)]
pub(crate) fn prefetch<E>(v: &E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and fetching changes nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(v).cast());
    }
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128};

/// The same by blocks of `N` by `N`, a row of which fills 16 bytes. In each round every second row becomes the elements in turn of two rows that are
/// half a block apart, which moves an element by one bit of its position; after as many rounds as `N` has bits, rows are columns.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn blocks<const N: usize, E: Copy>(
    rows: [&[E; LANES]; LANES],
    out: &mut [E],
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
                // SAFETY: the slice has 16 bytes, and every bit pattern is a value of a register.
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
                // SAFETY: the slice has 16 bytes, and whole elements were moved, so that they are values of `E` still.
                unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), block[i]) };
            }
        }
    }
}

/// The elements of two registers in turn.
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

    fn turns<E: Copy + PartialEq + std::fmt::Debug>(element: impl Fn(usize) -> E) {
        let stride = LANES + 3;
        let rows: [[E; LANES]; LANES] =
            std::array::from_fn(|r| std::array::from_fn(|c| element(r * LANES + c)));
        let mut out = vec![element(999); LANES * stride];
        turn(rows.each_ref(), &mut out, stride);
        for (i, v) in out.iter().enumerate() {
            let (c, r) = (i / stride, i % stride);
            let want = if r < LANES { rows[r][c] } else { element(999) };
            assert_eq!(*v, want, "row {r}, column {c}");
        }
    }

    #[test]
    fn elements_of_any_size_go_where_they_belong() {
        turns(|i| i as u16);
        turns(|i| i as f32);
        turns(|i| i as f64);
        turns(|i| i as u128);
    }
}
