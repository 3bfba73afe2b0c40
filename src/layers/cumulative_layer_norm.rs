//! Cumulative layer normalization.

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::norm::Norm;
use super::params::{Affine, AffineParams};
use crate::ops::{self, CumulativeState, Modulation, check};

const LAYER: &str = "CumulativeLayerNorm";

/// Configuration of [`CumulativeLayerNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct CumulativeLayerNormOptions {
    /// Added to the variance, inside the root. Default: 1e-8.
    pub eps: f64,
    /// Learned parameters. Default: weight and bias.
    pub affine: Affine,
}

impl Default for CumulativeLayerNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-8,
            affine: Affine::WeightAndBias,
        }
    }
}

impl From<f64> for CumulativeLayerNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// Cumulative layer normalization (cLN): each position of a sequence by all channels up to it.
///
/// `y = (x − μ) / √(σ² + ε) · w + b`
///
/// Where:
/// - μ and σ² (biased) of position t are taken over all channels of the positions 0 to t of a
///   sample;
/// - `w` and `b` are `weight` and `bias`, `[C]`, if `affine` has them;
/// - ε is `eps`.
///
/// Luo and Mesgarani, 2018, <https://arxiv.org/abs/1809.07454> (Conv-TasNet). No position depends
/// on a later one: at its last position the layer is [`GroupNorm`](crate::GroupNorm) of one group,
/// on the sequence up to there. [`forward_stream`](Self::forward_stream) takes a sequence part by
/// part. Training and inference are the same, so the layer is a [`Module`]. The dtype is `f16`,
/// `bf16`, `f32` or `f64`; half precision is computed in `f32`.
///
/// It is asteroid's `CumLN`. Layers of speechbrain and espnet that are called cumulative or cLN
/// normalize each position by itself: [`LayerNorm`](crate::LayerNorm) with `channels_first`.
#[derive(Debug, Clone)]
pub struct CumulativeLayerNorm {
    params: AffineParams,
    num_channels: usize,
    options: CumulativeLayerNormOptions,
}

/// A [`CumulativeLayerNorm`] over `num_channels`, its parameters taken from `vb`.
///
/// Parameters: `weight` (also found as `gamma` or `scale`) and `bias` (`beta`), `[num_channels]`,
/// as `affine` says; a file may have them with further axes of size 1.
///
/// # Errors
/// Options out of range, parameters of another shape; a checkpoint with a scale or shift that
/// `affine` lacks.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_norm::{CumulativeState, cumulative_layer_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let norm = cumulative_layer_norm(4, 1e-8, vb)?;
/// let x = Tensor::randn(0f64, 1., (2, 4, 100), &Device::Cpu)?;
/// let whole = norm.forward(&x)?;
/// // The same, as it comes in.
/// let mut state = CumulativeState::new();
/// for start in [0, 50] {
///     let y = norm.forward_stream(&x.narrow(2, start, 50)?, &mut state)?;
///     let distance = (y - whole.narrow(2, start, 50)?)?.abs()?.max_all()?;
///     assert!(distance.to_scalar::<f64>()? < 1e-12);
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cumulative_layer_norm(
    num_channels: usize,
    options: impl Into<CumulativeLayerNormOptions>,
    vb: VarBuilder,
) -> Result<CumulativeLayerNorm> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    check::countable(LAYER, "weight", &[num_channels])?;
    Ok(CumulativeLayerNorm {
        params: AffineParams::new(LAYER, &vb, num_channels, options.affine, 1.)?,
        num_channels,
        options,
    })
}

impl CumulativeLayerNorm {
    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &CumulativeLayerNormOptions {
        &self.options
    }

    /// The number of channels.
    pub fn num_channels(&self) -> usize {
        self.num_channels
    }

    /// The next part of a stream: positions follow those that `state` has seen, which it then has
    /// seen too.
    ///
    /// Together the parts give what [`forward`](Module::forward) gives for the whole, up to
    /// rounding. No gradient leads into an earlier part.
    ///
    /// # Shapes
    /// `[N, num_channels, T]` with any T; `N` is that of the first part.
    ///
    /// # Errors
    /// Those of [`forward`](Module::forward), another number of samples; `state` is unchanged then.
    pub fn forward_stream(&self, xs: &Tensor, state: &mut CumulativeState) -> Result<Tensor> {
        self.check_channels(xs)?;
        let (weight, bias, eps) = (self.weight(), self.bias(), self.options.eps);
        let (y, after) = ops::cumulative_layer_norm_from(xs, weight, bias, eps, state)?;
        *state = after;
        Ok(y)
    }

    /// `forward` with scale and shift from outside: `y = norm(x) · (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `xs` as in `forward`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward`; a scale or shift of another shape, dtype or device.
    pub fn forward_modulated(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.forward_modulated_by(xs, &Modulation::new(scale, shift))
    }

    /// [`forward_modulated`](Self::forward_modulated) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated`](Self::forward_modulated).
    pub fn forward_modulated_by(&self, xs: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        self.check_channels(xs)?;
        let params = [self.weight(), self.bias()];
        ops::modulated_cumulative_layer_norm(xs, params, self.options.eps, modulation)
    }

    fn check_channels(&self, xs: &Tensor) -> Result<()> {
        check::rank_at_least(LAYER, xs, 2, "[N, C, T]")?;
        check::channels(LAYER, xs, self.num_channels)
    }
}

impl Module for CumulativeLayerNorm {
    /// Normalizes each position of `xs` by those up to it.
    ///
    /// # Shapes
    /// `[N, num_channels, T]`; the output is contiguous, of the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.check_channels(xs)?;
        ops::cumulative_layer_norm(xs, self.weight(), self.bias(), self.options.eps)
    }
}

impl Norm for CumulativeLayerNorm {
    fn kind(&self) -> &'static str {
        "cumulative_layer"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(1.)
    }
}
