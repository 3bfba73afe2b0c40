//! The one place where work goes to threads.
//!
//! Work is cut into blocks whose size depends on the shape alone, and what blocks leave is combined
//! in the order of the blocks: the number of threads changes neither.

use rayon::prelude::*;

use super::simd::{Kernel, Level};

/// Below this many elements the calling thread is done before another would have begun.
const SERIAL: usize = 1 << 14;

/// At most this many blocks, so that what they leave to be combined stays small.
const BLOCKS: usize = 64;

/// The least elements of a block.
const BLOCK: usize = 1 << 12;

/// How many of `count` items of `len` elements make a block.
pub(crate) fn items_per_block(count: usize, len: usize) -> usize {
    count
        .div_ceil(BLOCKS)
        .max(BLOCK.div_ceil(len.max(1)))
        .max(1)
}

/// Calls `f` with every job, in parallel where `elements`, what all of them touch, are worth it.
pub(crate) fn for_each<J: Send>(jobs: Vec<J>, elements: usize, f: impl Fn(J) + Sync + Send) {
    if jobs.len() == 1 || elements <= SERIAL || rayon::current_num_threads() == 1 {
        jobs.into_iter().for_each(f);
    } else {
        jobs.into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Runs every kernel with the instruction set of the calling thread, in parallel as
/// [`for_each`] does.
pub(crate) fn run<K: Kernel<Output = ()> + Send>(
    elements: usize,
    kernels: impl Iterator<Item = K>,
) {
    let level = Level::current();
    for_each(kernels.collect(), elements, |kernel| level.run(kernel));
}
