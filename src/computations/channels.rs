//! Channels normalized over the batch and space, or by given statistics: batch norm.

use candle_core::{DType, Result, Tensor};

use super::composed;
use super::{Args, ChannelAxes, Composed, Computation, Gradients};

/// Where the statistics of the channels come from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// The batch, about the means of the channels or about zero.
    Own { center: bool },
    /// The caller: the mean and the variance of each channel, `[C]` each, contiguous and in memory
    /// that nothing else writes to.
    Given { mean: Tensor, var: Tensor },
}

/// `y = (x − mean) / √(var + eps) · weight + bias` for each channel, over all samples.
#[derive(Debug, Clone)]
pub(crate) struct Channels {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    pub(crate) source: Source,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
}

impl Channels {
    /// `x` is `[N, C, *]`, and not empty.
    pub(crate) fn of(layer: &'static str, x: &Tensor, source: Source, eps: f64) -> Self {
        Self {
            layer,
            axes: ChannelAxes::of(x),
            source,
            eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
        }
    }

    /// One channel in each row, in the accumulator's dtype.
    fn by_channel(&self, x: &Tensor) -> Result<Tensor> {
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
    fn in_order(&self, rows: &Tensor) -> Result<Tensor> {
        rows.reshape((self.axes.channels, self.axes.outer, self.axes.inner))?
            .transpose(0, 1)?
            .contiguous()
    }

    /// Given statistics as a mean and a factor `1 / √(var + eps)`, formed in `dtype`, of shape `dims`.
    fn factors(
        &self,
        [mean, var]: [&Tensor; 2],
        dtype: DType,
        dims: &[usize],
    ) -> Result<[Tensor; 2]> {
        let [mean, var] = [mean, var].map(|s| s.to_dtype(dtype)?.reshape(dims));
        Ok([mean?, (var? + self.eps)?.sqrt()?.recip()?])
    }
}

impl Computation for Channels {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let (x, channels) = (args.x, self.axes.channels);
        let acc = composed::accumulator(x.dtype());
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let (y, statistics) = match &self.source {
            Source::Own { center } => {
                let rows = self.by_channel(&composed::unshared(x)?)?;
                let standardized = composed::standardize(&rows, *center, self.eps)?;
                let y = standardized.y.unsqueeze(0)?;
                let y = composed::scale_shift(&y, weight.as_ref(), bias.as_ref())?;
                let y = self.in_order(&y.to_dtype(x.dtype())?)?;
                (y, Some(standardized.statistics))
            }
            Source::Given { mean, var } => {
                let x = x.contiguous()?.to_dtype(acc)?;
                let x = x.reshape((self.axes.outer, channels, ()))?;
                let [mean, inv_std] = self.factors([mean, var], acc, &[1, channels, 1])?;
                let y = x.broadcast_sub(&mean)?.broadcast_mul(&inv_std)?;
                let y = composed::scale_shift(&y, weight.as_ref(), bias.as_ref())?;
                (y.to_dtype(args.x.dtype())?, None)
            }
        };
        let y = y.reshape(args.x.shape())?;
        Ok(Composed { y, statistics })
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let weight = args.weight.map(|w| w.to_dtype(acc)).transpose()?;
        let (x, dy) = (self.by_channel(args.x)?, self.by_channel(dy)?);
        let mut grads = match &self.source {
            Source::Own { center } => {
                let dy = dy.unsqueeze(0)?;
                composed::backward(&x, &dy, weight.as_ref(), *center, self.eps)?
            }
            Source::Given { mean, var } => {
                let dims = [self.axes.channels, 1];
                let factors = self.factors([mean, var], DType::F64, &dims)?;
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
