//! The range from −1 to 1, with zero where it was.

use candle_core::Result;

use super::affine::Map;
use super::extremes::Extremes;
use super::fitted::{FittedScaler, Rule};
use super::{Nan, State};

/// Options of a [`MaxAbsScaler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct MaxAbsScalerOptions {
    /// Cut what lies beyond −1 to 1 when data are transformed, as data can that were not fitted.
    /// A value that is cut gets no gradient. Default `false`.
    pub clip: bool,
    /// Treatment of NaN in the data that are fitted. Default: refused.
    pub nan: Nan,
}

/// Divides every feature by its greatest absolute value, as scikit-learn's `MaxAbsScaler`: zeros
/// stay zeros.
///
/// ```text
/// y = x / max |x|
/// ```
///
/// A feature that is zero throughout is divided by 1.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{MaxAbsScaler, Scaler};
///
/// let scaler = MaxAbsScaler::default();
/// let x = Tensor::new(&[0f32, 2., -4.], &Device::Cpu)?;
/// scaler.fit(&x)?;
/// assert_eq!(scaler.transform(&x)?.to_vec1::<f32>()?, [0., 0.5, -1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type MaxAbsScaler = FittedScaler<MaxAbsScalerOptions>;

impl MaxAbsScaler {
    /// The greatest absolute value of each feature.
    ///
    /// # Errors
    /// No data yet.
    pub fn max_abs(&self) -> Result<Vec<f64>> {
        self.fitted.each(largest)
    }
}

fn largest(extremes: &Extremes) -> f64 {
    extremes.max.max(-extremes.min)
}

impl Rule for MaxAbsScalerOptions {
    const KIND: &'static str = "MaxAbsScaler";

    type Statistic = Extremes;

    fn check(&self) -> Result<()> {
        Ok(())
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
        Ok(Map {
            center: [0.; 2],
            scale: match largest(extremes) {
                0. => 1.,
                largest => largest,
            },
            offset: 0.,
        })
    }

    fn clip(&self) -> Option<[f64; 2]> {
        self.clip.then_some([-1., 1.])
    }

    fn save(&self, state: State, statistics: &[Extremes]) -> Result<State> {
        let state = state
            .with_option("clip", self.clip)
            .with_option("nan", self.nan);
        Extremes::save(state, statistics)
    }

    fn restore(state: &State) -> Result<(Self, Vec<Extremes>)> {
        let rule = Self {
            clip: state.option("clip")?,
            nan: state.option("nan")?,
        };
        Ok((rule, Extremes::restore(state)?))
    }
}
