//! Variables that an optimizer should have.

use std::sync::PoisonError;

use candle_core::Var;
use candle_nn::VarMap;

use crate::layers::Norm;
use crate::layers::params::{
    BIAS, GAIN, LEFT_VECTOR, MAGNITUDE, NUM_BATCHES_TRACKED, RIGHT_VECTOR, RUNNING_MEAN,
    RUNNING_VAR,
};

/// The variables of a model, by how an optimizer should treat them.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ParamGroups {
    /// Weights and embeddings: trained with weight decay.
    pub decay: Vec<Var>,
    /// Biases and the parameters of norms: trained without. Decay would pull a scale towards zero.
    pub no_decay: Vec<Var>,
    /// Running statistics, counters, and vectors of spectral norm: not trained.
    pub statistics: Vec<Var>,
}

impl ParamGroups {
    /// Moves the parameters of `norm` to `no_decay`, where their shape alone does not tell: a
    /// weight of two axes or more without a bias.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_norm::{param_groups, rms_norm};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = rms_norm((4, 8), 1e-6, vb)?;
    /// let mut groups = param_groups(&vars);
    /// assert_eq!((groups.decay.len(), groups.no_decay.len()), (1, 0));
    /// groups.exempt(&norm);
    /// assert_eq!((groups.decay.len(), groups.no_decay.len()), (0, 1));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn exempt(&mut self, norm: &dyn Norm) {
        let ids: Vec<_> = norm.parameters().iter().map(|(_, p)| p.id()).collect();
        let (exempt, decay) = std::mem::take(&mut self.decay)
            .into_iter()
            .partition(|var| ids.contains(&var.id()));
        self.decay = decay;
        self.no_decay.extend::<Vec<Var>>(exempt);
    }
}

/// The variables of `vars` that training changes: all but running statistics, counters and the
/// vectors of spectral norm, in the order of their names.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
/// use candle_norm::{batch_norm, trainable_vars};
///
/// let vars = VarMap::new();
/// batch_norm(8, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// assert_eq!((vars.all_vars().len(), trainable_vars(&vars).len()), (5, 2));
/// let optimizer = SGD::new(trainable_vars(&vars), 0.1)?;
/// # let _ = optimizer;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn trainable_vars(vars: &VarMap) -> Vec<Var> {
    let named = named(vars);
    named
        .into_iter()
        .filter(|(name, _)| !is_statistic(name))
        .map(|(_, var)| var)
        .collect()
}

/// The variables of `vars` in three groups, each in the order of their names.
///
/// Told by name and shape: running statistics and biases by their names; norms by having at most
/// one axis, or a weight and a bias of the same shape, or by being the magnitude of a weight norm
/// or the gain of a standardized weight. The direction `v` of a weight norm decays as the weight
/// would, which leaves the function as it is and keeps `v` from growing. A norm's weight of two
/// axes or more without a bias looks like a linear layer: see [`ParamGroups::exempt`].
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
/// use candle_norm::{NormConfig, param_groups};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// "batch".parse::<NormConfig>()?.linear(4, 8, vb)?;
/// let groups = param_groups(&vars);
/// assert_eq!((groups.decay.len(), groups.no_decay.len(), groups.statistics.len()), (1, 2, 3));
/// let plain = ParamsAdamW { weight_decay: 0., ..Default::default() };
/// let optimizers = [
///     AdamW::new(groups.decay, ParamsAdamW::default())?,
///     AdamW::new(groups.no_decay, plain)?,
/// ];
/// # let _ = optimizers;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn param_groups(vars: &VarMap) -> ParamGroups {
    let named = named(vars);
    let dims = |name: &str| {
        let found = named.iter().find(|(n, _)| n == name);
        found.map(|(_, var)| var.dims())
    };
    let mut groups = ParamGroups {
        decay: vec![],
        no_decay: vec![],
        statistics: vec![],
    };
    for (name, var) in &named {
        let sibling = |mine: &str, other: &str| {
            let prefix = name.strip_suffix(mine)?;
            dims(&format!("{prefix}{other}"))
        };
        let like_its_sibling = [("weight", "bias"), ("bias", "weight")]
            .into_iter()
            .any(|(mine, other)| sibling(mine, other) == Some(var.dims()));
        let magnitude = MAGNITUDE.iter().any(|m| ends_with_part(name, m));
        let bias = ends_with_part(name, BIAS[0]) || ends_with_part(name, GAIN[0]);
        let group = if is_statistic(name) {
            &mut groups.statistics
        } else if var.rank() <= 1 || bias || magnitude || like_its_sibling {
            &mut groups.no_decay
        } else {
            &mut groups.decay
        };
        group.push(var.clone());
    }
    groups
}

fn named(vars: &VarMap) -> Vec<(String, Var)> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut named: Vec<_> = vars.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

/// Whether a variable is a running mean, a running variance, a counter of batches or a singular
/// vector, told by its name.
pub(crate) fn is_statistic(name: &str) -> bool {
    let statistics = [RUNNING_MEAN[0], RUNNING_VAR[0], NUM_BATCHES_TRACKED];
    statistics.iter().any(|s| ends_with_part(name, s)) || is_vector(name)
}

/// Whether a variable is a singular vector of spectral norm, of which there is no average.
pub(crate) fn is_vector(name: &str) -> bool {
    let vectors = [LEFT_VECTOR[0], RIGHT_VECTOR[0]];
    vectors.iter().any(|s| ends_with_part(name, s))
}

/// Whether the path `name` ends in the parts of `end`.
fn ends_with_part(name: &str, end: &str) -> bool {
    name.strip_suffix(end)
        .is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}
