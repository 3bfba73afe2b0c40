//! Arithmetic on slices: lanes and threads, and nothing of tensors.

mod buffer;
mod columns;
pub(crate) mod groups;
mod moments;
mod par;
pub(crate) mod planes;
pub(crate) mod rows;
mod shared;
pub(crate) mod simd;
mod span;
pub(crate) mod weight;
