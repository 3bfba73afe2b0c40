//! Normalization of each channel of each sample by its own statistics.

use candle_core::{DType, Result, Tensor};

use super::batch_norm::BatchStatistics;
use super::group_norm::Groups;
use super::{Route, check, composed, fused, route};
use crate::kernels::Stats;

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
    let Some(planes) = Planes::checked(layer, x, weight, bias, eps)? else {
        return Ok((composed::empty(x, &[weight, bias])?, None));
    };
    let Planes {
        n, c, space, acc, ..
    } = planes;
    let unbiased = space as f64 / (space - 1) as f64;
    if planes.route == Route::Fused {
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
    let standardized = composed::standardize(&planes.rows(x)?, true, eps)?;
    let y = planes.affine(x, &standardized.y, weight, bias)?;
    let mean_over_samples = |s: &Tensor| {
        let by_channel = s.detach().reshape((n, c))?.t()?.contiguous()?;
        composed::Rows::new(&by_channel)?.mean()
    };
    let statistics = BatchStatistics {
        mean: mean_over_samples(&standardized.mean)?,
        var: (mean_over_samples(&standardized.var)? * unbiased)?,
    };
    Ok((y, Some(statistics)))
}

/// [`instance_norm`] in the name of `layer`, and the mean and `√(var + eps)` that each channel of each sample was normalized by, `[N, C]`
/// in the accumulator's dtype: they are part of the graph, so that what is restored by them has its whole gradient.
pub(crate) fn instance_norm_by(
    layer: &'static str,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, [Tensor; 2])> {
    let Some(planes) = Planes::checked(layer, x, weight, bias, eps)? else {
        check::countable(layer, "statistics", &x.dims()[..2])?;
        let none = Tensor::zeros(
            (x.dims()[0], x.dims()[1]),
            composed::accumulator(x.dtype()),
            x.device(),
        )?;
        return Ok((composed::empty(x, &[weight, bias])?, [none.clone(), none]));
    };
    let Planes { n, c, acc, .. } = planes;
    let by_channel =
        |mean: Tensor, std: Tensor| Result::Ok([mean.reshape((n, c))?, std.reshape((n, c))?]);
    if planes.route == Route::Fused {
        let op = Groups::new(layer, x, c, weight, bias, eps);
        let (y, op) = fused::apply(op, x, &[weight, bias])?;
        if x.track_op() {
            let (mean, std) = composed::mean_and_std(&planes.rows(x)?, eps)?;
            return Ok((y, by_channel(mean, std)?));
        }
        let saved = |of: fn(&Stats) -> f64| {
            let values: Vec<f64> = op.stats()?.iter().map(of).collect();
            Tensor::from_vec(values, (n, c), x.device())?.to_dtype(acc)
        };
        return Ok((y, [saved(|s| s.mean.high)?, saved(|s| s.inv_std.recip())?]));
    }
    let standardized = composed::standardize(&planes.rows(x)?, true, eps)?;
    let y = planes.affine(x, &standardized.y, weight, bias)?;
    Ok((y, by_channel(standardized.mean, standardized.std)?))
}

/// The channels of samples as rows of numbers.
struct Planes {
    n: usize,
    c: usize,
    space: usize,
    acc: DType,
    route: Route,
}

impl Planes {
    /// Those of `x`, which meets every rule; none where it is empty.
    fn checked(
        layer: &'static str,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Option<Self>> {
        check::eps(layer, eps)?;
        check::rank_at_least(layer, x, 3, "[N, C, ...]")?;
        let (n, c) = (x.dims()[0], x.dims()[1]);
        check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
        let route = route(layer, x)?;
        if x.elem_count() == 0 {
            return Ok(None);
        }
        let space = x.elem_count() / (n * c);
        check::more_than_one_position(layer, space, x)?;
        let acc = composed::accumulator(x.dtype());
        Ok(Some(Self {
            n,
            c,
            space,
            acc,
            route,
        }))
    }

    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let x = composed::unshared(x)?.to_dtype(self.acc)?;
        x.reshape((self.n * self.c, self.space))
    }

    /// Normalized rows, scaled and shifted, in the shape and dtype of `x`.
    fn affine(
        &self,
        x: &Tensor,
        rows: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [weight, bias] = composed::parameters(weight, bias, self.acc)?;
        let y = composed::scale_shift(
            &rows.reshape((self.n, self.c, self.space))?,
            weight.as_ref(),
            bias.as_ref(),
        )?;
        y.to_dtype(x.dtype())?.reshape(x.shape())
    }
}
