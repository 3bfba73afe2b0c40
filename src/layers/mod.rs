//! The layers: parameters, configuration, running statistics. Their formulas are computed by
//! [`ops`](crate::ops).

mod batch;
pub mod batch_norm;
pub(crate) mod batch_renorm;
mod condition;
pub(crate) mod conv1d;
pub(crate) mod cumulative_layer_norm;
pub(crate) mod dyt;
mod foldable;
mod frozen;
mod gated_rms_norm;
pub(crate) mod global_response_norm;
pub mod group_norm;
pub mod instance_norm;
pub(crate) mod l2_normalize;
pub(crate) mod layer_norm;
pub(crate) mod layer_scale;
mod masked;
mod names;
mod norm;
mod observe;
mod options;
pub(crate) mod params;
mod rev_in;
pub mod rms_norm;
mod running_stats;
pub(crate) mod scale_norm;
mod shared_state;
pub mod spectral_norm;
pub mod switch_norm;
mod updates;
pub mod weight_norm;
pub mod weight_standardization;
mod weighted;

pub use condition::{
    Chunk, ChunkOrder, Chunks, ConditionProjection, ScaleShiftTable, condition_projection,
    scale_shift_table,
};
pub use foldable::Foldable;
pub use frozen::FrozenNorm;
pub use gated_rms_norm::{GatedRmsNorm, gated_rms_norm};
pub(crate) use names::{NONE, Names};
pub(crate) use norm::Identity;
pub use norm::Norm;
pub(crate) use observe::Recalibrating;
pub(crate) use options::NormOptions;
pub use params::Affine;
pub use rev_in::{RevIn, RevInOptions, RevInStats, rev_in};
pub use running_stats::{RunningStats, Snapshot};
pub use updates::{pool_updates, without_updates};
