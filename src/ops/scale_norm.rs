//! Rows at one common length.

use candle_core::{Result, Shape, Tensor};

use super::check;
use super::row_norm::{RowLayout, check_rows};
use crate::computations::{WeightRows, composed};
use crate::graph;

const LAYER: &str = "ScaleNorm";

/// Scale normalization over the trailing axes `normalized_shape`: every row at the length `weight`.
///
/// `y = weight · x / max(‖x‖, eps)`, the norm taken over `normalized_shape` for each row (Nguyen
/// and Salazar, 2019, <https://arxiv.org/abs/1910.05895>). A row that is shorter than `eps` is
/// divided by `eps`, so that it goes to zero with its length.
///
/// # Shapes
/// `x`: `[*, normalized_shape]`; `weight`: `[1]`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// An input that does not end in `normalized_shape`, a weight that does not fit it, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[3f64, 4.], [0., 0.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[10f64], &Device::Cpu)?;
/// let y = candle_norm::ops::scale_norm(&x, 2, &weight, 1e-5)?;
/// assert!((y.get(0)?.to_vec1::<f64>()?[1] - 8.).abs() < 1e-12);
/// assert_eq!(y.get(1)?.to_vec1::<f64>()?, [0., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn scale_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    scale_norm_by(x, normalized_shape.into().dims(), weight, eps, false)
}

/// [`scale_norm`], of the channels of each position of `[N, C, *]` if they come first.
pub(crate) fn scale_norm_by(
    x: &Tensor,
    normalized_shape: &[usize],
    weight: &Tensor,
    eps: f64,
    channels_first: bool,
) -> Result<Tensor> {
    check::eps(LAYER, eps)?;
    check_rows(LAYER, x, normalized_shape, channels_first)?;
    let length = check::Param {
        name: "weight",
        value: weight,
        shape: &[1],
    };
    check::input(LAYER, x, &[length])?;
    if x.elem_count() == 0 {
        return graph::empty(LAYER, x, &[Some(weight)]);
    }
    let layout = RowLayout::new(x, normalized_shape, channels_first);
    let computation = WeightRows {
        layer: LAYER,
        len: layout.len,
        least: composed::eps_in(composed::accumulator(x.dtype()), eps),
    };
    let y = graph::apply(computation, &layout.rows(x)?, Some(weight), None)?;
    layout.restored(&y)
}
