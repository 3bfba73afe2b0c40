//! Normalization by a learned mixture of the statistics of instances, layers and batches.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::batch_norm::{BatchStatistics, normalize_with};
use super::check;
use crate::computations::{FixedStatistics, PlaneMoments, composed};
use crate::graph::{self, Route, route};

const LAYER: &str = "SwitchNorm";

/// Which statistics of a batch [`switch_norm`] mixes in.
#[derive(Debug, Clone, Copy)]
pub enum SwitchBatch<'a> {
    /// None.
    Absent,
    /// Those of this batch, as in training.
    Own,
    /// These, as in inference: the mean and the variance of each channel, which get no gradient.
    Given(&'a Tensor, &'a Tensor),
}

/// What [`switch_norm`] mixes.
#[derive(Debug, Clone, Copy)]
pub struct SwitchSources<'a> {
    /// Whether the statistics of instances are among them.
    pub instance: bool,
    /// The statistics of the batch.
    pub batch: SwitchBatch<'a>,
    /// Divide the variance of a plane by n − 1 in place of n; without instances, those of layers and batches.
    pub unbiased: bool,
}

impl SwitchSources<'_> {
    fn count(&self) -> usize {
        let batch = !matches!(self.batch, SwitchBatch::Absent);
        1 + usize::from(self.instance) + usize::from(batch)
    }
}

/// Switchable normalization of `x`: `y = (x − mean) / √(var + eps) · weight + bias`.
///
/// `mean` is the sum of the means of the instance, the layer and the batch, by the shares `softmax(mean_weight)`, and `var`
/// that of their variances by `softmax(var_weight)` (Luo et al., 2019, <https://arxiv.org/abs/1806.10779>). Also returns the mean and the
/// variance of the batch, where its own are mixed in; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; `mean_weight`, `var_weight`: one value for each source, in the order of instance, layer and
/// batch. The result has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 2, below 3 with instances; one value where a variance is divided by n − 1; parameters that do not fit; `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, SwitchBatch, SwitchSources};
///
/// let x = Tensor::new(&[[[1f64, 3.], [10., 30.]]], &Device::Cpu)?;
/// let equal = Tensor::new(&[1f64, 1.], &Device::Cpu)?;
/// let sources = SwitchSources { instance: true, batch: SwitchBatch::Absent, unbiased: false };
/// let (y, _) = ops::switch_norm(&x, None, None, [&equal, &equal], sources, 1e-9)?;
/// // Channel 0 has mean 2 and variance 1, the sample mean 11 and variance 131.5.
/// let expected = (1. - 6.5) / 66.25f64.sqrt();
/// assert!((y.to_vec3::<f64>()?[0][0][0] - expected).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn switch_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    shares: [&Tensor; 2],
    sources: SwitchSources,
    eps: f64,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let (y, statistics) = switch_norm_with(x, weight, bias, shares, sources, eps)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// [`switch_norm`], whose statistics are `f64` on the fused path, so that those of several batches
/// can be pooled.
pub(crate) fn switch_norm_with(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    [mean_weight, var_weight]: [&Tensor; 2],
    sources: SwitchSources,
    eps: f64,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    check_arguments(x, weight, bias, [mean_weight, var_weight], &sources, eps)?;
    let route = route(LAYER, x)?;
    if x.elem_count() == 0 {
        let params = [weight, bias, Some(mean_weight), Some(var_weight)];
        return Ok((composed::empty(x, &params)?, None));
    }
    let (n, c) = (x.dims()[0], x.dims()[1]);
    let space = x.elem_count() / (n * c);
    check_counts(x, &sources, space)?;
    let acc = composed::accumulator(x.dtype());
    let rows = match route {
        Route::Fused(_) => x.contiguous()?,
        Route::Composed => composed::unshared(x)?,
    };
    let rows = rows.reshape((n, c, space))?;
    let rows = match route {
        Route::Fused(_) if !x.track_op() => rows,
        // Two gradients meet here, in the accumulator's dtype, so that their sum is rounded once.
        _ => rows.to_dtype(acc)?,
    };
    let planes = match route {
        Route::Fused(_) => Planes::fused(&rows, &sources)?,
        Route::Composed => Planes::composed(&rows, &sources)?,
    };
    let mixed = planes.mix([mean_weight, var_weight], &sources)?;
    let wide = planes.mean.dtype();
    let [weight, bias] = composed::parameters(weight, bias, wide)?;
    let std = (mixed.var + composed::eps_in(acc, eps))?.sqrt()?;
    // About the mean of its own plane, which cancels: large means cost no digits.
    let mut scale = std.recip()?;
    if let Some(weight) = weight {
        scale = scale.broadcast_mul(&weight.reshape((1, c))?)?;
    }
    let mut shift = ((planes.mean.detach() - mixed.mean)? * &scale)?;
    if let Some(bias) = bias {
        shift = shift.broadcast_add(&bias.reshape((1, c))?)?;
    }
    let narrow = |t: Tensor| t.to_dtype(acc)?.reshape(n * c);
    let (scale, shift) = (narrow(scale)?, narrow(shift)?);
    let about = planes.about.detach().reshape(n * c)?;
    let statistics = Arc::new(FixedStatistics::new([about.clone(), about.zeros_like()?]));
    let y = normalize_with(
        LAYER,
        3,
        &planes.values.reshape((1, n * c, space))?,
        &statistics,
        [Some(&scale), Some(&shift)],
        1.,
    )?;
    let statistics = mixed.batch.map(|[mean, var]| BatchStatistics { mean, var });
    let y = y.reshape(x.shape())?.to_dtype(x.dtype())?;
    Ok((y, statistics))
}

fn check_arguments(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    shares: [&Tensor; 2],
    sources: &SwitchSources,
    eps: f64,
) -> Result<()> {
    check::eps(LAYER, eps)?;
    let least = if sources.instance { 3 } else { 2 };
    check::rank_at_least(LAYER, x, least, "[N, C, ...]")?;
    let (c, count) = (x.dims()[1], [sources.count()]);
    let channels = [c];
    let mut params = check::Param::affine(weight, bias, &channels);
    for (name, value) in ["mean_weight", "var_weight"].into_iter().zip(shares) {
        params.push(check::Param {
            name,
            value,
            shape: &count,
        });
    }
    check::input(LAYER, x, &params)?;
    if let SwitchBatch::Given(mean, var) = sources.batch {
        for (name, value) in [("running_mean", mean), ("running_var", var)] {
            check::float(LAYER, name, value)?;
            check::shape(LAYER, name, value, &[c])?;
            check::same_device(LAYER, name, value, x.device())?;
        }
    }
    Ok(())
}

/// What is divided by n − 1 has more than one value.
fn check_counts(x: &Tensor, sources: &SwitchSources, space: usize) -> Result<()> {
    if !sources.unbiased {
        return Ok(());
    }
    let (n, c) = (x.dims()[0], x.dims()[1]);
    if sources.instance {
        return check::more_values(LAYER, "channel of a sample", space, x);
    }
    check::more_values(LAYER, "sample", c * space, x)?;
    match sources.batch {
        SwitchBatch::Own => check::more_than_one_value(LAYER, n * space, x),
        _ => Ok(()),
    }
}

/// The planes of a batch, one for each channel of each sample, and their moments.
struct Planes {
    /// `[N, C, space]`; on the composed path each plane less a value of its own.
    values: Tensor,
    /// Values subtracted from `mean`, one after the other: their sum would be rounded. `[N, 1]`
    /// or `[1, 1]`.
    offsets: Vec<Tensor>,
    /// The mean of each plane less `offsets`, `[N, C]`; `f64` on the fused path.
    mean: Tensor,
    /// The biased variance, `[N, C]`.
    var: Tensor,
    /// What the values are centered by: their means, which no gradient reaches.
    about: Tensor,
    space: usize,
}

/// What planes are normalized by.
struct Mixed {
    /// `[N, C]`.
    mean: Tensor,
    /// `[N, C]`.
    var: Tensor,
    /// The mean and variance of the batch, `[C]` each, where they are its own.
    batch: Option<[Tensor; 2]>,
}

impl Planes {
    /// The moments are a node of the graph of their own; all that follows of them is `f64`.
    fn fused(x: &Tensor, sources: &SwitchSources) -> Result<Self> {
        let (n, c, space) = x.dims3()?;
        let moments = PlaneMoments {
            layer: LAYER,
            len: space,
        };
        let both = graph::apply(moments, x, None, None)?;
        let [mean, var] = [0, 1].map(|i| both.narrow(0, i, 1)?.reshape((n, c)));
        let mean = mean?;
        let offset = offset(&mean, sources)?;
        Ok(Self {
            values: x.clone(),
            about: mean.detach(),
            mean: mean.broadcast_sub(&offset)?,
            offsets: vec![offset],
            var: var?,
            space,
        })
    }

    fn composed(x: &Tensor, sources: &SwitchSources) -> Result<Self> {
        let (n, c, space) = x.dims3()?;
        // Each plane by itself, so that one whose values are far from those of others keeps its
        // digits.
        let first = finite(x.detach().narrow(2, 0, 1)?)?;
        let values = x.broadcast_sub(&first)?;
        let first = first.reshape((n, c))?;
        let (mean, var) = composed::mean_and_var(&values.reshape((n * c, space))?)?;
        let mean = mean.reshape((n, c))?;
        let about = mean.detach();
        let offset = offset(&first, sources)?;
        let mean = (mean + first.broadcast_sub(&offset)?)?;
        // Nearer still, for the gradient of the shares: a sum of products with these means.
        let rest = self::offset(&mean, sources)?;
        Ok(Self {
            values,
            about,
            mean: mean.broadcast_sub(&rest)?,
            offsets: vec![offset, rest],
            var: var.reshape((n, c))?,
            space,
        })
    }

    fn mix(&self, shares: [&Tensor; 2], sources: &SwitchSources) -> Result<Mixed> {
        let (n, c) = self.mean.dims2()?;
        let wide = self.mean.dtype();
        let unbiased = |count: usize, applies: bool| match applies && sources.unbiased {
            true => count as f64 / (count - 1) as f64,
            false => 1.,
        };
        let var = (&self.var * unbiased(self.space, sources.instance))?;
        // The moments of a union of planes of equal size, along axis 1 of `mean` and `var`.
        let union = |mean: &Tensor, var: &Tensor| -> Result<[Tensor; 2]> {
            let whole = composed::Rows::new(mean)?.mean()?.unsqueeze(1)?;
            let inner = (var + mean.broadcast_sub(&whole)?.sqr()?)?;
            let inner = composed::Rows::new(&inner)?.mean()?.unsqueeze(1)?;
            Ok([whole, inner])
        };
        let [layer_mean, layer_var] = union(&self.mean, &var)?;
        let layer_var = (layer_var * unbiased(c * self.space, !sources.instance))?;
        let mut means = vec![];
        let mut vars = vec![];
        if sources.instance {
            means.push(self.mean.clone());
            vars.push(var.clone());
        }
        means.push(layer_mean);
        vars.push(layer_var);
        let mut batch = None;
        match sources.batch {
            SwitchBatch::Absent => {}
            SwitchBatch::Own => {
                let by_channel = |t: &Tensor| t.t()?.contiguous();
                let [mean, var] = union(&by_channel(&self.mean)?, &by_channel(&var)?)?;
                let var = (var * unbiased(n * self.space, !sources.instance))?;
                let (mean, var) = (mean.t()?, var.t()?);
                let add = |mean: Tensor, offset| mean.broadcast_add(offset);
                let stored = self.offsets.iter().rev().try_fold(mean.detach(), add)?;
                batch = Some([stored.reshape(c)?, var.detach().reshape(c)?]);
                means.push(mean);
                vars.push(var);
            }
            SwitchBatch::Given(mean, var) => {
                let row = |t: &Tensor| t.detach().to_dtype(wide)?.reshape((1, c));
                let subtract = |mean: Tensor, offset| mean.broadcast_sub(offset);
                means.push(self.offsets.iter().try_fold(row(mean)?, subtract)?);
                vars.push(row(var)?);
            }
        }
        let [mean_shares, var_shares] = shares.map(|s| softmax(&s.to_dtype(wide)?));
        Ok(Mixed {
            mean: weighted_sum(&means, &mean_shares?, (n, c))?,
            var: weighted_sum(&vars, &var_shares?, (n, c))?,
            batch,
        })
    }
}

/// A value near the means of the data, whose differences then have all their digits: that of equal
/// means is zero. It comes from nothing that the
/// result does not depend on anyway: the first of `values` `[N, …]`, or of each sample where
/// samples do not see each other.
fn offset(values: &Tensor, sources: &SwitchSources) -> Result<Tensor> {
    let first = values.detach().narrow(1, 0, 1)?;
    let offset = match sources.batch {
        // Running means say nothing of where these data are.
        SwitchBatch::Absent | SwitchBatch::Given(..) => first,
        SwitchBatch::Own => first.narrow(0, 0, 1)?,
    };
    finite(offset)
}

/// `t` with zeros in place of what is not finite.
fn finite(t: Tensor) -> Result<Tensor> {
    let finite = t.abs()?.lt(f64::INFINITY)?;
    finite.where_cond(&t, &t.zeros_like()?)
}

/// What [`switch_norm`] mixes by, of one of its weights.
pub(crate) fn shares(weight: &Tensor) -> Result<Vec<f64>> {
    softmax(&weight.detach().to_dtype(DType::F64)?)?.to_vec1()
}

fn softmax(t: &Tensor) -> Result<Tensor> {
    let e = t.broadcast_sub(&t.detach().max(0)?)?.exp()?;
    e.broadcast_div(&e.sum_all()?)
}

/// The sum of `terms`, each of which broadcasts to `dims`, by `shares`.
fn weighted_sum(terms: &[Tensor], shares: &Tensor, dims: (usize, usize)) -> Result<Tensor> {
    let mut sum = Tensor::zeros(dims, shares.dtype(), shares.device())?;
    for (i, term) in terms.iter().enumerate() {
        let share = shares.narrow(0, i, 1)?.unsqueeze(0)?;
        sum = sum.broadcast_add(&term.broadcast_mul(&share)?)?;
    }
    Ok(sum)
}
