//! Convolutions along one axis whose gradients are right on the CPU.

use candle_core::{Result, Tensor};
use candle_nn::{Conv1dConfig, ConvTranspose1dConfig, Module, VarBuilder};

use super::weighted::{initial, sealed::Layer};
use crate::ops::check;
use crate::ops::linear_map::LinearMap;

/// A convolution along one axis, in place of candle-nn's.
///
/// `y = weight ⋆ x + bias`
///
/// Where:
/// - `⋆` is the cross-correlation along the last axis of `[N, C, L]`, with the stride, padding,
///   dilation and groups of [`Conv1dConfig`];
/// - `weight` is `[out_channels, in_channels / groups, kernel_size]`, and `bias`, if there is one,
///   `[out_channels]`.
///
/// candle-nn 0.11 has a wrong weight gradient at batch 2 and more, and a wrong input gradient
/// without padding. Here the convolution runs through candle's in two dimensions, and every
/// gradient is right. Constructors and accessors are candle's. The dtype is `f16`, `bf16`, `f32` or
/// `f64`; half precision is computed in `f32` and rounded once.
///
/// [`WeightNorm`](crate::WeightNorm), [`fold`](crate::fold) and
/// [`fold_into`](crate::BatchNorm::fold_into) take it as they take candle's.
/// [`inner`](Self::inner) is candle's layer of the same parameters, and [`From`] brings one here.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv1dConfig, Module};
/// use candle_norm::{Conv1d, gradcheck::gradcheck};
///
/// let config = Conv1dConfig { stride: 2, ..Default::default() };
/// let line = |n: i64| Tensor::arange(0, n, &Device::Cpu)?.to_dtype(DType::F64)?.sin();
/// let (x, weight) = (line(2 * 3 * 7)?.reshape((2, 3, 7))?, line(4 * 3 * 2)?.reshape((4, 3, 2))?);
/// let convolve = |v: &[Tensor]| Conv1d::new(v[1].clone(), None, config).forward(&v[0]);
/// gradcheck(convolve, &[x, weight])?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Conv1d(candle_nn::Conv1d);

/// A transposed convolution along one axis, in place of candle-nn's.
///
/// `y = weight ⋆ᵀ x + bias`
///
/// Where:
/// - `⋆ᵀ` is the transpose of a convolution along the last axis of `[N, C, L]`, with the stride,
///   padding, output padding, dilation and groups of [`ConvTranspose1dConfig`];
/// - `weight` is `[in_channels, out_channels / groups, kernel_size]`, and `bias`, if there is one,
///   `[out_channels]`.
///
/// candle-nn 0.11 has no backward for it, and a wrong result without padding at batch 2 and more.
/// Here it runs through candle's in two dimensions, and result and gradients are right.
/// Constructors and accessors are candle's; dtypes are those of [`Conv1d`].
#[derive(Debug, Clone)]
pub struct ConvTranspose1d(candle_nn::ConvTranspose1d);

/// The layer around candle's of the same name, and the functions that build it.
macro_rules! convolution {
    ($layer:ident, $config:ident, $new:ident, $new_no_bias:ident, $output:literal) => {
        impl $layer {
            /// A layer of given parameters.
            pub fn new(weight: Tensor, bias: Option<Tensor>, config: $config) -> Self {
                Self(candle_nn::$layer::new(weight, bias, config))
            }

            /// Stride, padding, dilation and groups.
            pub fn config(&self) -> &$config {
                self.0.config()
            }

            /// The kernel.
            pub fn weight(&self) -> &Tensor {
                self.0.weight()
            }

            /// The bias of each output channel, if there is one.
            pub fn bias(&self) -> Option<&Tensor> {
                self.0.bias()
            }

            /// candle-nn's layer of the same parameters, with candle's own behavior.
            pub fn inner(&self) -> &candle_nn::$layer {
                &self.0
            }

            fn from_vb(
                sizes: (usize, usize, usize),
                config: $config,
                with_bias: bool,
                vb: VarBuilder,
            ) -> Result<Self> {
                let (layer, map) = (stringify!($layer), Self::map(&config));
                let (inputs, outputs, kernel_size) = sizes;
                let shape = map.weight_shape(layer, inputs, outputs, kernel_size)?;
                check::countable(layer, "bias", &[outputs])?;
                let (weight_init, bias_init) = initial(map, inputs, outputs, kernel_size);
                let weight = vb.get_with_hints(shape, "weight", weight_init)?;
                let bias = with_bias
                    .then(|| vb.get_with_hints(outputs, "bias", bias_init))
                    .transpose()?;
                Ok(Self::new(weight, bias, config))
            }
        }

        impl Layer for $layer {
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
            fn map(config: &$config) -> LinearMap {
                candle_nn::$layer::map(config)
            }
        }

        impl From<candle_nn::$layer> for $layer {
            fn from(layer: candle_nn::$layer) -> Self {
                Self(layer)
            }
        }

        impl Module for $layer {
            /// The convolution of `xs`.
            ///
            /// # Shapes
            /// `[N, in_channels, L]` to `[N, out_channels, L']`, contiguous.
            ///
            /// # Errors
            /// An input of another rank, number of channels, dtype or device; one that the kernel
            /// does not fit; a stride, dilation or number of groups that is out of range.
            fn forward(&self, xs: &Tensor) -> Result<Tensor> {
                Self::map(self.config()).apply(stringify!($layer), xs, self.weight(), self.bias())
            }
        }

        #[doc = concat!("A [`", stringify!($layer), "`] with a bias, its parameters taken from \
        `vb`.")]
        ///
        /// Parameters: `weight` and `bias`, their initial values drawn as candle-nn draws them.
        ///
        /// # Errors
        /// A stride or dilation of zero, groups that do not divide the channels, parameters of
        /// another shape.
        ///
        /// ```
        /// use candle_core::{DType, Device, Tensor};
        /// use candle_nn::{Module, VarBuilder, VarMap};
        ///
        /// let vars = VarMap::new();
        /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        #[doc = concat!("let layer = candle_norm::", stringify!($new), "(3, 4, 2, \
        Default::default(), vb)?;")]
        /// let x = Tensor::zeros((2, 3, 8), DType::F32, &Device::Cpu)?;
        #[doc = concat!("assert_eq!(layer.forward(&x)?.dims(), ", $output, ");")]
        /// # Ok::<(), candle_core::Error>(())
        /// ```
        pub fn $new(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            config: $config,
            vb: VarBuilder,
        ) -> Result<$layer> {
            $layer::from_vb((in_channels, out_channels, kernel_size), config, true, vb)
        }

        #[doc = concat!("[`", stringify!($new), "`] without a bias.")]
        ///
        /// # Errors
        #[doc = concat!("As [`", stringify!($new), "`].")]
        pub fn $new_no_bias(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            config: $config,
            vb: VarBuilder,
        ) -> Result<$layer> {
            $layer::from_vb((in_channels, out_channels, kernel_size), config, false, vb)
        }
    };
}

convolution!(Conv1d, Conv1dConfig, conv1d, conv1d_no_bias, "[2, 4, 7]");
convolution!(
    ConvTranspose1d,
    ConvTranspose1dConfig,
    conv_transpose1d,
    conv_transpose1d_no_bias,
    "[2, 4, 9]"
);
