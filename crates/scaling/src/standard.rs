//! Zero mean and unit variance.

use candle_core::Result;

use super::affine::{Map, scale_of};
use super::check;
use super::data::{moments_of, weighted_moments};
use super::fitted::{FittedScaler, Rule};
use super::{Moments, Nan, State};

/// Options of a [`StandardScaler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct StandardScalerOptions {
    /// Subtract the mean. Default `true`.
    pub with_mean: bool,
    /// Divide by the standard deviation. Default `true`.
    pub with_std: bool,
    /// Treatment of NaN in the data that are fitted. Default: refused.
    pub nan: Nan,
}

impl Default for StandardScalerOptions {
    fn default() -> Self {
        Self {
            with_mean: true,
            with_std: true,
            nan: Nan::default(),
        }
    }
}

/// Scales every feature to zero mean and unit variance, as scikit-learn's `StandardScaler`.
///
/// ```text
/// y = (x − μ) / σ
/// ```
///
/// Where:
/// - `μ` is the mean of the feature, and `σ²` its biased variance (divided by n);
/// - `σ` is 1 for a feature that does not vary: whose standard deviation is below the resolution of
///   an `f64` at its mean.
///
/// Data are merged as count, mean and sum of squared distances (Chan, Golub and LeVeque, 1979), the
/// mean in two numbers: a mean of 10⁹ standard deviations leaves the variance as it is, and the
/// order in which data come does not matter.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{Scaler, StandardScaler};
///
/// let scaler = StandardScaler::default().with_names(["mileage", "doors"])?;
/// scaler.fit(&Tensor::new(&[[10_000f32, 2.], [30_000., 2.]], &Device::Cpu)?)?;
/// assert_eq!((scaler.mean()?, scaler.scale()?), (vec![20_000., 2.], vec![10_000., 1.]));
///
/// let y = scaler.transform(&Tensor::new(&[[40_000f32, 4.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2., 2.]]);
/// assert_eq!(scaler.inverse_transform(&y)?.to_vec2::<f32>()?, [[40_000., 4.]]);
///
/// let wrong = scaler.transform(&Tensor::new(&[[40_000f32]], &Device::Cpu)?);
/// assert!(wrong.unwrap_err().to_string().contains(r#"feature 1 "doors" is missing"#));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type StandardScaler = FittedScaler<StandardScalerOptions>;

impl StandardScaler {
    /// The mean of each feature, also where it is not subtracted.
    ///
    /// # Errors
    /// No data yet.
    pub fn mean(&self) -> Result<Vec<f64>> {
        self.fitted.each(|m| m.mean())
    }

    /// The biased variance of each feature.
    ///
    /// # Errors
    /// No data yet.
    pub fn var(&self) -> Result<Vec<f64>> {
        self.fitted.each(|m| m.var())
    }

    /// Count, mean and squared distances of each feature: the statistics that batch norm has of a
    /// batch. Empty before any data.
    pub fn moments(&self) -> Vec<Moments> {
        self.fitted.snapshot().statistics.clone()
    }
}

impl Rule for StandardScalerOptions {
    const KIND: &'static str = "StandardScaler";

    type Statistic = Moments;

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn nan(&self) -> Nan {
        self.nan
    }

    fn empty(&self) -> Result<Moments> {
        Ok(Moments::default())
    }

    fn take(moments: &mut Moments, values: &[f64]) -> Result<()> {
        *moments = moments.merge(moments_of(values));
        Ok(())
    }

    fn take_weighted(moments: &mut Moments, values: &[f64], weights: &[f64]) -> Result<()> {
        *moments = moments.merge(weighted_moments(values, weights));
        Ok(())
    }

    fn merge(into: &mut Moments, from: &Moments) -> Result<()> {
        *into = into.merge(*from);
        Ok(())
    }

    fn largest(moments: &Moments) -> f64 {
        moments.count() + moments.mean() + moments.m2()
    }

    fn map(&self, moments: &Moments) -> Result<Map> {
        Ok(Map {
            center: match self.with_mean {
                true => [moments.mean(), moments.mean_error()],
                false => [0.; 2],
            },
            scale: match self.with_std {
                true => scale_of(moments.mean(), moments.var()),
                false => 1.,
            },
            offset: 0.,
        })
    }

    fn save(&self, state: State, statistics: &[Moments]) -> Result<State> {
        let values =
            |of: fn(Moments) -> f64| -> Vec<f64> { statistics.iter().map(|m| of(*m)).collect() };
        let state = state
            .with_option("with_mean", self.with_mean)
            .with_option("with_std", self.with_std)
            .with_option("nan", self.nan)
            .with_values("mean", &values(Moments::mean))?
            .with_values("mean_error", &values(Moments::mean_error))?
            .with_values("m2", &values(Moments::m2))?;
        // Samples without weights count one each.
        let mut pairs = statistics.iter().zip(state.seen());
        match pairs.all(|(m, seen)| m.count() == seen.values as f64) {
            true => Ok(state),
            false => state.with_values("weight", &values(Moments::count)),
        }
    }

    fn restore(state: &State) -> Result<(Self, Vec<Moments>)> {
        let rule = Self {
            with_mean: state.option("with_mean")?,
            with_std: state.option("with_std")?,
            nan: state.option("nan")?,
        };
        let len = state.seen().len();
        let counts = || state.seen().iter().map(|seen| seen.values as f64).collect();
        let weight = match state.tensors().contains_key("weight") {
            true => state.values("weight", len)?,
            false => counts(),
        };
        let [mean, mean_error, m2] = [
            state.values("mean", len)?,
            state.values("mean_error", len)?,
            state.values("m2", len)?,
        ];
        let mut statistics = Vec::with_capacity(len);
        for (i, seen) in state.seen().iter().enumerate() {
            let (label, weight) = (state.features().label(i), weight[i]);
            let holds = (weight > 0.) == (seen.values > 0);
            check::saved_value(state.kind(), "weight", &label, weight, holds)?;
            let moments = state.moments(i, [weight, mean[i], mean_error[i], m2[i]])?;
            let (largest, holds) = (Self::largest(&moments), Self::largest(&moments).is_finite());
            check::saved_value(state.kind(), "m2", &label, largest, holds)?;
            statistics.push(moments);
        }
        Ok((rule, statistics))
    }
}
