//! Switchable normalization.

use std::sync::Arc;

use candle_core::{Result, Tensor, Var, bail};
use candle_nn::{Init, Module, ModuleT, VarBuilder};

use super::batch::Taken;
use super::names::Names;
use super::norm::{Norm, OnLastAxis};
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use super::running_stats::RunningStats;
use crate::collective::Collective;
use crate::ops::{self, BatchStatistics, JointStatistics, SwitchBatch, SwitchOptions, check};

const LAYER: &str = "SwitchNorm";

// The names of the reference implementation.
const MEAN_WEIGHT: &str = "mean_weight";
const VAR_WEIGHT: &str = "var_weight";

/// Configuration of [`SwitchNorm`], with the defaults of the reference implementation.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct SwitchNormOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// The weight of a new batch in the running statistics; `None` averages all batches alike.
    /// Default: 0.1.
    ///
    /// The reference implementation names the weight of the old value: its 0.9 is 0.1 here, its
    /// 0.997 is 0.003. With `using_moving_average=False` it adds batches up instead;
    /// [`switch_norm`] says how such a checkpoint is read.
    pub momentum: Option<f64>,
    /// Affine parameters that are learned. Default: both.
    pub affine: Affine,
    /// Mix in the statistics of the batch; without, training and inference are the same. Default:
    /// true.
    pub using_bn: bool,
    /// The spatial axes of the input, which say what the parameters are called in shape:
    /// `[1, C, 1, 1]` for two of them. Any input of rank 3 or more will do. With 0 there are no
    /// instances to have statistics: layer and batch are mixed. Default: 2.
    pub spatial_dims: usize,
    /// Divide the variance of an instance by n − 1, as the reference implementation does, in place
    /// of n, as the paper does. The variances of layer and batch are formed from it; without
    /// instances they are divided by n − 1 themselves. Default: true.
    pub unbiased: bool,
    /// Start from a scale of zero, for the last norm of a residual branch. Default: false.
    pub last_gamma: bool,
    /// Refuse a training batch with NaN or infinity, which would make the running statistics NaN
    /// for good. It waits for the device at every step, and holds for all layers of the same
    /// variables. Default: false.
    pub refuse_non_finite: bool,
}

impl Default for SwitchNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            momentum: Some(0.1),
            affine: Affine::WeightAndBias,
            using_bn: true,
            spatial_dims: 2,
            unbiased: true,
            last_gamma: false,
            refuse_non_finite: false,
        }
    }
}

impl From<f64> for SwitchNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl SwitchNormOptions {
    fn of_batch<'a>(&self, batch: SwitchBatch<'a>) -> SwitchOptions<'a> {
        SwitchOptions {
            instance: self.spatial_dims > 0,
            batch,
            unbiased: self.unbiased,
            eps: self.eps,
        }
    }

    /// Correction of the variance: that of n values is divided by n less this.
    fn batch_correction(&self) -> usize {
        usize::from(self.unbiased && self.spatial_dims == 0)
    }

    fn initial_weight(&self) -> f64 {
        if self.last_gamma { 0. } else { 1. }
    }
}

impl NormOptions for SwitchNormOptions {
    // `sn` is missing: papers write it for spectral norm too.
    const NAMES: Names = Names::new(&["switch", "switchable"], &[], true);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(Box::new(switch_norm(num_channels, *self, vb)?))
    }

    /// Without spatial axes there are no instances.
    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            spatial_dims: 0,
            ..*self
        };
        Ok(Box::new(OnLastAxis {
            norm: options.channels(num_features, vb)?,
            num_features,
        }))
    }
}

/// Switchable normalization: each channel of each sample by a learned mixture of the statistics of
/// its instance, layer and batch.
///
/// `y = (x − Σ mₖ·μₖ) / √(Σ vₖ·σ²ₖ + ε) · w + b`
///
/// Where:
/// - k runs over instance (space), layer (channels and space) and batch (samples and space);
/// - `m = softmax(mean_weight)` and `v = softmax(var_weight)` are mixing weights, which the layer
///   learns;
/// - in inference, the statistics of the batch are the running ones, to which each training batch
///   adds `momentum` of its own;
/// - `w` and `b` are `weight` and `bias`, one value a channel, if `affine` has them;
/// - ε is `eps`.
///
/// Luo, Ren, Peng, Zhang and Li, 2019, <https://arxiv.org/abs/1806.10779>. The two modes differ, so
/// the layer is a [`ModuleT`]. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision is
/// computed in `f32` and rounded once, and keeps `f32` statistics.
#[derive(Debug, Clone)]
pub struct SwitchNorm {
    params: AffineParams,
    mean_weight: Tensor,
    var_weight: Tensor,
    /// Placeholder statistics if none are tracked.
    stats: RunningStats,
    options: SwitchNormOptions,
    num_features: usize,
    /// Ranks that form the statistics of training batches together.
    group: Option<Arc<dyn Collective>>,
}

/// A [`SwitchNorm`] of the `num_features` channels on axis 1, its parameters and statistics taken
/// from `vb`.
///
/// Names and shapes are those of the reference implementation, for two spatial axes: `weight` and
/// `bias`, `[1, C, 1, 1]`; `mean_weight` and `var_weight`, `[3]`; `running_mean` and `running_var`,
/// `[1, C, 1]`. Also `num_batches_tracked` (0 if missing).
///
/// # Checkpoints of the reference implementation
/// They load as they are, under these options ([the others](SwitchNormOptions) at their defaults):
///
/// | there | here |
/// | --- | --- |
/// | `SwitchNorm1d`, `2d`, `3d` | `spatial_dims` 0, 2, 3 |
/// | `using_bn=False` | `using_bn: false` |
/// | `momentum`: 0.9 in `2d`, 0.997 in `1d` and `3d` unless given | `momentum: Some(1. - that)` |
/// | `last_gamma=True` | `last_gamma: true`; it matters for new layers only |
/// | variances by n − 1 | `unbiased: true`, the default |
///
/// With `using_moving_average=False`, the layer there adds up, over k training batches of mean m
/// and variance v, m and v + m², which its training script turns into averages before it saves
/// them. Sums that were not are to be divided by k, and then the square of the first subtracted
/// from the second. Here, `momentum: None` and [`recalibrate`](crate::recalibrate) average m and v.
///
/// A layer that was never trained has a running variance of 0 there, and of 1 here.
///
/// # Errors
/// Options out of range, `last_gamma` without a scale, tensors of another shape, a negative running
/// variance, a statistic that is not finite;
/// a checkpoint with a scale or shift that `affine` lacks.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::switch_norm(3, 1e-5, vb)?;
/// let x = Tensor::randn(5f32, 2., (4, 3, 8, 8), &Device::Cpu)?;
/// assert_eq!(norm.forward_t(&x, true)?.dims(), [4, 3, 8, 8]);
/// assert_eq!(norm.mean_mixing_weights()?, [1. / 3.; 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn switch_norm(
    num_features: usize,
    options: impl Into<SwitchNormOptions>,
    vb: VarBuilder,
) -> Result<SwitchNorm> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    check::momentum(LAYER, options.momentum)?;
    // A tensor of candle has eight axes at the most.
    at_most(LAYER, "spatial_dims", options.spatial_dims, 6)?;
    if options.last_gamma {
        has_scale(LAYER, "last_gamma", options.affine.has_weight())?;
    }
    let mut shape = vec![1; options.spatial_dims + 2];
    shape[1] = num_features;
    let statistics = &shape[..shape.len().min(3)];
    let stats = RunningStats::new(LAYER, statistics, options.momentum, options.using_bn, &vb)?
        .refusing(options.refuse_non_finite);
    let sources = 1 + usize::from(options.spatial_dims > 0) + usize::from(options.using_bn);
    let mixing_weights = |name| vb.get_with_hints(sources, name, Init::Const(1.));
    Ok(SwitchNorm {
        mean_weight: mixing_weights(MEAN_WEIGHT)?,
        var_weight: mixing_weights(VAR_WEIGHT)?,
        params: AffineParams::new(LAYER, &vb, shape, options.affine, options.initial_weight())?,
        stats,
        options,
        num_features,
        group: None,
    })
}

impl SwitchNorm {
    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// Logits of the mixing weights of the means: instance, layer, batch.
    pub fn mean_weight(&self) -> &Tensor {
        &self.mean_weight
    }

    /// Logits of the mixing weights of the variances: instance, layer, batch.
    pub fn var_weight(&self) -> &Tensor {
        &self.var_weight
    }

    /// The mixing weights of the means of instance, layer and batch, as far as they are mixed.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn mean_mixing_weights(&self) -> Result<Vec<f64>> {
        ops::mixing_weights(&self.mean_weight)
    }

    /// The mixing weights of the variances of instance, layer and batch, as far as they are mixed.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn var_mixing_weights(&self) -> Result<Vec<f64>> {
        ops::mixing_weights(&self.var_weight)
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &SwitchNormOptions {
        &self.options
    }

    /// The number of channels on axis 1.
    pub fn num_features(&self) -> usize {
        self.num_features
    }

    /// The running statistics, if those of the batch are mixed in.
    pub fn running_stats(&self) -> Option<&RunningStats> {
        self.options.using_bn.then_some(&self.stats)
    }

    /// This layer with the running statistics of now and for good, its parameters still trainable.
    /// The statistics of instances and layers remain those of each input, so that it cannot be
    /// folded into the layer before.
    ///
    /// # Errors
    /// A negative running variance, which only a direct write to the variable can leave.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::switch_norm(3, 1e-5, vb)?;
    /// let x = Tensor::randn(5f32, 2., (4, 3, 8, 8), &Device::Cpu)?.flatten_from(2)?;
    /// norm.forward_t(&x, true)?;
    /// let frozen = norm.frozen()?;
    /// let y = frozen.forward(&x)?.to_vec3::<f32>()?;
    /// assert_eq!(y, norm.forward_t(&x, false)?.to_vec3::<f32>()?);
    /// // The layer trains on, its frozen statistics do not; both have the same parameters.
    /// norm.forward_t(&x, true)?;
    /// assert_eq!(y, frozen.forward(&x)?.to_vec3::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn frozen(&self) -> Result<FrozenSwitchNorm> {
        let batch = self.running_stats().map(batch_statistics).transpose()?;
        let norm = self.clone();
        Ok(FrozenSwitchNorm { norm, batch })
    }

    /// This layer with the batch's part of its statistics formed over all ranks of `group`, as
    /// [`BatchNorm::synchronized`](crate::BatchNorm::synchronized) forms them, with the same rules
    /// for the ranks. Those of instances and layers are of each sample. Without `using_bn` nothing
    /// changes.
    ///
    /// The gradients of weight, bias and mixing weights are the part of this rank, to be summed
    /// with all other gradients.
    pub fn synchronized(mut self, group: Arc<dyn Collective>) -> Self {
        self.group = (group.size() > 1).then_some(group);
        self
    }

    fn check_input(&self, xs: &Tensor) -> Result<()> {
        let least = 2 + self.options.spatial_dims.min(1);
        check::rank_at_least(LAYER, xs, least, "[N, C, ...]")?;
        check::channels(LAYER, xs, self.num_features)
    }

    /// `xs` by the mixture with the batches of all ranks of `group`, and their statistics.
    fn mixed_over(
        &self,
        group: &Arc<dyn Collective>,
        xs: &Tensor,
    ) -> Result<(Tensor, Option<JointStatistics>)> {
        let flat = |p: Option<&Tensor>| p.map(Tensor::flatten_all).transpose();
        let (weight, bias) = (flat(self.weight())?, flat(self.bias())?);
        ops::sync_switch_norm_with(
            group,
            self.check_input(xs),
            xs,
            [weight.as_ref(), bias.as_ref()],
            [&self.mean_weight, &self.var_weight],
            self.options.of_batch(SwitchBatch::Own),
            self.num_features,
        )
    }

    /// `xs` by the mixture with `batch`, and the statistics of the batch where they are its own.
    fn mixed(&self, xs: &Tensor, batch: SwitchBatch) -> Result<(Tensor, Option<BatchStatistics>)> {
        let options = &self.options;
        self.check_input(xs)?;
        let flat = |p: Option<&Tensor>| p.map(Tensor::flatten_all).transpose();
        let (weight, bias) = (flat(self.weight())?, flat(self.bias())?);
        ops::switch_norm_with(
            xs,
            weight.as_ref(),
            bias.as_ref(),
            [&self.mean_weight, &self.var_weight],
            options.of_batch(batch),
        )
    }
}

impl ModuleT for SwitchNorm {
    /// Normalizes `xs`; in inference with the running statistics for those of the batch.
    ///
    /// # Shapes
    /// `[N, num_features, *]` of rank at least 3, or 2 without spatial axes; the output is
    /// contiguous, of the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device; one value where a variance is
    /// unbiased. No error changes the statistics.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if !self.options.using_bn {
            return Ok(self.mixed(xs, SwitchBatch::Absent)?.0);
        }
        if !train {
            let [mean, var] = batch_statistics(&self.stats)?;
            return Ok(self.mixed(xs, SwitchBatch::Given(&mean, &var))?.0);
        }
        let correction = self.options.batch_correction();
        let taken = Taken::OverValues { correction };
        if let Some(group) = &self.group {
            let (y, statistics) = self.mixed_over(group, xs)?;
            self.stats.observe_joint(statistics, taken)?;
            return Ok(y);
        }
        let (y, statistics) = self.mixed(xs, SwitchBatch::Own)?;
        self.stats.observe_as(xs, statistics, taken)?;
        Ok(y)
    }
}

/// The running mean and variance of each channel as they are now.
fn batch_statistics(stats: &RunningStats) -> Result<[Tensor; 2]> {
    let [mean, var] = stats.mean_and_var()?;
    Ok([mean.flatten_all()?, var.flatten_all()?])
}

/// A [`SwitchNorm`] whose statistics of the batch no longer change: those that it mixes with the
/// statistics of each instance and layer are the running ones as they were when
/// [`frozen`](SwitchNorm::frozen) was called.
///
/// The parameters are those of the layer itself: they go on training. There is no second mode, so
/// it is a [`Module`].
#[derive(Debug, Clone)]
pub struct FrozenSwitchNorm {
    norm: SwitchNorm,
    /// Mean and variance of each channel, if those of the batch are mixed in.
    batch: Option<[Tensor; 2]>,
}

impl FrozenSwitchNorm {
    /// The fixed mean of each channel, if the statistics of the batch are mixed in.
    pub fn running_mean(&self) -> Option<&Tensor> {
        self.batch.as_ref().map(|[mean, _]| mean)
    }

    /// The fixed variance of each channel, if the statistics of the batch are mixed in.
    pub fn running_var(&self) -> Option<&Tensor> {
        self.batch.as_ref().map(|[_, var]| var)
    }

    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.norm.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.norm.bias()
    }

    /// The configuration of the layer.
    pub fn options(&self) -> &SwitchNormOptions {
        self.norm.options()
    }
}

impl Module for FrozenSwitchNorm {
    /// Normalizes `xs` with the fixed statistics for those of the batch.
    ///
    /// # Shapes
    /// `[N, num_features, *]` of rank at least 3, or 2 without spatial axes; the output is
    /// contiguous, of the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device; one value where a variance is
    /// unbiased.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let batch = match &self.batch {
            Some([mean, var]) => SwitchBatch::Given(mean, var),
            None => SwitchBatch::Absent,
        };
        Ok(self.norm.mixed(xs, batch)?.0)
    }
}

impl Norm for SwitchNorm {
    fn kind(&self) -> &'static str {
        SwitchNormOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut all = self.params.named();
        all.push((MEAN_WEIGHT, self.mean_weight.clone()));
        all.push((VAR_WEIGHT, self.var_weight.clone()));
        all
    }

    fn running_stats(&self) -> Option<&RunningStats> {
        self.running_stats()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(self.options.initial_weight())?;
        for mixing_weights in [&self.mean_weight, &self.var_weight] {
            if mixing_weights.is_variable() {
                Var::from_tensor(mixing_weights)?.set(&mixing_weights.ones_like()?.detach())?;
            }
        }
        self.stats.reset()
    }
}

fn at_most(layer: &str, name: &str, value: usize, most: usize) -> Result<()> {
    if value > most {
        bail!("{layer}: expected {name} of at most {most}, got {value}")
    }
    Ok(())
}

/// Source of the start of a scale.
fn has_scale(layer: &str, option: &str, scale: bool) -> Result<()> {
    if !scale {
        bail!(
            "{layer}: expected an affine with a scale for {option}, which sets where it starts, \
            got one without; set {option} to false"
        )
    }
    Ok(())
}
