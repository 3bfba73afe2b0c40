//! Functions that build weight-normalized layers.

use candle_core::Result;
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, VarBuilder,
};

use super::{WeightNorm, WeightNormOptions};

/// A weight-normalized [`Linear`] with a bias, its parameters taken from `vb`.
///
/// Parameters: `parametrizations.weight.original0` (g; also found as `weight_g`),
/// `parametrizations.weight.original1` (v; also `weight_v`) and `bias`. A checkpoint that has the
/// plain `weight` instead starts from it.
///
/// # Errors
/// Options out of range, parameters of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::weight_norm;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = weight_norm::linear(8, 4, Default::default(), vb)?;
/// let x = Tensor::randn(3f32, 2., (64, 8), &Device::Cpu)?;
/// let y = layer.init_from_batch(&x)?;
/// assert!(y.mean_all()?.to_scalar::<f32>()?.abs() < 1e-5);
/// let plain: candle_nn::Linear = layer.bake()?;
/// # let _ = plain;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(
    in_dim: usize,
    out_dim: usize,
    options: WeightNormOptions,
    vb: VarBuilder,
) -> Result<WeightNorm<Linear>> {
    WeightNorm::new(in_dim, out_dim, 1, (), true, options, &vb)
}

/// [`linear`] without a bias.
///
/// # Errors
/// As [`linear`]; a checkpoint that holds a bias, which would be dropped unseen.
pub fn linear_no_bias(
    in_dim: usize,
    out_dim: usize,
    options: WeightNormOptions,
    vb: VarBuilder,
) -> Result<WeightNorm<Linear>> {
    WeightNorm::new(in_dim, out_dim, 1, (), false, options, &vb)
}

/// The free function of a convolution, with or without a bias.
macro_rules! convolution {
    (
        $name:ident, $layer:ident, $config:ident, bias: $bias:literal,
        $input:literal => $output:literal, $doc:literal
    ) => {
        #[doc = $doc]
        ///
        /// Names as for [`linear`]; the initial values of `v` and the bias are drawn as candle-nn
        /// draws them.
        ///
        /// # Errors
        /// A stride or dilation of zero, groups that do not divide the channels, parameters of
        /// another shape; without a bias, a checkpoint that holds one.
        ///
        /// ```
        /// use candle_core::{DType, Device, Tensor};
        /// use candle_nn::{Module, VarBuilder, VarMap};
        /// use candle_norm::weight_norm;
        ///
        /// let vars = VarMap::new();
        /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        /// let (config, options) = (Default::default(), Default::default());
        #[doc = concat!("let layer = weight_norm::", stringify!($name), "(3, 4, 2, config, \
        options, vb)?;")]
        #[doc = concat!("let x = Tensor::zeros(", $input, ", DType::F32, &Device::Cpu)?;")]
        #[doc = concat!("assert_eq!(layer.forward(&x)?.dims(), ", $output, ");")]
        /// # Ok::<(), candle_core::Error>(())
        /// ```
        pub fn $name(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            config: $config,
            options: WeightNormOptions,
            vb: VarBuilder,
        ) -> Result<WeightNorm<$layer>> {
            WeightNorm::new(
                in_channels,
                out_channels,
                kernel_size,
                config,
                $bias,
                options,
                &vb,
            )
        }
    };
}

convolution!(
    conv1d, Conv1d, Conv1dConfig, bias: true, "(2, 3, 8)" => "[2, 4, 7]",
    "A weight-normalized [`Conv1d`] over `[N, C, L]`, with a bias, its parameters taken from `vb`."
);
convolution!(
    conv1d_no_bias, Conv1d, Conv1dConfig, bias: false, "(2, 3, 8)" => "[2, 4, 7]",
    "[`conv1d`] without a bias."
);
convolution!(
    conv2d, Conv2d, Conv2dConfig, bias: true, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "A weight-normalized [`Conv2d`] over `[N, C, H, W]`, with a bias, its parameters taken from \
    `vb`."
);
convolution!(
    conv2d_no_bias, Conv2d, Conv2dConfig, bias: false, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "[`conv2d`] without a bias."
);
convolution!(
    conv_transpose1d, ConvTranspose1d, ConvTranspose1dConfig, bias: true,
    "(2, 3, 8)" => "[2, 4, 9]",
    "A weight-normalized [`ConvTranspose1d`] over `[N, C, L]`, with a bias, its parameters taken \
    from `vb`."
);
convolution!(
    conv_transpose1d_no_bias, ConvTranspose1d, ConvTranspose1dConfig, bias: false,
    "(2, 3, 8)" => "[2, 4, 9]",
    "[`conv_transpose1d`] without a bias."
);
convolution!(
    conv_transpose2d, ConvTranspose2d, ConvTranspose2dConfig, bias: true,
    "(2, 3, 8, 8)" => "[2, 4, 9, 9]",
    "A weight-normalized [`ConvTranspose2d`] over `[N, C, H, W]`, with a bias, its parameters \
    taken from `vb`."
);
convolution!(
    conv_transpose2d_no_bias, ConvTranspose2d, ConvTranspose2dConfig, bias: false,
    "(2, 3, 8, 8)" => "[2, 4, 9, 9]",
    "[`conv_transpose2d`] without a bias."
);
