//! Channels normalized over the batch and space, or by given statistics: batch norm.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Result, Tensor};

use candle_norm_support::messages;

use super::activation::Activation;
use super::composed;
use super::spread::{Affine, AffineGradients, Spread};
use super::synchronized::Synchronized;
use super::{Args, ChannelAxes, Composed, Computation, Gradients};

/// Where the statistics of the channels come from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// The batch, about the means of the channels or about zero.
    Own { center: bool },
    /// The caller.
    Given(Arc<FixedStatistics>),
    /// The batches of all ranks of a group.
    Synchronized(Arc<Synchronized>),
}

/// The mean and the variance of each channel, `[C]` each, which never change.
#[derive(Debug)]
pub(crate) struct FixedStatistics {
    mean: Tensor,
    var: Tensor,
    /// The form in which a backend takes them for an `eps`.
    prepared: OnceLock<(f64, Arc<dyn Any + Send + Sync>)>,
}

impl FixedStatistics {
    /// `mean` and `var` are contiguous, in memory that nothing else writes to.
    pub(crate) fn new([mean, var]: [Tensor; 2]) -> Self {
        Self {
            mean,
            var,
            prepared: OnceLock::new(),
        }
    }

    pub(crate) fn mean(&self) -> &Tensor {
        &self.mean
    }

    pub(crate) fn var(&self) -> &Tensor {
        &self.var
    }

    /// The result of `form`, which depends on the statistics and `eps` alone. The first one that is
    /// formed is kept; another type or `eps` is formed anew.
    pub(crate) fn prepared<T: Any + Send + Sync>(
        &self,
        eps: f64,
        form: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        if let Some((kept_eps, kept)) = self.prepared.get()
            && *kept_eps == eps
            && let Ok(kept) = kept.clone().downcast::<T>()
        {
            return Ok(kept);
        }
        let formed = Arc::new(form()?);
        let _ = self.prepared.set((eps, formed.clone()));
        Ok(formed)
    }
}

/// `y = (x − mean) / √(var + eps) · weight + bias` for each channel, over all samples.
#[derive(Debug, Clone)]
pub(crate) struct Channels {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    pub(crate) source: Source,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
    /// Of weight and bias.
    pub(crate) spread: Spread,
    /// Follows weight and bias.
    pub(crate) activation: Option<Activation>,
}

impl Channels {
    /// `x` is `[N, C, *]`, and not empty.
    pub(crate) fn of(layer: &'static str, x: &Tensor, source: Source, eps: f64) -> Self {
        Self {
            layer,
            axes: ChannelAxes::of(x),
            source,
            eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
            spread: Spread::Channel,
            activation: None,
        }
    }

    /// Weight, and bias, in the dtype that they are applied in.
    fn affine<'a>(&self, weight: Option<&'a Tensor>, bias: Option<&'a Tensor>) -> Affine<'a> {
        let (dims, along) = self.spread.along(self.axes);
        Affine {
            weight,
            bias,
            dims,
            along,
            activation: self.activation,
        }
    }

    /// Of `x` `[N, C, *]` that may be empty, as that of a rank may be.
    pub(crate) fn synchronized(
        layer: &'static str,
        x: &Tensor,
        by: Arc<Synchronized>,
        eps: f64,
    ) -> Self {
        let dims = x.dims();
        Self {
            layer,
            axes: ChannelAxes {
                outer: dims[0],
                channels: dims[1],
                inner: dims[2..].iter().product(),
            },
            source: Source::Synchronized(by),
            spread: Spread::Channel,
            activation: None,
            eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
        }
    }

    /// The number of values of a channel.
    pub(crate) fn values_per_channel(&self) -> f64 {
        (self.axes.outer * self.axes.inner) as f64
    }

    /// One channel in each row, in the accumulator's dtype.
    pub(super) fn by_channel(&self, x: &Tensor) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        x.to_dtype(composed::accumulator(x.dtype()))?
            .contiguous()?
            .reshape((outer, channels, inner))?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((channels, outer * inner))
    }

    /// The elements of rows of channels in the order of the input.
    pub(super) fn in_order(&self, rows: &Tensor) -> Result<Tensor> {
        rows.reshape((self.axes.channels, self.axes.outer, self.axes.inner))?
            .transpose(0, 1)?
            .contiguous()
    }

    /// Given statistics as a mean and a factor `1 / √(var + eps)`, formed in `dtype`, `[C, 1]`.
    fn factors(&self, given: &FixedStatistics, dtype: DType) -> Result<[Tensor; 2]> {
        let column = |s: &Tensor| s.to_dtype(dtype)?.reshape((self.axes.channels, 1));
        let std = (column(&given.var)? + self.eps)?.sqrt()?;
        Ok([column(&given.mean)?, std.recip()?])
    }
}

impl Channels {
    /// The gradients where weight and bias are spread wider than the channels, or an activation
    /// follows them.
    fn spread_gradients(
        &self,
        x: &Tensor,
        affine: Affine,
        dy: &Tensor,
    ) -> Result<Gradients<Tensor>> {
        let (rows, acc) = (self.by_channel(x)?, dy.dtype());
        let (dx, AffineGradients { dweight, dbias, .. }) = match &self.source {
            Source::Own { center } => {
                let standardized = composed::standardize(&rows, *center, self.eps)?;
                let grads = affine.gradients(&self.in_order(&standardized.y)?, dy)?;
                let g = self.by_channel(&grads.g)?;
                (composed::through(&standardized, &g, *center)?, grads)
            }
            Source::Given(given) => {
                let [mean, inv_std] = self.factors(given, DType::F64)?.map(|f| f.to_dtype(acc));
                let (mean, inv_std) = (mean?, inv_std?);
                let normal = rows.broadcast_sub(&mean)?.broadcast_mul(&inv_std)?;
                let grads = affine.gradients(&self.in_order(&normal)?, dy)?;
                (self.by_channel(&grads.g)?.broadcast_mul(&inv_std)?, grads)
            }
            Source::Synchronized(_) => {
                return messages::internal(self.layer, "one weight for each channel");
            }
        };
        Ok(Gradients {
            dx: self.in_order(&dx)?,
            dweight: Some(dweight),
            dbias: Some(dbias),
        })
    }
}

/// Factors of the forward in the accumulator's dtype, as [`FixedStatistics`] keep them.
struct ComposedFactors(DType, [Tensor; 2]);

impl Computation for Channels {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn backward_reads_bias(&self) -> bool {
        self.activation.is_some()
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let (x, channels) = (args.x, self.axes.channels);
        let acc = composed::accumulator(x.dtype());
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let (y, statistics) = match &self.source {
            Source::Synchronized(by) => return by.composed(self, args),
            Source::Own { center } => {
                let rows = self.by_channel(&composed::unshared(x)?)?;
                let standardized = composed::standardize(&rows, *center, self.eps)?;
                if self.spread != Spread::Channel || self.activation.is_some() {
                    let affine = self.affine(weight.as_ref(), bias.as_ref());
                    let y = affine.apply(&self.in_order(&standardized.y)?)?;
                    return Ok(Composed {
                        y: y.to_dtype(x.dtype())?.reshape(x.shape())?,
                        statistics: Some(standardized.statistics),
                    });
                }
                let y = standardized.y.unsqueeze(0)?;
                let y = composed::scale_shift(&y, weight.as_ref(), bias.as_ref())?;
                let y = self.in_order(&y.to_dtype(x.dtype())?)?;
                (y, Some(standardized.statistics))
            }
            Source::Given(given) => {
                let x = x.contiguous()?.to_dtype(acc)?;
                let x = x.reshape((self.axes.outer, channels, ()))?;
                let form = || Ok(ComposedFactors(acc, self.factors(given, acc)?));
                let mut factors = given.prepared(self.eps, form)?;
                if factors.0 != acc {
                    factors = Arc::new(form()?);
                }
                let [mean, inv_std] = &factors.1;
                let y = x.broadcast_sub(mean)?.broadcast_mul(inv_std)?;
                let affine = self.affine(weight.as_ref(), bias.as_ref());
                let y = affine.apply(&y)?;
                (y.to_dtype(args.x.dtype())?, None)
            }
        };
        let y = y.reshape(args.x.shape())?;
        Ok(Composed { y, statistics })
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let weight = args.weight.map(|w| w.to_dtype(acc)).transpose()?;
        if self.spread != Spread::Channel || self.activation.is_some() {
            let bias = args.bias.map(|b| b.to_dtype(acc)).transpose()?;
            let affine = self.affine(weight.as_ref(), bias.as_ref());
            return self.spread_gradients(args.x, affine, &dy.to_dtype(acc)?);
        }
        let (x, dy) = (self.by_channel(args.x)?, self.by_channel(dy)?);
        let mut grads = match &self.source {
            Source::Synchronized(by) => return by.composed_gradients(self, args, &dy),
            Source::Own { center } => {
                let dy = dy.unsqueeze(0)?;
                composed::backward(&x, &dy, weight.as_ref(), *center, self.eps)?
            }
            Source::Given(given) => {
                let factors = self.factors(given, DType::F64)?;
                let [mean, inv_std] = factors.map(|f| f.to_dtype(acc));
                let (mean, inv_std) = (mean?, inv_std?);
                let normal = x.broadcast_sub(&mean)?.broadcast_mul(&inv_std)?;
                let g = composed::scale_shift(&dy.unsqueeze(0)?, weight.as_ref(), None)?;
                Gradients {
                    dx: g.squeeze(0)?.broadcast_mul(&inv_std)?,
                    dweight: Some((&dy * normal)?.sum(1)?),
                    dbias: Some(dy.sum(1)?),
                }
            }
        };
        grads.dx = self.in_order(&grads.dx)?;
        Ok(grads)
    }
}
