//! Options of averaged weights, and the schedule of the decay.

/// Weighting of the past in an [`AveragedModel`](super::AveragedModel).
///
/// At the n-th update the average a takes in the weights w by a ← d · a + (1 − d) · w; the first
/// copies them (d = 0).
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Average {
    /// All updates alike: d = 1 − 1/n. Stochastic weight averaging (Izmailov et al., 2018,
    /// [arXiv:1803.05407](https://arxiv.org/abs/1803.05407)): update once an epoch, at a high
    /// learning rate, near the end.
    Equal,
    /// Exponentially: d by the schedule. Update after every step.
    Exponential(Decay),
}

/// The schedule of d, the weight that an exponential average keeps.
///
/// ```
/// use candle_norm::{Decay, Warmup};
///
/// let constant = Decay { decay: 0.99, ..Default::default() };
/// assert_eq!([1, 2, 3].map(|n| constant.at(n)), [0., 0.99, 0.99]);
///
/// let warmup = Decay { decay: 0.99, warmup: Some(Warmup::default()), ..Default::default() };
/// assert!(warmup.at(2) < 0.4 && warmup.at(100) < 0.96);
/// assert_eq!(warmup.at(10_000), 0.99);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Decay {
    /// Limit of d, between 0 and 1. Default 0.999, PyTorch's; 0.9999 is usual for long
    /// trainings of images.
    pub decay: f64,
    /// A rise of d from 0, for early weights are far from good. Default none.
    pub warmup: Option<Warmup>,
    /// The least d of the warm-up, at most `decay`. Default 0.
    pub min_decay: f64,
    /// So many updates copy the weights before the average begins. Default 0.
    pub update_after: u64,
}

/// d = 1 − (1 + n / γ)^−p after n updates, as in timm's `ModelEmaV3`. With γ = 1, a power of 2/3
/// reaches 0.999 at 31 600 updates and
/// 0.9999 at 1 000 000; 3/4 reaches 0.999 at 10 000 and 0.9999 at 215 400.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Warmup {
    /// γ. Default 1.
    pub gamma: f64,
    /// p. Default 2/3.
    pub power: f64,
}

impl Default for Decay {
    fn default() -> Self {
        Self {
            decay: 0.999,
            warmup: None,
            min_decay: 0.,
            update_after: 0,
        }
    }
}

impl Default for Warmup {
    fn default() -> Self {
        Self {
            gamma: 1.,
            power: 2. / 3.,
        }
    }
}

impl Decay {
    /// d at the n-th update, from 1 on.
    pub fn at(&self, update: u64) -> f64 {
        let step = update.saturating_sub(self.update_after).saturating_sub(1);
        match self.warmup {
            _ if step == 0 => 0.,
            None => self.decay,
            Some(Warmup { gamma, power }) => {
                let rise = 1. - (1. + step as f64 / gamma).powf(-power);
                rise.min(self.decay).max(self.min_decay)
            }
        }
    }
}

impl Average {
    /// d at the n-th update, from 1 on.
    pub fn decay_at(&self, update: u64) -> f64 {
        match self {
            Average::Equal => 1. - 1. / update.max(1) as f64,
            Average::Exponential(decay) => decay.at(update),
        }
    }
}

/// Options of an [`AveragedModel`](super::AveragedModel). A number converts into the exponential
/// average of that decay, a [`Decay`] into that of the schedule, an [`Average`] into itself.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct AveragedModelOptions {
    /// Weighting of the past. Default: exponential, with a decay of 0.999.
    pub average: Average,
    /// Whether running means and variances are averaged too, as in timm; otherwise they are copied,
    /// as in PyTorch. Default `false`.
    pub average_statistics: bool,
}

impl Default for AveragedModelOptions {
    fn default() -> Self {
        Average::Exponential(Decay::default()).into()
    }
}

impl From<Average> for AveragedModelOptions {
    fn from(average: Average) -> Self {
        Self {
            average,
            average_statistics: false,
        }
    }
}

impl From<f64> for AveragedModelOptions {
    fn from(decay: f64) -> Self {
        let decay = Decay {
            decay,
            ..Default::default()
        };
        decay.into()
    }
}

impl From<Decay> for AveragedModelOptions {
    fn from(decay: Decay) -> Self {
        Average::Exponential(decay).into()
    }
}
