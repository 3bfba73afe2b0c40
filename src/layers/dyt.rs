//! Dynamic tanh.

use candle_core::{Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};

use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{self, ALPHA, Affine, AffineParams, SHIFT};
use crate::ops::{self, Squash, check};

const LAYER: &str = "DyT";

/// Configuration of [`DyT`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct DyTOptions {
    /// Function of the values: the hyperbolic tangent is DyT, the error function is Derf.
    /// Default: `Tanh`.
    pub function: Squash,
    /// Number that `alpha` starts from: 0.5 in the papers, 4 in diffusers' SAME, 1 in
    /// x-transformers. Default: 0.5.
    pub alpha: f64,
    /// Learned parameters of the channels. Default: weight and bias.
    pub affine: Affine,
    /// Channels are on axis 1 of `[N, C, *]`, and not on the last axis. Default: false.
    pub channels_first: bool,
}

impl Default for DyTOptions {
    fn default() -> Self {
        Self {
            function: Squash::Tanh,
            alpha: 0.5,
            affine: Affine::WeightAndBias,
            channels_first: false,
        }
    }
}

/// Converts a number that `alpha` starts from.
impl From<f64> for DyTOptions {
    fn from(alpha: f64) -> Self {
        Self {
            alpha,
            ..Self::default()
        }
    }
}

impl DyTOptions {
    /// Dynamic erf.
    pub fn derf() -> Self {
        Self {
            function: Squash::Erf,
            ..Self::default()
        }
    }
}

impl NormOptions for DyTOptions {
    const NAMES: Names = Names::new(&["dyt", "dynamictanh"], &[], false);

    fn parse(argument: Option<&str>) -> Option<Self> {
        match argument {
            None => Some(Self::default()),
            Some("erf") => Some(Self::derf()),
            Some(_) => None,
        }
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: true,
            ..*self
        };
        Ok(Box::new(dyt(num_channels, options, vb)?))
    }

    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: false,
            ..*self
        };
        Ok(Box::new(dyt(num_features, options, vb)?))
    }
}

/// Dynamic tanh (DyT), or dynamic erf (Derf): a bounded function in place of a normalization.
///
/// `y = w · tanh(α · x) + b`, or `y = w · erf(α · x + s) + b`
///
/// Where:
/// - `α` is `alpha`, one number for all channels, of shape `[1]`;
/// - `s` is `s`, one number that starts from 0; Derf alone has it;
/// - `w` and `b` are `weight` and `bias`, `[C]`, if `affine` has them.
///
/// DyT: Zhu et al., 2025, <https://arxiv.org/abs/2503.10622>, in place of the LayerNorms and
/// RmsNorms of transformers. No element depends on another: no statistics are formed, and training
/// and inference are the same, so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or
/// `f64`; half precision is computed in `f32` and rounded once.
#[derive(Debug, Clone)]
pub struct DyT {
    alpha: Tensor,
    /// Of Derf.
    shift: Option<Tensor>,
    params: AffineParams,
    num_channels: usize,
    options: DyTOptions,
}

/// A [`DyT`] over `num_channels`, its parameters taken from `vb`. A number in place of the options
/// is `alpha`; there is no ε.
///
/// Parameters: `alpha` (also found as `pre_tanh_scale`), of shape `[1]`, or without axes in a file;
/// `s` (also `shift`) of the same shape, of Derf; `weight` (`gamma`, `scale`) and `bias` (`beta`),
/// `[num_channels]`, as `affine` says.
///
/// # Errors
/// An `alpha` that is not finite, parameters of another shape; a checkpoint with a scale or shift
/// that `affine` lacks.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_norm::{DyTOptions, dyt};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = dyt(4, 0.5, vb.pp("tanh"))?;
/// let y = layer.forward(&Tensor::new(&[[0f32, 1., 100., -100.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?[0][2..], [1., -1.]);
/// let derf = dyt(4, DyTOptions::derf(), vb.pp("erf"))?;
/// assert_eq!(derf.shift().unwrap().to_vec1::<f32>()?, [0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn dyt(num_channels: usize, options: impl Into<DyTOptions>, vb: VarBuilder) -> Result<DyT> {
    let options = options.into();
    check::finite(LAYER, "alpha", options.alpha)?;
    check::countable(LAYER, "weight", &[num_channels])?;
    let shift = || params::get(&vb, 1, SHIFT, 0.);
    Ok(DyT {
        alpha: params::get(&vb, 1, ALPHA, options.alpha)?,
        shift: (options.function == Squash::Erf).then(shift).transpose()?,
        params: AffineParams::new(LAYER, &vb, num_channels, options.affine, 1.)?,
        num_channels,
        options,
    })
}

impl DyT {
    /// The factor of the input.
    pub fn alpha(&self) -> &Tensor {
        &self.alpha
    }

    /// Number that is added to the product; Derf alone has one.
    pub fn shift(&self) -> Option<&Tensor> {
        self.shift.as_ref()
    }

    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// The configuration.
    pub fn options(&self) -> &DyTOptions {
        &self.options
    }
}

impl Module for DyT {
    /// The function of each element of `xs`.
    ///
    /// # Shapes
    /// `[*, C]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of the same shape
    /// and dtype.
    ///
    /// # Errors
    /// An input of another number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let first = self.options.channels_first;
        match first {
            true => check::channels_first(LAYER, xs, self.num_channels)?,
            false => check::features(LAYER, xs, self.num_channels)?,
        }
        let (alpha, weight, bias) = (&self.alpha, self.weight(), self.bias());
        match self.options.function {
            Squash::Tanh => ops::dyt(xs, alpha, weight, bias, first),
            Squash::Erf => ops::derf(xs, alpha, self.shift(), weight, bias, first),
        }
    }
}

impl Norm for DyT {
    fn kind(&self) -> &'static str {
        DyTOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut named = vec![(ALPHA[0], self.alpha.clone())];
        named.extend(self.shift.iter().map(|shift| (SHIFT[0], shift.clone())));
        named.extend(self.params.named());
        named
    }

    fn reset(&self) -> Result<()> {
        let numbers = [(Some(&self.alpha), self.options.alpha), (self.shift(), 0.)];
        for (number, start) in numbers {
            if let Some(number) = number.filter(|n| n.is_variable()) {
                let start = Tensor::full(start, number.shape(), number.device())?;
                Var::from_tensor(number)?.set(&start.to_dtype(number.dtype())?)?;
            }
        }
        self.params.reset(1.)
    }
}
