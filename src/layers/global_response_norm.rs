//! Global response normalization.

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::norm::Norm;
use super::params::{self, AffineParams, BIAS, WEIGHT};
use crate::ops::{self, check};

const LAYER: &str = "GlobalResponseNorm";

/// Configuration of [`GlobalResponseNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct GlobalResponseNormOptions {
    /// ε, added to the mean of the lengths. Default: 1e-6.
    pub eps: f64,
    /// Channels are on axis 1 of `[N, C, *]`, and not on the last axis, as inside of an MLP.
    /// Default: false.
    pub channels_first: bool,
}

impl Default for GlobalResponseNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            channels_first: false,
        }
    }
}

impl From<f64> for GlobalResponseNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// Global response normalization (GRN), by which the channels of a sample compete.
///
/// `y = x + w · x · n + b` with `n = g / (mean(g) + ε)`
///
/// Where:
/// - `g` is the length `‖x‖` of a channel of a sample over space, `|x|` where there is no space;
///   the mean is that of all channels of the sample;
/// - `w` and `b` are `weight` and `bias`, `[C]`; both start from 0, so that the layer starts as the
///   identity;
/// - ε is `eps`.
///
/// Woo et al., 2023, <https://arxiv.org/abs/2301.00808> (ConvNeXt V2). Training and inference are
/// the same, so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or `f64`; half
/// precision is computed in `f32`. Channels of zeros have gradients that are finite.
///
/// The layer of sparse convolutions that takes `g` over a whole batch is another one.
#[derive(Debug, Clone)]
pub struct GlobalResponseNorm {
    weight: Tensor,
    bias: Tensor,
    options: GlobalResponseNormOptions,
}

/// A [`GlobalResponseNorm`] over `num_channels`, its parameters taken from `vb`.
///
/// Parameters: `weight` and `bias` (also found as `gamma` and `beta`), `[num_channels]`; a file may
/// have them with further axes of size 1, as `[1, 1, 1, C]` of the authors, transformers and
/// diffusers.
///
/// # Errors
/// Options out of range, parameters of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::global_response_norm(4, 1e-6, vb)?;
/// let x = Tensor::randn(0f32, 1., (2, 7, 7, 4), &Device::Cpu)?;
/// let y = norm.forward(&x)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn global_response_norm(
    num_channels: usize,
    options: impl Into<GlobalResponseNormOptions>,
    vb: VarBuilder,
) -> Result<GlobalResponseNorm> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    check::countable(LAYER, "weight", &[num_channels])?;
    Ok(GlobalResponseNorm {
        weight: params::get(&vb, num_channels, WEIGHT, 0.)?,
        bias: params::get(&vb, num_channels, BIAS, 0.)?,
        options,
    })
}

impl GlobalResponseNorm {
    /// A layer of given parameters, `[C]`.
    pub fn new(
        weight: Tensor,
        bias: Tensor,
        options: impl Into<GlobalResponseNormOptions>,
    ) -> Self {
        Self {
            weight,
            bias,
            options: options.into(),
        }
    }

    /// The weight of the normalized part.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The shift.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// ε, added to the mean of the lengths.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &GlobalResponseNormOptions {
        &self.options
    }

    fn params(&self) -> AffineParams {
        AffineParams {
            weight: Some(self.weight.clone()),
            bias: Some(self.bias.clone()),
        }
    }
}

impl Module for GlobalResponseNorm {
    /// The channels of each sample, by their shares in its length.
    ///
    /// # Shapes
    /// `[N, *, C]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of the same
    /// shape and dtype.
    ///
    /// # Errors
    /// An input of another number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let GlobalResponseNormOptions {
            eps,
            channels_first,
        } = self.options;
        ops::global_response_norm(xs, &self.weight, &self.bias, eps, channels_first)
    }
}

impl Norm for GlobalResponseNorm {
    fn kind(&self) -> &'static str {
        "grn"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params().named()
    }

    fn reset(&self) -> Result<()> {
        self.params().reset(0.)
    }
}
