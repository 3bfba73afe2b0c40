//! Vectors of length one.

use candle_core::{D, Result, Tensor};
use candle_nn::Module;

use super::norm::Norm;
use crate::ops::{self, L2Form};

/// Configuration of [`L2Normalize`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct L2NormalizeOptions {
    /// The axis that vectors lie along; `None` is the last one. Default: `None`.
    pub dim: Option<usize>,
    /// ε, which keeps the length from zero. Default: 1e-12.
    pub eps: f64,
    /// How it does so. Default: [`L2Form::Max`].
    pub form: L2Form,
}

impl Default for L2NormalizeOptions {
    fn default() -> Self {
        Self {
            dim: None,
            eps: 1e-12,
            form: L2Form::Max,
        }
    }
}

impl From<f64> for L2NormalizeOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// L2 normalization: every vector at length one. It has no parameters.
///
/// `y = x / max(‖x‖, ε)`, or `y = x / √(Σ x² + ε)` with [`L2Form::Inside`]
///
/// Where:
/// - `‖x‖` is the root of the sum of squares along `dim`, and `Σ x²` that sum;
/// - ε is `eps`: 1e-12 in PyTorch's `normalize`, 1e-6 in the `l2norm` of linear attention.
///
/// See [`ops::l2_normalize`] for gradients of short vectors. With one learned length it is
/// [`ScaleNorm`](crate::ScaleNorm).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// use candle_norm::L2Normalize;
///
/// let y = L2Normalize::new(1e-12).forward(&Tensor::new(&[[3f64, 4.]], &Device::Cpu)?)?;
/// assert!((y.to_vec2::<f64>()?[0][1] - 0.8).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct L2Normalize {
    options: L2NormalizeOptions,
}

impl L2Normalize {
    /// A layer of given options. An `eps` out of range is an error of the first forward.
    pub fn new(options: impl Into<L2NormalizeOptions>) -> Self {
        Self {
            options: options.into(),
        }
    }

    /// The configuration.
    pub fn options(&self) -> &L2NormalizeOptions {
        &self.options
    }
}

impl Module for L2Normalize {
    /// The vectors of `xs` at length one.
    ///
    /// # Shapes
    /// Any with the axis `dim`; the output is contiguous, of the same shape and dtype.
    ///
    /// # Errors
    /// Those of [`ops::l2_normalize`].
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let L2NormalizeOptions { dim, eps, form } = self.options;
        match dim {
            Some(dim) => ops::l2_normalize(xs, dim, eps, form),
            None => ops::l2_normalize(xs, D::Minus1, eps, form),
        }
    }
}

impl Norm for L2Normalize {
    fn kind(&self) -> &'static str {
        "l2"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![]
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }
}
