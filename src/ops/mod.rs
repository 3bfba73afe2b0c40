//! The layers as stateless, differentiable functions on tensors.
//!
//! A function here checks its input, hands what is to be computed to the graph, and returns a
//! tensor whose gradients reach every argument. The layers of this crate add parameters,
//! configuration and running statistics to these functions and nothing else.

pub(crate) mod check;
pub(crate) mod linear_map;

mod activation;
mod add_norm;
mod batch_norm;
mod batch_renorm;
mod cumulative_layer_norm;
mod dynamic;
mod gated_rms_norm;
mod ghost_batch_norm;
mod global_response_norm;
mod group_norm;
mod instance_norm;
mod joint_statistics;
mod l2_normalize;
mod layer_scale;
mod masked;
mod modulation;
mod moments;
mod row_norm;
mod scale_norm;
mod softmax;
mod spectral_norm;
mod switch_norm;
mod sync_batch_norm;
mod sync_switch_norm;
mod weight_norm;
mod weight_standardization;

pub use crate::computations::{Cast, Squash};
pub use crate::graph::{Path, with_path};
pub(crate) use activation::fused as fused_activation;
pub(crate) use add_norm::add_row_norm;
pub use add_norm::{add_layer_norm, add_rms_norm};
pub use batch_norm::{
    BatchStatistics, batch_norm, batch_norm_act, batch_norm_inference, batch_norm_inference_act,
    modulated_batch_norm,
};
pub(crate) use batch_norm::{batch_norm_with, normalize_with};
pub use batch_renorm::{RenormOptions, batch_renorm};
pub(crate) use batch_renorm::{Share, batch_renorm_with};
pub use cumulative_layer_norm::{CumulativeState, cumulative_layer_norm};
pub(crate) use cumulative_layer_norm::{
    cumulative_layer_norm_from, modulated_cumulative_layer_norm,
};
pub use dynamic::{derf, dyt};
pub use gated_rms_norm::{Gate, GatedRmsNormOptions, gated_rms_norm};
pub use ghost_batch_norm::ghost_batch_norm;
pub(crate) use ghost_batch_norm::{GhostStatistics, ghost_batch_norm_with};
pub use global_response_norm::global_response_norm;
pub(crate) use group_norm::group_norm_by;
pub use group_norm::{group_norm, group_norm_act, modulated_group_norm};
pub use instance_norm::{instance_norm, instance_norm_act, modulated_instance_norm};
pub(crate) use instance_norm::{instance_norm_by, instance_norm_values, instance_norm_with};
pub(crate) use joint_statistics::{JointStatistics, averaged_over_ranks};
pub use l2_normalize::{L2Form, l2_normalize};
pub use layer_scale::{GateOptions, gated_residual, layer_scale};
pub use masked::mask_of_lengths;
pub(crate) use masked::{Mask, averaged, wide_params};
pub use modulation::{Modulation, adain, modulate};
pub(crate) use modulation::{Scaling, modulate_in};
#[doc(inline)]
pub use moments::{Moments, moments};
pub use row_norm::{
    RmsOptions, layer_norm, layer_norm_act, modulated_layer_norm, modulated_rms_norm, rms_norm,
    rms_norm_act,
};
pub(crate) use row_norm::{RowNorm, row_norm};
pub use scale_norm::scale_norm;
pub(crate) use scale_norm::scale_norm_by;
pub use softmax::{log_softmax_last_dim, softmax_last_dim};
pub(crate) use spectral_norm::{fresh_vectors, sizes, vectors_of_u};
pub use spectral_norm::{power_iteration, spectral_norm};
pub use switch_norm::{SwitchBatch, SwitchOptions, switch_norm};
pub(crate) use switch_norm::{mixing_weights, switch_norm_with};
pub(crate) use sync_batch_norm::sync_batch_norm_with;
pub(crate) use sync_switch_norm::sync_switch_norm_with;
pub use weight_norm::weight_norm;
pub(crate) use weight_norm::{magnitude_shape, norms};
pub(crate) use weight_standardization::check_standardized;
pub use weight_standardization::weight_standardization;
