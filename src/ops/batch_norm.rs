//! Normalization of each channel by statistics over the batch and space, or by fixed ones.

use candle_core::{Result, Tensor};

use super::{check, composed, route};

/// What a batch contributes to running statistics.
#[derive(Debug, Clone)]
pub struct BatchStatistics {
    /// The mean of each channel, `[C]`.
    pub mean: Tensor,
    /// The unbiased variance (n / (n − 1)) of each channel, `[C]`.
    pub var: Tensor,
}

/// Batch normalization of `x` by the statistics of this batch, as in training.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken for each channel of axis 1 over all other
/// axes, the variance biased (Ioffe and Szegedy, 2015, <https://arxiv.org/abs/1502.03167>). Also returns the mean
/// and the unbiased variance, which running statistics take; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 2 or with one value per channel, parameters that do not fit, `eps` that is not positive
/// and finite.
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
    batch_norm_with(x, weight, bias, eps, true)
}

/// [`batch_norm`], or, without `center`, division by the root of the mean square.
pub(crate) fn batch_norm_with(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let layer = "BatchNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    let _route = route(layer, x)?;
    if x.elem_count() == 0 {
        return Ok((composed::empty(x, &[weight, bias])?, None));
    }
    let space = x.elem_count() / (n * c);
    let count = n * space;
    check::more_than_one_value(layer, count, x)?;
    let acc = composed::accumulator(x.dtype());
    let channels = x
        .contiguous()?
        .to_dtype(acc)?
        .reshape((n, c, space))?
        .transpose(0, 1)?
        .contiguous()?
        .reshape((c, count))?;
    let standardized = composed::standardize(&channels, center, eps)?;
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    let y = composed::scale_shift(
        &standardized.y.reshape((1, c, count))?,
        weight.as_ref(),
        bias.as_ref(),
    )?;
    let y = y
        .to_dtype(x.dtype())?
        .reshape((c, n, space))?
        .transpose(0, 1)?
        .contiguous()?
        .reshape(x.shape())?;
    let statistics = BatchStatistics {
        mean: standardized.mean,
        var: (standardized.var * (count as f64 / (count - 1) as f64))?,
    };
    Ok((y, Some(statistics)))
}

/// Batch normalization of `x` by given statistics, as in inference.
///
/// `y = (x − mean) / √(var + eps) · weight + bias` for each channel of axis 1. The statistics get no gradient.
///
/// # Shapes
/// `x`: `[N, C, *]`; `mean`, `var`, `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous. The statistics are `f32` or `f64`, whatever the dtype of `x`.
///
/// # Errors
/// An input of rank below 2, statistics or parameters that do not fit, `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[4f64]], &Device::Cpu)?;
/// let (mean, var) = (Tensor::new(&[2f64], &Device::Cpu)?, Tensor::new(&[4f64], &Device::Cpu)?);
/// let y = candle_norm::ops::batch_norm_inference(&x, &mean, &var, None, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[0][0] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm_inference(
    x: &Tensor,
    mean: &Tensor,
    var: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    normalize_with("BatchNorm", 2, x, (mean, var), weight, bias, eps)
}

/// Batch or instance normalization by given statistics: the same arithmetic, under the layer's own name and
/// from the rank on that it takes.
pub(crate) fn normalize_with(
    layer: &str,
    min_rank: usize,
    x: &Tensor,
    (mean, var): (&Tensor, &Tensor),
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, min_rank, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    for (name, value) in [("running_mean", mean), ("running_var", var)] {
        check::float(layer, name, value)?;
        check::shape(layer, name, value, &[c])?;
        check::same_device(layer, name, value, x.device())?;
    }
    let _route = route(layer, x)?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[weight, bias]);
    }
    let acc = composed::accumulator(x.dtype());
    let statistic = |s: &Tensor| s.detach().to_dtype(acc)?.reshape((1, c, 1));
    let inv_std = (statistic(var)? + composed::eps_in(acc, eps))?
        .sqrt()?
        .recip()?;
    let y = x
        .contiguous()?
        .to_dtype(acc)?
        .reshape((n, c, ()))?
        .broadcast_sub(&statistic(mean)?)?
        .broadcast_mul(&inv_std)?;
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    composed::scale_shift(&y, weight.as_ref(), bias.as_ref())?
        .to_dtype(x.dtype())?
        .reshape(x.shape())
}
