//! A residual connection and the norm after it in one sweep.

use candle_core::{Result, Shape, Tensor, bail};

use super::check;
use super::modulation::Scaling;
use super::row_norm::{RmsOptions, RowLayout, RowNorm, checked, row_norm};
use crate::computations::composed;
use crate::graph;

/// The rows of `x + residual`, normalized as `norm` says, and the sum.
pub(crate) fn add_row_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<(Tensor, Tensor)> {
    checked(x, normalized_shape, weight, bias, norm)?;
    check_residual(norm.layer, residual, x)?;
    if x.elem_count() == 0 {
        let sum = composed::anchored(&x.contiguous()?, &[residual])?;
        return Ok((graph::empty(norm.layer, &sum, &[weight, bias])?, sum));
    }
    if norm.activation.is_some() {
        return add_and_activate(
            x,
            residual,
            normalized_shape,
            Scaling::new(weight, bias),
            norm,
        );
    }
    let layout = RowLayout::new(x, normalized_shape, norm.channels_first);
    let computation = norm.computation(layout.len, x.dtype());
    let (x, residual) = (layout.rows(x)?, layout.rows(residual)?);
    let (y, sum) = graph::apply_added(computation, &x, &residual, weight, bias)?;
    Ok((layout.restored(&y)?, layout.restored(&sum)?))
}

/// [`add_row_norm`] with an activation: the sum is a pass of its own, and not rounded before the
/// norm either.
fn add_and_activate(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: &[usize],
    scaling: Scaling,
    norm: &RowNorm,
) -> Result<(Tensor, Tensor)> {
    let (dtype, acc) = (x.dtype(), composed::accumulator(x.dtype()));
    let wide = |p: Option<&Tensor>| p.map(|p| p.to_dtype(acc)).transpose();
    let (weight, bias) = (wide(scaling.weight)?, wide(scaling.bias)?);
    let scaling = Scaling::new(weight.as_ref(), bias.as_ref());
    let sum = (x.to_dtype(acc)? + residual.to_dtype(acc)?)?;
    let y = row_norm(&sum, normalized_shape, scaling, norm)?;
    Ok((y.to_dtype(dtype)?, sum.to_dtype(dtype)?.contiguous()?))
}

/// [`layer_norm`](super::layer_norm) of `x + residual`, and the sum itself: `(normalized, sum)`.
///
/// `sum = x + residual`, rounded to the dtype once; `normalized` is the layer norm of the sum
/// before it is rounded, and is rounded once as well. In `f32` and `f64` both are what adding first
/// and normalizing then gives; in half precision `normalized` is closer to the mathematics. The sum
/// is the residual of the next block. On the CPU one pass over memory computes both, but each is a
/// node of its own: gradients flow through either or both.
///
/// # Shapes
/// `x`, `residual`: `[*, normalized_shape]`, the same; weight and bias, in this order:
/// `normalized_shape`; both results have the shape and dtype of `x` and
/// are contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take `f32` parameters.
///
/// # Errors
/// Those of [`layer_norm`](super::layer_norm); a residual of another shape, dtype or device than
/// `x`.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[1f64, 1.]], &Device::Cpu)?;
/// let (y, sum) = candle_norm::ops::add_layer_norm(&x, &residual, 2, [None, None], 1e-9)?;
/// assert_eq!(sum.to_vec2::<f64>()?, [[2., 4.]]);
/// assert!((y.to_vec2::<f64>()?[0][1] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: impl Into<Shape>,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let (shape, norm) = (normalized_shape.into(), RowNorm::layer_norm(eps));
    add_row_norm(x, residual, shape.dims(), weight, bias, &norm)
}

/// [`rms_norm`](super::rms_norm) of `x + residual`, and the sum itself: `(normalized, sum)`.
///
/// `sum = x + residual`, rounded to the dtype once; `normalized` is the RMS norm of the sum before
/// it is rounded, and is rounded once as well. In `f32` and `f64` both are what adding first and
/// normalizing then gives; in half precision `normalized` is closer to the mathematics. The sum is
/// the residual of the next block. On the CPU one pass over memory computes both, but each is a
/// node of its own: gradients flow through either or both.
///
/// # Shapes
/// `x`, `residual`: `[*, normalized_shape]`, the same; `weight`: `normalized_shape`; both results
/// have the shape and dtype of `x` and are contiguous.
///
/// # Errors
/// Those of [`rms_norm`](super::rms_norm); a residual of another shape, dtype or device than `x`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops;
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[2f64, 1.]], &Device::Cpu)?;
/// let (y, sum) = ops::add_rms_norm(&x, &residual, 2, None, 1e-9)?;
/// assert_eq!(sum.to_vec2::<f64>()?, [[3., 4.]]);
/// assert!((y.to_vec2::<f64>()?[0][0] - 3. / 12.5f64.sqrt()).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    options: impl Into<RmsOptions>,
) -> Result<(Tensor, Tensor)> {
    let (shape, norm) = (normalized_shape.into(), RowNorm::from(options.into()));
    add_row_norm(x, residual, shape.dims(), weight, None, &norm)
}

/// A residual, which is added to the input.
pub(super) fn check_residual(layer: &str, residual: &Tensor, x: &Tensor) -> Result<()> {
    if residual.dims() != x.dims() {
        bail!(
            "{layer}: expected a residual of the input's shape {:?}, got {:?}; expand one of them \
            with broadcast_as",
            x.dims(),
            residual.dims()
        )
    }
    if residual.dtype() != x.dtype() {
        bail!(
            "{layer}: expected a residual of the input's dtype {:?}, got {:?}; convert one of them \
            with to_dtype",
            x.dtype(),
            residual.dtype()
        )
    }
    check::same_device(layer, "residual", residual, x.device())
}
