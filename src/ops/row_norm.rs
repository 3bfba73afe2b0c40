//! Normalization of each row by its own statistics: layer norm and RMS norm.

use candle_core::{DType, Result, Shape, Tensor, bail};
use candle_nn::Activation;

use super::activation::fused;
use super::check;
use super::modulation::{Features, Form, Modulation, Scaling};
use crate::computations::{Cast, Rows, composed};
use crate::graph::{self, transposed};

/// Normalization of rows, of which layer norm and RMS norm are special cases.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowNorm {
    /// The name that messages start with.
    pub(crate) layer: &'static str,
    /// The name that a configuration has for it.
    pub(crate) kind: &'static str,
    /// Subtract the mean (layer norm) or not (RMS norm).
    pub(crate) center: bool,
    /// `None` is the machine epsilon of the dtype that the statistics are formed in.
    pub(crate) eps: Option<f64>,
    /// Added to the weight.
    pub(crate) offset: f64,
    pub(crate) cast: Cast,
    /// The rows run along axis 1 instead of the trailing axes.
    pub(crate) channels_first: bool,
    /// Follows weight and bias.
    pub(crate) activation: Option<Activation>,
}

impl RowNorm {
    pub(crate) fn layer_norm(eps: f64) -> Self {
        Self {
            layer: "LayerNorm",
            kind: "layer",
            center: true,
            eps: Some(eps),
            offset: 0.,
            cast: Cast::AfterWeight,
            channels_first: false,
            activation: None,
        }
    }

    pub(crate) fn rms_norm(eps: Option<f64>) -> Self {
        Self {
            layer: "RmsNorm",
            kind: "rms",
            center: false,
            eps,
            ..Self::layer_norm(1.)
        }
    }

    /// ε for statistics formed for an input of dtype `dtype`.
    pub(crate) fn eps_for(&self, dtype: DType) -> f64 {
        self.eps.unwrap_or(match dtype {
            DType::F64 => f64::EPSILON,
            _ => f32::EPSILON as f64,
        })
    }

    /// The normalization of rows of `len` elements, with a result of dtype `dtype`.
    pub(super) fn computation(&self, len: usize, dtype: DType) -> Rows {
        Rows {
            layer: self.layer,
            len,
            center: self.center,
            eps: composed::eps_in(composed::accumulator(dtype), self.eps_for(dtype)),
            offset: self.offset,
            cast: self.cast,
            pairs: 1,
            activation: None,
            output: dtype,
        }
    }
}

/// Options of [`rms_norm`] and [`add_rms_norm`](super::add_rms_norm). A number is taken as `eps`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RmsOptions {
    /// Added to the mean square, inside the root. Default: `None`, the machine epsilon of the dtype
    /// that the mean square is formed in, as in PyTorch: 1.19e-7, for `f64` 2.2e-16.
    pub eps: Option<f64>,
    /// Added to the weight. Gemma and its relatives: 1. Default: 0.
    pub offset: f64,
    /// Place where half precision is rounded. Default: [`Cast::AfterWeight`].
    pub cast: Cast,
}

impl From<f64> for RmsOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps: Some(eps),
            ..Self::default()
        }
    }
}

impl From<RmsOptions> for RowNorm {
    fn from(options: RmsOptions) -> Self {
        Self {
            offset: options.offset,
            cast: options.cast,
            ..Self::rms_norm(options.eps)
        }
    }
}

/// Normalizes the rows of `x` as `norm` says.
pub(crate) fn row_norm(
    x: &Tensor,
    normalized_shape: &[usize],
    scaling: Scaling,
    norm: &RowNorm,
) -> Result<Tensor> {
    let layer = norm.layer;
    checked(x, normalized_shape, scaling.weight, scaling.bias, norm)?;
    let features = match norm.channels_first {
        true => Features::First,
        false => Features::Last(normalized_shape),
    };
    scaling.check(layer, x, features)?;
    let activation = fused(layer, norm.activation)?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &scaling.tensors());
    }
    let layout = RowLayout::new(x, normalized_shape, norm.channels_first);
    let rows = layout.rows(x)?;
    let mut merged = scaling.merged(layer, x, features, norm.offset)?;
    let pairs = match merged.form {
        Form::Shared => 1,
        Form::Sample => x.dims()[0],
        Form::Element => x.elem_count() / layout.len,
    };
    if merged.form == Form::Element && norm.channels_first {
        for value in [&mut merged.weight, &mut merged.bias].into_iter().flatten() {
            *value = layout.rows(&value.reshape(x.dims())?)?;
        }
    }
    let computation = Rows {
        offset: merged.offset,
        pairs,
        activation,
        ..norm.computation(layout.len, x.dtype())
    };
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    layout.restored(&graph::apply(computation, &rows, weight, bias)?)
}

/// Checks that everything fits.
pub(super) fn checked(
    x: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<()> {
    let layer = norm.layer;
    let eps = norm.eps_for(x.dtype());
    check::eps(layer, eps)?;
    check::finite(layer, "offset", norm.offset)?;
    check_rows(layer, x, normalized_shape, norm.channels_first)?;
    check::input(
        layer,
        x,
        &check::Param::affine(weight, bias, normalized_shape),
    )
}

/// Checks that `x` has rows of this shape.
pub(super) fn check_rows(
    layer: &str,
    x: &Tensor,
    normalized_shape: &[usize],
    channels_first: bool,
) -> Result<()> {
    if !channels_first {
        return trailing(layer, x, normalized_shape);
    }
    let channels = check::one_axis(layer, normalized_shape)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    check::channels_first(layer, x, channels)
}

/// Checks that the last axes of the input are the normalized ones.
fn trailing(layer: &str, x: &Tensor, normalized_shape: &[usize]) -> Result<()> {
    check::normalized_shape(layer, normalized_shape)?;
    if !x.dims().ends_with(normalized_shape) {
        bail!(
            "{layer}: expected an input that ends in normalized_shape {normalized_shape:?}, got \
            {:?}{}",
            x.dims(),
            rows_elsewhere(x.dims(), normalized_shape)
        )
    }
    Ok(())
}

/// Where the one normalized axis of an input may be instead of the end.
fn rows_elsewhere(dims: &[usize], normalized_shape: &[usize]) -> String {
    let on =
        |axis: usize| normalized_shape.len() == 1 && dims.get(axis) == normalized_shape.first();
    let n = normalized_shape[0];
    if on(1) {
        return format!(
            "; axis 1 has {n}: if channels come first, set channels_first in the options, or use \
            NormConfig::channels"
        );
    }
    if on(0) && dims.len() > 1 {
        return format!(
            "; axis 0 has {n}: if channels come first and the batch axis is missing, set \
            channels_first in the options and add the axis with unsqueeze(0)"
        );
    }
    String::new()
}

/// How the rows that are normalized lie in a tensor.
pub(super) struct RowLayout<'a> {
    dims: &'a [usize],
    pub(super) len: usize,
    channels_first: bool,
}

impl<'a> RowLayout<'a> {
    pub(super) fn new(x: &'a Tensor, normalized_shape: &[usize], channels_first: bool) -> Self {
        Self {
            dims: x.dims(),
            len: normalized_shape.iter().product(),
            channels_first,
        }
    }

    /// `x` with its rows one after the other in memory: every position of a map is one, if the
    /// channels come first.
    pub(super) fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        if !self.channels_first {
            return Ok(x);
        }
        transposed(&x.reshape((self.dims[0], self.len, ()))?)?.reshape(((), self.len))
    }

    /// The tensor of these rows.
    pub(super) fn restored(&self, rows: &Tensor) -> Result<Tensor> {
        if !self.channels_first {
            return Ok(rows.clone());
        }
        transposed(&rows.reshape((self.dims[0], (), self.len))?)?.reshape(self.dims)
    }
}

/// Layer normalization over the trailing axes `normalized_shape`.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken over `normalized_shape`
/// for each row, the variance biased (Ba, Kiros and Hinton, 2016,
/// <https://arxiv.org/abs/1607.06450>).
///
/// # Shapes
/// `x`: `[*, normalized_shape]`; `weight`, `bias`: `normalized_shape`; the result has the shape and
/// dtype of `x` and is contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take
/// `f32` parameters.
///
/// # Errors
/// An input that does not end in `normalized_shape`, parameters that do not fit it, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3.], [-5., 5.]], &Device::Cpu)?;
/// let y = candle_norm::ops::layer_norm(&x, 2, None, None, 1e-9)?;
/// assert!((y.get(1)?.to_vec1::<f64>()?[0] + 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let scaling = Scaling::new(weight, bias);
    row_norm(x, shape.dims(), scaling, &RowNorm::layer_norm(eps))
}

/// Root-mean-square normalization over the trailing axes `normalized_shape`.
///
/// `y = x / √(mean(x²) + eps) · (offset + weight)` (Zhang and Sennrich, 2019,
/// <https://arxiv.org/abs/1910.07467>). `eps: None` is the machine epsilon of the dtype that the
/// mean square is formed in: 1.19e-7 for `f16`, `bf16` and `f32`, 2.2e-16 for `f64`, as in PyTorch.
///
/// # Shapes
/// `x`: `[*, normalized_shape]`; `weight`: `normalized_shape`; the result has the shape and dtype
/// of `x` and is contiguous.
///
/// # Errors
/// An input that does not end in `normalized_shape`, a weight that does not fit it, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops;
///
/// let x = Tensor::new(&[[3f64, 4.]], &Device::Cpu)?;
/// let y = ops::rms_norm(&x, 2, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[0][0] - 3. / 12.5f64.sqrt()).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    options: impl Into<RmsOptions>,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let norm = RowNorm::from(options.into());
    row_norm(x, shape.dims(), Scaling::new(weight, None), &norm)
}

/// [`layer_norm`] with scale and shift from outside:
/// `y = layer_norm(x) · (offset + scale) + shift`, in one pass (AdaLN: Peebles and Xie, 2022,
/// <https://arxiv.org/abs/2212.09748>).
///
/// # Shapes
/// As [`layer_norm`]; scale and shift as [`Modulation`] says.
///
/// # Errors
/// Those of [`layer_norm`]; a scale or shift of another shape, dtype or device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[[1f64, 3.], [5., 1.]]], &Device::Cpu)?;
/// let scale = x.zeros_like()?.get(0)?.get(0)?;
/// let shift = Tensor::new(&[[1f64, 2.]], &Device::Cpu)?;
/// let modulation = Modulation::new(Some(&scale), Some(&shift));
/// let y = ops::modulated_layer_norm(&x, 2, [None, None], 1e-12, &modulation)?;
/// assert!((y.to_vec3::<f64>()?[0][1][0] - 2.).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulated_layer_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
    modulation: &Modulation,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let scaling = Scaling::new(weight, bias).modulated(modulation);
    row_norm(x, shape.dims(), scaling, &RowNorm::layer_norm(eps))
}

/// [`rms_norm`] with scale and shift from outside: `y = rms_norm(x) · (offset + scale) + shift`,
/// in one pass. The offset of [`RmsOptions`] belongs to `weight`, that of [`Modulation`] to the
/// scale.
///
/// # Shapes
/// As [`rms_norm`]; scale and shift as [`Modulation`] says.
///
/// # Errors
/// Those of [`rms_norm`]; a scale or shift of another shape, dtype or device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[1f64, 2., 2.]], &Device::Cpu)?;
/// let scale = Tensor::new(&[0.5f64, -1., 0.], &Device::Cpu)?;
/// let y = ops::modulated_rms_norm(&x, 3, None, 1e-6, &Modulation::new(Some(&scale), None))?;
/// assert!((y.to_vec2::<f64>()?[0][0] - 0.8660252594).abs() < 1e-10);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulated_rms_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    options: impl Into<RmsOptions>,
    modulation: &Modulation,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let norm = RowNorm::from(options.into());
    let scaling = Scaling::new(weight, None).modulated(modulation);
    row_norm(x, shape.dims(), scaling, &norm)
}

/// [`layer_norm`] with an activation after it, fused forward and backward:
/// `y = act(layer_norm(x))`.
///
/// The pre-activation is not kept, half precision is rounded once, and the slopes are those of
/// PyTorch: 0 for relu at 0.
///
/// # Shapes
/// As [`layer_norm`].
///
/// # Errors
/// Those of [`layer_norm`]; an activation other than `Relu`, `Relu6`, `LeakyRelu`, `Silu`, `Swish`,
/// `Gelu`, `NewGelu`, `GeluPytorchTanh`, `HardSwish`, `Sigmoid` and `Mish`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let y = candle_norm::ops::layer_norm_act(&x, 2, [None, None], 1e-5, Activation::Relu)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[0], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm_act(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let norm = RowNorm {
        activation: Some(activation),
        ..RowNorm::layer_norm(eps)
    };
    row_norm(x, shape.dims(), Scaling::new(weight, bias), &norm)
}

/// [`rms_norm`] with an activation after it, fused forward and backward: `y = act(rms_norm(x))`.
///
/// The pre-activation is not kept, half precision is rounded once, and the slopes are those of
/// PyTorch: 0 for relu at 0.
///
/// # Shapes
/// As [`rms_norm`].
///
/// # Errors
/// Those of [`rms_norm`]; an activation other than `Relu`, `Relu6`, `LeakyRelu`, `Silu`, `Swish`,
/// `Gelu`, `NewGelu`, `GeluPytorchTanh`, `HardSwish`, `Sigmoid` and `Mish`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
///
/// let x = Tensor::new(&[[-1f64, 3.]], &Device::Cpu)?;
/// let y = candle_norm::ops::rms_norm_act(&x, 2, None, 1e-6, Activation::Relu)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[0], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm_act(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    options: impl Into<RmsOptions>,
    activation: Activation,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let norm = RowNorm {
        activation: Some(activation),
        ..RowNorm::from(options.into())
    };
    row_norm(x, shape.dims(), Scaling::new(weight, None), &norm)
}
