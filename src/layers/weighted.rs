//! candle-nn's layers as weight normalization sees them: a weight, a bias, and a linear map that they stand for.

use candle_core::Tensor;
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear,
};

use crate::ops::linear_map::{Geometry, LinearMap};

/// A candle-nn layer that [`WeightNorm`](crate::WeightNorm) can go around: [`Linear`], [`Conv1d`], [`Conv2d`],
/// [`ConvTranspose1d`], [`ConvTranspose2d`].
pub trait Weighted: sealed::Layer {}

impl<L: sealed::Layer> Weighted for L {}

pub(crate) mod sealed {
    use super::{LinearMap, Tensor};

    pub trait Layer: Sized + Clone + std::fmt::Debug + Send + Sync {
        /// What the layer has besides its weight and bias.
        type Config: Clone + Copy + std::fmt::Debug + Send + Sync;
        fn weight(&self) -> &Tensor;
        fn bias(&self) -> Option<&Tensor>;
        fn config(&self) -> Self::Config;
        fn from_parts(weight: Tensor, bias: Option<Tensor>, config: Self::Config) -> Self;
        #[doc(hidden)]
        #[allow(private_interfaces)]
        fn map(config: &Self::Config) -> LinearMap;
    }
}

impl sealed::Layer for Linear {
    type Config = ();

    fn weight(&self) -> &Tensor {
        self.weight()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.bias()
    }
    fn config(&self) {}
    fn from_parts(weight: Tensor, bias: Option<Tensor>, _: ()) -> Self {
        Self::new(weight, bias)
    }
    #[allow(private_interfaces)]
    fn map(_: &()) -> LinearMap {
        LinearMap::Dense
    }
}

/// A convolution, by what its configuration says of its geometry.
macro_rules! convolution {
    ($layer:ident, $config:ident, |$c:ident| $geometry:expr) => {
        impl sealed::Layer for $layer {
            type Config = $config;

            fn weight(&self) -> &Tensor {
                self.weight()
            }
            fn bias(&self) -> Option<&Tensor> {
                self.bias()
            }
            fn config(&self) -> $config {
                *self.config()
            }
            fn from_parts(weight: Tensor, bias: Option<Tensor>, config: $config) -> Self {
                Self::new(weight, bias, config)
            }
            #[allow(private_interfaces)]
            fn map($c: &$config) -> LinearMap {
                LinearMap::Convolution($geometry)
            }
        }
    };
}

convolution!(Conv1d, Conv1dConfig, |c| Geometry {
    transposed: false,
    axes: 1,
    padding: c.padding,
    output_padding: 0,
    stride: c.stride,
    dilation: c.dilation,
    groups: c.groups,
});

convolution!(Conv2d, Conv2dConfig, |c| Geometry {
    transposed: false,
    axes: 2,
    padding: c.padding,
    output_padding: 0,
    stride: c.stride,
    dilation: c.dilation,
    groups: c.groups,
});

convolution!(ConvTranspose1d, ConvTranspose1dConfig, |c| Geometry {
    transposed: true,
    axes: 1,
    padding: c.padding,
    output_padding: c.output_padding,
    stride: c.stride,
    dilation: c.dilation,
    groups: c.groups,
});

convolution!(ConvTranspose2d, ConvTranspose2dConfig, |c| Geometry {
    transposed: true,
    axes: 2,
    padding: c.padding,
    output_padding: c.output_padding,
    stride: c.stride,
    dilation: c.dilation,
    groups: 1,
});
