//! The one place where work goes to threads.
//!
//! Work is cut into blocks whose size depends on the shape alone, and what blocks leave is combined
//! in the order of the blocks: the number of threads changes neither.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::simd::{Kernel, Level};

/// Below this many elements the calling thread is done before another would have begun.
const SERIAL: usize = 1 << 14;

/// The least elements of a block.
const BLOCK: usize = 1 << 12;

/// The most blocks of a tensor that is not large.
const FEW_BLOCKS: usize = 64;

/// The most blocks of a large tensor, two for each core of a large machine.
const MANY_BLOCKS: usize = 256;

/// The least elements of one of many blocks.
const LARGE_BLOCK: usize = 1 << 14;

/// The most blocks that have sums of their own, one for each core of a large machine.
const MANY_SUMMING_BLOCKS: usize = 128;

/// The least items of one of many such blocks, beside which its sums are small.
const MANY_ITEMS: usize = 128;

/// The least elements of one of many such blocks, beside which the merging of its sums is small.
const SUMMING_BLOCK: usize = 1 << 16;

/// How many of `count` items of `len` elements make a block.
pub(crate) fn items_per_block(count: usize, len: usize) -> usize {
    let large = LARGE_BLOCK.div_ceil(len.max(1));
    per_block(count, len, count.div_ceil(MANY_BLOCKS).max(large))
}

/// How many of `count` items of `len` elements make a block that leaves sums to be combined.
pub(crate) fn items_per_summing_block(count: usize, len: usize) -> usize {
    let large = MANY_ITEMS.max(SUMMING_BLOCK.div_ceil(len.max(1)));
    per_block(count, len, count.div_ceil(MANY_SUMMING_BLOCKS).max(large))
}

/// The items of one of few blocks, or of one of many if these are less.
fn per_block(count: usize, len: usize, of_many: usize) -> usize {
    let least = BLOCK.div_ceil(len.max(1)).max(1);
    count.div_ceil(FEW_BLOCKS).min(of_many).max(least)
}

/// The elements of a part of a row, group or channel that is divided.
pub(crate) const PART: usize = 1 << 14;

/// Whether `count` rows, groups or channels of `len` elements are divided, each into parts of
/// [`PART`] elements: where there are too few for the threads of a machine, and they are too long
/// to stay in the cache from one pass to the next, or very few.
pub(crate) fn divides(count: usize, len: usize) -> bool {
    (count < 16 && len >= 1 << 18) || (count <= 4 && len >= 1 << 16)
}

/// Calls `f` with every job, in parallel where `elements`, what all of them touch, are worth it.
pub(crate) fn for_each<J: Send>(jobs: Vec<J>, elements: usize, f: impl Fn(J) + Sync) {
    if jobs.len() == 1 || elements <= SERIAL || rayon::current_num_threads() == 1 {
        jobs.into_iter().for_each(f);
    } else {
        let jobs: Vec<_> = jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
        in_parallel(jobs.len(), &|i| {
            let job = jobs[i]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            job.into_iter().for_each(&f);
        });
    }
}

/// Calls `f` with every number below `count` on any thread. It is compiled once for all kernels:
/// code of rayon for each of them would take longer to compile than the kernels.
fn in_parallel(count: usize, f: &(dyn Fn(usize) + Sync)) {
    (0..count).into_par_iter().with_max_len(1).for_each(f);
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
