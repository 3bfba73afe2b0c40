//! Normalization layers for training [candle](candle_core) models, as well as for running them.
//!
//! The layers have PyTorch's formulas, defaults and parameter names, and the constructors and
//! accessors of candle-nn: a model written for candle-nn's norms compiles against this crate with
//! the import changed. Every parameter and every input gets its gradient. `f16`, `bf16`, `f32` and
//! `f64` train and evaluate; half precision is computed in `f32`.
//!
//! # Layers
//!
//! | layer | built by | one mean and variance for each | trait |
//! | --- | --- | --- | --- |
//! | [`BatchNorm`] | [`batch_norm()`] | channel; in inference running ones | [`ModuleT`] |
//! | [`LayerNorm`] | [`layer_norm()`] | row, or the channels of a position | [`Module`] |
//! | [`RmsNorm`] | [`rms_norm()`] | row, by its mean square alone | [`Module`] |
//! | [`ScaleNorm`] | [`scale_norm()`] | none: each row at one learned length | [`Module`] |
//! | [`GroupNorm`] | [`group_norm()`] | group of channels of a sample | [`Module`] |
//! | [`InstanceNorm`] | [`instance_norm()`] | channel of a sample, over space | [`ModuleT`] |
//! | [`WeightNorm`] | [`weight_norm`]`::linear`, … | none: a length and a direction | [`Module`] |
//! | [`SpectralNorm`] | [`spectral_norm`]`::linear`, … | none: the largest singular value | [`ModuleT`] |
//! | [`WeightStandardization`] | [`weight_standardization`]`::conv2d`, … | output of a weight | [`Module`] |
//! | [`SwitchNorm`] | [`switch_norm()`] | instance, layer and batch, mixed | [`ModuleT`] |
//! | [`GlobalResponseNorm`] | [`global_response_norm()`] | none: channels by their shares | [`Module`] |
//! | [`L2Normalize`] | [`L2Normalize::new`] | none: each vector at length one | [`Module`] |
//! | [`LayerScale`] | [`layer_scale()`] | none: a factor for each channel | [`Module`] |
//! | [`BatchRenorm`] | [`batch_renorm()`] | channel, corrected towards running ones | [`ModuleT`] |
//! | [`CumulativeLayerNorm`] | [`cumulative_layer_norm()`] | position, over those up to it | [`Module`] |
//! | [`DyT`] | [`dyt()`] | none: a bounded function of each element | [`Module`] |
//! | [`GatedRmsNorm`] | [`gated_rms_norm()`] | row, or group of a row | its own, with a gate |
//! | [`FrozenNorm`] | [`BatchNorm::frozen`] | channel, fixed | [`Module`] |
//! | [`FrozenSwitchNorm`] | [`SwitchNorm::frozen`] | as SwitchNorm, batch fixed | [`Module`] |
//!
//! Every layer but GatedRmsNorm, which has a second input, is a [`ModuleT`], called by
//! `forward_t(&xs, train)`. Those that compute the same in
//! training and inference are a [`Module`] too; BatchNorm, BatchRenorm, InstanceNorm and SwitchNorm
//! are not, so that no `forward` can pick a mode unasked.
//!
//! A configuration is a number, taken as `eps`, or a struct such as [`BatchNormOptions`] with
//! PyTorch's defaults.
//!
//! # Two paths
//!
//! On the CPU every layer has fused kernels, forward and backward: multithreaded, for AVX-512, AVX2
//! or portable, with bit-identical results. On other devices a layer is composed of candle's tensor
//! operations. [`Path`] has the choice, which is made for each call; both paths keep one numeric
//! contract.
//!
//! # Example
//!
//! A convolution with batch normalization learns to tell two kinds of noise apart:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{AdamW, Module, ModuleT, Optimizer, VarBuilder, VarMap, loss};
//! use candle_norm::{batch_norm, trainable_vars};
//!
//! fn main() -> Result<()> {
//!     let vars = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//!     let conv = candle_nn::conv2d_no_bias(1, 8, 3, Default::default(), vb.pp("conv"))?;
//!     let norm = batch_norm(8, 1e-5, vb.pp("norm"))?;
//!     let head = candle_nn::linear(8, 2, vb.pp("head"))?;
//!     let model = |images: &Tensor, train| {
//!         let maps = norm.forward_t(&conv.forward(images)?, train)?.relu()?;
//!         head.forward(&maps.mean((2, 3))?)
//!     };
//!
//!     // Two kinds of noise: the images of class 1 have twice the contrast of those of class 0.
//!     let labels = (Tensor::arange(0u32, 32, &Device::Cpu)? / 16.)?;
//!     let contrast = (labels.to_dtype(DType::F32)? + 1.)?.reshape((32, 1, 1, 1))?;
//!     let images = Tensor::rand(0f32, 1., (32, 1, 8, 8), &Device::Cpu)?.broadcast_mul(&contrast)?;
//!
//!     let mut optimizer = AdamW::new_lr(trainable_vars(&vars), 0.05)?;
//!     for _ in 0..40 {
//!         let loss = loss::cross_entropy(&model(&images, true)?, &labels)?;
//!         optimizer.backward_step(&loss)?;
//!     }
//!     // `false` is inference: the running statistics take the place of the batch's own.
//!     let right = model(&images, false)?.argmax(1)?.eq(&labels)?;
//!     assert_eq!(right.sum_all()?.to_scalar::<u8>()?, 32);
//!     Ok(())
//! }
//! ```
//!
//! # Around the layers
//!
//! - A norm as a value: [`NormConfig`], parsed from `"batch"` or `"group:8"`, builds a
//!   [`Box<dyn Norm>`](Norm), or a [`NormedLayer`]: a linear layer or convolution together with its
//!   norm.
//! - Training: [`trainable_vars`] and [`param_groups`] hand an optimizer what it should change;
//!   [`RunningStats`] are the state of BatchNorm and its kin, and [`recalibrate`]
//!   recomputes them; [`without_updates`] and [`pool_updates`] say which forwards go into them.
//! - Averaged weights: [`AveragedModel`], exponentially (EMA) or equally (SWA).
//! - Files: [`checkpoint`] loads what `VarMap::load` cannot: files of PyTorch, other names, several
//!   shards, a model with another head.
//! - Inference: [`BatchNorm::frozen`], [`BatchNorm::fold_into`], [`fold`], [`NormedLayer::fold`],
//!   [`WeightNorm::bake`].
//! - Without layers: [`ops`] has the same as functions on tensors.
//! - Data and targets: [`scaling`] has scalers that are fitted once and saved with the model.
//! - candle-nn's names: [`nn`] is candle-nn with these layers in it, so that a rename serves;
//!   [`Conv1d`] and [`ConvTranspose1d`] have right gradients where candle's have not.
//! - Checking: [`gradcheck`] compares gradients with central differences; [`with_path`] forces one
//!   of the paths.
//!
//! # Further reading
//!
//! - [`guide`]: which norm for which model, and the usual mistakes with their remedies
//! - [`guide::migration`]: from candle-nn, PyTorch, transformers, Flax and Keras
//! - [`guide::numerics`]: what every layer computes, to the rounding
//! - [`guide::scaling`]: which scaler for which data
//! - [`guide::math`]: how the gradients come about; [`guide::performance`]: what the layers cost
//!
//! The README lists the limits of this version, and bugs of candle on the CPU that can affect your
//! model.
//!
//! [`Module`]: candle_nn::Module
//! [`ModuleT`]: candle_nn::ModuleT

#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod collective;
mod computations;
pub mod distributed;
// The pages of `docs`; their examples are tests. Brackets there are citations and shapes;
// `tests/docs/readme.rs` follows the links.
mod graph;
#[allow(rustdoc::broken_intra_doc_links)]
#[cfg(doc)]
pub mod guide;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod layers;
mod models;
pub mod nn;
pub mod ops;
pub mod scaling;

#[doc(inline)]
pub use candle_norm_gradcheck as gradcheck;
#[doc(inline)]
pub use candle_norm_scaling::{LossBalancer, LossBalancerOptions};
pub use layers::batch_norm::{BatchNorm, BatchNormConfig, BatchNormOptions, batch_norm};
pub use layers::batch_renorm::{BatchRenorm, BatchRenormOptions, batch_renorm};
pub use layers::conv1d::{
    Conv1d, ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias, conv1d, conv1d_no_bias,
};
pub use layers::cumulative_layer_norm::{
    CumulativeLayerNorm, CumulativeLayerNormOptions, cumulative_layer_norm,
};
pub use layers::dyt::{DyT, DyTOptions, dyt};
pub use layers::global_response_norm::{
    GlobalResponseNorm, GlobalResponseNormOptions, global_response_norm,
};
pub use layers::group_norm::{GroupNorm, GroupNormOptions, group_norm};
pub use layers::instance_norm::{InstanceNorm, InstanceNormOptions, instance_norm};
pub use layers::l2_normalize::{L2Normalize, L2NormalizeOptions};
pub use layers::layer_norm::{
    LayerNorm, LayerNormConfig, LayerNormOptions, layer_norm, layer_norm_no_bias,
};
pub use layers::layer_scale::{LayerScale, LayerScaleOptions, layer_scale};
pub use layers::rms_norm::{RmsNorm, RmsNormOptions, rms_norm};
pub use layers::scale_norm::{ScaleNorm, ScaleNormOptions, scale_norm};
pub use layers::spectral_norm::{SpectralNorm, SpectralNormOptions};
pub use layers::switch_norm::{FrozenSwitchNorm, SwitchNorm, SwitchNormOptions, switch_norm};
pub use layers::weight_norm::{WeightNorm, WeightNormOptions, Weighted};
pub use layers::weight_standardization::{WeightStandardization, WeightStandardizationOptions};
pub use layers::{
    Affine, Chunk, ChunkOrder, Chunks, ConditionProjection, Foldable, FrozenNorm, GatedRmsNorm,
    Norm, RevIn, RevInOptions, RevInStats, RunningStats, ScaleShiftTable, Snapshot, batch_norm,
    condition_projection, gated_rms_norm, group_norm, instance_norm, pool_updates, rev_in,
    rms_norm, scale_shift_table, spectral_norm, switch_norm, weight_norm, weight_standardization,
    without_updates,
};
pub use models::{
    Average, AveragedModel, AveragedModelOptions, Decay, Follower, NormConfig, NormedLayer,
    ParamGroups, Pipeline, Warmup, checkpoint, fold, param_groups, recalibrate, trainable_vars,
};
pub use ops::{
    Cast, CumulativeState, Gate, GatedRmsNormOptions, Modulation, Path, Squash, with_path,
};

/// Layer and RMS normalization, in one module as in candle-nn.
pub mod layer_norm {
    pub use crate::layers::layer_norm::*;
    pub use crate::layers::rms_norm::{RmsNorm, rms_norm};
}

// The examples in these are tests too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../CONTRIBUTING.md")]
struct Contributing;
