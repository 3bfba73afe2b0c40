//! A branch that is scaled and joins a residual: LayerScale, and the gates of AdaLN-Zero.

use candle_core::{Result, Tensor};

use super::composed;
use super::{Args, ChannelAxes, Composed, Computation, Gradients, argument};

/// Places that a weight has one value for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Places {
    /// Those of one index of the last axis.
    Column,
    /// Those of one index of the last axis in one sample.
    SampleAndColumn,
    /// Those of one channel.
    Channel,
    /// Those of one channel in one sample.
    SampleAndChannel,
}

/// Meaning of the argument after the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Third {
    /// A shift for the same places as the weight, if there is one.
    Shift,
    /// A tensor like the input.
    Residual,
}

/// `y = x · weight + shift`, or `y = residual + x · weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScaleAdd {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    pub(crate) places: Places,
    pub(crate) third: Third,
}

impl ScaleAdd {
    /// `x · weight + shift`, in the shape of `x`.
    fn scaled(&self, x: &Tensor, weight: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        let weight = weight.flatten_all()?;
        let shift = shift.map(Tensor::flatten_all).transpose()?;
        let apply = |x: Tensor| composed::scale_shift(&x, Some(&weight), shift.as_ref());
        let y = match self.places {
            Places::Column => apply(x.reshape((outer * channels, inner, 1))?)?,
            Places::Channel => apply(x.reshape((outer, channels, inner))?)?,
            Places::SampleAndChannel => apply(x.reshape((1, outer * channels, inner))?)?,
            Places::SampleAndColumn => {
                let transposed_x = x.reshape((outer, channels, inner))?.transpose(1, 2)?;
                let transposed_x =
                    transposed_x
                        .contiguous()?
                        .reshape((1, outer * inner, channels))?;
                let y = apply(transposed_x)?.reshape((outer, inner, channels))?;
                y.transpose(1, 2)?.contiguous()?
            }
        };
        y.reshape(x.shape())
    }

    /// The sum of `t` over the places of each value of the weight.
    fn summed(&self, t: &Tensor) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        match self.places {
            Places::Column => t.reshape((outer * channels, inner))?.sum(0),
            Places::Channel => t.reshape((outer, channels, inner))?.sum(2)?.sum(0),
            Places::SampleAndChannel => t.reshape((outer * channels, inner))?.sum(1),
            Places::SampleAndColumn => t.reshape((outer, channels, inner))?.sum(1),
        }
    }
}

impl Computation for ScaleAdd {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let acc = composed::accumulator(args.x.dtype());
        let x = composed::unshared(args.x)?.to_dtype(acc)?;
        let weight = composed::kept(argument(self, args.weight)?)?.to_dtype(acc)?;
        let third = args
            .bias
            .map(|t| t.contiguous()?.to_dtype(acc))
            .transpose()?;
        let y = match self.third {
            Third::Shift => self.scaled(&x, &weight, third.as_ref())?,
            Third::Residual => (argument(self, third)? + self.scaled(&x, &weight, None)?)?,
        };
        Ok(y.to_dtype(args.x.dtype())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let wide = |t: &Tensor| t.contiguous()?.to_dtype(acc);
        let (x, dy) = (wide(args.x)?, wide(dy)?);
        let weight = wide(argument(self, args.weight)?)?;
        let dthird = match self.third {
            Third::Shift => self.summed(&dy)?,
            Third::Residual => dy.clone(),
        };
        Ok(Gradients {
            dx: self.scaled(&dy, &weight, None)?,
            dweight: Some(self.summed(&(&dy * &x)?)?),
            dbias: Some(dthird),
        })
    }
}
