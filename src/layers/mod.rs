//! The layers: parameters, configuration, running statistics. What they compute is in [`ops`](crate::ops).

pub mod batch_norm;
pub(crate) mod conv1d;
mod frozen;
pub mod group_norm;
pub mod instance_norm;
pub mod layer_norm;
pub(crate) mod params;
pub mod rms_norm;
mod running_stats;
pub mod switch_norm;
pub mod weight_norm;
mod weighted;

pub use frozen::{Foldable, FrozenNorm};
pub use params::Affine;
pub use running_stats::{RunningStats, Snapshot, recalibrate};
