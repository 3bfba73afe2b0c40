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
mod gated_rms_norm;
mod group_norm;
mod instance_norm;
mod modulation;
mod moments;
mod row_norm;
mod scale_norm;
mod softmax;
mod switch_norm;
mod weight_norm;

pub use crate::computations::Cast;
pub use crate::graph::{Path, with_path};
pub(crate) use activation::fused as fused_activation;
pub(crate) use add_norm::add_row_norm;
pub use add_norm::{add_layer_norm, add_rms_norm};
pub use batch_norm::{
    BatchStatistics, batch_norm, batch_norm_act, batch_norm_inference, batch_norm_inference_act,
    modulated_batch_norm,
};
pub(crate) use batch_norm::{batch_norm_with, normalize_with};
pub use gated_rms_norm::{Gate, GatedRmsNormOptions, gated_rms_norm};
pub(crate) use group_norm::group_norm_by;
pub use group_norm::{group_norm, group_norm_act, modulated_group_norm};
pub use instance_norm::{instance_norm, instance_norm_act, modulated_instance_norm};
pub(crate) use instance_norm::{instance_norm_by, instance_norm_with};
pub use modulation::{Modulation, adain, modulate};
pub(crate) use modulation::{Scaling, modulate_in};
pub(crate) use moments::columns;
#[doc(inline)]
pub use moments::{Moments, moments};
pub use row_norm::{
    RmsOptions, layer_norm, layer_norm_act, modulated_layer_norm, modulated_rms_norm, rms_norm,
    rms_norm_act,
};
pub(crate) use row_norm::{RowNorm, row_norm};
pub use scale_norm::scale_norm;
pub(crate) use scale_norm::scale_norm_by;
pub(crate) use softmax::softmax_last_dim;
pub use switch_norm::{SwitchBatch, SwitchSources, switch_norm};
pub(crate) use switch_norm::{shares, switch_norm_with};
pub use weight_norm::weight_norm;
pub(crate) use weight_norm::{magnitude_shape, norms};
