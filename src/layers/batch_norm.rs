//! Batch normalization.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use candle_nn::{Activation, ModuleT, VarBuilder};

pub use candle_nn::BatchNormConfig;

use super::batch::Taken;
use super::foldable::Foldable;
use super::frozen::FrozenNorm;
use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use super::running_stats::RunningStats;
use crate::collective::Collective;
use crate::computations::FixedStatistics;
use crate::ops::{self, Modulation, Scaling, check};

const LAYER: &str = "BatchNorm";

/// Configuration of [`BatchNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct BatchNormOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// The weight of a new batch in the running statistics; `None` averages all batches alike.
    /// Default: 0.1.
    ///
    /// PyTorch's convention: Flax and Keras write 0.99 or 0.9 for the weight of the old value.
    pub momentum: Option<f64>,
    /// Learned parameters. Default: weight and bias.
    pub affine: Affine,
    /// Keep running statistics for inference; without, inference uses those of its own batch.
    /// Default: true.
    pub track_running_stats: bool,
    /// Subtract the mean; without, channels are divided by their root mean square. Default: true.
    pub remove_mean: bool,
    /// Refuse a training batch with NaN or infinity, which would make the running statistics NaN
    /// for good. It waits for the device at every step, and holds for all layers of the same
    /// variables. Default: false.
    pub refuse_non_finite: bool,
    /// Follows weight and bias, in the same pass, forward and backward: `Relu`, `Relu6`,
    /// `LeakyRelu`, `Silu` or `Swish`, `Gelu`, `NewGelu` or `GeluPytorchTanh`, `HardSwish`,
    /// `Sigmoid`, `Mish`. Default: none.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub activation: Option<Activation>,
    /// Ghost batch normalization (Hoffer et al., 2017, <https://arxiv.org/abs/1705.08741>): in
    /// training, parts of the batch of about this many samples are normalized by statistics of
    /// their own, and update the running ones one after the other. There are ⌈N / size⌉ parts of
    /// one size, of which the last may have fewer samples; a last part of one value per channel
    /// joins the one before it. TabNet has 128. Default: none, all samples together.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub virtual_batch_size: Option<usize>,
}

impl Default for BatchNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            momentum: Some(0.1),
            affine: Affine::WeightAndBias,
            track_running_stats: true,
            remove_mean: true,
            refuse_non_finite: false,
            activation: None,
            virtual_batch_size: None,
        }
    }
}

/// Converts all that candle-nn's functions take for a [`BatchNormConfig`]: that itself, a number as
/// `eps`, and every type that converts into it.
impl<C: Into<BatchNormConfig>> From<C> for BatchNormOptions {
    fn from(config: C) -> Self {
        let config = config.into();
        Self {
            eps: config.eps,
            momentum: Some(config.momentum),
            affine: if config.affine {
                Affine::WeightAndBias
            } else {
                Affine::None
            },
            remove_mean: config.remove_mean,
            ..Self::default()
        }
    }
}

impl NormOptions for BatchNormOptions {
    const NAMES: Names = Names::new(&["batch"], &["bn"], true);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(Box::new(batch_norm(num_channels, *self, vb)?))
    }
}

/// Batch normalization: each channel by its mean and variance over the batch and space.
///
/// `y = (x − μ) / √(σ² + ε) · w + b`
///
/// Where:
/// - in training, μ and σ² (biased) are those of this batch, for each channel of axis 1 over all
///   other axes;
/// - in inference, they are the running statistics, to which each training batch adds `momentum` of
///   its mean and of its unbiased variance;
/// - `w` and `b` are `weight` and `bias`, one value a channel, if `affine` has them;
/// - ε is `eps`.
///
/// Ioffe and Szegedy, 2015, <https://arxiv.org/abs/1502.03167>. The two modes differ, so the layer
/// is a [`ModuleT`] and no `Module`: call [`forward_t`](ModuleT::forward_t), or take a
/// [`frozen`](Self::frozen) one. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision is
/// computed in `f32` and rounded once, and keeps `f32` statistics.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    params: AffineParams,
    /// Placeholder statistics if none are tracked.
    stats: RunningStats,
    options: BatchNormOptions,
    /// Ranks that form the statistics of training batches together.
    group: Option<Arc<dyn Collective>>,
}

/// A [`BatchNorm`] of the `num_features` channels on axis 1, its parameters and statistics taken
/// from `vb`.
///
/// Parameters: `weight` (also found as `gamma` or `scale`) and `bias` (also `beta`), as `affine`
/// says. Statistics: `running_mean` (`mean`, `moving_mean`), `running_var` (`var`,
/// `moving_variance`), `num_batches_tracked` (0 if missing).
///
/// # Errors
/// Options out of range, tensors of another shape, a negative running variance, a statistic that is
/// not finite; a checkpoint with a scale or
/// shift that `affine` lacks, which would be dropped unseen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::batch_norm(3, 1e-5, vb)?;
/// let x = Tensor::randn(5f32, 2., (16, 3, 8, 8), &Device::Cpu)?;
/// let trained = norm.forward_t(&x, true)?;
/// let inferred = norm.forward_t(&x, false)?;
/// assert_eq!(trained.dims(), inferred.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_norm<C: Into<BatchNormOptions>>(
    num_features: usize,
    options: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    ops::fused_activation(LAYER, options.activation)?;
    if let Some(size) = options.virtual_batch_size {
        check::at_least_one(LAYER, "sample of virtual_batch_size", size)?;
    }
    check::momentum(LAYER, options.momentum)?;
    let stats = RunningStats::new(
        LAYER,
        num_features,
        options.momentum,
        options.track_running_stats,
        &vb,
    )?
    .refusing(options.refuse_non_finite);
    Ok(BatchNorm {
        params: AffineParams::new(LAYER, &vb, num_features, options.affine, 1.)?,
        stats,
        options,
        group: None,
    })
}

impl BatchNorm {
    fn from_values(
        num_features: usize,
        (mean, var): (Tensor, Tensor),
        weight_and_bias: Option<(Tensor, Tensor)>,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        check::eps(LAYER, eps)?;
        check::shape(LAYER, "running_mean", &mean, &[num_features])?;
        check::shape(LAYER, "running_var", &var, &[num_features])?;
        let mut params = AffineParams::NONE;
        let mut affine = Affine::None;
        if let Some((weight, bias)) = weight_and_bias {
            check::shape(LAYER, "weight", &weight, &[num_features])?;
            check::shape(LAYER, "bias", &bias, &[num_features])?;
            affine = Affine::WeightAndBias;
            params = AffineParams {
                weight: Some(weight),
                bias: Some(bias),
            };
        }
        let momentum = Some(momentum);
        Ok(Self {
            params,
            stats: RunningStats::from_values(LAYER, mean, var, momentum)?,
            options: BatchNormOptions {
                eps,
                momentum,
                affine,
                ..Default::default()
            },
            group: None,
        })
    }

    /// A layer of given statistics and parameters, with a momentum of 0.1.
    ///
    /// # Errors
    /// Tensors that are not of shape `[num_features]`, statistics that are negative or not finite,
    /// `eps` out of range.
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        let affine = Some((weight, bias));
        Self::from_values(num_features, (running_mean, running_var), affine, eps, 0.1)
    }

    /// A layer of given statistics without parameters, with a momentum of 0.1.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn new_no_bias(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::from_values(num_features, (running_mean, running_var), None, eps, 0.1)
    }

    /// A layer of given statistics, parameters and momentum.
    ///
    /// # Errors
    /// As [`new`](Self::new), and a momentum outside `[0, 1]`.
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let statistics = (running_mean, running_var);
        Self::from_values(
            num_features,
            statistics,
            Some((weight, bias)),
            eps,
            momentum,
        )
    }

    /// A layer of given statistics and momentum, without parameters.
    ///
    /// # Errors
    /// As [`new_with_momentum`](Self::new_with_momentum).
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let statistics = (running_mean, running_var);
        Self::from_values(num_features, statistics, None, eps, momentum)
    }

    /// The live running mean; zeros where none is tracked.
    pub fn running_mean(&self) -> &Tensor {
        self.stats.mean()
    }

    /// The live running variance; ones where none is tracked.
    pub fn running_var(&self) -> &Tensor {
        self.stats.var()
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The scale and the shift of each channel, if there are both.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.weight().zip(self.bias())
    }

    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// The weight of the next batch in the running statistics: the momentum, or
    /// `1 / (num_batches_tracked + 1)` for the cumulative average.
    pub fn momentum(&self) -> f64 {
        self.stats.next_momentum()
    }

    /// The configuration that the layer was built with. [`RunningStats::momentum`] has the momentum
    /// in force.
    pub fn options(&self) -> &BatchNormOptions {
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

    /// Normalizes by the statistics of this batch and adds them to the running ones: `forward_t` in
    /// training.
    ///
    /// For a batch in several pieces, see [`pool_updates`](crate::pool_updates); for a forward that
    /// adds nothing, [`without_updates`](crate::without_updates).
    ///
    /// # Errors
    /// As [`forward_t`](ModuleT::forward_t).
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.trained(x, self.scaling()?)
    }

    /// `forward_t` with scale and shift from outside: `y = norm(x) · (1 + scale) + shift`, as
    /// conditional batch norm and SPADE do. The running statistics are those of `xs`.
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
    /// let norm = candle_norm::batch_norm(8, 1e-5, vb)?;
    /// let x = Tensor::randn(0f32, 1., (3, 8, 4, 4), &Device::Cpu)?;
    /// // One scale for each class of image, looked up by a condition; a shift for each pixel.
    /// let scale = Tensor::zeros((3, 8), DType::F32, &Device::Cpu)?;
    /// let y = norm.forward_modulated_t(&x, Some(&scale), Some(&x), true)?;
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
        let scaling = self.scaling()?.modulated(modulation);
        match train {
            true => self.trained(xs, scaling),
            false => self.inferred(xs, scaling),
        }
    }

    /// Steps after the normalization.
    fn scaling(&self) -> Result<Scaling<'_>> {
        Scaling::new(self.weight(), self.bias()).activated(LAYER, self.options.activation)
    }

    fn trained(&self, x: &Tensor, scaling: Scaling) -> Result<Tensor> {
        let options = &self.options;
        let taken = match options.remove_mean {
            true => Taken::OverValues { correction: 1 },
            false => Taken::AboutZero,
        };
        if let Some(size) = options.virtual_batch_size {
            self.check_input(x)?;
            self.refuse_ghosts_of_ranks()?;
            let (y, parts) =
                ops::ghost_batch_norm_with(x, size, scaling, options.eps, options.remove_mean)?;
            self.stats.observe_parts(x, parts, taken)?;
            return Ok(y);
        }
        if let Some(group) = &self.group {
            let (y, statistics) = ops::sync_batch_norm_with(
                group,
                self.check_input(x),
                x,
                scaling,
                self.num_features(),
                options.eps,
                options.remove_mean,
            )?;
            self.stats.observe_joint(statistics, taken)?;
            return Ok(y);
        }
        self.check_input(x)?;
        let (y, statistics) = ops::batch_norm_with(x, scaling, options.eps, options.remove_mean)?;
        self.stats.observe_as(x, statistics, taken)?;
        Ok(y)
    }

    /// This layer with the statistics of training batches formed over all ranks of `group`, each
    /// value counted once: synchronized batch normalization.
    ///
    /// `y = (x − μ) / √(σ² + ε) · w + b`, where μ and σ² are those of the batches of all ranks
    /// together (MegDet, Peng et al., 2018, <https://arxiv.org/abs/1711.07240>). The batches may
    /// differ in size, and be empty; one value per channel is an error if there is no other on any
    /// rank. Every rank gets the same statistics to the bit, and updates its running ones by them.
    /// Where these and the parameters start out equal
    /// ([`broadcast_vars`](crate::distributed::broadcast_vars)), they stay equal.
    ///
    /// Each forward in training takes two sums over ranks, of C numbers and of 2 C, and each
    /// backward one of 2 C (two where a group sums in the memory of devices). Inference takes
    /// none, also without running statistics. The gradient of
    /// the input is that of the loss of all ranks; those of weight and bias are the part of this
    /// rank, to be summed with all other gradients
    /// ([`sum_gradients`](crate::distributed::sum_gradients)): **the loss of a rank is the sum over
    /// its samples, divided by the number of samples of all ranks.**
    ///
    /// All ranks must run the same layers forward and backward in the same order, also a rank
    /// whose batch is empty: its loss must come from its output, as `y.sum_all()` does. Multiplying
    /// the loss by 0 cuts candle's graph, and the others wait for a backward that does not come.
    /// Gradients that are accumulated over micro-batches are not one batch for that: each
    /// micro-batch has statistics of its own. Derivatives of second order need samples on every
    /// rank.
    ///
    /// Names in checkpoints are those of the plain layer. A group of one rank changes nothing. The
    /// layer and its clones share running statistics with the layer that this was called on.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_norm::{batch_norm, distributed::Threads};
    ///
    /// // Ranks with the batches 1 2 6, -1 and nothing.
    /// let batches = [vec![1f64, 2., 6.], vec![-1.], vec![]];
    /// let means = Threads::run(3, |group| {
    ///     let vars = VarMap::new();
    ///     let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    ///     let batch = &batches[group.rank()];
    ///     let norm = batch_norm(1, 1e-5, vb)?.synchronized(group);
    ///     norm.forward_train(&Tensor::from_slice(batch, (batch.len(), 1), &Device::Cpu)?)?;
    ///     norm.running_mean().to_vec1::<f64>()
    /// })?;
    /// // A tenth of the mean of 1, 2, 6 and -1, on every rank.
    /// assert_eq!(means, [[0.2]; 3]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn synchronized(mut self, group: Arc<dyn Collective>) -> Self {
        self.group = (group.size() > 1).then_some(group);
        self
    }

    /// The group of ranks that form the statistics of training batches together, if there are
    /// several.
    pub fn group(&self) -> Option<&Arc<dyn Collective>> {
        self.group.as_ref()
    }

    /// Parts of the batches of several ranks would be other parts on each.
    fn refuse_ghosts_of_ranks(&self) -> Result<()> {
        if self.group.is_some() {
            bail!(
                "{LAYER}: expected no virtual_batch_size in a synchronized layer, got {:?}; ghost \
                batches have statistics of their own, so that there is nothing to synchronize",
                self.options.virtual_batch_size
            )
        }
        Ok(())
    }

    fn inferred(&self, x: &Tensor, scaling: Scaling) -> Result<Tensor> {
        self.check_input(x)?;
        let eps = self.options.eps;
        if !self.options.track_running_stats {
            let center = self.options.remove_mean;
            return Ok(ops::batch_norm_with(x, scaling, eps, center)?.0);
        }
        let statistics = Arc::new(FixedStatistics::new(self.stats.mean_and_var()?));
        ops::normalize_with(LAYER, 2, x, &statistics, scaling, eps)
    }

    fn check_input(&self, x: &Tensor) -> Result<()> {
        check::rank_at_least(LAYER, x, 2, "[N, C, ...]")?;
        check::channels(LAYER, x, self.num_features())
    }

    /// This layer with the statistics of now and for good, its affine parameters still trainable.
    ///
    /// # Errors
    /// A layer that tracks no statistics.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = candle_norm::batch_norm(3, 1e-5, vb)?;
    /// let x = Tensor::randn(5f32, 2., (4, 3, 8), &Device::Cpu)?;
    /// norm.forward_t(&x, true)?;
    /// let frozen = norm.frozen()?;
    /// let y = frozen.forward(&x)?;
    /// assert_eq!(y.to_vec3::<f32>()?, norm.forward_t(&x, false)?.to_vec3::<f32>()?);
    /// // The layer trains on, its frozen statistics do not; both have the same weight.
    /// norm.forward_t(&x, true)?;
    /// assert_eq!(y.to_vec3::<f32>()?, frozen.forward(&x)?.to_vec3::<f32>()?);
    /// let gradients = y.sum_all()?.backward()?;
    /// assert!(gradients.get(norm.weight().unwrap()).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn frozen(&self) -> Result<FrozenNorm> {
        let (params, eps) = (&self.params, self.options.eps);
        let frozen = FrozenNorm::new(LAYER, 2, self.running_stats(), params, eps)?;
        Ok(frozen.with_activation(self.options.activation))
    }

    /// `layer` followed by this one in inference, as one layer: see [`FrozenNorm::fold_into`].
    ///
    /// # Errors
    /// A layer that tracks no statistics, or does not fit.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_nn::{Linear, Module};
    /// use candle_norm::BatchNorm;
    ///
    /// let line = |v: f64| Tensor::new(&[v], &Device::Cpu);
    /// let norm = BatchNorm::new_no_bias(1, line(2.)?, line(4.)?, 1e-12)?;
    /// let layer = Linear::new(Tensor::new(&[[6f64]], &Device::Cpu)?, None);
    /// // (6x − 2) / 2
    /// let both = norm.fold_into(&layer)?;
    /// let y = both.forward(&Tensor::new(&[[1f64]], &Device::Cpu)?)?;
    /// assert!((y.to_vec2::<f64>()?[0][0] - 2.).abs() < 1e-9);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn fold_into<L: Foldable>(&self, layer: &L) -> Result<L> {
        self.frozen()?.fold_into(layer)
    }
}

impl ModuleT for BatchNorm {
    /// Normalizes each channel of `xs`, in training by its own statistics, else by the running
    /// ones.
    ///
    /// # Shapes
    /// `[N, num_features, *]` of rank at least 2; the output is contiguous, of the same shape and
    /// dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device; in training, one value per
    /// channel. No error changes the statistics.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if train {
            self.forward_train(xs)
        } else {
            self.inferred(xs, self.scaling()?)
        }
    }
}

impl Norm for BatchNorm {
    fn kind(&self) -> &'static str {
        BatchNormOptions::NAMES.name
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
