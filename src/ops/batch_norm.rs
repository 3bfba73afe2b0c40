//! Normalization of each channel by statistics over the batch and space, or by fixed ones.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::Activation;

use super::check;
use super::modulation::{Features, Modulation, Scaling};
use crate::computations::{Channels, FixedStatistics, Source, composed};
use crate::graph;

/// Statistics of a batch, which running statistics take.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BatchStatistics {
    /// The mean of each channel, `[C]`.
    pub mean: Tensor,
    /// The unbiased variance (n / (n − 1)) of each channel, `[C]`.
    pub var: Tensor,
}

impl BatchStatistics {
    /// In another dtype.
    pub(super) fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            mean: self.mean.to_dtype(dtype)?,
            var: self.var.to_dtype(dtype)?,
        })
    }
}

/// Batch normalization of `x` by the statistics of this batch, as in training.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken for each channel of axis 1
/// over all other axes, the variance biased (Ioffe and Szegedy, 2015,
/// <https://arxiv.org/abs/1502.03167>). Also returns the mean and the unbiased variance, which
/// running statistics take; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// An input of rank below 2 or with one value per channel, parameters that do not fit, `eps` that
/// is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[0f64], [2.]], &Device::Cpu)?;
/// let (y, statistics) = candle_norm::ops::batch_norm(&x, None, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[1][0] - 1.).abs() < 1e-8);
/// assert_eq!(statistics.unwrap().var.to_vec1::<f64>()?, [2.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let (y, statistics) = batch_norm_with(x, Scaling::new(weight, bias), eps, true)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// [`batch_norm`] with scale and shift from outside: `y = batch_norm(x) · (offset + scale) + shift`
/// (conditional batch norm: de Vries et al., 2017, <https://arxiv.org/abs/1707.00683>; SPADE: Park
/// et al., 2019, <https://arxiv.org/abs/1903.07291>). The statistics are those of `x`, over all
/// samples.
///
/// # Shapes
/// As [`batch_norm`]; scale and shift as [`Modulation`] says.
///
/// # Errors
/// Those of [`batch_norm`]; a scale or shift of another shape, dtype or device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[[1f64, 3.]], [[2., -2.]]], &Device::Cpu)?;
/// let scale = Tensor::new(&[[0.5f64], [-0.5]], &Device::Cpu)?;
/// let modulation = Modulation::new(Some(&scale), None);
/// let (y, _) = ops::modulated_batch_norm(&x, None, None, 1e-5, &modulation)?;
/// assert!((y.to_vec3::<f64>()?[0][0][1] - 1.603565161).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulated_batch_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    modulation: &Modulation,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias).modulated(modulation);
    let (y, statistics) = batch_norm_with(x, scaling, eps, true)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// [`batch_norm`] with an activation after it, fused forward and backward:
/// `y = act(batch_norm(x))`.
///
/// The pre-activation is not kept, half precision is rounded once, and the slopes are those of
/// PyTorch: 0 for relu at 0. The statistics are those of `x`, before the activation.
///
/// # Shapes
/// As [`batch_norm`].
///
/// # Errors
/// Those of [`batch_norm`]; an activation other than `Relu`, `Relu6`, `LeakyRelu`, `Silu`, `Swish`,
/// `Gelu`, `NewGelu`, `GeluPytorchTanh`, `HardSwish`, `Sigmoid` and `Mish`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
///
/// let x = Tensor::new(&[[1f64], [3.]], &Device::Cpu)?;
/// let y = candle_norm::ops::batch_norm_act(&x, None, None, 1e-5, Activation::Relu)?.0;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[0], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm_act(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    activation: Activation,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias).activated("BatchNorm", Some(activation))?;
    let (y, statistics) = batch_norm_with(x, scaling, eps, true)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// [`batch_norm`], or, without `center`, division by the root of the mean square. The statistics
/// are `f64` on the fused path, so that those of several
/// batches can be pooled.
pub(crate) fn batch_norm_with(
    x: &Tensor,
    scaling: Scaling,
    eps: f64,
    center: bool,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let layer = "BatchNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    let c = x.dims()[1];
    let (weight, bias) = (scaling.weight, scaling.bias);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    scaling.check(layer, x, Features::First)?;
    if x.elem_count() == 0 {
        return Ok((graph::empty(layer, x, &scaling.tensors())?, None));
    }
    let count = x.elem_count() / c;
    check::more_than_one_value(layer, count, x)?;
    let merged = scaling.merged(layer, x, Features::First, 0.)?;
    let channels = Channels {
        spread: merged.spread(),
        activation: scaling.activation,
        ..Channels::of(layer, x, Source::Own { center }, eps)
    };
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    let (y, statistics) = graph::apply_with_statistics(channels, x, weight, bias)?;
    let statistics = BatchStatistics {
        mean: statistics.mean()?,
        var: (statistics.var()? * (count as f64 / (count - 1) as f64))?,
    };
    Ok((y, Some(statistics)))
}

/// Batch normalization of `x` by given statistics, as in inference.
///
/// `y = (x − mean) / √(var + eps) · weight + bias` for each channel of axis 1. The statistics get
/// no gradient.
///
/// # Shapes
/// `x`: `[N, C, *]`; mean and variance, in this order, `weight`, `bias`: `[C]`; the result has the
/// shape and dtype of `x` and is contiguous. The statistics are `f32` or `f64`, whatever the dtype
/// of `x`.
///
/// # Errors
/// An input of rank below 2, statistics or parameters that do not fit, `eps` that is not positive
/// and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[4f64]], &Device::Cpu)?;
/// let (mean, var) = (Tensor::new(&[2f64], &Device::Cpu)?, Tensor::new(&[4f64], &Device::Cpu)?);
/// let y = candle_norm::ops::batch_norm_inference(&x, [&mean, &var], None, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[0][0] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm_inference(
    x: &Tensor,
    [mean, var]: [&Tensor; 2],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    // Copies, which no later update reaches.
    let copy = |s: &Tensor| s.detach().force_contiguous();
    let fixed = Arc::new(FixedStatistics::new([copy(mean)?, copy(var)?]));
    normalize_with("BatchNorm", 2, x, &fixed, Scaling::new(weight, bias), eps)
}

/// [`batch_norm_inference`] with an activation after it, fused forward and backward.
///
/// # Shapes
/// As [`batch_norm_inference`].
///
/// # Errors
/// Those of [`batch_norm_inference`] and of [`batch_norm_act`].
pub fn batch_norm_inference_act(
    x: &Tensor,
    [mean, var]: [&Tensor; 2],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let copy = |s: &Tensor| s.detach().force_contiguous();
    let fixed = Arc::new(FixedStatistics::new([copy(mean)?, copy(var)?]));
    let scaling = Scaling::new(weight, bias).activated("BatchNorm", Some(activation))?;
    normalize_with("BatchNorm", 2, x, &fixed, scaling, eps)
}

/// Batch or instance normalization by given statistics: the same arithmetic, under the layer's own
/// name and from the rank on that it takes.
pub(crate) fn normalize_with(
    layer: &'static str,
    min_rank: usize,
    x: &Tensor,
    statistics: &Arc<FixedStatistics>,
    scaling: Scaling,
    eps: f64,
) -> Result<Tensor> {
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, min_rank, "[N, C, ...]")?;
    let c = x.dims()[1];
    let (weight, bias) = (scaling.weight, scaling.bias);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    scaling.check(layer, x, Features::First)?;
    let named = [
        ("running_mean", statistics.mean()),
        ("running_var", statistics.var()),
    ];
    for (name, value) in named {
        check::float(layer, name, value)?;
        check::shape(layer, name, value, &[c])?;
        check::same_device(layer, name, value, x.device())?;
    }
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &scaling.tensors());
    }
    let merged = scaling.merged(layer, x, Features::First, 0.)?;
    let channels = Channels {
        spread: merged.spread(),
        activation: scaling.activation,
        ..Channels::of(layer, x, Source::Given(statistics.clone()), eps)
    };
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    graph::apply(channels, x, weight, bias)
}
