//! Normalization layers for candle.
pub mod checkpoint;
#[allow(unsafe_code)] // and nowhere else: lanes, threads and uncleared buffers need it
mod kernels;
mod layers;
mod norm;
pub mod ops;
mod optim;

pub use layers::batch_norm::{BatchNorm, BatchNormConfig, BatchNormOptions, batch_norm};
pub use layers::group_norm::{GroupNorm, GroupNormOptions, group_norm};
pub use layers::instance_norm::{InstanceNorm, InstanceNormOptions, instance_norm};
pub use layers::layer_norm::{
    LayerNorm, LayerNormConfig, LayerNormOptions, layer_norm, layer_norm_no_bias,
};
pub use layers::rms_norm::{RmsNorm, RmsNormOptions, rms_norm};
pub use layers::weight_norm::{WeightNorm, WeightNormOptions, Weighted};
pub use layers::{
    Affine, Foldable, FrozenNorm, RunningStats, Snapshot, batch_norm, group_norm, instance_norm,
    layer_norm, recalibrate, rms_norm, weight_norm,
};
pub use norm::{Norm, NormConfig, NormedLayer};
pub use ops::{Cast, Path, with_path};
pub use optim::{ParamGroups, param_groups, trainable_vars};
