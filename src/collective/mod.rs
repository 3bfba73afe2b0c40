//! Sums over the ranks of a group: the trait, and its implementation for threads.

mod agreement;
mod call;
mod device;
#[cfg(feature = "nccl")]
mod nccl;
mod threads;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Result;

pub use agreement::agree;
pub(crate) use agreement::{VOTE, agreed, vote};
pub use call::{Call, at_step};
pub use device::DeviceSums;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use threads::Threads;

/// A group of ranks that compute together: processes, hosts or threads, each of which holds one
/// such value with a rank of its own.
///
/// Every rank of the group makes the same calls in the same order; a call returns when all of them
/// have made it. An implementation compares what the ranks call ([`Call`], and the number and dtype
/// of the values) and returns an error on every rank where they differ, and where one of them does
/// not come. [`Threads`] is the implementation of this crate; `candle-norm-mpi` has one over MPI.
///
/// # An implementation of your own
/// The result of a sum has the same bits on every rank: parameters and running statistics stay
/// equal by that. Values that are not finite are summed like any others. The group can be used by
/// several threads of a rank only if they take turns in an order that is the same on all ranks.
///
/// ```
/// use std::sync::Arc;
///
/// use candle_core::Result;
/// use candle_norm::distributed::{Call, Collective};
///
/// /// The group of one rank.
/// #[derive(Debug)]
/// struct Alone;
///
/// impl Collective for Alone {
///     fn rank(&self) -> usize {
///         0
///     }
///     fn size(&self) -> usize {
///         1
///     }
///     fn all_reduce_sum(&self, _: &Call, _: &mut [f64]) -> Result<()> {
///         Ok(())
///     }
///     fn all_reduce_sum_f32(&self, _: &Call, _: &mut [f32]) -> Result<()> {
///         Ok(())
///     }
///     fn broadcast(&self, _: &Call, _: &mut [f64]) -> Result<()> {
///         Ok(())
///     }
///     fn split(&self, _: usize) -> Result<Arc<dyn Collective>> {
///         Ok(Arc::new(Alone))
///     }
/// }
/// ```
pub trait Collective: Send + Sync + Debug {
    /// The number of this rank, from 0 to `size() - 1`.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// Replaces `values` by their sums over all ranks, element by element.
    ///
    /// # Errors
    /// Another call or length on another rank, a rank that does not come, faults of the
    /// implementation.
    fn all_reduce_sum(&self, call: &Call, values: &mut [f64]) -> Result<()>;

    /// [`all_reduce_sum`](Self::all_reduce_sum) in `f32`, for gradients.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn all_reduce_sum_f32(&self, call: &Call, values: &mut [f32]) -> Result<()>;

    /// Replaces `values` by those of rank 0, bit for bit.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn broadcast(&self, call: &Call, values: &mut [f64]) -> Result<()>;

    /// The group of the ranks that call with the same `color`, in the order of their ranks here.
    ///
    /// Statistics may be shared by fewer ranks than gradients: groups of 8 to 32 keep batch norm's
    /// many small sums off the slow links of a large cluster.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn split(&self, color: usize) -> Result<Arc<dyn Collective>>;

    /// Sums in the memory of devices, if the engine has them: synchronized layers and
    /// [`sum_gradients`](crate::distributed::sum_gradients) then copy nothing to the host. The
    /// other calls carry what the host knows: counts, votes, and what the ranks compare.
    fn device_sums(&self) -> Option<&dyn DeviceSums> {
        None
    }
}
