//! candle-nn with the layers of this crate in it: every public name of `candle_nn`, under its path
//! there.
//!
//! Where candle's own drops gradients or has them wrong, the name stands for this crate's, with
//! candle's signature; every other name is
//! candle's itself. So a rename serves: `candle_nn::` becomes `candle_norm::nn::`, or a file takes
//! `use candle_norm::nn as candle_nn;` and stays as it is.
//!
//! | name | what it is here |
//! | --- | --- |
//! | `BatchNorm`, `LayerNorm`, and the functions that build them | [`BatchNorm`], [`LayerNorm`] |
//! | `RmsNorm`, `GroupNorm`, and the functions that build them | [`RmsNorm`], [`GroupNorm`] |
//! | `Conv1d`, `ConvTranspose1d`, and their functions | [`Conv1d`], [`ConvTranspose1d`] |
//! | `ops::{layer_norm, layer_norm_slow, rms_norm, rms_norm_slow}` | the same with every gradient |
//! | `ops::softmax_last_dim` | the same with every gradient |
//! | `rotary_emb::{rope, rope_i, rope_thd}` | functions of [`rotary_emb`] with every gradient |
//! | all else: `VarBuilder`, `VarMap`, `Linear`, `Conv2d`, `AdamW`, `loss`, … | candle-nn's own |
//!
//! The functions here take what candle's take and nothing more, so that types are inferred as
//! there; those at the root of this crate also take its options. `Conv2d::absorb_bn` is the one
//! method that takes candle's own norm: [`BatchNorm::fold_into`] is in its place. `ops::sdpa`,
//! which exists on Metal alone, is candle's own and passes no gradients on.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_norm::nn as candle_nn; // the only line that is new
//!
//! use candle_nn::{Conv1dConfig, Module, VarBuilder, VarMap};
//!
//! fn main() -> Result<()> {
//!     let vars = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//!     let conv = candle_nn::conv1d(4, 8, 3, Conv1dConfig::default(), vb.pp("conv"))?;
//!     let norm = candle_nn::layer_norm(6, 1e-5, vb.pp("norm"))?;
//!     let x = Tensor::randn(0f32, 1., (2, 4, 8), &Device::Cpu)?;
//!     let y = candle_nn::ops::softmax_last_dim(&norm.forward(&conv.forward(&x)?)?)?;
//!     let gradients = (y * x.narrow(2, 0, 6)?.sum_keepdim(1)?.broadcast_as((2, 8, 6))?)?
//!         .sum_all()?
//!         .backward()?;
//!     assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
//!     Ok(())
//! }
//! ```
//!
//! [`BatchNorm`]: crate::BatchNorm
//! [`BatchNorm::fold_into`]: crate::BatchNorm::fold_into
//! [`LayerNorm`]: crate::LayerNorm
//! [`RmsNorm`]: crate::RmsNorm
//! [`GroupNorm`]: crate::GroupNorm
//! [`Conv1d`]: crate::Conv1d
//! [`ConvTranspose1d`]: crate::ConvTranspose1d

use candle_core::Result;

// What is declared below, or named one by one, takes the place of what a glob brings.
pub use candle_nn::*;

pub use crate::layers::batch_norm::BatchNorm;
pub use crate::layers::conv1d::{
    Conv1d, ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias, conv1d, conv1d_no_bias,
};
pub use crate::layers::group_norm::GroupNorm;
pub use crate::layers::layer_norm::LayerNorm;
pub use crate::layers::rms_norm::RmsNorm;

pub mod ops;
pub mod rotary_emb;

/// `candle_nn::batch_norm`.
pub mod batch_norm {
    pub use super::{BatchNorm, BatchNormConfig, batch_norm};
}

/// `candle_nn::conv`.
pub mod conv {
    pub use super::{
        Conv1d, ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias, conv1d, conv1d_no_bias,
    };
    pub use candle_nn::conv::*;
}

/// `candle_nn::group_norm`.
pub mod group_norm {
    pub use super::{GroupNorm, group_norm};
}

/// `candle_nn::layer_norm`.
pub mod layer_norm {
    pub use super::{
        LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
    };
}

/// [`batch_norm`](crate::batch_norm()) with candle's signature.
///
/// # Errors
/// Those of [`batch_norm`](crate::batch_norm()).
pub fn batch_norm<C: Into<BatchNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    crate::batch_norm(num_features, config, vb)
}

/// [`layer_norm`](crate::layer_norm()) with candle's signature.
///
/// # Errors
/// Those of [`layer_norm`](crate::layer_norm()).
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    crate::layer_norm(size, config, vb)
}

/// [`layer_norm_no_bias`](crate::layer_norm_no_bias) with candle's signature.
///
/// # Errors
/// Those of [`layer_norm`](crate::layer_norm()).
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    crate::layer_norm_no_bias(size, eps, vb)
}

/// [`rms_norm`](crate::rms_norm()) with candle's signature.
///
/// # Errors
/// Those of [`rms_norm`](crate::rms_norm()).
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    crate::rms_norm(size, eps, vb)
}

/// [`group_norm`](crate::group_norm()) with candle's signature.
///
/// # Errors
/// Those of [`group_norm`](crate::group_norm()).
pub fn group_norm(
    num_groups: usize,
    num_channels: usize,
    eps: f64,
    vb: VarBuilder,
) -> Result<GroupNorm> {
    crate::group_norm(num_groups, num_channels, eps, vb)
}
