//! Root-mean-square normalization.

use candle_core::{Result, Shape, Tensor};
use candle_nn::{Activation, Module, VarBuilder};

use super::layer_norm::LayerNorm;
use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use crate::ops::{Cast, Modulation, RowNorm, check, fused_activation};

/// Configuration of [`RmsNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RmsNormOptions {
    /// Added to the mean square, inside the root; `None` is the machine epsilon of the dtype that
    /// the mean square is formed in (1.19e-7, for `f64` 2.2e-16), PyTorch's default. Default: 1e-6.
    pub eps: Option<f64>,
    /// Learned parameters. Default: the weight.
    pub affine: Affine,
    /// Added to the weight, which then starts from one less. Gemma and its relatives: 1.
    /// Default: 0.
    pub offset: f64,
    /// Place where half precision is rounded. Llama and its relatives: [`Cast::BeforeWeight`].
    /// Default: [`Cast::AfterWeight`].
    pub cast: Cast,
    /// Normalize axis 1 of `[N, C, *]` maps at each position. Default: false.
    pub channels_first: bool,
    /// Follows weight and bias, in the same pass, forward and backward: `Relu`, `Relu6`,
    /// `LeakyRelu`, `Silu` or `Swish`, `Gelu`, `NewGelu` or `GeluPytorchTanh`, `HardSwish`,
    /// `Sigmoid`, `Mish`. Default: none.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub activation: Option<Activation>,
}

impl Default for RmsNormOptions {
    fn default() -> Self {
        Self {
            eps: Some(1e-6),
            affine: Affine::Weight,
            offset: 0.,
            cast: Cast::AfterWeight,
            channels_first: false,
            activation: None,
        }
    }
}

impl From<f64> for RmsNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps: Some(eps),
            ..Self::default()
        }
    }
}

impl NormOptions for RmsNormOptions {
    const NAMES: Names = Names::new(&["rms"], &[], false);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: true,
            ..*self
        };
        Ok(Box::new(rms_norm(num_channels, options, vb)?))
    }

    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: false,
            ..*self
        };
        Ok(Box::new(rms_norm(num_features, options, vb)?))
    }
}

/// Root-mean-square normalization: each row by its own scale, the mean kept.
///
/// `y = x / √(mean(x²) + ε) · (offset + w)`
///
/// Where:
/// - the mean square is taken over the trailing `normalized_shape`, for each row by itself;
/// - `w` is `weight`, of shape `normalized_shape`, if `affine` has it;
/// - ε is `eps`; `offset` is 0, or 1 in checkpoints whose weight is kept around zero.
///
/// Zhang and Sennrich, 2019, <https://arxiv.org/abs/1910.07467>. Training and inference are the
/// same, so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision
/// is computed in `f32`.
///
/// | checkpoint | options |
/// | --- | --- |
/// | PyTorch `RMSNorm`, Olmo 2 | default, or `eps: None` |
/// | Llama, Mistral, Qwen 2 and 3 | `cast: Cast::BeforeWeight` |
/// | Gemma, Qwen 3 Next | `offset: 1.` |
#[derive(Debug, Clone)]
pub struct RmsNorm {
    rows: LayerNorm,
    options: RmsNormOptions,
}

/// An [`RmsNorm`] over the trailing `normalized_shape`, its parameters taken from `vb`.
///
/// Parameters: `weight` (also found as `gamma` or `scale`), and `bias` if `affine` says so.
///
/// # Errors
/// Options out of range, parameters of another shape; a checkpoint with a scale or shift that
/// `affine` lacks, which would be dropped unseen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_norm::{RmsNormOptions, rms_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let llama = rms_norm(64, 1e-6, vb.pp("llama"))?;
/// let gemma = rms_norm(64, RmsNormOptions { offset: 1., ..Default::default() }, vb.pp("gemma"))?;
/// let x = Tensor::ones((2, 64), DType::F32, &Device::Cpu)?;
/// let difference = (llama.forward(&x)? - gemma.forward(&x)?)?.abs()?.sum_all()?;
/// assert_eq!(difference.to_scalar::<f32>()?, 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm(
    normalized_shape: impl Into<Shape>,
    options: impl Into<RmsNormOptions>,
    vb: VarBuilder,
) -> Result<RmsNorm> {
    let shape = normalized_shape.into();
    let options = options.into();
    let norm = RowNorm {
        offset: options.offset,
        cast: options.cast,
        channels_first: options.channels_first,
        activation: options.activation,
        ..RowNorm::rms_norm(options.eps)
    };
    check::eps(norm.layer, norm.eps_for(vb.dtype()))?;
    fused_activation(norm.layer, options.activation)?;
    check::finite(norm.layer, "offset", options.offset)?;
    check::countable(norm.layer, "a normalized_shape", shape.dims())?;
    let initial = 1. - options.offset;
    let params = AffineParams::new(norm.layer, &vb, &shape, options.affine, initial)?;
    let rows = LayerNorm::from_params(shape.dims(), params, norm, &vb)?;
    Ok(RmsNorm { rows, options })
}

impl RmsNorm {
    /// A layer of a given weight, whose shape is `normalized_shape`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self {
            rows: LayerNorm::rms_norm(weight, eps),
            options: eps.into(),
        }
    }

    /// The same layer as a [`LayerNorm`] that keeps the mean.
    pub fn into_inner(self) -> LayerNorm {
        self.rows
    }

    /// The scale, without the offset; ones where `affine` has none.
    pub fn weight(&self) -> &Tensor {
        self.rows.weight()
    }

    /// The shift, if there is one.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_norm::{Affine, RmsNormOptions, rms_norm};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let affine = Affine::WeightAndBias;
    /// let options = RmsNormOptions { affine, offset: 1., ..Default::default() };
    /// let norm = rms_norm(4, options, vb)?;
    /// assert_eq!(norm.bias().unwrap().dims(), [4]);
    /// assert_eq!((norm.offset(), norm.weight().to_vec1::<f32>()?), (1., vec![0.; 4]));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn bias(&self) -> Option<&Tensor> {
        self.rows.bias()
    }

    /// Offset added to the weight.
    pub fn offset(&self) -> f64 {
        self.rows.offset()
    }

    /// ε, added to the mean square.
    pub fn eps(&self) -> f64 {
        self.rows.eps()
    }

    /// The configuration.
    pub fn options(&self) -> &RmsNormOptions {
        &self.options
    }

    /// The trailing shape that the mean square is taken over.
    pub fn normalized_shape(&self) -> &[usize] {
        self.rows.normalized_shape()
    }

    /// The same as `forward`: both are differentiable here.
    ///
    /// # Errors
    /// As `forward`.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.rows.forward(xs)
    }

    /// The normalized sum `xs + residual`, and the sum, which is the next residual, in one pass
    /// over memory on the CPU.
    ///
    /// Both are rounded to the dtype once: in `f32` and `f64` the same as to add and then to
    /// `forward`, in half precision closer to the mathematics.
    ///
    /// # Shapes
    /// `xs`, `residual` and both results: as in `forward`.
    ///
    /// # Errors
    /// Those of `forward`; a residual of another shape, dtype or device than `xs`.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Module, VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::rms_norm(8, 1e-6, vb)?;
    /// let attended = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// let stream = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// let (normalized, stream) = norm.forward_add(&attended, &stream)?;
    /// assert_eq!(normalized.to_vec3::<f32>()?, norm.forward(&stream)?.to_vec3::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.rows.forward_add(xs, residual)
    }

    /// The norm with scale and shift from outside, in one pass:
    /// `y = norm(x) · (1 + scale) + shift`. The offset of the options belongs to the weight.
    ///
    /// # Shapes
    /// `xs` as in `forward`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward`; a scale or shift of another shape, dtype or device.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::rms_norm(8, 1e-6, vb)?;
    /// let tokens = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// let scale = Tensor::zeros((2, 8), DType::F32, &Device::Cpu)?;
    /// assert_eq!(norm.forward_modulated(&tokens, Some(&scale), None)?.dims(), [2, 3, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_modulated(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.rows.forward_modulated(xs, scale, shift)
    }

    /// [`forward_modulated`](Self::forward_modulated) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated`](Self::forward_modulated).
    pub fn forward_modulated_by(&self, xs: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        self.rows.forward_modulated_by(xs, modulation)
    }
}

impl Module for RmsNorm {
    /// Normalizes each row of `xs`.
    ///
    /// # Shapes
    /// `[*, normalized_shape]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of
    /// the same shape and dtype.
    ///
    /// # Errors
    /// An input of another trailing shape, dtype or device; an `eps` out of range given to
    /// [`RmsNorm::new`].
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.rows.forward(xs)
    }
}

impl Norm for RmsNorm {
    fn kind(&self) -> &'static str {
        self.rows.kind()
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.rows.parameters()
    }

    fn reset(&self) -> Result<()> {
        self.rows.reset()
    }
}
