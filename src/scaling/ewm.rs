//! Mean and variance of which every row forgets a share.

use candle_core::Result;

use super::follow::{Causal, Following, Memory, scaler_of_series};
use super::window::one;
use super::{Moments, Nan, State};
use crate::ops::check;

const LAYER: &str = "EwmScaler";

/// Options of an [`EwmScaler`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct EwmScalerOptions {
    /// The weight of a new row, above 0 and at most 1.
    pub alpha: f64,
    /// Divide by the sum of the weights that there were. Without, the first row is taken for all that were before it: its weight is not `α`
    /// but 1, and it is long in going. Default: true.
    #[cfg_attr(feature = "serde", serde(default = "adjusted"))]
    pub adjust: bool,
    /// Leave the variance as the mean square of the weighted distances, which is too small where few rows carry the weight. Default: false.
    #[cfg_attr(feature = "serde", serde(default))]
    pub bias: bool,
    /// Let NaN pass without the past getting older. Default: false.
    #[cfg_attr(feature = "serde", serde(default))]
    pub ignore_na: bool,
    /// Whether a row counts among those that it is scaled by. Default: it does.
    #[cfg_attr(feature = "serde", serde(default))]
    pub causal: Causal,
    /// What becomes of NaN: refused, or left out and counted. Default: refused.
    #[cfg_attr(feature = "serde", serde(default))]
    pub nan: Nan,
}

#[cfg(feature = "serde")]
fn adjusted() -> bool {
    true
}

impl EwmScalerOptions {
    /// By the weight of a new row.
    ///
    /// # Errors
    /// `alpha` that is not above 0 and at most 1.
    pub fn alpha(alpha: f64) -> Result<Self> {
        let holds = alpha > 0. && alpha <= 1.;
        check::scaling::option(LAYER, "alpha", holds, "above 0 and at most 1", &alpha)?;
        Ok(Self {
            alpha,
            adjust: true,
            bias: false,
            ignore_na: false,
            causal: Causal::default(),
            nan: Nan::default(),
        })
    }

    /// By the number of rows after which a row has half of its weight: `α = 1 − 2^(−1 / halflife)`.
    ///
    /// # Errors
    /// `halflife` that is not positive and finite.
    pub fn halflife(halflife: f64) -> Result<Self> {
        let holds = halflife > 0. && halflife.is_finite();
        check::scaling::option(LAYER, "halflife", holds, "above 0 and finite", &halflife)?;
        Self::alpha(-(-std::f64::consts::LN_2 / halflife).exp_m1())
    }

    /// By the window whose rows are as old on average: `α = 2 / (span + 1)`.
    ///
    /// # Errors
    /// `span` below 1 or infinite.
    pub fn span(span: f64) -> Result<Self> {
        let holds = span >= 1. && span.is_finite();
        check::scaling::option(LAYER, "span", holds, "of at least 1 and finite", &span)?;
        Self::alpha(2. / (span + 1.))
    }

    /// By the average age of the weight, the center of mass: `α = 1 / (1 + com)`.
    ///
    /// # Errors
    /// `com` below 0 or infinite.
    pub fn com(com: f64) -> Result<Self> {
        let holds = com >= 0. && com.is_finite();
        check::scaling::option(LAYER, "com", holds, "of at least 0 and finite", &com)?;
        Self::alpha(1. / (1. + com))
    }
}

/// Scales every feature of a series to zero mean and unit variance, the rows weighted the less the older they are, as pandas' `ewm` has them.
///
/// ```text
/// y = (x − μ) / σ     wᵢ = (1 − α)^i     μ = Σ wᵢ xᵢ / W     σ² = Σ wᵢ (xᵢ − μ)² / W · W² / (W² − Σ wᵢ²)
/// ```
///
/// Where:
/// - `i` counts back from the newest row, which is the row itself or the one before it; `W = Σ wᵢ`;
/// - without `adjust`, the weights are `α (1 − α)^i`, and `(1 − α)^i` for the first row: `μ ← (1 − α) μ + α x`. River's `EWMean` and `EWVar`
///   are these, with `bias`;
/// - with `bias`, the last factor of `σ²`, which corrects it for the few rows that carry the weight, is left out;
/// - `σ` is 1 for a feature that does not vary: whose standard deviation is below the resolution of an `f64` at its mean; and until there are
///   two values of it.
///
/// The statistics are moments whose count is a weight: each row scales it down, and is merged to them. So a mean of 10⁹ standard deviations
/// leaves the variance as it is, which a difference of mean squares does not.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{EwmScaler, EwmScalerOptions, Scaler};
///
/// let scaler = EwmScaler::new(EwmScalerOptions::alpha(0.5)?)?;
/// let (_, stats) = scaler.transform_series(&Tensor::new(&[[6f64], [12.]], &Device::Cpu)?)?;
/// // The older row has half the weight of the newer.
/// assert_eq!(stats.mean(), [6., 10.]);
/// assert!((scaler.var()?[0] - 18.).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct EwmScaler {
    following: Following<Weighted>,
}

scaler_of_series!(EwmScaler, EwmScalerOptions);

impl EwmScaler {
    /// The number of equally weighted rows that the mean of each feature is as certain as now: `W² / Σ wᵢ²`.
    ///
    /// # Errors
    /// No data yet.
    pub fn effective_count(&self) -> Result<Vec<f64>> {
        self.following.of_memory(|memory| {
            let count = |w: &Weight| w.moments.count() * w.moments.count() / w.squares;
            memory.0.iter().map(count).collect()
        })
    }
}

/// The weighted past of one feature.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Weight {
    /// Their count is the sum of the weights.
    moments: Moments,
    /// The sum of the squares of the weights.
    squares: f64,
}

impl Weight {
    fn times(self, by: f64) -> Self {
        let m = self.moments;
        Self {
            moments: Moments::from_parts(m.count() * by, m.mean(), m.mean_error(), m.m2() * by),
            squares: self.squares * by * by,
        }
    }

    fn push(&mut self, options: &EwmScalerOptions, value: f64) {
        if value.is_nan() {
            if !options.ignore_na {
                *self = self.times(1. - options.alpha);
            }
            return;
        }
        let first = self.moments.count() == 0.;
        let weight = if options.adjust || first {
            1.
        } else {
            options.alpha
        };
        let new = Self {
            moments: one(value),
            squares: 1.,
        };
        let (old, new) = (self.times(1. - options.alpha), new.times(weight));
        *self = Self {
            moments: match old.moments.count() > 0. {
                true => old.moments.merge(new.moments),
                false => new.moments,
            },
            squares: old.squares + new.squares,
        };
        if !options.adjust {
            *self = self.times(1. / self.moments.count());
        }
    }
}

/// The weighted past of every feature.
#[derive(Debug, Clone)]
pub(super) struct Weighted(Vec<Weight>);

impl Memory for Weighted {
    const KIND: &'static str = LAYER;

    type Options = EwmScalerOptions;

    fn check(options: &EwmScalerOptions) -> Result<()> {
        EwmScalerOptions::alpha(options.alpha).map(|_| ())
    }

    fn nan(options: &EwmScalerOptions) -> Nan {
        options.nan
    }

    fn causal(options: &EwmScalerOptions) -> Causal {
        options.causal
    }

    fn new(_: &EwmScalerOptions, features: usize) -> Self {
        Self(vec![Weight::default(); features])
    }

    fn push(&mut self, options: &EwmScalerOptions, row: &[f64]) {
        for (weight, value) in self.0.iter_mut().zip(row) {
            weight.push(options, *value);
        }
    }

    fn statistics(&self, options: &EwmScalerOptions, feature: usize) -> (Moments, f64) {
        let Weight { moments, squares } = self.0[feature];
        if options.bias {
            return (moments, moments.var());
        }
        let all = moments.count() * moments.count();
        let var = match all > squares {
            true => moments.var() * (all / (all - squares)),
            false => f64::NAN,
        };
        (moments, var)
    }

    fn save(options: &EwmScalerOptions, memory: Option<&Self>, state: State) -> Result<State> {
        let state = state
            .with_option("alpha", options.alpha)
            .with_option("adjust", options.adjust)
            .with_option("bias", options.bias)
            .with_option("ignore_na", options.ignore_na)
            .with_option("causal", options.causal)
            .with_option("nan", options.nan);
        let Some(Self(weights)) = memory else {
            return Ok(state);
        };
        let each = |of: fn(&Weight) -> f64| weights.iter().map(of).collect::<Vec<_>>();
        state
            .with_values("weight", &each(|w| w.moments.count()))?
            .with_values("weight_squares", &each(|w| w.squares))?
            .with_values("mean", &each(|w| w.moments.mean()))?
            .with_values("mean_error", &each(|w| w.moments.mean_error()))?
            .with_values("m2", &each(|w| w.moments.m2()))
    }

    fn restore(state: &State, features: usize) -> Result<(EwmScalerOptions, Option<Self>)> {
        let options = EwmScalerOptions {
            alpha: state.option("alpha")?,
            adjust: state.option("adjust")?,
            bias: state.option("bias")?,
            ignore_na: state.option("ignore_na")?,
            causal: state.option("causal")?,
            nan: state.option("nan")?,
        };
        if features == 0 {
            return Ok((options, None));
        }
        let get = |name| state.values(name, features);
        let (weight, squares) = (get("weight")?, get("weight_squares")?);
        let (mean, mean_error, m2) = (get("mean")?, get("mean_error")?, get("m2")?);
        let mut weights = Vec::with_capacity(features);
        for i in 0..features {
            let label = state.features().label(i);
            for (what, value) in [("weight", weight[i]), ("weight_squares", squares[i])] {
                let holds = value.is_finite() && value >= 0.;
                check::scaling::saved_value(LAYER, what, &label, value, holds)?;
            }
            weights.push(Weight {
                moments: state.moments(i, [weight[i], mean[i], mean_error[i], m2[i]])?,
                squares: squares[i],
            });
        }
        Ok((options, Some(Self(weights))))
    }
}
