//! Planes scaled and shifted, each by coefficients of its own.

use candle_core::{Result, Tensor};

use super::composed;
use super::{Args, ChannelAxes, Composed, Computation, Gradients, argument};

/// `y = (x − about) · scale + shift + bias` for each channel of each sample.
///
/// The weight holds the coefficients, `[3, N · C]`: scales, shifts, and numbers near the means of
/// the planes, which keep the digits of large means and get no gradient. The bias has one value for
/// each channel. Coefficients wider than `x` are summed before they are rounded to its accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScaleShift {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
}

impl ScaleShift {
    /// The number of planes.
    pub(crate) fn planes(&self) -> usize {
        self.axes.outer * self.axes.channels
    }

    /// `x` with a plane in each row, in `wide`, less `about`; the rows of scales and shifts.
    fn parts(&self, x: &Tensor, coefficients: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
        let (planes, wide) = (self.planes(), coefficients.dtype());
        let row = |i| coefficients.narrow(0, i, 1)?.reshape(planes);
        let about = row(2)?.detach().reshape((planes, 1))?;
        let x = x.contiguous()?.to_dtype(wide)?.reshape((planes, ()))?;
        Ok((x.broadcast_sub(&about)?, [row(0)?, row(1)?]))
    }
}

impl Computation for ScaleShift {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let coefficients = argument(self, args.weight)?;
        let (x, [scale, mut shift]) = self.parts(args.x, coefficients)?;
        if let Some(bias) = args.bias {
            let (samples, channels) = (self.axes.outer, self.axes.channels);
            let bias = bias.to_dtype(shift.dtype())?.reshape((1, channels))?;
            shift = shift.reshape((samples, channels))?.broadcast_add(&bias)?;
            shift = shift.reshape(self.planes())?;
        }
        let y = composed::scale_shift(&x.unsqueeze(0)?, Some(&scale), Some(&shift))?;
        Ok(y.to_dtype(args.x.dtype())?.reshape(args.x.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (x, [scale, _]) = self.parts(args.x, argument(self, args.weight)?)?;
        let planes = self.planes();
        let dy = dy.contiguous()?.to_dtype(x.dtype())?.reshape(x.shape())?;
        let dshift = dy.sum(1)?;
        let dscale = (&dy * &x)?.sum(1)?;
        let dbias = dshift.reshape((self.axes.outer, self.axes.channels))?;
        Ok(Gradients {
            dx: dy.broadcast_mul(&scale.reshape((planes, 1))?)?,
            dweight: Some(Tensor::stack(
                &[&dscale, &dshift, &dshift.zeros_like()?],
                0,
            )?),
            dbias: Some(dbias.sum(0)?),
        })
    }
}
