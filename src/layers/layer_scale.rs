//! LayerScale.

use candle_core::{Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};

use super::norm::Norm;
use super::params::{self, BETA, GAMMA};
use crate::ops::{self, GateOptions, check};

const LAYER: &str = "LayerScale";

/// Configuration of [`LayerScale`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct LayerScaleOptions {
    /// Number that `gamma` starts from: 1e-5 in timm, 1e-6 in ConvNeXt, 1 in DINOv2. Default: 1e-5.
    pub init: f64,
    /// Learn a shift too, as ResMLP's `Affine` and MobileBERT's `NoNorm` do. Default: false.
    pub shift: bool,
    /// Channels are on axis 1 of `[N, C, *]`, and not on the last axis. Default: false.
    pub channels_first: bool,
    /// Multiply by the hyperbolic tangent of `gamma`. Default: false.
    pub tanh: bool,
}

impl Default for LayerScaleOptions {
    fn default() -> Self {
        Self {
            init: 1e-5,
            shift: false,
            channels_first: false,
            tanh: false,
        }
    }
}

impl From<f64> for LayerScaleOptions {
    fn from(init: f64) -> Self {
        Self {
            init,
            ..Self::default()
        }
    }
}

/// LayerScale: the branch of a residual block, with a learned factor for each channel.
///
/// `y = x · γ`, or `y = x · γ + β` with a shift
///
/// Where:
/// - `γ` is `gamma`, `[C]`; it starts from a small number, so that a block starts near the
///   identity;
/// - `β` is `beta`, `[C]`, which starts from 0.
///
/// Touvron et al., 2021, <https://arxiv.org/abs/2103.17239> (CaiT).
/// [`forward_add`](Self::forward_add) adds the residual in the same pass. Training and inference
/// are the same, so the layer is a [`Module`].
#[derive(Debug, Clone)]
pub struct LayerScale {
    gamma: Tensor,
    beta: Option<Tensor>,
    options: LayerScaleOptions,
}

/// A [`LayerScale`] over `num_channels`, its parameters taken from `vb`.
///
/// Parameters: `gamma` (also found as `lambda1`, `layer_scale_parameter` or `scale`), and `beta`
/// with a shift (also found as `bias`), `[num_channels]`; a file may have them with further axes of
/// size 1. A block that holds two, such as BEiT's `lambda_1` and `lambda_2`, needs a builder that
/// renames: `vb.rename_f(|_| "blocks.0.lambda_1".to_string())`.
///
/// # Errors
/// An `init` that is not finite, parameters of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let scale = candle_norm::layer_scale(2, 0.5, vb)?;
/// let x = Tensor::new(&[[3f64, -1.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[1f64, 2.]], &Device::Cpu)?;
/// assert_eq!(scale.forward(&x)?.to_vec2::<f64>()?, [[1.5, -0.5]]);
/// assert_eq!(scale.forward_add(&x, &residual)?.to_vec2::<f64>()?, [[2.5, 1.5]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_scale(
    num_channels: usize,
    options: impl Into<LayerScaleOptions>,
    vb: VarBuilder,
) -> Result<LayerScale> {
    let options = options.into();
    check::finite(LAYER, "init", options.init)?;
    check::countable(LAYER, "gamma", &[num_channels])?;
    let beta = || params::get(&vb, num_channels, BETA, 0.);
    Ok(LayerScale {
        gamma: params::get(&vb, num_channels, GAMMA, options.init)?,
        beta: options.shift.then(beta).transpose()?,
        options,
    })
}

impl LayerScale {
    /// A layer of a given factor for each channel, `[C]`, and of a shift if there is one.
    pub fn new(gamma: Tensor, beta: Option<Tensor>, options: impl Into<LayerScaleOptions>) -> Self {
        let options = LayerScaleOptions {
            shift: beta.is_some(),
            ..options.into()
        };
        Self {
            gamma,
            beta,
            options,
        }
    }

    /// The factors.
    pub fn gamma(&self) -> &Tensor {
        &self.gamma
    }

    /// The shift, if there is one.
    pub fn beta(&self) -> Option<&Tensor> {
        self.beta.as_ref()
    }

    /// The configuration.
    pub fn options(&self) -> &LayerScaleOptions {
        &self.options
    }

    fn gate(&self) -> GateOptions {
        GateOptions::default()
            .with_channels_first(self.options.channels_first)
            .with_tanh(self.options.tanh)
    }

    /// `residual + xs · γ (+ β)`, in one pass over memory on the CPU.
    ///
    /// # Shapes
    /// Both: `[*, C]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of the same
    /// shape and dtype.
    ///
    /// # Errors
    /// Those of [`ops::gated_residual`].
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<Tensor> {
        ops::gated_residual(residual, xs, &self.gamma, self.beta(), self.gate())
    }
}

impl Module for LayerScale {
    /// `xs · γ (+ β)`.
    ///
    /// # Shapes
    /// `[*, C]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of the same shape
    /// and dtype.
    ///
    /// # Errors
    /// Those of [`ops::layer_scale`].
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        ops::layer_scale(xs, &self.gamma, self.beta(), self.gate())
    }
}

impl Norm for LayerScale {
    fn kind(&self) -> &'static str {
        "layer_scale"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut named = vec![(GAMMA[0], self.gamma.clone())];
        named.extend(self.beta.iter().map(|beta| (BETA[0], beta.clone())));
        named
    }

    fn reset(&self) -> Result<()> {
        let params = [(Some(&self.gamma), self.options.init), (self.beta(), 0.)];
        for (param, start) in params {
            if let Some(param) = param.filter(|p| p.is_variable()) {
                let start = Tensor::full(start, param.shape(), param.device())?;
                Var::from_tensor(param)?.set(&start.to_dtype(param.dtype())?)?;
            }
        }
        Ok(())
    }
}
