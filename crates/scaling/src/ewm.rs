//! Mean and variance of which every row forgets a share.

use candle_core::Result;

use super::Causal;
use super::check;
use super::follow::{Memory, SeriesOptions, SeriesScaler};
use super::rows::{LARGEST_VAR, of_series};
use super::window::one;
use super::{Features, Moments, Nan, Seen, State};

const LAYER: &str = "EwmScaler";

/// Options of an [`EwmScaler`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct EwmScalerOptions {
    /// The weight of a new row, above 0 and at most 1.
    pub alpha: f64,
    /// Divide by the sum of the weights that there were. Without, the first row is taken for all
    /// that were before it: its weight is not `α` but 1, and it is long in going. Default: true.
    #[cfg_attr(feature = "serde", serde(default = "adjusted"))]
    pub adjust: bool,
    /// Leave the variance as the mean square of the weighted distances, which is too small where
    /// few rows carry the weight. Default: false.
    #[cfg_attr(feature = "serde", serde(default))]
    pub bias: bool,
    /// Let NaN pass without the past getting older. Default: false.
    #[cfg_attr(feature = "serde", serde(default))]
    pub ignore_na: bool,
    /// Whether a row counts among those that it is scaled by. Default: it does.
    #[cfg_attr(feature = "serde", serde(default))]
    pub causal: Causal,
    /// Treatment of NaN: refused, or left out and counted. Default: refused.
    #[cfg_attr(feature = "serde", serde(default))]
    pub nan: Nan,
}

#[cfg(feature = "serde")]
fn adjusted() -> bool {
    true
}

impl EwmScalerOptions {
    /// Options of a given weight of a new row.
    ///
    /// # Errors
    /// `alpha` that is not above 0 and at most 1.
    pub fn alpha(alpha: f64) -> Result<Self> {
        let holds = alpha > 0. && alpha <= 1.;
        check::option(LAYER, "alpha", holds, "above 0 and at most 1", &alpha)?;
        Ok(Self {
            alpha,
            adjust: true,
            bias: false,
            ignore_na: false,
            causal: Causal::default(),
            nan: Nan::default(),
        })
    }

    /// Options of a number of rows after which a row has half of its weight:
    /// `α = 1 − 2^(−1 / halflife)`.
    ///
    /// # Errors
    /// `halflife` that is not positive and finite.
    pub fn halflife(halflife: f64) -> Result<Self> {
        let holds = halflife > 0. && halflife.is_finite();
        check::option(LAYER, "halflife", holds, "above 0 and finite", &halflife)?;
        Self::alpha(-(-std::f64::consts::LN_2 / halflife).exp_m1())
    }

    /// Options of a window whose rows are as old on average: `α = 2 / (span + 1)`.
    ///
    /// # Errors
    /// `span` below 1 or infinite.
    pub fn span(span: f64) -> Result<Self> {
        let holds = span >= 1. && span.is_finite();
        check::option(LAYER, "span", holds, "of at least 1 and finite", &span)?;
        Self::alpha(2. / (span + 1.))
    }

    /// Options of an average age of the weight, the center of mass: `α = 1 / (1 + com)`.
    ///
    /// # Errors
    /// `com` below 0 or infinite.
    pub fn com(com: f64) -> Result<Self> {
        let holds = com >= 0. && com.is_finite();
        check::option(LAYER, "com", holds, "of at least 0 and finite", &com)?;
        Self::alpha(1. / (1. + com))
    }
}

/// Scales every feature of a series to zero mean and unit variance, the rows weighted the less the
/// older they are, as pandas' `ewm` has them.
///
/// ```text
/// y = (x − μ) / σ     wᵢ = (1 − α)^i     μ = Σ wᵢ xᵢ / W
/// σ² = Σ wᵢ (xᵢ − μ)² / W · W² / (W² − Σ wᵢ²)
/// ```
///
/// Where:
/// - `i` counts back from the newest row, which is the row itself or the one before it; `W = Σ wᵢ`;
/// - without `adjust`, the weights are `α (1 − α)^i`, and `(1 − α)^i` for the first row:
///   `μ ← (1 − α) μ + α x`. River's `EWMean` and `EWVar` are these, with `bias`;
/// - with `bias`, the last factor of `σ²`, which corrects it for the few rows that carry the
///   weight, is left out;
/// - `σ` is 1 for a feature that does not vary: whose standard deviation is below the resolution of
///   an `f64` at its mean; and until there are two values of it, or where `α` is 1 and the newest
///   has all the weight.
///
/// The statistics are moments whose count is a weight: each row scales it down, and is merged to
/// them. So a mean of 10⁹ standard deviations leaves the variance as it is, which a difference of
/// mean squares does not. Weights are relative to the newest: however long the gap between two
/// values, nothing of their variance is lost.
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
pub type EwmScaler = SeriesScaler<EwmScalerOptions>;

impl SeriesOptions for EwmScalerOptions {
    type Memory = Weighted;
}

impl EwmScaler {
    /// The number of equally weighted rows that the mean of each feature is as certain as now:
    /// `W² / Σ wᵢ²`.
    ///
    /// # Errors
    /// No data yet.
    pub fn effective_count(&self) -> Result<Vec<f64>> {
        self.following.of_memory(|memory| {
            let count = |w: &WeightedPast| w.moments.count() * w.moments.count() / w.squares;
            memory.0.iter().map(count).collect()
        })
    }
}

/// The weighted past of one feature, its weights in units of that of the newest value.
///
/// The past does not get lighter while values are missing: weights are relative, and what the next
/// value makes of them is known when it comes. Nor is anything taken off a sum: `W² − Σ wᵢ²` is
/// `2 Σ wᵢ wⱼ` over pairs, which is what is kept of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct WeightedPast {
    /// Their count is the sum of the weights.
    moments: Moments,
    /// The sum of the squares of the weights.
    squares: f64,
    /// `1 − Σ wᵢ² / W²`, the factor by which the biased variance is too small.
    pairs: f64,
    /// The variance that is not; none of one value. It outlives the two numbers that it is the
    /// ratio of, which a long gap takes to zero.
    var: Option<f64>,
    /// Number of rows without a value since the newest one.
    gap: f64,
}

impl WeightedPast {
    fn of(value: f64) -> Self {
        Self {
            moments: one(value),
            squares: 1.,
            ..Self::default()
        }
    }

    fn push(&mut self, options: &EwmScalerOptions, value: f64) {
        if value.is_nan() {
            if !options.ignore_na && self.moments.count() > 0. {
                self.gap += 1.;
            }
            return;
        }
        // With all weight on the newest row nothing is left of the others.
        if self.moments.count() == 0. || options.alpha == 1. {
            *self = Self::of(value);
            return;
        }
        let kept = (1. - options.alpha).powf(self.gap + 1.);
        let new = if options.adjust { 1. } else { options.alpha };
        let m = self.moments;
        let total = m.count() * kept + new;
        let (old_share, new_share) = (m.count() * kept / total, new / total);
        let distance = (value - m.mean()) - m.mean_error();
        let (squared, pairs) = (
            m.var() + new_share * distance * distance,
            old_share * self.pairs + 2. * new_share,
        );
        let old = Moments::from_parts(m.count() * kept, m.mean(), m.mean_error(), m.m2() * kept);
        let merged = old.merge(Moments::from_parts(new, value, 0., 0.));
        // Without `adjust`, the sum of the weights is 1 after each value.
        let unit = if options.adjust { 1. } else { total };
        *self = Self {
            moments: Moments::from_parts(
                merged.count() / unit,
                merged.mean(),
                merged.mean_error(),
                merged.m2() / unit,
            ),
            squares: (kept * kept * self.squares + new * new) / (unit * unit),
            pairs: old_share * pairs,
            var: Some(squared / pairs),
            gap: 0.,
        };
    }
}

/// The weighted past of every feature.
#[derive(Debug, Clone)]
pub struct Weighted(Vec<WeightedPast>);

impl Memory for Weighted {
    const KIND: &'static str = LAYER;

    const INSTEAD_OF_WEIGHTS: &'static str =
        "it weighs rows by their age alone, which alpha, span and halflife set";

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
        Self(vec![WeightedPast::default(); features])
    }

    fn push(&mut self, options: &EwmScalerOptions, row: &[f64]) {
        for (weight, value) in self.0.iter_mut().zip(row) {
            weight.push(options, *value);
        }
    }

    fn statistics(&self, options: &EwmScalerOptions, feature: usize) -> (Moments, Option<f64>) {
        let WeightedPast { moments, var, .. } = self.0[feature];
        match options.bias {
            true => (moments, Some(moments.var())),
            false => (moments, var),
        }
    }

    const CHECKED: bool = true;

    fn check_saved(&self, features: &Features, seen: &[Seen]) -> Result<()> {
        for (i, (weight, seen)) in self.0.iter().zip(seen).enumerate() {
            // A weight is at most 1, and there is one for each value.
            let is_weight = |v: f64| match seen.values {
                0 => v == 0.,
                values => v > 0. && v <= values as f64,
            };
            let WeightedPast {
                moments,
                squares,
                pairs,
                var,
                gap,
            } = *weight;
            let is_gap = gap.fract() == 0. && (0. ..=seen.nan as f64).contains(&gap);
            let is_var = var.is_none_or(|var| (0. ..=LARGEST_VAR).contains(&var));
            for (what, value, holds) in [
                ("weight", moments.count(), is_weight(moments.count())),
                ("weight_squares", squares, is_weight(squares)),
                ("pairs", pairs, (0. ..=1.).contains(&pairs)),
                ("var", var.unwrap_or(f64::NAN), is_var),
                ("gap", gap, is_gap),
            ] {
                check::saved_value(LAYER, what, &features.label(i), value, holds)?;
            }
        }
        Ok(())
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
        let each = |of: fn(&WeightedPast) -> f64| weights.iter().map(of).collect::<Vec<_>>();
        state
            .with_values("weight", &each(|w| w.moments.count()))?
            .with_values("weight_squares", &each(|w| w.squares))?
            .with_values("mean", &each(|w| w.moments.mean()))?
            .with_values("mean_error", &each(|w| w.moments.mean_error()))?
            .with_values("m2", &each(|w| w.moments.m2()))?
            .with_values("pairs", &each(|w| w.pairs))?
            .with_values("var", &each(|w| w.var.unwrap_or(f64::NAN)))?
            .with_values("gap", &each(|w| w.gap))
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
        let (pairs, var, gap) = (get("pairs")?, get("var")?, get("gap")?);
        let mut weights = Vec::with_capacity(features);
        for i in 0..features {
            let label = state.features().label(i);
            check::saved_value(LAYER, "weight", &label, weight[i], weight[i] >= 0.)?;
            let moments = state.moments(i, [weight[i], mean[i], mean_error[i], m2[i]])?;
            weights.push(WeightedPast {
                moments: of_series(state, i, moments)?,
                squares: squares[i],
                pairs: pairs[i],
                var: Some(var[i]).filter(|v| !v.is_nan()),
                gap: gap[i],
            });
        }
        let weighted = Self(weights);
        weighted.check_saved(state.features(), state.counts()?)?;
        Ok((options, Some(weighted)))
    }
}
