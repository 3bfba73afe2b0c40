//! Output buffers that are written once and never cleared first.
//!
//! Whoever writes a part of a buffer returns it as a slice of initialized elements. Such a slice
//! is the proof that the part was written, so that writing needs no promise by word of mouth.

use std::mem::{MaybeUninit, take};
use std::ptr;
use std::slice::ChunksMut;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::shared::Shared;

/// A vector of `len` elements, which `jobs` gets in parts of `size` elements, the last of which may
/// be shorter, and writes.
///
/// # Panics
/// If a part was not written to its end.
pub(crate) fn fill<T: Copy>(len: usize, size: usize, jobs: impl FnOnce(Parts<T>)) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    let written = AtomicUsize::new(0);
    jobs(Parts::new(
        &mut out.spare_capacity_mut()[..len],
        size,
        &written,
    ));
    assert!(written.into_inner() == len, "every part is written");
    // SAFETY: parts do not overlap and count an element once a slice has shown it to be written.
    unsafe { out.set_len(len) };
    out
}

/// A vector of `len` elements, which `jobs` writes in parts that interleave.
///
/// # Safety
/// `jobs` must write every element.
pub(crate) unsafe fn fill_interleaved<T: Copy>(len: usize, jobs: impl FnOnce(Shared<T>)) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    jobs(Shared::new(&mut out.spare_capacity_mut()[..len]));
    // SAFETY: the capacity is at least `len`, and the caller promises that all of it was written.
    unsafe { out.set_len(len) };
    out
}

/// The parts of a buffer, in their order.
pub(crate) struct Parts<'a, T> {
    chunks: ChunksMut<'a, MaybeUninit<T>>,
    written: &'a AtomicUsize,
}

impl<'a, T> Parts<'a, T> {
    fn new(buffer: &'a mut [MaybeUninit<T>], size: usize, written: &'a AtomicUsize) -> Self {
        Self {
            chunks: buffer.chunks_mut(size.max(1)),
            written,
        }
    }
}

impl<'a, T> Iterator for Parts<'a, T> {
    type Item = Part<'a, T>;

    fn next(&mut self) -> Option<Part<'a, T>> {
        Some(Part {
            rest: self.chunks.next()?,
            done: 0,
            written: self.written,
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.chunks.size_hint()
    }
}

/// A part of a buffer, written from its start to its end.
pub(crate) struct Part<'a, T> {
    rest: &'a mut [MaybeUninit<T>],
    /// How many elements before the rest are written.
    done: usize,
    /// The sum of these over all parts that are no longer in use.
    written: &'a AtomicUsize,
}

impl<'a, T> Part<'a, T> {
    /// How many elements are yet to be written.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }

    /// Has the next `len` elements written by `write`, which returns them.
    #[inline(always)]
    pub(crate) fn write(
        &mut self,
        len: usize,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<T>]) -> &'b mut [T],
    ) {
        let (next, rest) = take(&mut self.rest).split_at_mut(len);
        let start = next.as_ptr().cast::<T>();
        let written = write(next);
        assert!(ptr::eq(written.as_ptr(), start) && written.len() == len);
        self.done += len;
        self.rest = rest;
    }

    /// The rest in parts of its own, of `size` elements each.
    pub(crate) fn divide(mut self, size: usize) -> Parts<'a, T> {
        Parts::new(take(&mut self.rest), size, self.written)
    }
}

impl<T> Drop for Part<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.written.fetch_add(self.done, Ordering::Relaxed);
    }
}

/// Values that a kernel leaves for its next step, in memory that it keeps.
pub(crate) struct Scratch<T>(Vec<T>);

impl<T: Copy> Scratch<T> {
    pub(crate) fn new() -> Self {
        Self(vec![])
    }

    /// Forgets all values.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds `len` values, which `write` writes and returns.
    #[inline(always)]
    pub(crate) fn push(
        &mut self,
        len: usize,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<T>]) -> &'b mut [T],
    ) {
        self.0.reserve(len);
        let next = &mut self.0.spare_capacity_mut()[..len];
        let start = next.as_ptr().cast::<T>();
        let written = write(next);
        assert!(ptr::eq(written.as_ptr(), start) && written.len() == len);
        // SAFETY: the next `len` elements are within the capacity, and the slice that came back
        // shows that they are written.
        unsafe { self.0.set_len(self.0.len() + len) };
    }

    /// The values, in their order.
    #[inline(always)]
    pub(crate) fn get(&self) -> &[T] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all<T: Copy>(out: &mut [MaybeUninit<T>], value: T) -> &mut [T] {
        out.write_copy_of_slice(&vec![value; out.len()])
    }

    #[test]
    fn parts_make_up_the_whole() {
        let ten = fill(10, 4, |parts| {
            for (i, mut part) in parts.enumerate() {
                while part.len() > 0 {
                    part.write(part.len().min(3), |out| all(out, i));
                }
            }
        });
        assert_eq!(ten, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
        let divided = fill(6, 3, |parts| {
            let parts = parts.flat_map(|part| part.divide(2)).enumerate();
            parts.for_each(|(i, mut part)| part.write(part.len(), |out| all(out, i)));
        });
        assert_eq!(divided, [0, 0, 1, 2, 2, 3]);
        assert!(fill::<u8>(0, 0, |_| ()).is_empty());
    }

    #[test]
    #[should_panic(expected = "every part is written")]
    fn a_part_that_is_not_written_is_noticed() {
        fill(2, 1, |parts| {
            parts
                .take(1)
                .for_each(|mut part| part.write(1, |out| all(out, 1)));
        });
    }

    #[test]
    #[should_panic]
    fn the_slice_of_another_part_proves_nothing() {
        fill(4, 4, |parts| {
            for mut part in parts {
                part.write(4, |_| Box::leak(Box::new([1; 4])));
            }
        });
    }
}
