//! Rows brought to given lengths: weight norm, and scale norm.

use candle_core::{DType, Result, Tensor};

use super::composed;
use super::{Args, Composed, Computation, Gradients};

/// `w = g · v / max(‖v‖, least)` for each row of `len` elements of `v`, the input; `g` is the
/// weight: one for each row, or one for all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct WeightRows {
    /// The name that messages start with.
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
    /// Zero where a row of any length but zero has a direction; a row of zeros then has the weight
    /// and the gradient zero.
    pub(crate) least: f64,
}

impl Computation for WeightRows {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let v = args.x;
        let g = super::argument(self, args.weight)?;
        let acc = composed::accumulator(v.dtype());
        let rows = composed::kept(v)?.to_dtype(acc)?.reshape(((), self.len))?;
        let g = composed::kept(g)?.to_dtype(acc)?.flatten_all()?;
        let num_rows = rows.dims()[0];
        let w = if g.elem_count() == num_rows {
            self.scaled_rows(&rows, Some(&g))?
        } else {
            let units = self.scaled_rows(&rows, None)?;
            composed::scale_shift(&units.reshape((num_rows, 1, self.len))?, Some(&g), None)?
        };
        Ok(w.to_dtype(v.dtype())?.reshape(v.shape())?.into())
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
        let direction = self.scaled_rows(&rows, None)?;
        let dg = (&dw * &direction)?.sum_keepdim(1)?;
        let scale = row_scale(&rows)?;
        let scaled = rows.broadcast_div(&scale)?;
        let squares = scaled.sqr()?.sum_keepdim(1)?;
        let along = match self.short(&squares, &scale)? {
            Some(short) => (&dg * short.eq(0u8)?.to_dtype(acc)?)?,
            None => dg.clone(),
        };
        let across = (dw - direction.broadcast_mul(&along)?)?;
        let inv_norm = self.inv_norm(&squares, &scale)?.broadcast_div(&scale)?;
        let factor = inv_norm.broadcast_mul(&g.to_dtype(acc)?.reshape(((), 1))?)?;
        let dg = match g.elem_count() == num_rows {
            true => dg,
            false => composed::Rows::new(&dg.reshape((1, num_rows))?)?.sum()?,
        };
        Ok(Gradients {
            dx: across.broadcast_mul(&factor)?,
            dweight: Some(dg),
            dbias: None,
        })
    }
}

impl WeightRows {
    /// Each row of `v` `[rows, len]` at length `g` `[rows]`, or one.
    fn scaled_rows(&self, v: &Tensor, g: Option<&Tensor>) -> Result<Tensor> {
        let scale = row_scale(v)?;
        let rows = composed::Rows::new(&v.broadcast_div(&scale)?)?;
        let inv_norm = self.inv_norm(&rows.sqr()?.sum()?, &scale.flatten_all()?)?;
        match g {
            Some(g) => rows.times(&(inv_norm * g)?)?.join(),
            None => rows.times(&inv_norm)?.join(),
        }
    }

    /// One over the length of each row, from the sum of the squares of its elements over `scale`,
    /// in multiples of one over `scale`.
    fn inv_norm(&self, squares: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let inv_norm = Self::own_inverse(squares)?;
        match self.short(squares, scale)? {
            Some(short) => short.where_cond(&(scale / self.least)?, &inv_norm),
            None => Ok(inv_norm),
        }
    }

    /// One over the root of `squares`; zero, without a gradient, where that is zero.
    pub(super) fn own_inverse(squares: &Tensor) -> Result<Tensor> {
        // A zero row has no direction: it divides by one instead of zero, and is cut off from
        // weight and gradient.
        let zero = squares.detach().eq(0.)?.to_dtype(squares.dtype())?;
        let kept = (1. - &zero)?;
        (squares + zero)?.sqrt()?.recip()? * kept
    }

    /// The rows that are shorter than the least length, where there is one.
    fn short(&self, squares: &Tensor, scale: &Tensor) -> Result<Option<Tensor>> {
        if self.least == 0. {
            return Ok(None);
        }
        let norms = (squares.detach().sqrt()? * scale)?;
        norms.lt(self.least).map(Some)
    }
}

/// `‖v‖` for each of the rows `[rows, len]`.
pub(crate) fn norms_of_rows(rows: &Tensor) -> Result<Tensor> {
    let scale = row_scale(rows)?;
    let unit = rows.broadcast_div(&scale)?;
    let norm = composed::Rows::new(&unit)?.sqr()?.sum()?.sqrt()?;
    norm * scale.flatten_all()?
}

/// A detached divisor `[rows, 1]` that brings the largest value of each row to 1, so that squares
/// neither over- nor underflow; 1 for rows that are zero or not finite.
pub(super) fn row_scale(v: &Tensor) -> Result<Tensor> {
    let largest = v.detach().abs()?.max_keepdim(1)?;
    let bound = match v.dtype() {
        DType::F64 => f64::MAX,
        _ => f32::MAX as f64,
    };
    let usable = (largest.gt(0.)? * largest.le(bound)?)?;
    usable.where_cond(&largest, &largest.ones_like()?)
}
