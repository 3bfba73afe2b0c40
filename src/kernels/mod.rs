//! Arithmetic on slices: lanes and threads, and nothing of tensors.

mod buffer;
mod moments;
mod par;
pub(crate) mod rows;
pub(crate) mod simd;
mod span;
