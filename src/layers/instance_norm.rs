//! Instance normalization.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Activation, ModuleT, VarBuilder};

use super::batch::Taken;
use super::frozen::FrozenNorm;
use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use super::running_stats::RunningStats;
use crate::collective::Collective;
use crate::computations::FixedStatistics;
use crate::ops::{self, Modulation, Scaling, check};

const LAYER: &str = "InstanceNorm";

/// Configuration of [`InstanceNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct InstanceNormOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// The weight of a new batch in the running statistics; `None` averages all batches alike.
    /// Default: 0.1.
    pub momentum: Option<f64>,
    /// Learned parameters. Default: none.
    pub affine: Affine,
    /// Keep running statistics for inference; without, every input is normalized by its own.
    /// Default: false.
    pub track_running_stats: bool,
    /// Refuse a training batch with NaN or infinity, which would make the running statistics NaN
    /// for good. It waits for the device at every step, and holds for all layers of the same
    /// variables. Default: false.
    pub refuse_non_finite: bool,
    /// Follows weight and bias, in the same pass, forward and backward: `Relu`, `Relu6`,
    /// `LeakyRelu`, `Silu` or `Swish`, `Gelu`, `NewGelu` or `GeluPytorchTanh`, `HardSwish`,
    /// `Sigmoid`, `Mish`. Default: none.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub activation: Option<Activation>,
}

impl Default for InstanceNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            momentum: Some(0.1),
            affine: Affine::None,
            track_running_stats: false,
            refuse_non_finite: false,
            activation: None,
        }
    }
}

impl From<f64> for InstanceNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl NormOptions for InstanceNormOptions {
    const NAMES: Names = Names::new(&["instance"], &["in"], true);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(Box::new(instance_norm(num_channels, *self, vb)?))
    }
}

/// Instance normalization: each channel of each sample by its own mean and variance over space.
///
/// `y = (x − μ) / √(σ² + ε) · w + b`
///
/// Where:
/// - μ and σ² (biased) are taken for each sample and channel over space, or, in inference with
///   tracked statistics, are the running ones: the averages over the samples of a batch of their
///   mean and of their unbiased variance;
/// - `w` and `b` are `weight` and `bias`, one value a channel, if `affine` has them;
/// - ε is `eps`.
///
/// Ulyanov, Vedaldi and Lempitsky, 2016, <https://arxiv.org/abs/1607.08022>. The modes differ where
/// statistics are tracked, so the layer is a [`ModuleT`]. The dtype is `f16`, `bf16`, `f32` or
/// `f64`; half precision is computed in `f32` and rounded once.
#[derive(Debug, Clone)]
pub struct InstanceNorm {
    params: AffineParams,
    /// Placeholder statistics if none are tracked.
    stats: RunningStats,
    options: InstanceNormOptions,
    /// Ranks that form running statistics together.
    group: Option<Arc<dyn Collective>>,
}

/// An [`InstanceNorm`] of the `num_features` channels on axis 1, its parameters and statistics
/// taken from `vb`.
///
/// Names as for [`batch_norm`](crate::batch_norm()).
///
/// # Errors
/// Options out of range, tensors of another shape, a negative running variance, a statistic that is
/// not finite; a checkpoint with a scale or
/// shift that `affine` lacks, which would be dropped unseen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{InstanceNormOptions, instance_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = instance_norm(3, InstanceNormOptions::default(), vb)?;
/// let x = Tensor::randn(5f32, 2., (2, 3, 8, 8), &Device::Cpu)?;
/// assert_eq!(norm.forward_t(&x, false)?.dims(), [2, 3, 8, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn instance_norm(
    num_features: usize,
    options: impl Into<InstanceNormOptions>,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    ops::fused_activation(LAYER, options.activation)?;
    check::momentum(LAYER, options.momentum)?;
    let stats = RunningStats::new(
        LAYER,
        num_features,
        options.momentum,
        options.track_running_stats,
        &vb,
    )?
    .refusing(options.refuse_non_finite);
    Ok(InstanceNorm {
        params: AffineParams::new(LAYER, &vb, num_features, options.affine, 1.)?,
        stats,
        options,
        group: None,
    })
}

impl InstanceNorm {
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
    pub fn options(&self) -> &InstanceNormOptions {
        &self.options
    }

    /// The number of channels on axis 1.
    pub fn num_features(&self) -> usize {
        self.stats.mean().elem_count()
    }

    /// The running statistics, if they are tracked.
    pub fn running_stats(&self) -> Option<&RunningStats> {
        self.options.track_running_stats.then_some(&self.stats)
    }

    /// This layer with the running statistics of now and for good, its affine parameters still
    /// trainable.
    ///
    /// # Errors
    /// A layer that tracks no statistics.
    pub fn frozen(&self) -> Result<FrozenNorm> {
        let (params, eps) = (&self.params, self.options.eps);
        let frozen = FrozenNorm::new(LAYER, 3, self.running_stats(), params, eps)?;
        Ok(frozen.with_activation(self.options.activation))
    }

    /// This layer with its running statistics updated by the batches of all ranks of `group`, each
    /// sample counted once, so that they have the same bits on every rank.
    ///
    /// Output and gradients are those of the plain layer, since samples do not see each other. Each
    /// forward in training takes one sum over ranks of 2 C numbers if statistics are tracked, which
    /// every rank must take part in, also one with an empty batch; otherwise nothing is sent. The
    /// layer and its clones share running statistics with the layer that this was called on.
    pub fn synchronized(mut self, group: Arc<dyn Collective>) -> Self {
        self.group = (group.size() > 1).then_some(group);
        self
    }

    /// `forward_t` with scale and shift from outside, in one pass:
    /// `y = norm(x) · (1 + scale) + shift`, as conditional instance norm does.
    ///
    /// # Shapes
    /// `xs` as in `forward_t`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward_t`; a scale or shift of another shape, dtype or device. No error changes
    /// the statistics.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::instance_norm(8, 1e-5, vb)?;
    /// let x = Tensor::randn(0f32, 1., (3, 8, 4, 4), &Device::Cpu)?;
    /// let scale = Tensor::zeros((3, 8), DType::F32, &Device::Cpu)?;
    /// let y = norm.forward_modulated_t(&x, Some(&scale), None, true)?;
    /// assert_eq!(y.dims(), [3, 8, 4, 4]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_modulated_t(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
        train: bool,
    ) -> Result<Tensor> {
        self.forward_modulated_by_t(xs, &Modulation::new(scale, shift), train)
    }

    /// [`forward_modulated_t`](Self::forward_modulated_t) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated_t`](Self::forward_modulated_t).
    pub fn forward_modulated_by_t(
        &self,
        xs: &Tensor,
        modulation: &Modulation,
        train: bool,
    ) -> Result<Tensor> {
        self.normalized(xs, self.scaling()?.modulated(modulation), train)
    }

    /// Steps after the normalization.
    fn scaling(&self) -> Result<Scaling<'_>> {
        Scaling::new(self.weight(), self.bias()).activated(LAYER, self.options.activation)
    }

    fn normalized(&self, xs: &Tensor, scaling: Scaling, train: bool) -> Result<Tensor> {
        let options = &self.options;
        if options.track_running_stats && !train {
            self.check_input(xs)?;
            let statistics = Arc::new(FixedStatistics::new(self.stats.mean_and_var()?));
            return ops::normalize_with(LAYER, 3, xs, &statistics, scaling, options.eps);
        }
        if !options.track_running_stats {
            self.check_input(xs)?;
            return ops::instance_norm_values(xs, scaling, options.eps);
        }
        let by_samples = || {
            self.check_input(xs)?;
            ops::instance_norm_with(xs, scaling, options.eps)
        };
        let Some(group) = &self.group else {
            let (y, statistics) = by_samples()?;
            self.stats.observe_as(xs, statistics, Taken::OfSamples)?;
            return Ok(y);
        };
        let normalized = by_samples();
        let local = normalized.as_ref().ok();
        let local = local.map(|(_, statistics)| Some((xs.dims()[0], statistics.as_ref()?)));
        let joint = ops::averaged_over_ranks(&**group, LAYER, self.num_features(), local);
        // The error of this rank says more than that of the sum.
        let (y, _) = normalized?;
        self.stats.observe_joint(joint?, Taken::OfSamples)?;
        Ok(y)
    }

    fn check_input(&self, xs: &Tensor) -> Result<()> {
        check::rank_at_least(LAYER, xs, 3, "[N, C, ...]")?;
        check::channels(LAYER, xs, self.num_features())
    }
}

impl ModuleT for InstanceNorm {
    /// Normalizes each channel of each sample of `xs`; in inference by the running statistics, if
    /// they are tracked.
    ///
    /// # Shapes
    /// `[N, num_features, *]` of rank at least 3; the output is contiguous, of the same shape and
    /// dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device; one spatial element where its
    /// own statistics are used. No error changes the statistics.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.normalized(xs, self.scaling()?, train)
    }
}

impl Norm for InstanceNorm {
    fn kind(&self) -> &'static str {
        InstanceNormOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    fn running_stats(&self) -> Option<&RunningStats> {
        self.running_stats()
    }

    fn frozen(&self) -> Result<FrozenNorm> {
        self.frozen()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(1.)?;
        self.stats.reset()
    }
}
