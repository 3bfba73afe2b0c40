//! The layers: parameters, configuration, running statistics. What they compute is in [`ops`](crate::ops).

pub mod batch_norm;
pub(crate) mod conv1d;
mod fold;
mod frozen;
pub mod group_norm;
pub mod instance_norm;
pub mod layer_norm;
pub(crate) mod params;
pub mod rms_norm;
mod running_stats;
mod shared_state;
pub mod switch_norm;
mod updates;
pub mod weight_norm;
mod weighted;

pub use fold::{Foldable, Follower, fold};
pub use frozen::FrozenNorm;
pub use params::Affine;
pub use running_stats::{RunningStats, Snapshot, recalibrate};
pub use updates::{pool_updates, without_updates};
