//! `candle_nn::ops`, with every gradient.
//!
//! candle's `layer_norm`, `rms_norm` and `softmax_last_dim` drop the gradients of all that comes
//! before them. Those here have candle's
//! signatures and keep them; every other name is candle's own. [`ops`] has norms with more options.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_norm::nn::ops;
//!
//! let x = Var::new(&[[1f32, 2., 4.], [0., -1., 3.]], &Device::Cpu)?;
//! let weight = Tensor::new(&[1f32, 0.5, 2.], &Device::Cpu)?;
//! let y = ops::softmax_last_dim(&ops::rms_norm(&x, &weight, 1e-6)?)?;
//! assert!(y.sqr()?.sum_all()?.backward()?.get(&x).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```

use candle_core::{Result, Tensor};

pub use candle_nn::ops::*;

use crate::ops::{self, Cast};

/// Layer normalization over the trailing axes, which are those of `alpha` and `beta`:
/// [`ops::layer_norm`] with candle's signature.
///
/// `y = (xs − mean) / √(var + eps) · alpha + beta`
///
/// # Shapes
/// `xs`: `[*, N]`; `alpha`, `beta`: `[N]`; the result as `xs`, contiguous.
///
/// # Errors
/// Those of [`ops::layer_norm`].
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    ops::layer_norm(xs, alpha.shape(), Some(alpha), Some(beta), f64::from(eps))
}

/// The same as [`layer_norm`], which needs no second form for gradients.
///
/// # Errors
/// Those of [`layer_norm`].
pub fn layer_norm_slow(x: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    layer_norm(x, alpha, beta, eps)
}

/// Root-mean-square normalization over the trailing axes, which are those of `alpha`:
/// [`ops::rms_norm`] with candle's signature.
///
/// `y = xs / √(mean(xs²) + eps) · alpha`
///
/// # Shapes
/// `xs`: `[*, N]`; `alpha`: `[N]`; the result as `xs`, contiguous.
///
/// # Errors
/// Those of [`ops::rms_norm`].
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    let eps = Some(f64::from(eps));
    ops::rms_norm(
        xs,
        alpha.shape(),
        Some(alpha),
        ops::RmsOptions {
            eps,
            ..Default::default()
        },
    )
}

/// [`rms_norm`] that rounds half precision where candle's does: before it multiplies by `alpha`,
/// and after. In `f32` and `f64` both are the same.
///
/// # Errors
/// Those of [`rms_norm`].
pub fn rms_norm_slow(x: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    let eps = Some(f64::from(eps));
    ops::rms_norm(
        x,
        alpha.shape(),
        Some(alpha),
        ops::RmsOptions {
            eps,
            offset: 0.,
            cast: Cast::BeforeWeight,
        },
    )
}

/// Softmax along the last axis.
///
/// `y = exp(xs − max) / Σ exp(xs − max)`, for each row by itself: [`ops::softmax_last_dim`], which
/// is fused with its backward on the CPU, and differentiable to any order. Half precision is
/// computed in `f32` and rounded once. A row of −∞ alone gives NaN, as in PyTorch.
///
/// # Shapes
/// `xs`: `[*, N]`; the result as `xs`, contiguous.
///
/// # Errors
/// An input without axes, or of integers.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    ops::softmax_last_dim(xs)
}
