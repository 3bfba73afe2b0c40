//! Shares of a data set.

use candle_core::{Result, bail};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

const LAYER: &str = "shard";

/// The samples 0 to `samples - 1` in an order drawn by `seed` and `epoch`: the same on all ranks.
///
/// ```
/// use candle_norm::distributed::shuffled;
///
/// let mut order = shuffled(10, 42, 0);
/// assert_eq!(order, shuffled(10, 42, 0));
/// assert_ne!(order, shuffled(10, 42, 1));
/// order.sort();
/// assert_eq!(order, (0..10).collect::<Vec<_>>());
/// ```
pub fn shuffled(samples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..samples).collect();
    // Another seed for each epoch, by the odd constant of the golden ratio.
    let seed = seed.wrapping_add(epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    order
}

/// `order` in batches of `batch` samples over all ranks, each of which has a share for each of
/// `ranks`: a rest of fewer samples than ranks is added to the batch before.
///
/// # Errors
/// A batch, or an order, of fewer samples than ranks.
///
/// ```
/// use candle_norm::distributed::batches;
///
/// let order = [0, 1, 2, 3, 4, 5, 6, 7, 8];
/// let sizes = |batch, ranks| -> candle_core::Result<Vec<usize>> {
///     Ok(batches(&order, batch, ranks)?.map(<[_]>::len).collect())
/// };
/// assert_eq!(sizes(4, 1)?, [4, 4, 1]);
/// assert_eq!(sizes(4, 2)?, [4, 5]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batches<T>(order: &[T], batch: usize, ranks: usize) -> Result<impl Iterator<Item = &[T]>> {
    let layer = "batches";
    let least = ranks.max(1);
    if batch < least || order.len() < least {
        bail!(
            "{layer}: expected at least one sample for each of {ranks} ranks, got batches of \
            {batch} of {} samples; take fewer ranks or larger batches",
            order.len()
        )
    }
    let mut rest = order;
    Ok(std::iter::from_fn(move || {
        let mut count = batch.min(rest.len());
        if rest.len() - count < least {
            count = rest.len();
        }
        let (first, after) = rest.split_at(count);
        rest = after;
        (!first.is_empty()).then_some(first)
    }))
}

/// The share of `rank` in `batch`: neighboring samples, and as many as each other rank has, or one
/// more or less.
///
/// # Errors
/// A batch of fewer samples than ranks, which would leave a rank without any; a rank that is not
/// below `ranks`.
///
/// ```
/// use candle_norm::distributed::shard;
///
/// let batch = [10, 11, 12, 13, 14];
/// assert_eq!(shard(&batch, 0, 2)?, [10, 11, 12]);
/// assert_eq!(shard(&batch, 1, 2)?, [13, 14]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn shard<T>(batch: &[T], rank: usize, ranks: usize) -> Result<&[T]> {
    let layer = LAYER;
    if rank >= ranks {
        bail!("{layer}: expected a rank below {ranks}, the number of ranks, got {rank}")
    }
    if batch.len() < ranks {
        bail!(
            "{layer}: expected at least one sample for each of {ranks} ranks, got a batch of {}; \
            take fewer ranks or larger batches",
            batch.len()
        )
    }
    let (least, more) = (batch.len() / ranks, batch.len() % ranks);
    let start = rank * least + rank.min(more);
    Ok(&batch[start..start + least + usize::from(rank < more)])
}
