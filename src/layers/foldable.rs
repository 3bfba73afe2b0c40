//! Layers that a norm can be folded into.

use candle_core::Tensor;
use candle_nn::{Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, Linear};

use super::conv1d;
use super::weighted::sealed::Layer;
use crate::ops::linear_map::LinearMap;

/// Layers that a normalization of their output channels can be folded into: candle-nn's [`Linear`],
/// [`Conv1d`], [`Conv2d`],
/// [`ConvTranspose1d`], [`ConvTranspose2d`], and the one-dimensional convolutions of this crate.
#[diagnostic::on_unimplemented(
    message = "a norm folds into the linear layer or convolution right before it, and `{Self}` is \
    none",
    note = "with an activation between the two, or another layer, they are no single layer: keep \
    the norm, as `frozen()` for a `Module`"
)]
pub trait Foldable: sealed::Mapped {
    /// The weight, output channels first; in transposed convolutions
    /// `[inputs, outputs / groups, ..]`.
    fn weight(&self) -> &Tensor;
    /// The bias, if there is one.
    fn bias(&self) -> Option<&Tensor>;
    /// The same layer with other values.
    fn with(&self, weight: Tensor, bias: Tensor) -> Self;
}

pub(crate) mod sealed {
    use super::LinearMap;

    pub trait Mapped {
        #[doc(hidden)]
        #[allow(private_interfaces)]
        fn map(&self) -> LinearMap;
        /// The same layer, of plain values.
        #[doc(hidden)]
        fn detached(&self) -> Self;
    }
}

macro_rules! foldable {
    ($($layer:ty),*) => {$(
        impl sealed::Mapped for $layer {
            #[allow(private_interfaces)]
            fn map(&self) -> LinearMap {
                <Self as Layer>::map(&Layer::config(self))
            }
            fn detached(&self) -> Self {
                let bias = Layer::bias(self).map(Tensor::detach);
                Layer::from_parts(Layer::weight(self).detach(), bias, Layer::config(self))
            }
        }

        impl Foldable for $layer {
            fn weight(&self) -> &Tensor {
                Layer::weight(self)
            }
            fn bias(&self) -> Option<&Tensor> {
                Layer::bias(self)
            }
            fn with(&self, weight: Tensor, bias: Tensor) -> Self {
                Layer::from_parts(weight, Some(bias), Layer::config(self))
            }
        }
    )*};
}

foldable!(Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d);
foldable!(conv1d::Conv1d, conv1d::ConvTranspose1d);
