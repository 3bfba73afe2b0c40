//! A weight as a magnitude times a direction.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::fused::{self, Arg, FusedOp, Native, elements, widened, with_native};
use super::{Route, check, composed, route};
use crate::kernels::Length;

/// The weight `g · v / ‖v‖`, the norm taken over all axes of `v` but `dim`, or over all of it for `dim: None`.
///
/// Salimans and Kingma, 2016, <https://arxiv.org/abs/1602.07868>. The weight is as independent of the scale of `v` as
/// the formula says: norms that would over- or underflow do not. Where `v` is zero, the weight and its
/// gradients are zero.
///
/// # Shapes
/// `v`: any; `g`: of the rank of `v` with size 1 on all axes but `dim`, or a scalar for `dim: None`; the result has the
/// shape and dtype of `v` and is contiguous.
///
/// # Errors
/// A `dim` that `v` does not have, a `g` that does not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let v = Tensor::new(&[[3f64, 4.]], &Device::Cpu)?;
/// let g = Tensor::new(&[[10f64]], &Device::Cpu)?;
/// let w = candle_norm::ops::weight_norm(&v, &g, Some(0))?;
/// assert!((w.to_vec2::<f64>()?[0][1] - 8.).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn weight_norm(v: &Tensor, g: &Tensor, dim: Option<usize>) -> Result<Tensor> {
    let layer = "WeightNorm";
    check::dim(layer, dim, v.dims())?;
    let g_shape = magnitude_shape(v.dims(), dim);
    let magnitude = check::Param {
        name: "g",
        value: g,
        shape: &g_shape,
    };
    check::input(layer, v, &[magnitude])?;
    let route = route(layer, v)?;
    if v.elem_count() == 0 {
        return composed::empty(v, &[Some(g)]);
    }
    let dim = dim.unwrap_or(0);
    let num_rows = g.elem_count();
    // Rows along the axis `dim`: [dim, everything else].
    let by_row = match num_rows {
        1 => v.contiguous()?,
        _ => v.transpose(0, dim)?.contiguous()?,
    };
    let w = match route {
        Route::Fused => {
            let op = Rows {
                len: v.elem_count() / num_rows,
                lengths: OnceLock::new(),
            };
            fused::apply(op, &by_row, &[Some(g)])?.0
        }
        Route::Composed => {
            let acc = composed::accumulator(v.dtype());
            let rows = composed::kept(&by_row)?.to_dtype(acc)?;
            let rows = rows.reshape((num_rows, ()))?;
            let g = composed::kept(g)?.to_dtype(acc)?.reshape(num_rows)?;
            let w = scaled_rows(&rows, &g)?.to_dtype(v.dtype())?;
            w.reshape(by_row.shape())?
        }
    };
    match num_rows {
        1 => Ok(w),
        _ => w.transpose(0, dim)?.contiguous(),
    }
}

/// The shape of the magnitudes of a weight of shape `dims`.
pub(crate) fn magnitude_shape(dims: &[usize], dim: Option<usize>) -> Vec<usize> {
    match dim {
        None => vec![],
        Some(d) => (0..dims.len())
            .map(|axis| if axis == d { dims[axis] } else { 1 })
            .collect(),
    }
}

/// `‖v‖` for each row of `v` along `dim`, in the shape of the magnitudes.
pub(crate) fn norms(v: &Tensor, dim: Option<usize>) -> Result<Tensor> {
    let shape = magnitude_shape(v.dims(), dim);
    let acc = composed::accumulator(v.dtype());
    if v.elem_count() == 0 {
        return Tensor::zeros(shape, v.dtype(), v.device());
    }
    let num_rows = shape.iter().product::<usize>();
    let by_row = match dim {
        Some(d) => v.transpose(0, d)?,
        None => v.clone(),
    };
    let rows = by_row
        .contiguous()?
        .to_dtype(acc)?
        .reshape((num_rows, ()))?;
    let scale = row_scale(&rows)?;
    let unit = rows.broadcast_div(&scale)?;
    let norm = composed::Rows::new(&unit)?.sqr()?.sum()?.sqrt()?;
    (norm * scale.flatten_all()?)?
        .to_dtype(v.dtype())?
        .reshape(shape)
}

/// Each row of `v` `[rows, len]` at length `g` `[rows]`.
fn scaled_rows(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let v = v.broadcast_div(&row_scale(v)?)?;
    let rows = composed::Rows::new(&v)?;
    let squares = rows.sqr()?.sum()?;
    // A zero row has no direction: it divides by one instead of zero, and is cut off from weight and gradient.
    let zero = squares.detach().eq(0.)?.to_dtype(squares.dtype())?;
    let kept = (1. - &zero)?;
    let inv_norm = ((squares + zero)?.sqrt()?.recip()? * kept)?;
    rows.times(&(inv_norm * g)?)?.join()
}

/// A detached divisor `[rows, 1]` that brings the largest value of each row to 1, so that squares neither over- nor
/// underflow; 1 for rows that are zero or not finite.
fn row_scale(v: &Tensor) -> Result<Tensor> {
    let largest = v.detach().abs()?.max_keepdim(1)?;
    let bound = match v.dtype() {
        DType::F64 => f64::MAX,
        _ => f32::MAX as f64,
    };
    let usable = (largest.gt(0.)? * largest.le(bound)?)?;
    usable.where_cond(&largest, &largest.ones_like()?)
}

/// Weight norm of the rows of a contiguous tensor as a node of the graph.
struct Rows {
    len: usize,
    lengths: OnceLock<Vec<Length>>,
}

impl Rows {
    fn forward_of<T: Native>(&self, args: &[Arg]) -> Result<CpuStorage> {
        let (v, g) = (elements::<T>(args[0])?, widened::<T::Acc>(args[1])?);
        let (w, lengths) = T::weight_forward(v, &g, self.len);
        let _ = self.lengths.set(lengths);
        Ok(T::to_cpu_storage_owned(w))
    }

    fn backward_of<T: Native>(&self, args: &[Arg]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let (v, dw) = (elements::<T>(args[0])?, elements(args[1])?);
        let g = widened::<T::Acc>(args[2])?;
        let lengths = fused::saved(self.name(), &self.lengths)?;
        let (dv, dg) = T::weight_backward(v, dw, &g, lengths, self.len);
        Ok((T::to_cpu_storage_owned(dv), vec![dg]))
    }
}

impl FusedOp for Rows {
    fn name(&self) -> &'static str {
        "WeightNorm"
    }

    fn forward(&self, args: &[Arg]) -> Result<CpuStorage> {
        with_native!(fused::dtype(&args[0]), self.name(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, args: &[Arg], _: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        with_native!(fused::dtype(&args[0]), self.name(), T => self.backward_of::<T>(args))
    }

    fn backward_composed(&self, args: &[&Tensor], dw: &Tensor) -> Result<Vec<Tensor>> {
        let (v, g) = (args[0], args[1]);
        let acc = composed::accumulator(v.dtype());
        let by_row = |t: &Tensor| t.to_dtype(acc)?.contiguous()?.reshape(((), self.len));
        let (rows, dw) = (by_row(v)?, by_row(dw)?);
        let num_rows = rows.dims()[0];
        // The direction of each row, whose derivative by itself is that of `scaled_rows` at length one.
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
        let dv = across.broadcast_mul(&factor)?;
        Ok(vec![
            dv.reshape(v.shape())?.to_dtype(v.dtype())?,
            dg.reshape(g.shape())?.to_dtype(g.dtype())?,
        ])
    }
}
