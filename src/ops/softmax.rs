//! Softmax along the last axis.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::Softmax;
use crate::graph;

/// Softmax along the last axis.
///
/// `y = exp(x − max) / Σ exp(x − max)`, for each row by itself. The gradient is
/// `y · (dy − Σ dy · y)`. A row of −∞ alone, and one with NaN or +∞, is NaN throughout, as in
/// PyTorch.
///
/// # Shapes
/// `x`: `[*, N]`; the result has the shape and dtype of `x` and is contiguous. `f16`, `bf16`,
/// `f32`, `f64`; half precision is computed in `f32` and rounded once.
///
/// # Errors
/// An input without axes, or of integers.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_norm::ops;
///
/// let x = Var::new(&[[0f64, 3f64.ln()]], &Device::Cpu)?;
/// let y = ops::softmax_last_dim(&x)?;
/// assert!((y.to_vec2::<f64>()?[0][1] - 0.75).abs() < 1e-12);
/// assert!(y.sqr()?.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    of_rows("softmax_last_dim", x, false)
}

/// The logarithm of [`softmax_last_dim`], which does not underflow.
///
/// `y = (x − max) − ln Σ exp(x − max)`, with the gradient `dy − exp(y) · Σ dy`.
///
/// # Shapes
/// Those of [`softmax_last_dim`].
///
/// # Errors
/// Those of [`softmax_last_dim`].
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[0f64, 1000.]], &Device::Cpu)?;
/// let y = candle_norm::ops::log_softmax_last_dim(&x)?;
/// assert_eq!(y.to_vec2::<f64>()?, [[-1000., 0.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn log_softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    of_rows("log_softmax_last_dim", x, true)
}

fn of_rows(layer: &'static str, x: &Tensor, log: bool) -> Result<Tensor> {
    check::float(layer, "input", x)?;
    check::rank_at_least(layer, x, 1, "[..., N]")?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &[]);
    }
    let len = x.dims()[x.rank() - 1];
    graph::apply(Softmax { layer, len, log }, &x.contiguous()?, None, None)
}
