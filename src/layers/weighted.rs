//! candle-nn's layers as this crate sees them: a weight, a bias, and a linear map that they stand
//! for.

use candle_core::{Result, Tensor};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Init, Linear, VarBuilder, init,
};

use super::params::{BIAS, name_in, stored};
use crate::ops::linear_map::{Geometry, LinearMap};

/// A layer that [`WeightNorm`](crate::WeightNorm) can go around: candle-nn's [`Linear`],
/// [`Conv1d`], [`Conv2d`],
/// [`ConvTranspose1d`], [`ConvTranspose2d`], and the one-dimensional convolutions of this crate.
pub trait Weighted: sealed::Layer {}

impl<L: sealed::Layer> Weighted for L {}

pub(crate) mod sealed {
    use super::{LinearMap, Tensor};

    pub trait Layer: Sized + Clone + std::fmt::Debug + Send + Sync {
        /// Configuration besides weight and bias.
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

/// The initial values of the weight and the bias, as candle-nn draws them.
pub(super) fn initial(
    map: LinearMap,
    inputs: usize,
    outputs: usize,
    kernel_size: usize,
) -> (Init, Init) {
    let uniform = |fan_in: usize| {
        let bound = 1. / (fan_in.max(1) as f64).sqrt();
        Init::Uniform {
            lo: -bound,
            up: bound,
        }
    };
    match map {
        // Without inputs there is nothing to draw, and the deviation would be infinite.
        _ if inputs == 0 || kernel_size == 0 => (Init::Const(0.), Init::Const(0.)),
        LinearMap::Convolution(g) if g.transposed => {
            let init = uniform(outputs.saturating_mul(kernel_size.saturating_pow(g.axes as u32)));
            (init, init)
        }
        _ => (init::DEFAULT_KAIMING_NORMAL, uniform(inputs)),
    }
}

/// One of candle-nn's layers without weight normalization, with the same gradients that are right.
#[derive(Debug, Clone)]
pub(crate) struct Plain {
    map: LinearMap,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Plain {
    pub(crate) fn new(
        map: LinearMap,
        inputs: usize,
        outputs: usize,
        kernel_size: usize,
        with_bias: bool,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let shape = map.weight_shape("NormedLayer", inputs, outputs, kernel_size)?;
        let (weight_init, bias_init) = initial(map, inputs, outputs, kernel_size);
        Ok(Self {
            map,
            weight: vb.get_with_hints(shape, "weight", weight_init)?,
            bias: with_bias
                .then(|| vb.get_with_hints(outputs, name_in(vb, BIAS), bias_init))
                .transpose()?,
        })
    }

    /// Whether a checkpoint holds a bias for a layer of so many outputs.
    pub(crate) fn has_stored_bias(outputs: usize, vb: &VarBuilder) -> bool {
        stored(vb, &outputs.into(), BIAS).is_some()
    }

    /// A layer of plain values: no gradient leads back.
    pub(super) fn of_values(map: LinearMap, weight: &Tensor, bias: Option<&Tensor>) -> Self {
        Self {
            map,
            weight: weight.detach(),
            bias: bias.map(Tensor::detach),
        }
    }

    pub(crate) fn detached(&self) -> Self {
        Self::of_values(self.map, &self.weight, self.bias())
    }

    pub(super) fn map(&self) -> LinearMap {
        self.map
    }

    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Whether the outputs lie on the last axis, instead of axis 1.
    pub(crate) fn channels_last(&self) -> bool {
        self.map == LinearMap::Dense
    }

    pub(crate) fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.map
            .apply("NormedLayer", xs, &self.weight, self.bias.as_ref())
    }
}
