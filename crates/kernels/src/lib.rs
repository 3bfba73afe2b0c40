//! CPU kernels of normalization layers on slices: lanes and threads, and nothing of tensors.
//!
//! [`Float`] has them all, for each element type. Lengths are checked where tensors become slices,
//! so that a kernel only asserts.
//!
//! A kernel is a struct of slices and a function over lanes; `simd` compiles it for each
//! instruction set, `par` runs its blocks on threads, `loops` turns slices into lanes and back, and
//! `buffer` keeps the account of what was written.
//!
//! A closure that works on lanes is marked `#[inline(always)]`: as a function of its own it would
//! not have the instruction set of its caller, and hand lanes over in memory.
//!
//! A module imports only from those above it here. Those that need `unsafe` are marked.

// Several arrays are indexed alike, in step.
#![allow(clippy::needless_range_loop)]
// The unit tests compile only the code that they call. Every kernel for every element type, once
// more, would take minutes.
#![cfg_attr(test, allow(dead_code, unused_imports))]

#[allow(unsafe_code)]
mod simd;

#[allow(unsafe_code)]
mod loops;
mod par;
#[allow(unsafe_code)]
mod shared;

#[allow(unsafe_code)]
mod buffer;
#[allow(unsafe_code)]
mod column_sums;
mod moments;
mod shape;

mod slice_moments;
mod stats;
#[allow(unsafe_code)]
mod transpose;

mod activation;
mod affine;
mod grads;
mod readers;
mod spread;

mod columns;
mod dynamic;
mod gated;
mod groups;
#[allow(unsafe_code)]
mod planes;
#[allow(unsafe_code)]
mod rows;
mod scale_add;
mod softmax;
mod weight;

mod channels;

#[cfg(not(test))]
mod float;

pub use activation::{Activation, Squash};
pub use affine::AffinePair;
pub use channels::Following;
pub use dynamic::{DynamicGradients, DynamicParams, DynamicSpec};
#[cfg(not(test))]
pub use float::Float;
pub use gated::{Gate, GatedGradients, GatedSpec};
pub use grads::{Gradients, Wanted};
pub use groups::GroupSpec;
pub use moments::{Mean, Moments};
pub use rows::{Added, RowSpec};
pub use shape::{Order, Shape};
pub use simd::Level;
pub use softmax::ExpSum;
pub use spread::{Frame, GradSums, NormalizedBy, Spread};
pub use stats::{Statistics, Stats};
pub use weight::{Floor, Length};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
