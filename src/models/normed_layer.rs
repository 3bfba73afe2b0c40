//! A linear layer or convolution together with its norm.

use candle_core::{Result, Tensor};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, ModuleT, VarBuilder,
};

use super::NormConfig;
use crate::layers::weight_norm::{Around, Plain, WeightNorm, Weighted};
use crate::layers::{Identity, NONE, Norm};

/// A linear layer or convolution and its norm, as [`NormConfig::linear`] and its relatives build
/// them.
///
/// Weight normalization goes around the layer, every other norm comes after it. A model that is
/// made of these changes its norm by value:
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
/// The gradients of the layer inside are right on the CPU also where those of candle's own
/// one-dimensional convolutions are not.
#[derive(Debug)]
pub struct NormedLayer(Parts);

#[derive(Debug)]
enum Parts {
    After {
        layer: Plain,
        norm: Box<dyn Norm>,
    },
    /// The norm goes around the layer, and so is both.
    Around(Box<dyn Around>),
}

impl NormedLayer {
    /// The norm.
    pub fn norm(&self) -> &dyn Norm {
        match &self.0 {
            Parts::After { norm, .. } => &**norm,
            Parts::Around(norm) => &**norm,
        }
    }

    fn layer(&self) -> Option<&Plain> {
        match &self.0 {
            Parts::After { layer, .. } => Some(layer),
            Parts::Around(_) => None,
        }
    }

    /// The weight that inputs are multiplied by; that of weight normalization is
    /// [`parameters`](Norm::parameters) of the norm.
    pub fn weight(&self) -> Option<&Tensor> {
        self.layer().map(Plain::weight)
    }

    /// The bias before the norm, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.layer().and_then(Plain::bias)
    }

    /// The layer and its norm as one layer, for inference: a batch norm, or an instance norm that
    /// tracks statistics, goes into the weight and the bias as
    /// [`fold`](crate::fold) does it, and the weight of weight normalization is formed once. What
    /// comes back has the norm `none`, and plain values.
    ///
    /// # Errors
    /// A norm that normalizes each input by its own statistics.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{ModuleT, VarBuilder, VarMap};
    /// use candle_norm::NormConfig;
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    /// let block = "batch".parse::<NormConfig>()?.conv1d(3, 4, 3, Default::default(), vb)?;
    /// let x = Tensor::randn(0f64, 1., (2, 3, 9), &Device::Cpu)?;
    /// block.forward_t(&x, true)?;
    /// let folded = block.fold()?;
    /// let difference = (folded.forward_t(&x, false)? - block.forward_t(&x, false)?)?;
    /// assert!(difference.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
    /// assert_eq!(folded.norm().kind(), "none");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn fold(&self) -> Result<Self> {
        let layer = match &self.0 {
            Parts::After { layer, norm } if norm.kind() == NONE.name => layer.detached(),
            Parts::After { layer, norm } => norm.frozen()?.folded_into(layer)?,
            Parts::Around(norm) => norm.baked()?,
        };
        Ok(Self(Parts::After {
            layer,
            norm: Box::new(Identity),
        }))
    }
}

impl ModuleT for NormedLayer {
    /// The layer on `xs`, normalized.
    ///
    /// # Errors
    /// An input that does not fit the layer or the norm.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        match &self.0 {
            Parts::After { layer, norm } => norm.forward_t(&layer.forward(xs)?, train),
            Parts::Around(norm) => norm.forward_t(xs, train),
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
            return Ok(NormedLayer(Parts::Around(Box::new(norm))));
        }
        // A checkpoint whose statistics were taken with a bias needs it, though the norm has one
        // too.
        let with_bias = !self.has_bias() || Plain::has_stored_bias(outputs, &layer_vb);
        let map = L::map(&config);
        let layer = Plain::new(map, inputs, outputs, kernel_size, with_bias, &layer_vb)?;
        let norm = match layer.channels_last() {
            true => self.features(outputs, vb.pp("norm"))?,
            false => self.channels(outputs, vb.pp("norm"))?,
        };
        Ok(NormedLayer(Parts::After { layer, norm }))
    }

    /// A linear layer with this norm. Parameters: `layer.weight`, `layer.bias` where the norm has
    /// none, or where a checkpoint holds one all the same, and the norm's under `norm`.
    ///
    /// # Errors
    /// Options out of range, parameters of another shape.
    pub fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<NormedLayer> {
        self.around::<Linear>((in_dim, out_dim, 1), (), vb)
    }

    /// A convolution over `[N, C, L]` with this norm; see [`linear`](Self::linear) for the
    /// parameters.
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

    /// A convolution over `[N, C, H, W]` with this norm; see [`linear`](Self::linear) for the
    /// parameters.
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

    /// A transposed convolution over `[N, C, L]` with this norm; see [`linear`](Self::linear) for
    /// the parameters.
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

    /// A transposed convolution over `[N, C, H, W]` with this norm; see [`linear`](Self::linear)
    /// for the parameters.
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
