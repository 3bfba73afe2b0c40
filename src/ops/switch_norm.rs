//! Normalization by a learned mixture of the statistics of instances, layers and batches.

use candle_core::{DType, Result, Tensor, bail};

use super::batch_norm::BatchStatistics;
use super::check;
use crate::computations::{
    Batch, ChannelAxes, Mixture, PlaneMoments, Planes, ScaleShift, composed, finite, softmax,
};
use crate::graph::{self, Route, route};
use candle_norm_support::host;

pub(super) const LAYER: &str = "SwitchNorm";

/// Statistics of a batch that [`switch_norm`] mixes in.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum SwitchBatch<'a> {
    /// None.
    Absent,
    /// Those of this batch, as in training.
    Own,
    /// These, as in inference: the mean and the variance of each channel, which get no gradient.
    Given(&'a Tensor, &'a Tensor),
}

/// Sources that [`switch_norm`] mixes, and how.
#[derive(Debug, Clone, Copy)]
pub struct SwitchOptions<'a> {
    /// Whether the statistics of instances are among them.
    pub instance: bool,
    /// The statistics of the batch.
    pub batch: SwitchBatch<'a>,
    /// Divide the variance of a plane by n − 1 in place of n; without instances, those of layers
    /// and batches.
    pub unbiased: bool,
    /// Added to the mixed variance, inside the root.
    pub eps: f64,
}

impl SwitchOptions<'_> {
    fn count(&self) -> usize {
        let batch = !matches!(self.batch, SwitchBatch::Absent);
        1 + usize::from(self.instance) + usize::from(batch)
    }
}

/// Switchable normalization of `x`: `y = (x − mean) / √(var + eps) · weight + bias`.
///
/// `mean` is the sum of the means of the instance, the layer and the batch, by the mixing weights
/// `softmax(mean_weight)`, and `var` that of their variances by `softmax(var_weight)` (Luo et al.,
/// 2019, <https://arxiv.org/abs/1806.10779>). Also returns the mean and the variance of the batch,
/// where its own are mixed in; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; `mean_weight`, `var_weight`: one value for each
/// source, in the order of instance, layer and batch. The result has the shape and dtype of `x` and
/// is contiguous.
///
/// # Errors
/// An input of rank below 2, below 3 with instances; one value where a variance is divided by
/// n − 1; parameters that do not fit; `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, SwitchBatch, SwitchOptions};
///
/// let x = Tensor::new(&[[[1f64, 3.], [10., 30.]]], &Device::Cpu)?;
/// let equal = Tensor::new(&[1f64, 1.], &Device::Cpu)?;
/// let (instance, batch) = (true, SwitchBatch::Absent);
/// let options = SwitchOptions { instance, batch, unbiased: false, eps: 1e-9 };
/// let (y, _) = ops::switch_norm(&x, None, None, [&equal, &equal], options)?;
/// // Channel 0 has mean 2 and variance 1, the sample mean 11 and variance 131.5.
/// let expected = (1. - 6.5) / 66.25f64.sqrt();
/// assert!((y.to_vec3::<f64>()?[0][0][0] - expected).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn switch_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    mixing_weights: [&Tensor; 2],
    options: SwitchOptions,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    let (y, statistics) = switch_norm_with(x, weight, bias, mixing_weights, options)?;
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
    options: SwitchOptions,
) -> Result<(Tensor, Option<BatchStatistics>)> {
    check_arguments(x, weight, bias, [mean_weight, var_weight], &options)?;
    let route = route(LAYER, x)?;
    if x.elem_count() == 0 {
        let params = [weight, bias, Some(mean_weight), Some(var_weight)];
        return Ok((composed::empty(x, &params)?, None));
    }
    let (n, c) = (x.dims()[0], x.dims()[1]);
    let space = x.elem_count() / (n * c);
    check_counts(x, &options, space)?;
    let params = [weight, bias, Some(mean_weight), Some(var_weight)];
    let rows = rows_of_planes(route, x, (n, c, space), &params)?;
    let mixture = mixture(x, &options)?;
    let weight = weight.map(composed::kept).transpose()?;
    let logits = joined_logits([mean_weight, var_weight], x)?;
    let (values, coefficients, statistics) = match route {
        Route::Fused(_) => {
            let moments = moments_of_planes(&rows)?;
            let (weight, logits) = (weight.as_ref(), Some(&logits));
            if matches!(mixture.batch, Batch::Own) {
                let (coefficients, saved) =
                    graph::apply_with_statistics(mixture, &moments, weight, logits)?;
                (rows, coefficients, Some([saved.mean()?, saved.var()?]))
            } else {
                let coefficients = graph::apply(mixture, &moments, weight, logits)?;
                (rows, coefficients, None)
            }
        }
        Route::Composed => {
            let (values, planes) = planes(&rows, &mixture)?;
            let (coefficients, statistics) =
                mixture.of_planes(&planes, weight.as_ref(), &logits)?;
            (values, coefficients, statistics)
        }
    };
    let y = scaled_and_shifted(&values, &coefficients, bias, x)?;
    let statistics = statistics.map(|[mean, var]| BatchStatistics { mean, var });
    Ok((y, statistics))
}

/// `x` as `[N, C, space]`, in the dtype that it is computed on with these parameters.
pub(super) fn rows_of_planes(
    route: Route,
    x: &Tensor,
    dims: (usize, usize, usize),
    params: &[Option<&Tensor>],
) -> Result<Tensor> {
    let rows = match route {
        Route::Fused(_) => x.contiguous()?,
        Route::Composed => composed::unshared(x)?,
    };
    let rows = rows.reshape(dims)?;
    let tracks = x.track_op() || params.iter().flatten().any(|p| p.track_op());
    match route {
        Route::Fused(_) if !tracks => Ok(rows),
        // Two gradients meet here, in the accumulator's dtype, so that their sum is rounded once.
        // For those of the parameters too, so that they do not depend on whether `x` is tracked.
        _ => rows.to_dtype(composed::accumulator(x.dtype())),
    }
}

/// The mixing weights before their softmax: one argument of a node, and a copy, as the backward is
/// to find it.
pub(super) fn joined_logits(weights: [&Tensor; 2], x: &Tensor) -> Result<Tensor> {
    let acc = composed::accumulator(x.dtype());
    let [mean, var] = weights.map(|w| w.to_dtype(acc));
    Tensor::cat(&[mean?, var?], 0)
}

/// The moments of the planes of `rows` `[N, C, space]`, by a node.
pub(super) fn moments_of_planes(rows: &Tensor) -> Result<Tensor> {
    let moments = PlaneMoments {
        layer: LAYER,
        len: rows.dims()[2],
    };
    graph::apply(moments, rows, None, None)
}

/// `values` by the coefficients of their planes, in the shape and dtype of `x`.
pub(super) fn scaled_and_shifted(
    values: &Tensor,
    coefficients: &Tensor,
    bias: Option<&Tensor>,
    x: &Tensor,
) -> Result<Tensor> {
    let scale_shift = ScaleShift {
        layer: LAYER,
        axes: ChannelAxes::of(values),
    };
    let y = graph::apply(scale_shift, values, Some(coefficients), bias)?;
    y.reshape(x.shape())?.to_dtype(x.dtype())
}

/// The mixture for `x` `[N, C, *]`.
pub(super) fn mixture(x: &Tensor, options: &SwitchOptions) -> Result<Mixture> {
    // Copies, which no later update of running statistics reaches.
    let copy = |t: &Tensor| t.detach().force_contiguous();
    Ok(Mixture {
        layer: LAYER,
        axes: ChannelAxes::of(x),
        instance: options.instance,
        batch: match options.batch {
            SwitchBatch::Absent => Batch::Absent,
            SwitchBatch::Own => Batch::Own,
            SwitchBatch::Given(mean, var) => Batch::Given {
                mean: copy(mean)?,
                var: copy(var)?,
            },
        },
        unbiased: options.unbiased,
        eps: composed::eps_in(composed::accumulator(x.dtype()), options.eps),
    })
}

pub(super) fn check_arguments(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    mixing_weights: [&Tensor; 2],
    options: &SwitchOptions,
) -> Result<()> {
    check::eps(LAYER, options.eps)?;
    let least = if options.instance { 3 } else { 2 };
    check::rank_at_least(LAYER, x, least, "[N, C, ...]")?;
    let (c, count) = (x.dims()[1], [options.count()]);
    let channels = [c];
    let mut params = check::Param::affine(weight, bias, &channels);
    for (name, value) in ["mean_weight", "var_weight"]
        .into_iter()
        .zip(mixing_weights)
    {
        params.push(check::Param {
            name,
            value,
            shape: &count,
        });
    }
    check::input(LAYER, x, &params)?;
    if let SwitchBatch::Given(mean, var) = options.batch {
        for (name, value) in [("running_mean", mean), ("running_var", var)] {
            check::float(LAYER, name, value)?;
            check::shape(LAYER, name, value, &[c])?;
            check::same_device(LAYER, name, value, x.device())?;
        }
    }
    Ok(())
}

/// Checks that sums divided by n − 1 have more than one value.
fn check_counts(x: &Tensor, options: &SwitchOptions, space: usize) -> Result<()> {
    check_counts_of_samples(x, options, space)?;
    if !options.unbiased || options.instance {
        return Ok(());
    }
    let n = x.dims()[0];
    match options.batch {
        SwitchBatch::Own => check::more_than_one_value(LAYER, n * space, x),
        _ => Ok(()),
    }
}

/// [`check_counts`] of what samples have by themselves.
pub(super) fn check_counts_of_samples(
    x: &Tensor,
    options: &SwitchOptions,
    space: usize,
) -> Result<()> {
    match (options.unbiased, options.instance) {
        (false, _) => Ok(()),
        (true, true) => more_values(LAYER, "channel of a sample", space, x),
        (true, false) => more_values(LAYER, "sample", x.dims()[1] * space, x),
    }
}

/// The moments of the planes of `x` `[N, C, space]` by tensor operations, and the values of `x`,
/// each plane less a value of its own.
pub(super) fn planes(x: &Tensor, mixture: &Mixture) -> Result<(Tensor, Planes)> {
    let (n, c, space) = x.dims3()?;
    // Each plane by itself, so that one whose values are far from those of others keeps its digits.
    let first = finite(x.detach().narrow(2, 0, 1)?)?;
    let values = x.broadcast_sub(&first)?;
    let first = first.reshape((n, c))?;
    let (mean, var) = composed::mean_and_var(&values.reshape((n * c, space))?)?;
    let mean = mean.reshape((n, c))?;
    let about = mean.detach();
    let offset = mixture.offset(&first)?;
    let mean = (mean + first.broadcast_sub(&offset)?)?;
    // Nearer still, for the gradient of the mixing weights: a sum of products with these means.
    let rest = mixture.offset(&mean)?;
    let planes = Planes {
        mean: mean.broadcast_sub(&rest)?,
        offsets: vec![offset, rest],
        var: var.reshape((n, c))?,
        about,
    };
    Ok((values, planes))
}

/// Factors that [`switch_norm`] mixes by, from one of its weights.
pub(crate) fn mixing_weights(weight: &Tensor) -> Result<Vec<f64>> {
    host::vector(&softmax(&weight.detach().to_dtype(DType::F64)?)?)
}

/// A variance that is divided by n − 1.
fn more_values(layer: &str, of: &str, values: usize, x: &Tensor) -> Result<()> {
    if values == 1 {
        bail!(
            "{layer}: expected more than 1 value per {of}, whose variance is unbiased, got input \
            size {:?}; set unbiased to false",
            x.dims()
        )
    }
    Ok(())
}
