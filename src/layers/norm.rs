//! The trait of all layers, and layers without formulas of their own.

use candle_core::{Result, Tensor, bail};
use candle_nn::{Module, ModuleT};

use super::frozen::FrozenNorm;
use super::names::NONE;
use super::running_stats::RunningStats;
use crate::ops::check;

/// A normalization layer of any kind. A `Box<dyn Norm>` is itself a [`ModuleT`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{Norm, NormConfig};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm: Box<dyn Norm> = "batch".parse::<NormConfig>()?.channels(3, vb)?;
/// let y = norm.forward_t(&Tensor::randn(0f32, 1., (4, 3, 5, 5), &Device::Cpu)?, true)?;
/// assert_eq!(y.dims(), [4, 3, 5, 5]);
/// let names: Vec<_> = norm.buffers().into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["running_mean", "running_var", "num_batches_tracked"]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # A norm of your own
///
/// A type that implements it goes wherever the layers here go: into a `Box<dyn Norm>`,
/// [`recalibrate`](crate::recalibrate), [`fold`](crate::fold()) and
/// [`ParamGroups::exempt`](crate::ParamGroups::exempt). [`RunningStats::from_vb`] and
/// [`RunningStats::observe`] keep running statistics for it, [`FrozenNorm::of`] freezes them:
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{FrozenNorm, Norm, RunningStats, ops, recalibrate};
///
/// /// Batch normalization without parameters.
/// #[derive(Debug)]
/// struct Whiten(RunningStats);
///
/// impl ModuleT for Whiten {
///     fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
///         if !train {
///             let now = self.0.snapshot()?;
///             return ops::batch_norm_inference(xs, [&now.mean, &now.var], None, None, 1e-5);
///         }
///         let (y, statistics) = ops::batch_norm(xs, None, None, 1e-5)?;
///         self.0.observe(xs, statistics)?;
///         Ok(y)
///     }
/// }
///
/// impl Norm for Whiten {
///     fn kind(&self) -> &'static str {
///         "whiten"
///     }
///     fn parameters(&self) -> Vec<(&'static str, Tensor)> {
///         vec![]
///     }
///     fn running_stats(&self) -> Option<&RunningStats> {
///         Some(&self.0)
///     }
///     fn frozen(&self) -> Result<FrozenNorm> {
///         FrozenNorm::of(&self.0, None, None, 1e-5)
///     }
///     fn reset(&self) -> Result<()> {
///         self.0.reset()
///     }
/// }
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let norm = Whiten(RunningStats::from_vb("Whiten", 1, Some(0.1), &vb)?);
/// let batches = [[[0f64], [2.]], [[4.], [6.]]].map(|b| Tensor::new(&b, &Device::Cpu).unwrap());
/// recalibrate(&[&norm], batches, |x| norm.forward_t(x, true))?;
/// assert_eq!(norm.frozen()?.running_mean().to_vec1::<f64>()?, [3.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub trait Norm: ModuleT + Send + Sync + std::fmt::Debug {
    /// The name of the layer as [`NormConfig`](crate::NormConfig) writes it. `"none"` is the name
    /// of a layer that does nothing, which [`fold`](crate::fold()) leaves out.
    fn kind(&self) -> &'static str;

    /// The parameters that training changes, by the names that a checkpoint holds them under.
    fn parameters(&self) -> Vec<(&'static str, Tensor)>;

    /// The running statistics, if the layer tracks any.
    fn running_stats(&self) -> Option<&RunningStats> {
        None
    }

    /// The statistics by the names that a checkpoint holds them under. They are live: see
    /// [`RunningStats::snapshot`] for a consistent copy.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.running_stats()
            .map(RunningStats::buffers)
            .unwrap_or_default()
    }

    /// This layer with the running statistics of now and for good, its affine parameters still
    /// trainable: see [`BatchNorm::frozen`](crate::BatchNorm::frozen).
    ///
    /// # Errors
    /// A layer that normalizes each input by its own statistics, as all do but BatchNorm, and
    /// InstanceNorm that tracks them.
    fn frozen(&self) -> Result<FrozenNorm> {
        fixed_statistics(self.kind())
    }

    /// Parameters that are variables, and statistics, back to what they start from.
    ///
    /// # Errors
    /// Only those of the device.
    fn reset(&self) -> Result<()>;
}

impl ModuleT for Box<dyn Norm> {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        (**self).forward_t(xs, train)
    }
}

/// The layer that does nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity;

impl Module for Identity {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(xs.clone())
    }
}

impl Norm for Identity {
    fn kind(&self) -> &'static str {
        NONE.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![]
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }
}

/// A layer for channels on axis 1, applied to features on the last axis.
#[derive(Debug)]
pub(crate) struct OnLastAxis {
    pub(crate) norm: Box<dyn Norm>,
    pub(crate) num_features: usize,
}

impl ModuleT for OnLastAxis {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if xs.rank() <= 2 {
            return self.norm.forward_t(xs, train);
        }
        check::features("NormConfig", xs, self.num_features)?;
        let last = xs.rank() - 1;
        self.norm
            .forward_t(&xs.transpose(1, last)?, train)?
            .transpose(1, last)?
            .contiguous()
    }
}

impl Norm for OnLastAxis {
    fn kind(&self) -> &'static str {
        self.norm.kind()
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.norm.parameters()
    }

    fn running_stats(&self) -> Option<&RunningStats> {
        self.norm.running_stats()
    }

    fn frozen(&self) -> Result<FrozenNorm> {
        Ok(self.norm.frozen()?.on_last_axis())
    }

    fn reset(&self) -> Result<()> {
        self.norm.reset()
    }
}

/// A norm that normalizes each input by its own statistics has none that could be fixed.
fn fixed_statistics<T>(kind: &str) -> Result<T> {
    let layer = format!("{kind} norm");
    bail!(
        "{layer}: expected statistics that stay the same for every input, got those of each input; \
        BatchNorm has such statistics, and InstanceNorm that tracks them: only these can be \
        frozen, or folded into the layer before"
    )
}
