//! Vectors of length one.

use candle_core::shape::Dim;
use candle_core::{Result, Tensor, bail};

use super::check;
pub use crate::computations::L2Form;
use crate::computations::{UnitRows, composed};
use crate::graph;

const LAYER: &str = "l2_normalize";

/// The vectors along the axis `dim`, each divided by its length.
///
/// `y = x / max(‖x‖, eps)` with [`L2Form::Max`] (PyTorch's `normalize`, whose ε is 1e-12), and
/// `y = x / √(Σ x² + eps)` with [`L2Form::Inside`] (the `l2norm` of linear attention, such as gated
/// delta networks, <https://arxiv.org/abs/2412.06464>, whose ε is 1e-6). Entries whose squares
/// would over- or underflow do not lose their vector.
///
/// The gradient is `(dy − y · Σ dy · y) / ‖x‖`. With [`L2Form::Max`], the length of a vector that
/// is not longer than ε is a constant, and its gradient `dy / eps`: infinite in `f16` with ε =
/// 1e-12, as in PyTorch. For vectors that may be zero, take [`L2Form::Inside`], or a larger ε.
///
/// # Shapes
/// `x`: any; `dim`: an axis of it, such as `D::Minus1`. The result has the shape and dtype of `x`
/// and is contiguous. `f16`, `bf16`, `f32`, `f64`; half precision is computed in `f32`.
///
/// # Errors
/// An axis that `x` does not have, integers, `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{D, Device, Tensor};
/// use candle_norm::ops::{self, L2Form};
///
/// let x = Tensor::new(&[[3f64, 4.], [0., 0.]], &Device::Cpu)?;
/// let y = ops::l2_normalize(&x, D::Minus1, 1e-12, L2Form::Max)?;
/// assert!((y.get(0)?.to_vec1::<f64>()?[1] - 0.8).abs() < 1e-12);
/// assert_eq!(y.get(1)?.to_vec1::<f64>()?, [0., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn l2_normalize(x: &Tensor, dim: impl Dim, eps: f64, form: L2Form) -> Result<Tensor> {
    check::eps(LAYER, eps)?;
    check::float(LAYER, "input", x)?;
    let Ok(dim) = dim.to_index(x.shape(), LAYER) else {
        return no_such_axis(x);
    };
    if x.elem_count() == 0 {
        return graph::empty(LAYER, x, &[]);
    }
    let dims = x.dims();
    let (len, inner) = (dims[dim], dims[dim + 1..].iter().product::<usize>());
    let rows = UnitRows {
        layer: LAYER,
        len,
        eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
        form,
    };
    if inner == 1 {
        return graph::apply(rows, &x.contiguous()?, None, None);
    }
    // The vectors lie across memory.
    let transposed_x = graph::transposed(&x.contiguous()?.reshape(((), len, inner))?)?;
    let y = graph::apply(rows, &transposed_x, None, None)?;
    graph::transposed(&y)?.reshape(dims)
}

/// An axis that the input does not have.
fn no_such_axis<T>(x: &Tensor) -> Result<T> {
    bail!(
        "{LAYER}: expected dim to be an axis of the input, got one that is not, for input size \
        {:?}",
        x.dims()
    )
}
