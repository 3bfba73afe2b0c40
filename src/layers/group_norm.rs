//! Group normalization.

use candle_core::{Result, Tensor};
use candle_nn::{Activation, Module, VarBuilder};

use super::names::{Argument, Names};
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use crate::ops::{self, Modulation, Scaling, check};

/// Configuration of [`GroupNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct GroupNormOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// Learned parameters. Default: weight and bias.
    pub affine: Affine,
    /// Follows weight and bias, in the same pass, forward and backward: `Relu`, `Relu6`,
    /// `LeakyRelu`, `Silu` or `Swish`, `Gelu`, `NewGelu` or `GeluPytorchTanh`, `HardSwish`,
    /// `Sigmoid`, `Mish`. Default: none.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub activation: Option<Activation>,
}

impl Default for GroupNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            affine: Affine::WeightAndBias,
            activation: None,
        }
    }
}

impl From<f64> for GroupNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// A [`GroupNorm`] as a configuration has it: the number of groups, which has no default, beside
/// the options.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields, rename = "GroupForm"))]
pub(crate) struct GroupNormSpec {
    pub(crate) num_groups: usize,
    #[cfg_attr(feature = "serde", serde(default))]
    pub(crate) options: GroupNormOptions,
}

impl NormOptions for GroupNormSpec {
    const NAMES: Names = Names {
        argument: Some(Argument {
            form: "N (N groups, at least 1)",
            expected: "a number of groups of at least 1",
            example: "32",
            suggested: "8",
        }),
        ..Names::new(&["group"], &["gn"], false)
    };

    fn parse(argument: Option<&str>) -> Option<Self> {
        let num_groups = argument?.parse().ok().filter(|n| *n > 0)?;
        let options = GroupNormOptions::default();
        Some(Self {
            num_groups,
            options,
        })
    }

    fn argument(&self) -> Option<String> {
        Some(self.num_groups.to_string())
    }

    fn has_bias(&self) -> bool {
        self.options.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let norm = group_norm(self.num_groups, num_channels, self.options, vb)?;
        Ok(Box::new(norm))
    }
}

/// Group normalization: each group of channels of a sample by its own mean and variance.
///
/// `y = (x − μ) / √(σ² + ε) · w + b`
///
/// Where:
/// - μ and σ² (biased) are taken for each sample over the `num_channels / num_groups` channels of a
///   group and all of space;
/// - `w` and `b` are `weight` and `bias`, one value a channel, if `affine` has them;
/// - ε is `eps`.
///
/// Wu and He, 2018, <https://arxiv.org/abs/1803.08494>. It does not see the batch: training and
/// inference are the same, so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or
/// `f64`; half precision is computed in `f32` and rounded once.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    params: AffineParams,
    options: GroupNormOptions,
    num_channels: usize,
    num_groups: usize,
}

/// A [`GroupNorm`] of `num_groups` groups of the `num_channels` on axis 1, its parameters taken
/// from `vb`.
///
/// Parameters: `weight` (also found as `gamma` or `scale`) and `bias` (also `beta`), as `affine`
/// says.
///
/// # Errors
/// `num_groups` that does not divide `num_channels`, options out of range, parameters of another
/// shape; a checkpoint with a scale or shift that `affine` lacks, which would be dropped unseen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::group_norm(8, 32, 1e-5, vb)?;
/// let x = Tensor::zeros((2, 32, 7, 7), DType::F32, &Device::Cpu)?;
/// assert_eq!(norm.forward(&x)?.dims(), [2, 32, 7, 7]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn group_norm(
    num_groups: usize,
    num_channels: usize,
    options: impl Into<GroupNormOptions>,
    vb: VarBuilder,
) -> Result<GroupNorm> {
    let options = options.into();
    check::eps("GroupNorm", options.eps)?;
    ops::fused_activation("GroupNorm", options.activation)?;
    check::groups("GroupNorm", num_groups, num_channels)?;
    check::countable("GroupNorm", "a channel axis", &[num_channels])?;
    Ok(GroupNorm {
        params: AffineParams::new("GroupNorm", &vb, num_channels, options.affine, 1.)?,
        options,
        num_channels,
        num_groups,
    })
}

impl GroupNorm {
    /// A layer of given parameters.
    ///
    /// # Errors
    /// `num_groups` that does not divide `num_channels`, parameters of another shape, `eps` out of
    /// range.
    pub fn new(
        weight: Tensor,
        bias: Tensor,
        num_channels: usize,
        num_groups: usize,
        eps: f64,
    ) -> Result<Self> {
        check::eps("GroupNorm", eps)?;
        check::groups("GroupNorm", num_groups, num_channels)?;
        check::shape("GroupNorm", "weight", &weight, &[num_channels])?;
        check::shape("GroupNorm", "bias", &bias, &[num_channels])?;
        Ok(Self {
            params: AffineParams {
                weight: Some(weight),
                bias: Some(bias),
            },
            options: eps.into(),
            num_channels,
            num_groups,
        })
    }

    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &GroupNormOptions {
        &self.options
    }

    /// The number of channels on axis 1.
    pub fn num_channels(&self) -> usize {
        self.num_channels
    }

    /// The number of groups that they form.
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// The norm with scale and shift from outside, in one pass:
    /// `y = norm(x) · (1 + scale) + shift`, as AdaGN does.
    ///
    /// # Shapes
    /// `xs` as in `forward`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward`; a scale or shift of another shape, dtype or device.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::group_norm(2, 8, 1e-5, vb)?;
    /// let x = Tensor::randn(0f32, 1., (3, 8, 4, 4), &Device::Cpu)?;
    /// let scale = Tensor::zeros((3, 8), DType::F32, &Device::Cpu)?;
    /// assert_eq!(norm.forward_modulated(&x, Some(&scale), None)?.dims(), [3, 8, 4, 4]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_modulated(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.forward_modulated_by(xs, &Modulation::new(scale, shift))
    }

    /// [`forward_modulated`](Self::forward_modulated) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated`](Self::forward_modulated).
    pub fn forward_modulated_by(&self, xs: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        self.normalized(xs, self.scaling()?.modulated(modulation))
    }

    /// Steps after the normalization.
    fn scaling(&self) -> Result<Scaling<'_>> {
        let scaling = Scaling::new(self.params.weight(), self.params.bias());
        scaling.activated("GroupNorm", self.options.activation)
    }

    fn normalized(&self, xs: &Tensor, scaling: Scaling) -> Result<Tensor> {
        check::rank_at_least("GroupNorm", xs, 2, "[N, C, ...]")?;
        check::channels("GroupNorm", xs, self.num_channels)?;
        ops::group_norm_by(xs, self.num_groups, scaling, self.options.eps)
    }
}

impl Module for GroupNorm {
    /// Normalizes each group of each sample of `xs`.
    ///
    /// # Shapes
    /// `[N, num_channels, *]` of rank at least 2; the output is contiguous, of the same shape and
    /// dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.normalized(xs, self.scaling()?)
    }
}

impl Norm for GroupNorm {
    fn kind(&self) -> &'static str {
        GroupNormSpec::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(1.)
    }
}
