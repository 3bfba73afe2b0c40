//! Several ranks that train one model: groups of processes, hosts or threads, and what they sum.
//!
//! A rank holds a copy of the model and computes on its share of each batch. [`Collective`] is the
//! group that it belongs to; [`Threads`] is such a group in one process.
//!
//! - Each rank makes the same calls in the same order. [`at_step`] gives them the number of the
//!   training step, so that a rank that skipped one is an error on every rank, and [`agree`] makes
//!   the error of one rank an error of all.

pub use crate::collective::{Call, Collective, Threads, agree, at_step};
