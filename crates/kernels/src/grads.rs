//! Gradients: of the input, and of weight and bias.

use std::ops::{Mul, Sub};

/// The gradients of a layer: of the input, and, as far as they are wanted, of weight and bias in
/// `f64`.
#[derive(Debug, Clone)]
pub struct Gradients<E> {
    /// Of the input.
    pub dx: Vec<E>,
    /// Of the weight.
    pub dweight: Vec<f64>,
    /// Of the bias.
    pub dbias: Vec<f64>,
}

/// Parts that the backward of a batch accounts for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Whether the statistics are the batch's own, which move with `x`, and then whether the mean
    /// is among them.
    pub own: Option<bool>,
    /// Whether anybody wants the gradients of weight or bias; statistics of the batch need these
    /// sums anyway.
    pub params: bool,
}

/// `dx = scale · (g − mean − normal · along)`.
///
/// With `g` the gradient of `x̂`, `mean` that of all `g` and `along` that of all `g · x̂`, it takes
/// off what moves the mean and the variance.
#[derive(Clone, Copy)]
pub(crate) struct InputGrad<V> {
    pub(crate) mean: V,
    pub(crate) along: V,
    pub(crate) scale: V,
}

impl<V: Copy + Sub<Output = V> + Mul<Output = V>> InputGrad<V> {
    /// The gradient of an element whose normalized value, or distance from the mean, is `normal`.
    #[inline(always)]
    pub(crate) fn of(&self, normal: V, g: V) -> V {
        ((g - self.mean) - normal * self.along) * self.scale
    }
}
