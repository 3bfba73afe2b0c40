//! Softmax of rows, and its logarithm.

use candle_core::{Result, Tensor};

use super::composed;
use super::{Args, Composed, Computation, Gradients};

/// `exp(x) / Σ exp(x)` for each row of `len` elements of the input, or the logarithm of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Softmax {
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
    pub(crate) log: bool,
}

impl Softmax {
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let acc = composed::accumulator(x.dtype());
        x.contiguous()?.to_dtype(acc)?.reshape(((), self.len))
    }
}

impl Computation for Softmax {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let rows = self.rows(&composed::unshared(args.x)?)?;
        let y = match self.log {
            true => composed::log_softmax(&rows)?,
            false => composed::softmax(&rows)?,
        };
        Ok(y.to_dtype(args.x.dtype())?.reshape(args.x.shape())?.into())
    }

    /// `dx = y · (dy − Σ dy · y)`, and of the logarithm `dx = dy − y · Σ dy`.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let y = composed::softmax(&self.rows(args.x)?)?;
        let dy = dy.contiguous()?.to_dtype(y.dtype())?.reshape(y.shape())?;
        let dx = match self.log {
            true => (&dy - y.broadcast_mul(&dy.sum_keepdim(1)?)?)?,
            false => {
                let along = (&dy * &y)?.sum_keepdim(1)?;
                (y * dy.broadcast_sub(&along)?)?
            }
        };
        Ok(Gradients {
            dx,
            dweight: None,
            dbias: None,
        })
    }
}
