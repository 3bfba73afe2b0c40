//! Arithmetic on slices: lanes and threads, and nothing of tensors.
//!
//! A kernel is a struct of slices and a function over lanes; [`simd`] compiles it for each instruction set, [`par`] runs its blocks on threads,
//! [`span`] turns slices into lanes and back. Lengths are checked where tensors become slices, so that a kernel only asserts.
//!
//! A closure that works on lanes is marked `#[inline(always)]`: as a function of its own it would not have the instruction set of its
//! caller, and hand lanes over in memory.

// Several arrays are indexed alike, in step.
#![allow(clippy::needless_range_loop)]

mod buffer;
mod columns;
pub(crate) mod groups;
pub(crate) mod moments;
mod par;
pub(crate) mod planes;
mod readers;
pub(crate) mod rows;
mod shared;
#[cfg_attr(not(feature = "internals"), allow(dead_code, unreachable_pub))]
pub(crate) mod simd;
pub(crate) mod slices;
mod span;
mod totals;
pub(crate) mod turned;
pub(crate) mod weight;
