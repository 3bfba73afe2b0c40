//! Weight standardization around convolutions.

use candle_core::{Result, Tensor, Var, bail};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Module, VarBuilder};

use super::norm::Norm;
use super::params::{self, BIAS, GAIN, name_in, stored};
use super::weight_norm::check;
use super::weighted::{Weighted, initial};
use crate::ops;
use crate::ops::check as rules;
use crate::ops::linear_map::LinearMap;

const LAYER: &str = "WeightStandardization";

/// Configuration of [`WeightStandardization`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct WeightStandardizationOptions {
    /// ε, added to the variance of each output's weights: 1e-8 in BiT, 1e-5 in timm's NFNets.
    /// Default: 1e-6.
    pub eps: f64,
    /// The γ of `ScaledStdConv2d`, which learns a gain for each output; `None` is `StdConv2d`.
    /// Default: `None`.
    pub gamma: Option<f64>,
}

impl WeightStandardizationOptions {
    /// γ of layers without an activation after them.
    pub const GAMMA_IDENTITY: f64 = 1.;
    /// γ before `relu`.
    pub const GAMMA_RELU: f64 = 1.7139588594436646;
    /// γ before `silu`.
    pub const GAMMA_SILU: f64 = 1.7881293296813965;
    /// γ before `gelu`.
    pub const GAMMA_GELU: f64 = 1.7015043497085571;
}

impl Default for WeightStandardizationOptions {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            gamma: None,
        }
    }
}

impl From<f64> for WeightStandardizationOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// Weight standardization: a convolution whose weight has mean 0 and variance 1 for each output.
///
/// `ŵ = (w − mean) / √(var + ε) · s`, and `y` is that of the layer `L` with the weight `ŵ`.
///
/// Where:
/// - mean and biased variance are those of all weights of one output;
/// - `s` is 1 (`StdConv2d`), or `gain · γ / √fan_in` with a learned gain for each output, which
///   starts from 1, and γ for the activation (`ScaledStdConv2d` of NFNets);
/// - `L` is candle-nn's [`Conv1d`] or [`Conv2d`].
///
/// Qiao et al., 2019, <https://arxiv.org/abs/1903.10520>; Brock et al., 2021,
/// <https://arxiv.org/abs/2101.08692>. The authors of the former divide by the unbiased deviation
/// plus ε; this is timm's formula, by which BiT and NFNets were trained. It sees neither batch nor
/// mode, so it is a [`Module`]. Constant weights of an output give zeros.
///
/// [`bake`](Self::bake) gives the plain layer with the weight of now. Padding is that of `L`.
#[derive(Debug, Clone)]
pub struct WeightStandardization<L: Weighted> {
    weight: Tensor,
    gain: Option<Tensor>,
    bias: Option<Tensor>,
    options: WeightStandardizationOptions,
    config: L::Config,
}

impl<L: Weighted> WeightStandardization<L> {
    fn build(
        (inputs, outputs, kernel_size): (usize, usize, usize),
        config: L::Config,
        with_bias: bool,
        options: WeightStandardizationOptions,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let map = L::map(&config);
        let shape = map.weight_shape(LAYER, inputs, outputs, kernel_size)?;
        checked(map, &shape, &options)?;
        if !with_bias {
            check::no_stored_bias(LAYER, stored(vb, &outputs.into(), BIAS))?;
        }
        let (weight_init, bias_init) = initial(map, inputs, outputs, kernel_size);
        let bias = with_bias
            .then(|| vb.get_with_hints(outputs, name_in(vb, BIAS), bias_init))
            .transpose()?;
        let gain_shape = ops::magnitude_shape(&shape, Some(0));
        let gain = options.gamma.map(|_| params::get(vb, gain_shape, GAIN, 1.));
        Ok(Self {
            weight: vb.get_with_hints(shape, "weight", weight_init)?,
            gain: gain.transpose()?,
            bias,
            options,
            config,
        })
    }

    /// A layer of the weight and bias of `layer`, whose values it takes over as new variables, with
    /// gains of 1.
    ///
    /// # Errors
    /// Options out of range, a transposed convolution, one weight for each output, integers.
    pub fn from_layer(layer: &L, options: WeightStandardizationOptions) -> Result<Self> {
        let (map, weight) = (L::map(&layer.config()), layer.weight());
        check::float(LAYER, "weight", weight)?;
        checked(map, weight.dims(), &options)?;
        let var = |t: &Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(t)?.into_inner());
        let copy = |t: &Tensor| var(&t.detach().contiguous()?.copy()?);
        let gain_shape = ops::magnitude_shape(weight.dims(), Some(0));
        let ones = || Tensor::ones(gain_shape, weight.dtype(), weight.device());
        Ok(Self {
            weight: copy(weight)?,
            gain: options.gamma.map(|_| var(&ones()?)).transpose()?,
            bias: layer.bias().map(copy).transpose()?,
            options,
            config: layer.config(),
        })
    }

    /// The weight that the layer multiplies by.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn weight(&self) -> Result<Tensor> {
        let gain = self.gain.as_ref().zip(self.options.gamma);
        ops::weight_standardization(&self.weight, gain, self.options.eps)
    }

    /// The weight as it is learned.
    pub fn original(&self) -> &Tensor {
        &self.weight
    }

    /// The gain of each output, if there is one.
    pub fn gain(&self) -> Option<&Tensor> {
        self.gain.as_ref()
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The configuration.
    pub fn options(&self) -> &WeightStandardizationOptions {
        &self.options
    }

    /// The configuration of the layer inside.
    pub fn config(&self) -> L::Config {
        self.config
    }

    /// The plain candle-nn layer with the weight of now, for inference.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn bake(&self) -> Result<L> {
        let bias = self.bias.as_ref().map(Tensor::detach);
        Ok(L::from_parts(self.weight()?.detach(), bias, self.config))
    }
}

fn checked(map: LinearMap, weight: &[usize], options: &WeightStandardizationOptions) -> Result<()> {
    rules::eps(LAYER, options.eps)?;
    if let Some(gamma) = options.gamma {
        rules::finite(LAYER, "gamma", gamma)?;
    }
    if matches!(map, LinearMap::Convolution(g) if g.transposed) {
        let layer = LAYER;
        bail!(
            "{layer}: expected a layer whose weight has its outputs on axis 0, got a transposed \
            convolution"
        )
    }
    ops::check_standardized(weight)
}

impl<L: Weighted> Module for WeightStandardization<L> {
    /// The layer `L` on `xs`, with the standardized weight.
    ///
    /// # Shapes
    /// Those of `L`; the output is contiguous.
    ///
    /// # Errors
    /// An input that does not fit `L` in rank, channels, size, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        L::map(&self.config).apply(LAYER, xs, &self.weight()?, self.bias())
    }
}

impl<L: Weighted> Norm for WeightStandardization<L> {
    fn kind(&self) -> &'static str {
        "weight_standardization"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut named = vec![("weight", self.weight.clone())];
        named.extend(self.gain.iter().map(|g| (GAIN[0], g.clone())));
        named.extend(self.bias.iter().map(|b| (BIAS[0], b.clone())));
        named
    }

    /// Sets the gains to 1.
    fn reset(&self) -> Result<()> {
        match self.gain.as_ref().filter(|gain| gain.is_variable()) {
            Some(gain) => Var::from_tensor(gain)?.set(&gain.ones_like()?.detach()),
            None => Ok(()),
        }
    }
}

/// The free function of a convolution, with or without a bias.
macro_rules! convolution {
    (
        $name:ident, $layer:ident, $config:ident, bias: $bias:literal,
        $input:literal => $output:literal, $doc:literal
    ) => {
        #[doc = $doc]
        ///
        /// Parameters: `weight`, `gain` with a γ, `[out_channels, 1, ..]`, and `bias`: the file of
        /// a plain layer loads as it is. Initial values are drawn as candle-nn draws them.
        ///
        /// # Errors
        /// Options out of range, a stride or dilation of zero, groups that do not divide the
        /// channels, one weight for each output, parameters of another shape; without a bias, a
        /// checkpoint that holds one.
        ///
        /// ```
        /// use candle_core::{DType, Device, Tensor};
        /// use candle_nn::{Module, VarBuilder, VarMap};
        /// use candle_norm::weight_standardization;
        ///
        /// let vars = VarMap::new();
        /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        /// let (config, options) = (Default::default(), Default::default());
        #[doc = concat!("let layer = weight_standardization::", stringify!($name), "(3, 4, 2, \
        config, options, vb)?;")]
        #[doc = concat!("let x = Tensor::zeros(", $input, ", DType::F32, &Device::Cpu)?;")]
        #[doc = concat!("assert_eq!(layer.forward(&x)?.dims(), ", $output, ");")]
        /// # Ok::<(), candle_core::Error>(())
        /// ```
        pub fn $name(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            config: $config,
            options: WeightStandardizationOptions,
            vb: VarBuilder,
        ) -> Result<WeightStandardization<$layer>> {
            let sizes = (in_channels, out_channels, kernel_size);
            WeightStandardization::build(sizes, config, $bias, options, &vb)
        }
    };
}

convolution!(
    conv1d, Conv1d, Conv1dConfig, bias: true, "(2, 3, 8)" => "[2, 4, 7]",
    "A [`Conv1d`] over `[N, C, L]` with a standardized weight and a bias."
);
convolution!(
    conv1d_no_bias, Conv1d, Conv1dConfig, bias: false, "(2, 3, 8)" => "[2, 4, 7]",
    "[`conv1d`] without a bias."
);
convolution!(
    conv2d, Conv2d, Conv2dConfig, bias: true, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "A [`Conv2d`] over `[N, C, H, W]` with a standardized weight and a bias: with a γ, the \
    `ScaledStdConv2d` of NFNets."
);
convolution!(
    conv2d_no_bias, Conv2d, Conv2dConfig, bias: false, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "[`conv2d`] without a bias: the `StdConv2d` of BiT."
);
