//! Output buffers that are written once and never cleared first.

use std::mem::MaybeUninit;

/// A vector of `len` elements, all of which `fill` writes.
///
/// # Safety
/// `fill` must write every element.
pub(crate) unsafe fn filled<T: Copy>(
    len: usize,
    fill: impl FnOnce(&mut [MaybeUninit<T>]),
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    fill(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and `fill` has written as many elements.
    unsafe { out.set_len(len) };
    out
}

/// A part of a buffer, to be read.
///
/// # Safety
/// Every element of it must have been written.
#[inline(always)]
pub(crate) unsafe fn written<T: Copy>(part: &[MaybeUninit<T>]) -> &[T] {
    // SAFETY: the layouts are the same, and the elements are values of `T`, as the caller promises.
    unsafe { std::slice::from_raw_parts(part.as_ptr().cast(), part.len()) }
}
