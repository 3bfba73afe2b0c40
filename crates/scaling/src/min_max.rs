//! Min-max scaler.

use candle_core::Result;

use super::affine::Map;
use super::check;
use super::extremes::Extremes;
use super::fitted::{FittedScaler, Rule};
use super::{Nan, State};

/// Options of a [`MinMaxScaler`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct MinMaxScalerOptions {
    /// Images of the least and the greatest value of a feature. Default `(0, 1)`; `(-1, 1)` is
    /// usual too.
    pub feature_range: (f64, f64),
    /// Cut what lies beyond the range when data are transformed, as data can that were not fitted.
    /// A value that is cut gets no gradient. Default `false`.
    pub clip: bool,
    /// Treatment of NaN in the data that are fitted. Default: refused.
    pub nan: Nan,
}

impl Default for MinMaxScalerOptions {
    fn default() -> Self {
        Self {
            feature_range: (0., 1.),
            clip: false,
            nan: Nan::default(),
        }
    }
}

/// Scales every feature to a given range, as scikit-learn's `MinMaxScaler`.
///
/// ```text
/// y = (x − min) / (max − min) · (b − a) + a
/// ```
///
/// Where:
/// - `min`, `max` are the least and the greatest value of the feature; a feature that has but one
///   value is divided by 1;
/// - `[a, b]` is the range.
///
/// One value far from the others sets the range of all of them:
/// [`RobustScaler`](super::RobustScaler) leaves it out.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{MinMaxScaler, MinMaxScalerOptions, Scaler};
///
/// let feature_range = (-1., 1.);
/// let options = MinMaxScalerOptions { feature_range, clip: true, ..Default::default() };
/// let scaler = MinMaxScaler::new(options)?;
/// scaler.fit(&Tensor::new(&[0f64, 4., 8.], &Device::Cpu)?)?;
/// let y = scaler.transform(&Tensor::new(&[2f64, 100.], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f64>()?, [-0.5, 1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type MinMaxScaler = FittedScaler<MinMaxScalerOptions>;

impl MinMaxScaler {
    /// The least value of each feature.
    ///
    /// # Errors
    /// No data yet.
    pub fn data_min(&self) -> Result<Vec<f64>> {
        self.fitted.each(|e| e.min)
    }

    /// The greatest value of each feature.
    ///
    /// # Errors
    /// No data yet.
    pub fn data_max(&self) -> Result<Vec<f64>> {
        self.fitted.each(|e| e.max)
    }
}

impl Rule for MinMaxScalerOptions {
    const KIND: &'static str = "MinMaxScaler";

    type Statistic = Extremes;

    fn check(&self) -> Result<()> {
        let (a, b) = self.feature_range;
        let holds = a.is_finite() && b.is_finite() && a < b;
        let expected = "of two finite numbers, the first below the second";
        let got = format!("({a}, {b})");
        check::option(Self::KIND, "feature_range", holds, expected, &got)
    }

    fn nan(&self) -> Nan {
        self.nan
    }

    fn empty(&self) -> Result<Extremes> {
        Ok(Extremes::NONE)
    }

    fn take(extremes: &mut Extremes, values: &[f64]) -> Result<()> {
        extremes.take(values);
        Ok(())
    }

    /// A range has the samples that count, whatever they count.
    fn take_weighted(extremes: &mut Extremes, values: &[f64], _: &[f64]) -> Result<()> {
        Self::take(extremes, values)
    }

    fn merge(into: &mut Extremes, from: &Extremes) -> Result<()> {
        into.merge(*from);
        Ok(())
    }

    fn map(&self, extremes: &Extremes) -> Result<Map> {
        let (a, b) = self.feature_range;
        let range = extremes.max - extremes.min;
        Ok(Map {
            center: [extremes.min, 0.],
            scale: match range {
                0. => 1. / (b - a),
                range => range / (b - a),
            },
            offset: a,
        })
    }

    fn clip(&self) -> Option<[f64; 2]> {
        self.clip
            .then_some([self.feature_range.0, self.feature_range.1])
    }

    fn save(&self, state: State, statistics: &[Extremes]) -> Result<State> {
        let state = state
            .with_option("feature_min", self.feature_range.0)
            .with_option("feature_max", self.feature_range.1)
            .with_option("clip", self.clip)
            .with_option("nan", self.nan);
        Extremes::save(state, statistics)
    }

    fn restore(state: &State) -> Result<(Self, Vec<Extremes>)> {
        let rule = Self {
            feature_range: (state.option("feature_min")?, state.option("feature_max")?),
            clip: state.option("clip")?,
            nan: state.option("nan")?,
        };
        Ok((rule, Extremes::restore(state)?))
    }
}
