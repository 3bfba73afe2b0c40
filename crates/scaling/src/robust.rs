//! Median and quantiles, which outliers do not move.

use candle_core::Result;
use datasketches::common::SearchCriteria;
use datasketches::kll::{KllFloat, KllSketch};

use super::affine::Map;
use super::check;
use super::fitted::{FittedScaler, Rule};
use super::{Nan, State};

type Sketch = KllSketch<KllFloat<f64>>;

/// Options of a [`RobustScaler`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RobustScalerOptions {
    /// Subtract the median. Default `true`.
    pub with_centering: bool,
    /// Divide by the distance of the quantiles. Default `true`.
    pub with_scaling: bool,
    /// The two quantiles, in percent. Default `(25, 75)`: the interquartile range.
    pub quantile_range: (f64, f64),
    /// The `k` of the sketch: up to this many values of a feature the quantiles are exact. A
    /// feature takes about `24 · k` bytes. From 8 to 65535, default 4096.
    pub sketch_size: u16,
    /// Treatment of NaN in the data that are fitted. Default: refused.
    pub nan: Nan,
}

impl Default for RobustScalerOptions {
    fn default() -> Self {
        Self {
            with_centering: true,
            with_scaling: true,
            quantile_range: (25., 75.),
            sketch_size: 4096,
            nan: Nan::default(),
        }
    }
}

/// Scales every feature by its median and the distance of two quantiles, as scikit-learn's
/// `RobustScaler`.
///
/// ```text
/// y = (x − q(50)) / (q(b) − q(a))
/// ```
///
/// Where:
/// - `q(p)` is the p-th percentile of the feature, between two values in proportion; `(a, b)` is
///   `quantile_range`;
/// - a distance of zero counts as 1.
///
/// Data may come in any number of pieces, and are not kept: each feature has a KLL sketch (Karnin,
/// Lang and Liberty, 2016,
/// <https://arxiv.org/abs/1603.05346>). Up to [`sketch_size`](RobustScalerOptions::sketch_size)
/// values, 4096 by default, the quantiles are exact. Beyond, a quantile is that of a rank which is
/// off by at most [`rank_error`](Self::rank_error), 0.07 % by default, with a confidence of 99 %;
/// the sketch draws random bits, which have no seed, so two fits then differ within that bound.
/// Where a result must come out the same twice, choose a `sketch_size` of at least the number of
/// values, up to 65 535.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{RobustScaler, Scaler};
///
/// let scaler = RobustScaler::default();
/// scaler.fit(&Tensor::new(&[1f64, 2., 3., 4., 1e6], &Device::Cpu)?)?;
/// assert_eq!((scaler.center()?, scaler.scale()?), (vec![3.], vec![2.]));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type RobustScaler = FittedScaler<RobustScalerOptions>;

impl RobustScaler {
    /// The median of each feature.
    ///
    /// # Errors
    /// No data yet.
    pub fn center(&self) -> Result<Vec<f64>> {
        self.quantile(50.)
    }

    /// A percentile of each feature.
    ///
    /// # Errors
    /// No data yet, or a percentage outside of 0 to 100.
    pub fn quantile(&self, percent: f64) -> Result<Vec<f64>> {
        let holds = (0. ..=100.).contains(&percent);
        let kind = RobustScalerOptions::KIND;
        check::option(kind, "percent", holds, "from 0 to 100", &percent)?;
        let now = self.fitted.snapshot();
        now.each(|sketch| Ok(quantiles(sketch, [percent])?[0]))
    }

    /// Largest distance of a quantile from its rank, as a share of the number of values, with a
    /// confidence of 99 %: zero while all values are kept.
    pub fn rank_error(&self) -> f64 {
        let now = self.fitted.snapshot();
        let sketches = now.statistics.iter().filter(|s| s.is_estimation_mode());
        sketches
            .map(Sketch::normalized_rank_error)
            .fold(0., f64::max)
    }
}

/// Percentiles of a sketch that is not empty.
fn quantiles<const N: usize>(sketch: &Sketch, percents: [f64; N]) -> Result<[f64; N]> {
    let view = sketch.sorted_view();
    let count = sketch.n() as f64;
    // The value of a rank, counted from zero; by its middle, since it is a share that the sketch is
    // asked for.
    let at = |rank: f64| {
        let value = view.quantile((rank + 0.5) / count, SearchCriteria::Inclusive);
        match value {
            Ok(Some(value)) => Ok(value.into_inner()),
            _ => check::internal(RobustScalerOptions::KIND, "a rank that the sketch has"),
        }
    };
    let mut found = [0.; N];
    for (found, percent) in found.iter_mut().zip(percents) {
        let rank = percent / 100. * (count - 1.);
        let (low, high) = (at(rank.floor())?, at(rank.ceil())?);
        *found = match low == high {
            true => low,
            false => low + (high - low) * rank.fract(),
        };
    }
    Ok(found)
}

impl Rule for RobustScalerOptions {
    const KIND: &'static str = "RobustScaler";

    type Statistic = Sketch;

    fn check(&self) -> Result<()> {
        let (a, b) = self.quantile_range;
        let holds = 0. <= a && a < b && b <= 100.;
        let expected = "of two percentages from 0 to 100, the first below the second";
        let got = format!("({a}, {b})");
        check::option(Self::KIND, "quantile_range", holds, expected, &got)?;
        self.empty().map(|_| ())
    }

    fn nan(&self) -> Nan {
        self.nan
    }

    fn empty(&self) -> Result<Sketch> {
        let (size, sketch) = (self.sketch_size, Sketch::new(self.sketch_size));
        check::option(
            Self::KIND,
            "sketch_size",
            sketch.is_ok(),
            "from 8 to 65535",
            &size,
        )?;
        sketch.or_else(|_| check::internal(Self::KIND, "a sketch of that size"))
    }

    fn take(sketch: &mut Sketch, values: &[f64]) -> Result<()> {
        for &value in values {
            match KllFloat::<f64>::new(value) {
                Ok(value) => sketch.update(value),
                Err(_) => check::internal(Self::KIND, "values without NaN")?,
            }
        }
        Ok(())
    }

    fn merge(into: &mut Sketch, from: &Sketch) -> Result<()> {
        match into.merge(from) {
            Ok(()) => Ok(()),
            Err(_) => check::internal(Self::KIND, "sketches that can be merged"),
        }
    }

    fn map(&self, sketch: &Sketch) -> Result<Map> {
        let (a, b) = self.quantile_range;
        let [low, center, high] = quantiles(sketch, [a, 50., b])?;
        let distance = high - low;
        Ok(Map {
            center: [if self.with_centering { center } else { 0. }, 0.],
            scale: match self.with_scaling && distance != 0. {
                true => distance,
                false => 1.,
            },
            offset: 0.,
        })
    }

    fn save(&self, state: State, statistics: &[Sketch]) -> Result<State> {
        let mut bytes = vec![];
        for sketch in statistics {
            let sketch = sketch.serialize();
            bytes.extend((sketch.len() as u64).to_le_bytes());
            bytes.extend(sketch);
        }
        state
            .with_option("with_centering", self.with_centering)
            .with_option("with_scaling", self.with_scaling)
            .with_option("quantile_min", self.quantile_range.0)
            .with_option("quantile_max", self.quantile_range.1)
            .with_option("sketch_size", self.sketch_size)
            .with_option("nan", self.nan)
            .with_bytes("sketches", &bytes)
    }

    fn restore(state: &State) -> Result<(Self, Vec<Sketch>)> {
        let rule = Self {
            with_centering: state.option("with_centering")?,
            with_scaling: state.option("with_scaling")?,
            quantile_range: (state.option("quantile_min")?, state.option("quantile_max")?),
            sketch_size: state.option("sketch_size")?,
            nan: state.option("nan")?,
        };
        let bytes = state.bytes("sketches")?;
        let mut rest = bytes.as_slice();
        let mut sketches = Vec::with_capacity(state.seen().len());
        for (i, seen) in state.seen().iter().enumerate() {
            let one = check::present(Self::KIND, "a sketch of each feature", next(&mut rest))?;
            let sketch = Sketch::deserialize(one);
            let sketch = check::well_formed(Self::KIND, "a sketch", sketch)?;
            let ends = [sketch.min_item(), sketch.max_item()];
            let finite = ends.iter().flatten().all(|v| v.is_finite());
            let holds = finite && sketch.n() == seen.values && sketch.k() == rule.sketch_size;
            let label = state.features().label(i);
            check::saved_value(Self::KIND, "sketch", &label, sketch.n() as f64, holds)?;
            sketches.push(sketch);
        }
        check::saved_length(Self::KIND, "bytes after the sketches", 0, rest.len())?;
        Ok((rule, sketches))
    }
}

/// The next sketch of those that [`RobustScalerOptions::save`] wrote, each after its length.
fn next<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, after) = rest.split_first_chunk::<8>()?;
    let (sketch, after) = after.split_at_checked(u64::from_le_bytes(*len) as usize)?;
    *rest = after;
    Some(sketch)
}
