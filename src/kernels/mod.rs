//! Arithmetic on slices: lanes and threads, and nothing of tensors.
//!
//! A kernel is a struct of slices and a function over lanes; [`simd`] compiles it for each
//! instruction set, [`par`] runs its blocks on threads, [`loops`] turns slices into lanes and back,
//! and [`buffer`] keeps the account of what was written. Lengths are checked where tensors become
//! slices, so that a kernel only asserts.
//!
//! A closure that works on lanes is marked `#[inline(always)]`: as a function of its own it would
//! not have the instruction set of its caller, and hand lanes over in memory.
//!
//! A module imports only from those above it here.

// Several arrays are indexed alike, in step.
#![allow(clippy::needless_range_loop)]

#[cfg_attr(not(feature = "internals"), allow(dead_code, unreachable_pub))]
pub(crate) mod simd;

mod loops;
mod par;
mod shared;

mod buffer;
mod column_sums;
pub(crate) mod moments;
pub(crate) mod shape;

pub(crate) mod slice_moments;
pub(crate) mod stats;
pub(crate) mod transpose;

pub(crate) mod affine;
pub(crate) mod grads;
mod readers;

mod columns;
pub(crate) mod groups;
mod planes;
pub(crate) mod rows;
pub(crate) mod weight;

pub(crate) mod channels;
