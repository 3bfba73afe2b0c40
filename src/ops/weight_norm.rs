//! A weight as a magnitude times a direction.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::{WeightRows, composed, norms_of_rows};
use crate::graph;

/// The weight `g · v / ‖v‖`, the norm taken over all axes of `v` but `dim`, or over all of it for
/// `dim: None`.
///
/// Salimans and Kingma, 2016, <https://arxiv.org/abs/1602.07868>. The weight is as independent of
/// the scale of `v` as the formula says: norms that would over- or underflow do not. Where `v` is
/// zero, the weight and its gradients are zero.
///
/// # Shapes
/// `v`: any; `g`: of the rank of `v` with size 1 on all axes but `dim`, or a scalar for `dim:
/// None`; the result has the shape and dtype of `v` and is contiguous.
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
    if v.elem_count() == 0 {
        return graph::empty(layer, v, &[Some(g)]);
    }
    let dim = dim.unwrap_or(0);
    let num_rows = g.elem_count();
    // Rows along the axis `dim`: [dim, everything else].
    let by_row = match num_rows {
        1 => v.contiguous()?,
        _ => v.transpose(0, dim)?.contiguous()?,
    };
    let len = v.elem_count() / num_rows;
    let rows = WeightRows {
        layer,
        len,
        least: 0.,
    };
    let w = graph::apply(rows, &by_row, Some(g), None)?;
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
    norms_of_rows(&rows)?.to_dtype(v.dtype())?.reshape(shape)
}
