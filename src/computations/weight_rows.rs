//! Rows of a weight brought to given lengths: weight norm.

use candle_core::{DType, Result, Tensor};

use super::composed;
use super::{Args, Composed, Computation, Gradients};

/// `w = g · v / ‖v‖` for each row of `len` elements of `v`, the input; `g` is the weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct WeightRows {
    pub(crate) len: usize,
}

impl Computation for WeightRows {
    fn layer(&self) -> &'static str {
        "WeightNorm"
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let v = args.x;
        let g = super::argument(self, args.weight)?;
        let acc = composed::accumulator(v.dtype());
        let rows = composed::kept(v)?.to_dtype(acc)?.reshape(((), self.len))?;
        let g = composed::kept(g)?.to_dtype(acc)?.flatten_all()?;
        let w = scaled_rows(&rows, &g)?.to_dtype(v.dtype())?;
        Ok(w.reshape(v.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dw: &Tensor) -> Result<Gradients<Tensor>> {
        let v = args.x;
        let g = super::argument(self, args.weight)?;
        let acc = composed::accumulator(v.dtype());
        let by_row = |t: &Tensor| t.to_dtype(acc)?.contiguous()?.reshape(((), self.len));
        let (rows, dw) = (by_row(v)?, by_row(dw)?);
        let num_rows = rows.dims()[0];
        // The direction of each row, whose derivative by itself is that of `scaled_rows` at length
        // one.
        let ones = Tensor::ones(num_rows, acc, v.device())?;
        let direction = scaled_rows(&rows, &ones)?;
        let dg = (&dw * &direction)?.sum_keepdim(1)?;
        let across = (dw - direction.broadcast_mul(&dg)?)?;
        let scale = row_scale(&rows)?;
        let scaled = rows.broadcast_div(&scale)?;
        let squares = scaled.sqr()?.sum_keepdim(1)?;
        let zero = squares.detach().eq(0.)?.to_dtype(acc)?;
        let inv_norm =
            ((squares + &zero)?.sqrt()?.recip()? * (1. - zero)?)?.broadcast_div(&scale)?;
        let factor = (inv_norm * g.to_dtype(acc)?.reshape((num_rows, 1))?)?;
        Ok(Gradients {
            dx: across.broadcast_mul(&factor)?,
            dweight: Some(dg),
            dbias: None,
        })
    }
}

/// `‖v‖` for each of the rows `[rows, len]`.
pub(crate) fn norms_of_rows(rows: &Tensor) -> Result<Tensor> {
    let scale = row_scale(rows)?;
    let unit = rows.broadcast_div(&scale)?;
    let norm = composed::Rows::new(&unit)?.sqr()?.sum()?.sqrt()?;
    norm * scale.flatten_all()?
}

/// Each row of `v` `[rows, len]` at length `g` `[rows]`.
fn scaled_rows(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let v = v.broadcast_div(&row_scale(v)?)?;
    let rows = composed::Rows::new(&v)?;
    let squares = rows.sqr()?.sum()?;
    // A zero row has no direction: it divides by one instead of zero, and is cut off from weight
    // and gradient.
    let zero = squares.detach().eq(0.)?.to_dtype(squares.dtype())?;
    let kept = (1. - &zero)?;
    let inv_norm = ((squares + zero)?.sqrt()?.recip()? * kept)?;
    rows.times(&(inv_norm * g)?)?.join()
}

/// A detached divisor `[rows, 1]` that brings the largest value of each row to 1, so that squares
/// neither over- nor underflow; 1 for rows that are zero or not finite.
fn row_scale(v: &Tensor) -> Result<Tensor> {
    let largest = v.detach().abs()?.max_keepdim(1)?;
    let bound = match v.dtype() {
        DType::F64 => f64::MAX,
        _ => f32::MAX as f64,
    };
    let usable = (largest.gt(0.)? * largest.le(bound)?)?;
    usable.where_cond(&largest, &largest.ones_like()?)
}
