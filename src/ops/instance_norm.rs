//! Normalization of each channel of each sample by its own statistics.

use candle_core::{Result, Tensor, bail};
use candle_nn::Activation;

use super::batch_norm::BatchStatistics;
use super::check;
use super::modulation::{Features, Merged, Modulation, Scaling};
use crate::computations::{Groups, composed};
use crate::graph::{self, Statistics};

/// Instance normalization of `x`, by the statistics of each channel of each sample over space.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the variance biased; `weight` and `bias` are
/// per channel (Ulyanov, Vedaldi and Lempitsky, 2016, <https://arxiv.org/abs/1607.08022>). Also
/// returns what running statistics take: the means over the samples of the mean and of the unbiased
/// variance; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]` of rank at least 3; `weight`, `bias`: `[C]`; the result has the shape and dtype
/// of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 3 or with one spatial element, parameters that do not fit, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[[1f64, 3.], [10., 30.]]], &Device::Cpu)?;
/// let (y, _) = candle_norm::ops::instance_norm(&x, None, None, 1e-9)?;
/// assert!((y.to_vec3::<f64>()?[0][1][1] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn instance_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    instance_norm_with(x, Scaling::new(weight, bias), eps)
}

/// [`instance_norm`] with scale and shift from outside:
/// `y = instance_norm(x) · (offset + scale) + shift`, in one pass (conditional instance norm:
/// Dumoulin, Shlens and Kudlur, 2016, <https://arxiv.org/abs/1610.07629>).
///
/// # Shapes
/// As [`instance_norm`]; scale and shift as [`Modulation`] says.
///
/// # Errors
/// Those of [`instance_norm`]; a scale or shift of another shape, dtype or device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[[1f64, 3.], [10., 30.]]], &Device::Cpu)?;
/// let shift = Tensor::new(&[[0f64, 2.]], &Device::Cpu)?;
/// let modulation = Modulation::new(None, Some(&shift));
/// let (y, _) = ops::modulated_instance_norm(&x, None, None, 1e-9, &modulation)?;
/// assert!((y.to_vec3::<f64>()?[0][1][1] - 3.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulated_instance_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    modulation: &Modulation,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias).modulated(modulation);
    instance_norm_with(x, scaling, eps)
}

/// [`instance_norm`] with an activation after it, fused forward and backward:
/// `y = act(instance_norm(x))`.
///
/// The pre-activation is not kept, half precision is rounded once, and the slopes are those of
/// PyTorch: 0 for relu at 0. The statistics are those of `x`.
///
/// # Shapes
/// As [`instance_norm`].
///
/// # Errors
/// Those of [`instance_norm`]; an activation other than `Relu`, `Relu6`, `LeakyRelu`, `Silu`,
/// `Swish`, `Gelu`, `NewGelu`, `GeluPytorchTanh`, `HardSwish`, `Sigmoid` and `Mish`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
///
/// let x = Tensor::new(&[[[1f64, 3.]]], &Device::Cpu)?;
/// let y = candle_norm::ops::instance_norm_act(&x, None, None, 1e-5, Activation::Relu)?.0;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[0], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn instance_norm_act(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    activation: Activation,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias).activated("InstanceNorm", Some(activation))?;
    instance_norm_with(x, scaling, eps)
}

/// [`instance_norm`] with all that may follow the normalized values.
pub(crate) fn instance_norm_with(
    x: &Tensor,
    scaling: Scaling,
    eps: f64,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let layer = "InstanceNorm";
    let Some((groups, merged)) = merged(layer, x, &scaling, eps)? else {
        return Ok((graph::empty(layer, x, &scaling.tensors())?, None));
    };
    let (channels, space) = (groups.axes.channels, groups.axes.inner);
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    let (y, statistics) = graph::apply_with_statistics(groups, x, weight, bias)?;
    let [mean, var] = statistics.over_samples(channels)?;
    let statistics = BatchStatistics {
        mean,
        var: (var * (space as f64 / (space - 1) as f64))?,
    };
    Ok((
        y,
        Some(statistics.to_dtype(composed::accumulator(x.dtype()))?),
    ))
}

/// The values of [`instance_norm_with`] alone.
pub(crate) fn instance_norm_values(x: &Tensor, scaling: Scaling, eps: f64) -> Result<Tensor> {
    let layer = "InstanceNorm";
    match merged(layer, x, &scaling, eps)? {
        Some((groups, merged)) => {
            graph::apply(groups, x, merged.weight.as_ref(), merged.bias.as_ref())
        }
        None => graph::empty(layer, x, &scaling.tensors()),
    }
}

/// The groups of an `x` that meets every rule, and the weight and bias that follow; none where it
/// is empty.
fn merged(
    layer: &'static str,
    x: &Tensor,
    scaling: &Scaling,
    eps: f64,
) -> Result<Option<(Groups, Merged)>> {
    let groups = checked(layer, x, scaling.weight, scaling.bias, eps)?;
    scaling.check(layer, x, Features::First)?;
    let Some(groups) = groups else {
        return Ok(None);
    };
    let merged = scaling.merged(layer, x, Features::First, 0.)?;
    let groups = Groups {
        spread: merged.spread(),
        activation: scaling.activation,
        ..groups
    };
    Ok(Some((groups, merged)))
}

/// [`instance_norm`] in the name of `layer`, and the mean and `√(var + eps)` that each channel of
/// each sample was normalized by, `[N, C]` in the accumulator's dtype: they are part of the graph,
/// so that what is restored by them has its whole gradient.
pub(crate) fn instance_norm_by(
    layer: &'static str,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, [Tensor; 2])> {
    let acc = composed::accumulator(x.dtype());
    let Some(groups) = checked(layer, x, weight, bias, eps)? else {
        let dims = (x.dims()[0], x.dims()[1]);
        check::countable(layer, "statistics", &[dims.0, dims.1])?;
        let none = Tensor::zeros(dims, acc, x.device())?;
        let y = graph::empty(layer, x, &[weight, bias])?;
        return Ok((y, [none.clone(), none]));
    };
    let (y, statistics) = graph::apply_with_statistics(groups, x, weight, bias)?;
    let [mean, std] = match statistics {
        Statistics::Connected(s) => [s.mean, s.std],
        Statistics::Saved(_) if x.track_op() => groups.mean_and_std(x)?,
        Statistics::Saved(s) => s.mean_and_std()?,
    };
    let dims = (groups.axes.outer, groups.axes.channels);
    let by_channel = |t: Tensor| t.reshape(dims)?.to_dtype(acc);
    Ok((y, [by_channel(mean)?, by_channel(std)?]))
}

/// Each channel of a sample as a group of its own, of an `x` that meets every rule; none where it
/// is empty.
fn checked(
    layer: &'static str,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Option<Groups>> {
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 3, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    if x.elem_count() == 0 {
        return Ok(None);
    }
    more_than_one_position(layer, x.elem_count() / (n * c), x)?;
    Ok(Some(Groups::of(layer, x, c, eps)))
}

/// A channel of one sample has no variance where it has one position. No batch is large enough to
/// change that.
pub(super) fn more_than_one_position(layer: &str, positions: usize, x: &Tensor) -> Result<()> {
    if positions == 1 {
        bail!(
            "{layer}: expected more than 1 value per channel when training, got input size {:?}; \
            each channel of a sample is normalized over its own positions, so a larger batch does \
            not help: use larger maps (less stride or pooling before), LayerNorm over the \
            channels, or GroupNorm with several channels in a group",
            x.dims()
        )
    }
    Ok(())
}
