//! Unchecked disjoint parts of one output buffer, for threads that write parts which interleave.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A buffer whose parts are handed out unchecked.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T> {
    start: *mut MaybeUninit<T>,
    len: usize,
    buffer: PhantomData<&'a mut [MaybeUninit<T>]>,
}

// SAFETY: it is a slice that the parts given out divide among threads, and elements may be sent.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; nothing is read through it.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(buffer: &'a mut [MaybeUninit<T>]) -> Self {
        Self {
            start: buffer.as_mut_ptr(),
            len: buffer.len(),
            buffer: PhantomData,
        }
    }

    /// The part of `range`.
    ///
    /// # Safety
    /// No other part that overlaps `range` may be in use.
    #[inline(always)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [MaybeUninit<T>] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies in the buffer, which is borrowed for 'a; that nobody else has it
        // is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
