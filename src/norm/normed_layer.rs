//! A linear layer or convolution together with its norm.

use candle_core::{Result, Tensor};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, ModuleT, VarBuilder,
};

use super::{Norm, NormConfig};
use crate::layers::weight_norm::{Plain, WeightNorm, Weighted};

/// A linear layer or convolution and its norm, as [`NormConfig::linear`] and its kin build them.
///
/// Weight normalization goes around the layer, every other norm comes after it. A model that is made of these changes its
/// norm by value:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv2dConfig, ModuleT, VarBuilder, VarMap};
/// use candle_norm::NormConfig;
///
/// for name in ["none", "batch", "layer", "group:2", "instance", "rms", "weight"] {
///     let norm: NormConfig = name.parse()?;
///     let vars = VarMap::new();
///     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
///     let block = norm.conv2d(3, 4, 3, Conv2dConfig::default(), vb)?;
///     let y = block.forward_t(&Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?, true)?;
///     assert_eq!(y.dims(), [2, 4, 6, 6]);
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// The gradients of the layer inside are right on the CPU also where those of candle's own one-dimensional convolutions
/// are not.
#[derive(Debug)]
pub struct NormedLayer {
    /// None where the norm goes around the layer and so is both.
    layer: Option<Plain>,
    norm: Box<dyn Norm>,
}

impl NormedLayer {
    /// The norm.
    pub fn norm(&self) -> &dyn Norm {
        &*self.norm
    }

    /// The weight that inputs are multiplied by; that of weight normalization is [`parameters`](Norm::parameters) of the norm.
    pub fn weight(&self) -> Option<&Tensor> {
        self.layer.as_ref().map(Plain::weight)
    }

    /// The bias before the norm, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.layer.as_ref().and_then(Plain::bias)
    }
}

impl ModuleT for NormedLayer {
    /// The layer on `xs`, normalized.
    ///
    /// # Errors
    /// An input that does not fit the layer or the norm.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        match &self.layer {
            Some(layer) => self.norm.forward_t(&layer.forward(xs)?, train),
            None => self.norm.forward_t(xs, train),
        }
    }
}

impl NormConfig {
    fn around<L: Weighted + 'static>(
        &self,
        (inputs, outputs, kernel_size): (usize, usize, usize),
        config: L::Config,
        vb: VarBuilder,
    ) -> Result<NormedLayer> {
        let layer_vb = vb.pp("layer");
        if let Self::Weight(options) = *self {
            let norm = WeightNorm::<L>::new(
                inputs,
                outputs,
                kernel_size,
                config,
                true,
                options,
                &layer_vb,
            )?;
            return Ok(NormedLayer {
                layer: None,
                norm: Box::new(norm),
            });
        }
        // A checkpoint whose statistics were taken with a bias needs it, though the norm has one too.
        let with_bias = !self.has_bias() || Plain::has_stored_bias(outputs, &layer_vb);
        let map = L::map(&config);
        let layer = Plain::new(map, inputs, outputs, kernel_size, with_bias, &layer_vb)?;
        let norm = match layer.channels_last() {
            true => self.features(outputs, vb.pp("norm"))?,
            false => self.channels(outputs, vb.pp("norm"))?,
        };
        Ok(NormedLayer {
            layer: Some(layer),
            norm,
        })
    }

    /// A linear layer with this norm. Parameters: `layer.weight`, `layer.bias` where the norm has none, or where a
    /// checkpoint holds one all the same, and the norm's under `norm`.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<NormedLayer> {
        self.around::<Linear>((in_dim, out_dim, 1), (), vb)
    }

    /// A convolution over `[N, C, L]` with this norm; see [`linear`](Self::linear) for the parameters.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn conv1d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
        vb: VarBuilder,
    ) -> Result<NormedLayer> {
        self.around::<Conv1d>((in_channels, out_channels, kernel_size), config, vb)
    }

    /// A convolution over `[N, C, H, W]` with this norm; see [`linear`](Self::linear) for the parameters.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn conv2d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        vb: VarBuilder,
    ) -> Result<NormedLayer> {
        self.around::<Conv2d>((in_channels, out_channels, kernel_size), config, vb)
    }

    /// A transposed convolution over `[N, C, L]` with this norm; see [`linear`](Self::linear) for the parameters.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn conv_transpose1d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: ConvTranspose1dConfig,
        vb: VarBuilder,
    ) -> Result<NormedLayer> {
        self.around::<ConvTranspose1d>((in_channels, out_channels, kernel_size), config, vb)
    }

    /// A transposed convolution over `[N, C, H, W]` with this norm; see [`linear`](Self::linear) for the parameters.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn conv_transpose2d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: ConvTranspose2dConfig,
        vb: VarBuilder,
    ) -> Result<NormedLayer> {
        self.around::<ConvTranspose2d>((in_channels, out_channels, kernel_size), config, vb)
    }
}
