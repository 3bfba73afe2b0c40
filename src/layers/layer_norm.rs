//! Layer normalization.

use candle_core::{DType, Result, Shape, Tensor};
use candle_nn::{Activation, Module, VarBuilder};

pub use candle_nn::LayerNormConfig;

use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use crate::ops::{Modulation, RowNorm, Scaling, add_row_norm, check, fused_activation, row_norm};

/// Configuration of [`LayerNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct LayerNormOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// Learned parameters. Default: weight and bias.
    pub affine: Affine,
    /// Subtract the mean; without, rows are divided by their root mean square. Default: true.
    pub remove_mean: bool,
    /// Normalize axis 1 of `[N, C, *]` maps at each position, as ConvNeXt's LayerNorm2d does.
    /// Default: false.
    pub channels_first: bool,
    /// Follows weight and bias, in the same pass, forward and backward: `Relu`, `Relu6`,
    /// `LeakyRelu`, `Silu` or `Swish`, `Gelu`, `NewGelu` or `GeluPytorchTanh`, `HardSwish`,
    /// `Sigmoid`, `Mish`. Default: none.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub activation: Option<Activation>,
}

impl Default for LayerNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            affine: Affine::WeightAndBias,
            remove_mean: true,
            channels_first: false,
            activation: None,
        }
    }
}

/// Converts all that candle-nn's functions take for a [`LayerNormConfig`]: that itself, a number as
/// `eps`, and every type that converts
/// into it. candle's `affine` stands for the bias alone: its layer always has a weight.
impl<C: Into<LayerNormConfig>> From<C> for LayerNormOptions {
    fn from(config: C) -> Self {
        let config = config.into();
        Self {
            eps: config.eps,
            affine: if config.affine {
                Affine::WeightAndBias
            } else {
                Affine::Weight
            },
            remove_mean: config.remove_mean,
            channels_first: false,
            activation: None,
        }
    }
}

impl NormOptions for LayerNormOptions {
    const NAMES: Names = Names::new(&["layer"], &["ln"], true);

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
        Ok(Box::new(layer_norm(num_channels, options, vb)?))
    }

    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: false,
            ..*self
        };
        Ok(Box::new(layer_norm(num_features, options, vb)?))
    }
}

/// Layer normalization: each row by its own mean and variance.
///
/// `y = (x − μ) / √(σ² + ε) · w + b`
///
/// Where:
/// - μ and σ² (biased) are taken over the trailing `normalized_shape`, for each row by itself;
/// - `w` and `b` are `weight` and `bias`, of shape `normalized_shape`, if `affine` has them;
/// - ε is `eps`.
///
/// Ba, Kiros and Hinton, 2016, <https://arxiv.org/abs/1607.06450>. Training and inference are the
/// same, so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision
/// is computed in `f32` and rounded once.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    normalized_shape: Vec<usize>,
    params: AffineParams,
    weight_or_ones: Tensor,
    norm: RowNorm,
    options: LayerNormOptions,
}

/// A [`LayerNorm`] over the trailing `normalized_shape`, its parameters taken from `vb`.
///
/// Parameters: `weight` (also found as `gamma` or `scale`) and `bias` (also `beta`), as `affine`
/// says.
///
/// # Errors
/// Options out of range, parameters of another shape; a checkpoint with a scale or shift that
/// `affine` lacks, which would be dropped unseen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_norm::{LayerNormOptions, layer_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let tokens = layer_norm(768, 1e-5, vb.pp("tokens"))?;
/// let last_two_axes = layer_norm((4, 8), LayerNormOptions::default(), vb.pp("maps"))?;
/// let x = Tensor::zeros((2, 3, 768), DType::F32, &Device::Cpu)?;
/// assert_eq!(tokens.forward(&x)?.dims(), [2, 3, 768]);
/// # let _ = last_two_axes;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm<C: Into<LayerNormOptions>>(
    normalized_shape: impl Into<Shape>,
    options: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let shape = normalized_shape.into();
    let options = options.into();
    let norm = RowNorm {
        center: options.remove_mean,
        channels_first: options.channels_first,
        activation: options.activation,
        ..RowNorm::layer_norm(options.eps)
    };
    check::eps(norm.layer, options.eps)?;
    fused_activation(norm.layer, options.activation)?;
    check::countable(norm.layer, "a normalized_shape", shape.dims())?;
    let params = AffineParams::new(norm.layer, &vb, &shape, options.affine, 1.)?;
    LayerNorm::from_params(shape.dims(), params, norm, &vb)
}

/// A [`LayerNorm`] with a weight and without a bias.
///
/// # Errors
/// As [`layer_norm`].
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::layer_norm_no_bias(768, 1e-5, vb)?;
/// assert_eq!((norm.weight().dims(), norm.bias().is_none()), (&[768][..], true));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm_no_bias(
    normalized_shape: impl Into<Shape>,
    eps: f64,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let options = LayerNormOptions {
        eps,
        affine: Affine::Weight,
        ..Default::default()
    };
    layer_norm(normalized_shape, options, vb)
}

impl LayerNorm {
    pub(super) fn from_params(
        normalized_shape: &[usize],
        params: AffineParams,
        norm: RowNorm,
        vb: &VarBuilder,
    ) -> Result<Self> {
        if norm.channels_first {
            check::one_axis(norm.layer, normalized_shape)?;
        }
        check::normalized_shape(norm.layer, normalized_shape)?;
        let weight_or_ones = match &params.weight {
            Some(weight) => weight.clone(),
            None => Tensor::ones(normalized_shape, vb.dtype(), vb.device())?,
        };
        Ok(Self {
            normalized_shape: normalized_shape.to_vec(),
            options: options_of(&norm, &params, vb.dtype()),
            params,
            weight_or_ones,
            norm,
        })
    }

    pub(super) fn from_weight(weight: Tensor, bias: Option<Tensor>, norm: RowNorm) -> Self {
        let (weight_or_ones, dtype) = (weight.clone(), weight.dtype());
        let params = AffineParams {
            weight: Some(weight),
            bias,
        };
        Self {
            normalized_shape: weight_or_ones.dims().to_vec(),
            options: options_of(&norm, &params, dtype),
            params,
            weight_or_ones,
            norm,
        }
    }

    /// A layer of given parameters; `normalized_shape` is the shape of `weight`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self::from_weight(weight, Some(bias), RowNorm::layer_norm(eps))
    }

    /// A layer of a given weight, without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self::from_weight(weight, None, RowNorm::layer_norm(eps))
    }

    /// A layer that divides by the root mean square and keeps the mean.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self::from_weight(weight, None, RowNorm::rms_norm(Some(eps)))
    }

    /// The scale; ones where `affine` has none.
    pub fn weight(&self) -> &Tensor {
        &self.weight_or_ones
    }

    /// The shift, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.norm.eps_for(self.weight().dtype())
    }

    /// The configuration; its `eps` is the one for the dtype of the weight.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_norm::{Affine, LayerNorm};
    ///
    /// let weight = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    /// let norm = LayerNorm::new_no_bias(weight, 1e-6);
    /// assert_eq!((norm.options().eps, norm.options().affine), (1e-6, Affine::Weight));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn options(&self) -> &LayerNormOptions {
        &self.options
    }

    /// Whether the mean is subtracted.
    pub fn remove_mean(&self) -> bool {
        self.norm.center
    }

    /// The trailing shape that statistics are taken over.
    pub fn normalized_shape(&self) -> &[usize] {
        &self.normalized_shape
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
    /// let norm = candle_norm::layer_norm(8, 1e-5, vb)?;
    /// let attended = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// let stream = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// let (normalized, stream) = norm.forward_add(&attended, &stream)?;
    /// assert_eq!(normalized.to_vec3::<f32>()?, norm.forward(&stream)?.to_vec3::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        let shape = &self.normalized_shape;
        let (weight, bias) = (self.params.weight(), self.params.bias());
        add_row_norm(xs, residual, shape, weight, bias, &self.norm)
    }

    /// The norm with scale and shift from outside, in one pass:
    /// `y = norm(x) · (1 + scale) + shift`, as AdaLN does.
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
    /// use candle_norm::{Affine, LayerNormOptions, layer_norm};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let options = LayerNormOptions { eps: 1e-6, affine: Affine::None, ..Default::default() };
    /// let norm = layer_norm(8, options, vb)?;
    /// let tokens = Tensor::randn(0f32, 1., (2, 3, 8), &Device::Cpu)?;
    /// // One row for each sample, projected from a condition.
    /// let scale = Tensor::zeros((2, 8), DType::F32, &Device::Cpu)?;
    /// let shift = tokens.get_on_dim(1, 0)?;
    /// let y = norm.forward_modulated(&tokens, Some(&scale), Some(&shift))?;
    /// assert_eq!(y.dims(), [2, 3, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
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
        let scaling = self.scaling().modulated(modulation);
        row_norm(xs, &self.normalized_shape, scaling, &self.norm)
    }

    /// Steps after the normalization.
    fn scaling(&self) -> Scaling<'_> {
        Scaling::new(self.params.weight(), self.params.bias())
    }

    /// Added to the weight; 0 but in an RMS norm.
    pub(super) fn offset(&self) -> f64 {
        self.norm.offset
    }

    /// Initial weight: with an offset, the factor starts at one all the same.
    fn initial_weight(&self) -> f64 {
        1. - self.norm.offset
    }
}

/// The configuration that a layer of given parts has.
fn options_of(norm: &RowNorm, params: &AffineParams, dtype: DType) -> LayerNormOptions {
    LayerNormOptions {
        eps: norm.eps_for(dtype),
        affine: params.affine(),
        remove_mean: norm.center,
        channels_first: norm.channels_first,
        activation: norm.activation,
    }
}

impl Module for LayerNorm {
    /// Normalizes each row of `xs`.
    ///
    /// # Shapes
    /// `[*, normalized_shape]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of
    /// the same shape and dtype.
    ///
    /// # Errors
    /// An input of another trailing shape, dtype or device; an `eps` out of range given to a
    /// constructor without a `Result`.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        row_norm(xs, &self.normalized_shape, self.scaling(), &self.norm)
    }
}

impl Norm for LayerNorm {
    fn kind(&self) -> &'static str {
        self.norm.kind
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(self.initial_weight())
    }
}
