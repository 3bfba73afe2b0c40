//! Batch renormalization.

use candle_core::{Result, Tensor};
use candle_nn::{ModuleT, VarBuilder};

use super::batch::Taken;
use super::foldable::Foldable;
use super::frozen::FrozenNorm;
use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{Affine, AffineParams};
use super::running_stats::{Reached, RunningStats};
use crate::computations::FixedStatistics;
use crate::ops::{self, Modulation, RenormOptions, Scaling, Share, check};

const LAYER: &str = "BatchRenorm";

/// Configuration of [`BatchRenorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct BatchRenormOptions {
    /// Added to the variances, inside the roots. Default: 1e-3.
    pub eps: f64,
    /// The weight of a new batch in the running statistics; `None` averages all batches alike.
    /// Default: 0.01.
    pub momentum: Option<f64>,
    /// Bound of the factor `r` and of its inverse, at least 1. Default: 3.
    pub rmax: f64,
    /// Bound of the distance `d`, at least 0. Default: 5.
    pub dmax: f64,
    /// Batches that are normalized as BatchNorm does it before the correction begins, by which
    /// time the running statistics mean something. CrossQ has 100 000. Default: 5000, as in the
    /// paper. A file without `num_batches_tracked` begins at 0: set it to 0 for statistics that are
    /// trained already.
    pub warmup_steps: u64,
    /// Learned parameters. Default: weight and bias.
    pub affine: Affine,
    /// Refuse a training batch with NaN or infinity: see
    /// [`BatchNormOptions`](crate::BatchNormOptions). Default: false.
    pub refuse_non_finite: bool,
}

impl Default for BatchRenormOptions {
    fn default() -> Self {
        let RenormOptions { eps, rmax, dmax } = RenormOptions::default();
        Self {
            eps,
            momentum: Some(0.01),
            rmax,
            dmax,
            warmup_steps: 5000,
            affine: Affine::WeightAndBias,
            refuse_non_finite: false,
        }
    }
}

impl From<f64> for BatchRenormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl NormOptions for BatchRenormOptions {
    const NAMES: Names = Names::new(&["batch_renorm", "batchre", "batchrenorm"], &["brn"], true);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        self.affine.has_bias()
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(Box::new(batch_renorm(num_channels, *self, vb)?))
    }
}

/// Batch renormalization: batch normalization whose training is corrected towards its inference.
///
/// `y = (x̂ · r + d) · w + b` with `x̂ = (x − μ_B) / σ_B`, `r = clip(σ_B / σ, 1 / rmax, rmax)` and
/// `d = clip((μ_B − μ) / σ, −dmax, dmax)`
///
/// Where:
/// - μ_B and σ_B are the mean and the root of the biased variance of this batch, for each channel
///   of axis 1 over all other axes; μ and σ are those of the running statistics before the batch
///   updates them; ε is `eps`, added inside both roots;
/// - `r` and `d` are constants in the backward;
/// - for the first `warmup_steps` batches `r = 1` and `d = 0`, which is BatchNorm exactly;
/// - `w` and `b` are `weight` and `bias`, one value a channel, if `affine` has them.
///
/// In inference it is BatchNorm: `(x − μ) / σ · w + b`. Where nothing is clipped, training gives
/// the same, so that small batches, and those whose samples depend on each other, do less harm.
///
/// Ioffe, 2017, <https://arxiv.org/abs/1702.03275>. The two modes differ, so the layer is a
/// [`ModuleT`] and no `Module`. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision is
/// computed in `f32` and rounded once. Running statistics are those of
/// [`BatchNorm`](crate::BatchNorm), updated and saved as there; while they are recalibrated, the
/// layer is BatchNorm.
#[derive(Debug, Clone)]
pub struct BatchRenorm {
    params: AffineParams,
    stats: RunningStats,
    options: BatchRenormOptions,
}

/// A [`BatchRenorm`] of the `num_features` channels on axis 1, its parameters and statistics taken
/// from `vb`.
///
/// Names are those of [`batch_norm`](crate::batch_norm()).
///
/// # Errors
/// Options out of range; those of [`batch_norm`](crate::batch_norm()).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{BatchRenormOptions, batch_renorm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let options = BatchRenormOptions { warmup_steps: 0, ..Default::default() };
/// let norm = batch_renorm(1, options, vb)?;
/// let x = Tensor::new(&[[0.5f64], [1.], [-1.]], &Device::Cpu)?;
/// // The running statistics of a new layer are a mean of 0 and a variance of 1.
/// let inferred = norm.forward_t(&x, false)?.flatten_all()?.to_vec1::<f64>()?;
/// let trained = norm.forward_t(&x, true)?.flatten_all()?.to_vec1::<f64>()?;
/// assert!(trained.iter().zip(&inferred).all(|(a, b)| (a - b).abs() < 1e-12));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn batch_renorm(
    num_features: usize,
    options: impl Into<BatchRenormOptions>,
    vb: VarBuilder,
) -> Result<BatchRenorm> {
    let options = options.into();
    options.renorm().check()?;
    check::momentum(LAYER, options.momentum)?;
    let stats = RunningStats::new(LAYER, num_features, options.momentum, true, &vb)?
        .refusing(options.refuse_non_finite);
    Ok(BatchRenorm {
        params: AffineParams::new(LAYER, &vb, num_features, options.affine, 1.)?,
        stats,
        options,
    })
}

impl BatchRenormOptions {
    fn renorm(&self) -> RenormOptions {
        RenormOptions::default()
            .with_eps(self.eps)
            .with_bounds(self.rmax, self.dmax)
    }
}

impl BatchRenorm {
    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// ε, added to the variances.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration that the layer was built with.
    pub fn options(&self) -> &BatchRenormOptions {
        &self.options
    }

    /// The number of channels on axis 1.
    pub fn num_features(&self) -> usize {
        self.stats.mean().elem_count()
    }

    /// The live running mean.
    pub fn running_mean(&self) -> &Tensor {
        self.stats.mean()
    }

    /// The live running variance.
    pub fn running_var(&self) -> &Tensor {
        self.stats.var()
    }

    /// The running statistics.
    pub fn running_stats(&self) -> &RunningStats {
        &self.stats
    }

    /// `forward_t` with scale and shift from outside: `y = norm(x) · (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `xs` as in `forward_t`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward_t`; a scale or shift of another shape, dtype or device.
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
        self.scaled(xs, self.scaling().modulated(modulation), train)
    }

    fn scaling(&self) -> Scaling<'_> {
        Scaling::new(self.weight(), self.bias())
    }

    fn scaled(&self, x: &Tensor, scaling: Scaling, train: bool) -> Result<Tensor> {
        check::rank_at_least(LAYER, x, 2, "[N, C, ...]")?;
        check::channels(LAYER, x, self.num_features())?;
        let BatchRenormOptions {
            eps, warmup_steps, ..
        } = self.options;
        if !train {
            let statistics = FixedStatistics::new(self.stats.mean_and_var()?).into();
            return ops::normalize_with(LAYER, 2, x, &statistics, scaling, eps);
        }
        let reached = self.stats.reached(warmup_steps)?;
        let share = match &reached {
            Reached::Known(false) => Share::Nothing,
            Reached::Known(true) => Share::Whole,
            Reached::OnDevice(share) => Share::OnDevice(share),
        };
        let [mean, var] = self.stats.mean_and_var()?;
        let (running, options) = ([&mean, &var], self.options.renorm());
        let (y, statistics) = ops::batch_renorm_with(x, running, share, scaling, options)?;
        let taken = Taken::OverValues { correction: 1 };
        self.stats.observe_as(x, statistics, taken)?;
        Ok(y)
    }

    /// This layer with the statistics of now and for good, its affine parameters still trainable.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn frozen(&self) -> Result<FrozenNorm> {
        let (params, eps) = (&self.params, self.options.eps);
        FrozenNorm::new(LAYER, 2, Some(&self.stats), params, eps)
    }

    /// `layer` followed by this one in inference, as one layer: see [`FrozenNorm::fold_into`].
    ///
    /// # Errors
    /// A layer that does not fit.
    pub fn fold_into<L: Foldable>(&self, layer: &L) -> Result<L> {
        self.frozen()?.fold_into(layer)
    }
}

impl ModuleT for BatchRenorm {
    /// Normalizes each channel of `xs`, in training by its own statistics, corrected, else by the
    /// running ones.
    ///
    /// # Shapes
    /// `[N, num_features, *]` of rank at least 2; the output is contiguous, of the same shape and
    /// dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device; in training, one value per
    /// channel. No error changes the statistics.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.scaled(xs, self.scaling(), train)
    }
}

impl Norm for BatchRenorm {
    fn kind(&self) -> &'static str {
        BatchRenormOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    fn running_stats(&self) -> Option<&RunningStats> {
        Some(&self.stats)
    }

    fn frozen(&self) -> Result<FrozenNorm> {
        self.frozen()
    }

    fn reset(&self) -> Result<()> {
        self.params.reset(1.)?;
        self.stats.reset()
    }
}
