//! The lengths of rows as tensors of the graph.

use candle_core::{DType, Result, Shape, Tensor};

use super::composed;
use super::weight_rows::{WeightRows, row_scale};
use super::{Args, Composed, Computation, Gradients};

/// The root of the sum of squares of each row of the input, `[rows]` in the accumulator's dtype.
/// A row of zeros has the gradient zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
}

impl Lengths {
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let acc = composed::accumulator(x.dtype());
        x.to_dtype(acc)?.contiguous()?.reshape(((), self.len))
    }
}

impl Computation for Lengths {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn output(&self, x: &Shape, dtype: DType) -> (Shape, DType) {
        let rows = x.elem_count() / self.len;
        (Shape::from(rows), composed::accumulator(dtype))
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let rows = self.rows(&composed::unshared(args.x)?)?;
        let scale = row_scale(&rows)?;
        let scaled = composed::Rows::new(&rows.broadcast_div(&scale)?)?;
        let squares = scaled.sqr()?.sum()?;
        // The root of zero has no derivative, and NaN in place of one.
        let zero = squares.detach().eq(0.)?.to_dtype(squares.dtype())?;
        let norm = ((squares + &zero)?.sqrt()? - zero)?;
        Ok((norm * scale.flatten_all()?)?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let rows = self.rows(args.x)?;
        let scale = row_scale(&rows)?;
        let scaled = rows.broadcast_div(&scale)?;
        let inverse = WeightRows::own_inverse(&scaled.sqr()?.sum_keepdim(1)?)?;
        let factor = (dy.to_dtype(rows.dtype())?.reshape(((), 1))? * inverse)?;
        Ok(Gradients {
            dx: scaled.broadcast_mul(&factor)?,
            dweight: None,
            dbias: None,
        })
    }
}
