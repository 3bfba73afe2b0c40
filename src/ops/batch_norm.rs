//! Normalization of each channel by statistics over the batch and space, or by fixed ones.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Tensor};

use super::fused::{self, Arg, FusedOp, Native, Params, elements, with_native};
use super::group_norm::shape_of;
use super::{Route, check, composed, route};
use crate::kernels::{AffinePair, Order, Shape, Statistics, Stats, Wanted};

/// What a batch contributes to running statistics.
#[derive(Debug, Clone)]
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

    /// From the mean and the unbiased variance of each channel.
    pub(super) fn from_channels(
        channels: impl Iterator<Item = (f64, f64)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (mean, var): (Vec<f64>, Vec<f64>) = channels.unzip();
        let tensor = |v: Vec<f64>| {
            let len = v.len();
            Tensor::from_vec(v, len, device)?.to_dtype(dtype)
        };
        Ok(Self {
            mean: tensor(mean)?,
            var: tensor(var)?,
        })
    }
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
    let (y, statistics) = batch_norm_with(x, weight, bias, eps, true)?;
    let acc = composed::accumulator(x.dtype());
    let statistics = statistics.map(|s| s.to_dtype(acc)).transpose()?;
    Ok((y, statistics))
}

/// [`batch_norm`], or, without `center`, division by the root of the mean square. The statistics
/// are `f64` on the fused path, so that those of several
/// batches can be pooled.
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
    let route = route(layer, x)?;
    if x.elem_count() == 0 {
        return Ok((composed::empty(x, &[weight, bias])?, None));
    }
    let space = x.elem_count() / (n * c);
    let count = n * space;
    check::more_than_one_value(layer, count, x)?;
    let acc = composed::accumulator(x.dtype());
    let unbiased = count as f64 / (count - 1) as f64;
    if route == Route::Fused {
        let eps = composed::eps_in(acc, eps);
        let op = Channels::new(layer, x, Source::Own { center, eps }, weight, bias);
        let (y, op) = fused::apply(op, x, &[weight, bias])?;
        let stats = fused::saved(layer, &op.stats)?.iter();
        let channels = stats.map(|s| (s.mean.high, s.var * unbiased));
        let statistics = BatchStatistics::from_channels(channels, DType::F64, x.device())?;
        return Ok((y, Some(statistics)));
    }
    let channels = composed::unshared(x)?
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
        mean: standardized.mean.detach(),
        var: (standardized.var.detach() * unbiased)?,
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
    layer: &'static str,
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
    let route = route(layer, x)?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[weight, bias]);
    }
    let acc = composed::accumulator(x.dtype());
    if route == Route::Fused {
        let wide = |s: &Tensor| s.detach().to_dtype(DType::F64)?.to_vec1::<f64>();
        let eps = composed::eps_in(acc, eps);
        let channels = wide(mean)?.into_iter().zip(wide(var)?);
        let given = channels.map(|(mean, var)| Stats::new(mean.into(), var, eps));
        let op = Channels::new(layer, x, Source::Given(given.collect()), weight, bias);
        return Ok(fused::apply(op, x, &[weight, bias])?.0);
    }
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

/// Where the statistics of a batch norm come from.
enum Source {
    /// The batch, about the means of the channels or about zero.
    Own { center: bool, eps: f64 },
    /// The caller, one for each channel: copies, which no later update of running statistics reaches.
    Given(Vec<Stats>),
}

/// Batch norm as a node of the graph.
struct Channels {
    layer: &'static str,
    shape: Shape,
    source: Source,
    params: Params,
    stats: OnceLock<Vec<Stats>>,
}

impl Channels {
    /// `x` is `[N, C, *]`, and not empty.
    fn new(
        layer: &'static str,
        x: &Tensor,
        source: Source,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Self {
        Self {
            layer,
            shape: shape_of(x),
            source,
            params: Params::of(weight, bias),
            stats: OnceLock::new(),
        }
    }

    fn forward_of<T: Native>(&self, args: &[Arg]) -> Result<CpuStorage> {
        let (weight, bias) = (
            self.params.weight(&args[1..])?,
            self.params.bias(&args[1..])?,
        );
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let statistics = match &self.source {
            Source::Own { center, eps } => Statistics::Own {
                center: *center,
                eps: *eps,
            },
            Source::Given(stats) => Statistics::Given(stats),
        };
        let (x, order) = input::<T>(args[0])?;
        let (y, stats) = T::channels_forward(x, order, self.shape, affine, statistics);
        let _ = self.stats.set(stats);
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward_of<T: Native>(
        &self,
        args: &[Arg],
        params: bool,
    ) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let weight = self.params.weight(&args[2..])?;
        let weight = weight.as_deref();
        let ((x, order), dy) = (input::<T>(args[0])?, elements(args[1])?);
        let stats = fused::saved(self.layer, &self.stats)?;
        let own = match self.source {
            Source::Own { center, .. } => Some(center),
            Source::Given(_) => None,
        };
        let wanted = Wanted { own, params };
        let grads = T::channels_backward(x, order, dy, self.shape, weight, stats, wanted);
        let dparams = self.params.pick(grads.dweight, grads.dbias);
        Ok((T::to_cpu_storage_owned(grads.dx), dparams))
    }
}

/// The elements of the input, and how they lie.
fn input<T: Native>(x: Arg<'_>) -> Result<(&[T], Order)> {
    Ok(match fused::is_channels_last(x.1) {
        true => (fused::elements_in_memory(x)?, Order::ChannelsLast),
        false => (elements(x)?, Order::ChannelsFirst),
    })
}

impl FusedOp for Channels {
    fn name(&self) -> &'static str {
        self.layer
    }

    fn takes(&self, input: &Layout) -> bool {
        input.is_contiguous() || self.shape.has_planes() && fused::is_channels_last(input)
    }

    fn forward(&self, args: &[Arg]) -> Result<CpuStorage> {
        with_native!(fused::dtype(&args[0]), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, args: &[Arg], wanted: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let params = wanted[1..].contains(&true);
        with_native!(fused::dtype(&args[0]), self.layer, T => self.backward_of::<T>(args, params))
    }

    fn backward_composed(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let Shape {
            outer,
            channels,
            inner,
        } = self.shape;
        let x = args[0];
        let acc = composed::accumulator(x.dtype());
        // One row a channel, and back.
        let to_rows = |t: &Tensor| {
            let t = t.to_dtype(acc)?.contiguous()?;
            let t = t.reshape((outer, channels, inner))?.transpose(0, 1)?;
            t.contiguous()?.reshape((channels, outer * inner))
        };
        let weight = args.get(1).filter(|_| self.params.weight);
        let weight = weight.map(|w| w.to_dtype(acc)).transpose()?;
        let dy_rows = to_rows(dy)?.unsqueeze(0)?;
        let mut grads = match &self.source {
            Source::Own { center, eps } => {
                composed::backward(&to_rows(x)?, &dy_rows, weight.as_ref(), *center, *eps)?
            }
            Source::Given(stats) => {
                let column = |f: fn(&Stats) -> f64| {
                    let values: Vec<f64> = stats.iter().map(f).collect();
                    Tensor::from_vec(values, (channels, 1), x.device())?.to_dtype(acc)
                };
                let inv_std = column(|s| s.inv_std)?;
                let normal = to_rows(x)?
                    .broadcast_sub(&column(|s| s.mean.high)?)?
                    .broadcast_mul(&inv_std)?;
                let dy_rows = dy_rows.squeeze(0)?;
                let g = composed::scale_shift(&dy_rows.unsqueeze(0)?, weight.as_ref(), None)?;
                composed::Gradients {
                    dx: g.squeeze(0)?.broadcast_mul(&inv_std)?,
                    dweight: (&dy_rows * normal)?.sum(1)?,
                    dbias: dy_rows.sum(1)?,
                }
            }
        };
        grads.dx = grads
            .dx
            .reshape((channels, outer, inner))?
            .transpose(0, 1)?
            .contiguous()?;
        fused::shaped(args, self.params, grads)
    }
}
