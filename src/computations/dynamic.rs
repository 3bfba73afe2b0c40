//! A bounded function of scaled values in place of a normalization: dynamic tanh and its kin.

use candle_core::{Result, Tensor};

use super::composed;
use super::{Args, ChannelAxes, Composed, Computation, Gradients, argument};

/// Odd function of bounded values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Squash {
    /// The hyperbolic tangent: DyT.
    #[default]
    Tanh,
    /// The error function: Derf.
    Erf,
}

/// `y = f(alpha · x + shift) · weight + bias` with one alpha and shift, and a weight and a bias for
/// each channel.
///
/// The weight of the computation has all numbers in a line: alpha, shift, the weights, the biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dynamic {
    pub(crate) layer: &'static str,
    /// Channels are on the last axis, `[outer, 1, channels]`, or on the one in the middle.
    pub(crate) axes: ChannelAxes,
    pub(crate) channels_first: bool,
    pub(crate) squash: Squash,
}

/// Numbers of a line, taken apart.
struct Parts {
    alpha: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
}

impl Dynamic {
    /// The number of channels.
    pub(crate) fn channels(&self) -> usize {
        match self.channels_first {
            true => self.axes.channels,
            false => self.axes.inner,
        }
    }

    fn parts(&self, line: &Tensor) -> Result<Parts> {
        let c = self.channels();
        Ok(Parts {
            alpha: line.narrow(0, 0, 1)?,
            shift: line.narrow(0, 1, 1)?,
            weight: line.narrow(0, 2, c)?,
            bias: line.narrow(0, 2 + c, c)?,
        })
    }

    /// `t · weight + bias` of each channel, in the shape of `t`.
    fn by_channel(&self, t: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let dims = match self.channels_first {
            true => (self.axes.outer, self.axes.channels, self.axes.inner),
            false => (self.axes.outer * self.axes.channels, self.axes.inner, 1),
        };
        composed::scale_shift(&t.reshape(dims)?, Some(weight), bias)?.reshape(t.shape())
    }

    /// The sum of `t` over each channel.
    fn summed(&self, t: &Tensor) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        match self.channels_first {
            true => t.reshape((outer, channels, inner))?.sum(2)?.sum(0),
            false => t.reshape((outer * channels, inner))?.sum(0),
        }
    }

    /// The argument of the function.
    fn inner(&self, x: &Tensor, parts: &Parts) -> Result<Tensor> {
        let line = x.reshape((1, 1, x.elem_count()))?;
        composed::scale_shift(&line, Some(&parts.alpha), Some(&parts.shift))?.reshape(x.shape())
    }

    fn value(&self, u: &Tensor) -> Result<Tensor> {
        match self.squash {
            Squash::Tanh => u.tanh(),
            Squash::Erf => u.erf(),
        }
    }

    fn slope(&self, u: &Tensor) -> Result<Tensor> {
        match self.squash {
            Squash::Tanh => u.tanh()?.sqr()?.affine(-1., 1.),
            Squash::Erf => u.sqr()?.neg()?.exp()? * std::f64::consts::FRAC_2_SQRT_PI,
        }
    }
}

impl Computation for Dynamic {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let acc = composed::accumulator(args.x.dtype());
        let x = composed::unshared(args.x)?.to_dtype(acc)?;
        let parts = self.parts(&composed::kept(argument(self, args.weight)?)?)?;
        let value = self.value(&self.inner(&x, &parts)?)?;
        let y = self.by_channel(&value, &parts.weight, Some(&parts.bias))?;
        Ok(y.to_dtype(args.x.dtype())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let wide = |t: &Tensor| t.contiguous()?.to_dtype(acc);
        let (x, dy) = (wide(args.x)?, wide(dy)?);
        let parts = self.parts(&wide(argument(self, args.weight)?)?)?;
        let u = self.inner(&x, &parts)?;
        let dvalue = self.by_channel(&dy, &parts.weight, None)?;
        let du = (dvalue * self.slope(&u)?)?;
        let line = du.reshape((1, 1, x.elem_count()))?;
        let dx = composed::scale_shift(&line, Some(&parts.alpha), None)?;
        let all = |t: Tensor| t.sum_all()?.reshape(1);
        let dline = [
            all((&du * &x)?)?,
            all(du)?,
            self.summed(&(&dy * self.value(&u)?)?)?,
            self.summed(&dy)?,
        ];
        Ok(Gradients {
            dx,
            dweight: Some(Tensor::cat(&dline, 0)?),
            dbias: None,
        })
    }
}
