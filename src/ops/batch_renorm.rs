//! Batch normalization that is corrected towards running statistics.

use candle_core::{DType, Result, Tensor, bail};

use super::batch_norm::{BatchStatistics, batch_norm_with};
use super::check;
use super::modulation::{Features, Scaling};
use crate::computations::{ChannelAxes, PlaneMoments, composed};
use crate::graph::{self, Route};

const LAYER: &str = "BatchRenorm";

/// Options of [`batch_renorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RenormOptions {
    /// ε, added to the variances, inside the roots. Default: 1e-3.
    pub eps: f64,
    /// Bound of the factor `r` and of its inverse, at least 1. Default: 3.
    pub rmax: f64,
    /// Bound of the distance `d`, at least 0. Default: 5.
    pub dmax: f64,
}

impl Default for RenormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-3,
            rmax: 3.,
            dmax: 5.,
        }
    }
}

impl RenormOptions {
    /// The same with another `eps`.
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    /// The same with other bounds.
    pub fn with_bounds(self, rmax: f64, dmax: f64) -> Self {
        Self { rmax, dmax, ..self }
    }

    pub(crate) fn check(&self) -> Result<()> {
        check::eps(LAYER, self.eps)?;
        if !(1. ..f64::INFINITY).contains(&self.rmax) {
            bail!(
                "{LAYER}: expected rmax to be finite and at least 1, got {}; with 1 and a dmax of \
                0 the layer is BatchNorm",
                self.rmax
            )
        }
        if !(0. ..f64::INFINITY).contains(&self.dmax) {
            bail!(
                "{LAYER}: expected dmax to be finite and at least 0, got {}",
                self.dmax
            )
        }
        Ok(())
    }
}

/// Batch renormalization: `x` by the statistics of this batch, corrected towards running ones.
///
/// `y = (x̂ · r + d) · weight + bias` with `x̂ = (x − μ_B) / σ_B`,
/// `r = clip(σ_B / σ, 1 / rmax, rmax)` and `d = clip((μ_B − μ) / σ, −dmax, dmax)` (Ioffe, 2017,
/// <https://arxiv.org/abs/1702.03275>). μ_B and σ_B are those of the batch, σ_B biased, μ and σ
/// the running ones; ε is in both roots. `r` and `d` are constants in the backward. Where neither
/// is clipped, `y` is what inference gives. Also returns the mean and the unbiased variance of the
/// batch, which running statistics take; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; running mean and variance, in this order, `weight`, `bias`: `[C]`; the result
/// has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 2 or with one value per channel, statistics or parameters that do not
/// fit, options out of range.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, RenormOptions};
///
/// let x = Tensor::new(&[[1f64], [2.], [6.], [-1.]], &Device::Cpu)?;
/// let (mean, var) = (Tensor::new(&[0.5f64], &Device::Cpu)?, Tensor::new(&[4f64], &Device::Cpu)?);
/// let options = RenormOptions::default();
/// let (y, _) = ops::batch_renorm(&x, [&mean, &var], None, None, options)?;
/// // (6 − 0.5) / √4.001
/// assert!((y.get(2)?.to_vec1::<f64>()?[0] - 5.5 / 4.001f64.sqrt()).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_renorm(
    x: &Tensor,
    running: [&Tensor; 2],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    options: RenormOptions,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias);
    let (y, statistics) = batch_renorm_with(x, running, Share::Whole, scaling, options)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// How much of the correction there is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Share<'a> {
    Whole,
    /// None: batch norm.
    Nothing,
    /// All or none, by a number on the device, 1 or 0.
    OnDevice(&'a Tensor),
}

/// [`batch_renorm`] by a share of its correction.
pub(crate) fn batch_renorm_with(
    x: &Tensor,
    running: [&Tensor; 2],
    share: Share,
    scaling: Scaling,
    options: RenormOptions,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    options.check()?;
    check::rank_at_least(LAYER, x, 2, "[N, C, ...]")?;
    let c = x.dims()[1];
    let (weight, bias) = (scaling.weight, scaling.bias);
    check::input(LAYER, x, &check::Param::affine(weight, bias, &[c]))?;
    scaling.check(LAYER, x, Features::First)?;
    for (name, value) in [("running_mean", running[0]), ("running_var", running[1])] {
        check::float(LAYER, name, value)?;
        check::shape(LAYER, name, value, &[c])?;
        check::same_device(LAYER, name, value, x.device())?;
    }
    if x.elem_count() == 0 {
        return Ok((graph::empty(LAYER, x, &scaling.tensors())?, None));
    }
    check::more_than_one_value(LAYER, x.elem_count() / c, x)?;
    let share = match share {
        Share::Nothing => return batch_norm_with(x, scaling, options.eps, true),
        Share::Whole => None,
        Share::OnDevice(share) => Some(share),
    };
    let [r, d] = correction(x, running, share, options)?;
    let acc = composed::accumulator(x.dtype());
    let (r, d) = (r.to_dtype(acc)?, d.to_dtype(acc)?);
    let wide = |p: &Tensor| p.flatten_all()?.to_dtype(acc);
    // (x̂ · r + d) · w + b is batch norm of the weight w · r and the bias b + w · d.
    let (scale, moved) = match weight.map(wide).transpose()? {
        Some(weight) => ((&weight * r)?, (weight * d)?),
        None => (r, d),
    };
    let moved = match bias.map(wide).transpose()? {
        Some(bias) => (bias + moved)?,
        None => moved,
    };
    let scaling = Scaling {
        weight: Some(&scale),
        bias: Some(&moved),
        ..scaling
    };
    batch_norm_with(x, scaling, options.eps, true)
}

/// The factor `r` and the distance `d` of each channel, `[C]`, outside of the graph.
fn correction(
    x: &Tensor,
    [mean, var]: [&Tensor; 2],
    share: Option<&Tensor>,
    RenormOptions { eps, rmax, dmax }: RenormOptions,
) -> Result<[Tensor; 2]> {
    let [batch_mean, batch_var] = moments(&x.detach())?;
    let wide = |t: &Tensor| t.detach().to_dtype(batch_mean.dtype());
    let inv_std = (wide(var)? + eps)?.sqrt()?.recip()?;
    let r = clipped(((batch_var + eps)?.sqrt()? * &inv_std)?, [1. / rmax, rmax])?;
    let d = clipped(((&batch_mean - wide(mean)?)? * inv_std)?, [-dmax, dmax])?;
    let Some(share) = share else {
        return Ok([r, d]);
    };
    // A choice and no product: what is not finite has no effect before it counts.
    let share = share.broadcast_as(r.shape())?;
    Ok([
        share.where_cond(&r, &r.ones_like()?)?,
        share.where_cond(&d, &d.zeros_like()?)?,
    ])
}

/// `t` within bounds; NaN stays NaN, which candle's `clamp` on a GPU makes a bound.
fn clipped(t: Tensor, [least, most]: [f64; 2]) -> Result<Tensor> {
    t.ne(&t)?.where_cond(&t, &t.clamp(least, most)?)
}

/// The mean and the biased variance of each channel, `[C]` each, in `f64`.
fn moments(x: &Tensor) -> Result<[Tensor; 2]> {
    let ChannelAxes {
        outer,
        channels,
        inner,
    } = ChannelAxes::of(x);
    // On the composed path, the mean is as precise as its dtype.
    let x = match graph::route(LAYER, x)? {
        Route::Fused(_) => x.contiguous()?,
        Route::Composed => x.to_dtype(DType::F64)?.contiguous()?,
    };
    // Of rows of a channel: where there is no space, all samples are one.
    let (rows, outer, inner) = match inner {
        1 => (
            graph::transposed(&x.reshape((1, outer, channels))?)?,
            1,
            outer,
        ),
        _ => (x, outer, inner),
    };
    let computation = PlaneMoments {
        layer: LAYER,
        len: inner,
    };
    let rows = rows.reshape((outer * channels, inner))?;
    let both = graph::apply(computation, &rows, None, None)?;
    let [means, vars] = [0, 1].map(|i| both.get(i)?.reshape((outer, channels)));
    let (means, vars) = (means?, vars?);
    let mean = means.mean(0)?;
    let between = means.broadcast_sub(&mean)?.sqr()?;
    let var = (vars + between)?.mean(0)?;
    Ok([mean, var])
}
