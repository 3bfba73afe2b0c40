//! Errors of one rank that become errors of all.

use candle_core::{Result, bail};

use super::{Call, Collective};

/// Length of a [`vote`].
pub(crate) const VOTE: usize = 2;

/// Numbers that say to the other ranks, as a part of a sum, whether this `rank` failed.
pub(crate) fn vote(rank: usize, failed: bool) -> [f64; VOTE] {
    match failed {
        true => [1., rank as f64],
        false => [0., 0.],
    }
}

/// An error if the sum of all votes says that a rank failed.
pub(crate) fn agreed(layer: &str, votes: [f64; VOTE]) -> Result<()> {
    let [failed, rank] = votes;
    if failed == 1. {
        bail!(
            "{layer}: expected every rank to go on, got an error on rank {rank}, which has the \
            message"
        )
    }
    if failed != 0. {
        bail!(
            "{layer}: expected every rank to go on, got errors on {failed} ranks, which have the \
            messages"
        )
    }
    Ok(())
}

/// `result` if every rank has one; on each rank an error if one of them has an error: its own, or
/// one that names the rank.
///
/// For what may fail on one rank alone, such as reading a file: the others would wait for it in
/// their next call. Every rank of the group calls it, with the same `name`.
///
/// ```
/// use candle_core::{Result, bail};
/// use candle_norm::distributed::{Threads, agree};
///
/// let outcome = Threads::run(3, |group| {
///     let read = || if group.rank() == 1 { bail!("no such file") } else { Ok(5) };
///     let message = agree(&*group, "read", read()).unwrap_err().to_string();
///     Ok(message)
/// })?;
/// assert!(outcome[0].contains("error on rank 1"), "{}", outcome[0]);
/// assert!(outcome[1].contains("no such file"));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As said, and those of the group.
pub fn agree<T>(group: &dyn Collective, name: &'static str, result: Result<T>) -> Result<T> {
    let mut votes = vote(group.rank(), result.is_err());
    let summed = group.all_reduce_sum(&Call::new(name), &mut votes);
    let value = result?;
    summed?;
    agreed(name, votes)?;
    Ok(value)
}
