//! Normalization of each channel of each sample by its own statistics.

use candle_core::{Result, Tensor};

use super::batch_norm::BatchStatistics;
use super::group_norm::Groups;
use super::{Route, check, composed, fused, route};

/// Instance normalization of `x`, by the statistics of each channel of each sample over space.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the variance biased; `weight` and `bias` are per channel
/// (Ulyanov, Vedaldi and Lempitsky, 2016, <https://arxiv.org/abs/1607.08022>). Also returns what running statistics
/// take: the means over the samples of the mean and of the unbiased variance; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]` of rank at least 3; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// An input of rank below 3 or with one spatial element, parameters that do not fit, `eps` that is not positive
/// and finite.
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
    let layer = "InstanceNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 3, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    let route = route(layer, x)?;
    if x.elem_count() == 0 {
        return Ok((composed::empty(x, &[weight, bias])?, None));
    }
    let space = x.elem_count() / (n * c);
    check::more_than_one_value(layer, space, x)?;
    let acc = composed::accumulator(x.dtype());
    let unbiased = space as f64 / (space - 1) as f64;
    if route == Route::Fused {
        let op = Groups::new(layer, x, c, weight, bias, eps);
        let (y, op) = fused::apply(op, x, &[weight, bias])?;
        let mut means = vec![(0., 0.); c];
        for sample in op.stats()?.chunks(c) {
            for (mean, stats) in means.iter_mut().zip(sample) {
                mean.0 += stats.mean.high / n as f64;
                mean.1 += stats.var / n as f64;
            }
        }
        let channels = means.into_iter().map(|(mean, var)| (mean, var * unbiased));
        let statistics = BatchStatistics::from_channels(channels, acc, x.device())?;
        return Ok((y, Some(statistics)));
    }
    let planes = x.contiguous()?.to_dtype(acc)?.reshape((n * c, space))?;
    let standardized = composed::standardize(&planes, true, eps)?;
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    let y = composed::scale_shift(
        &standardized.y.reshape((n, c, space))?,
        weight.as_ref(),
        bias.as_ref(),
    )?;
    let mean_over_samples = |s: &Tensor| {
        let by_channel = s.reshape((n, c))?.t()?.contiguous()?;
        composed::Rows::new(&by_channel)?.mean()
    };
    let statistics = BatchStatistics {
        mean: mean_over_samples(&standardized.mean)?,
        var: (mean_over_samples(&standardized.var)? * unbiased)?,
    };
    Ok((y.to_dtype(x.dtype())?.reshape(x.shape())?, Some(statistics)))
}
