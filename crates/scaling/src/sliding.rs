//! Mean and variance of the last rows.

use candle_core::Result;

use super::Causal;
use super::check;
use super::follow::{Memory, SeriesOptions, SeriesScaler};
use super::window::Window;
use super::{Moments, Nan, State};

/// Options of a [`SlidingScaler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct SlidingScalerOptions {
    /// Number of rows that are remembered, at least 1.
    pub window: usize,
    /// Number taken off that of the values in the variance: 0 for the biased one, 1 for the
    /// unbiased. Default 0.
    #[cfg_attr(feature = "serde", serde(default))]
    pub ddof: usize,
    /// Whether a row counts among those that it is scaled by. Default: it does.
    #[cfg_attr(feature = "serde", serde(default))]
    pub causal: Causal,
    /// Treatment of NaN: refused, or left out and counted. It takes a place in the window either
    /// way. Default: refused.
    #[cfg_attr(feature = "serde", serde(default))]
    pub nan: Nan,
}

impl From<usize> for SlidingScalerOptions {
    fn from(window: usize) -> Self {
        Self {
            window,
            ddof: 0,
            causal: Causal::default(),
            nan: Nan::default(),
        }
    }
}

/// Scales every feature of a series to zero mean and unit variance over the last rows, as river's
/// `Rolling` of `Mean` and `Var` has them.
///
/// ```text
/// y = (x − μ) / σ        μ = Σ xᵢ / n        σ² = Σ (xᵢ − μ)² / (n − ddof)
/// ```
///
/// Where:
/// - the sums are over the values in the window: the last `window` rows up to the row itself, or
///   before it;
/// - `n` is how many of them are numbers;
/// - `σ` is 1 for a feature that does not vary there: whose standard deviation is below the
///   resolution of an `f64` at its mean; and where
///   there are no more than `ddof` values, which have no variance.
///
/// A row costs the same whatever the window, and nothing is ever subtracted from a sum: after
/// millions of rows the statistics are those of the window, to the rounding of one pass over it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{Scaler, SlidingScaler};
///
/// let scaler = SlidingScaler::new(2)?.with_names(["close"])?;
/// let close = Tensor::new(&[[10f64], [14.], [24.]], &Device::Cpu)?;
/// let (y, stats) = scaler.transform_series(&close)?;
/// assert_eq!(stats.mean(), [10., 12., 19.]);
/// assert_eq!(stats.scale(), [1., 2., 5.]);
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?, [0., 1., 1.]);
///
/// // What comes next is scaled, and brought back, by the window of now.
/// let next = Tensor::new(&[[29f64]], &Device::Cpu)?;
/// assert_eq!(scaler.transform(&next)?.to_vec2::<f64>()?, [[2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type SlidingScaler = SeriesScaler<SlidingScalerOptions>;

impl SeriesOptions for SlidingScalerOptions {
    type Memory = Window;
}

impl Memory for Window {
    const KIND: &'static str = "SlidingScaler";

    const INSTEAD_OF_WEIGHTS: &'static str = "take EwmScaler, which weighs rows by their age";

    type Options = SlidingScalerOptions;

    fn check(options: &SlidingScalerOptions) -> Result<()> {
        let window = options.window;
        check::option(Self::KIND, "window", window > 0, "of at least 1", &window)
    }

    fn nan(options: &SlidingScalerOptions) -> Nan {
        options.nan
    }

    fn causal(options: &SlidingScalerOptions) -> Causal {
        options.causal
    }

    fn new(options: &SlidingScalerOptions, features: usize) -> Self {
        Window::of(options.window, features)
    }

    fn push(&mut self, _: &SlidingScalerOptions, row: &[f64]) {
        self.push(row);
    }

    fn attempt<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.attempt(f)
    }

    fn statistics(&self, options: &SlidingScalerOptions, feature: usize) -> (Moments, Option<f64>) {
        let moments = self.moments(feature);
        let divisor = moments.count() - options.ddof as f64;
        let m2 = moments.m2();
        // Not `max`, which would make 0 of a NaN.
        let m2 = if m2 < 0. { 0. } else { m2 };
        (moments, (divisor > 0.).then(|| m2 / divisor))
    }

    fn save(options: &SlidingScalerOptions, memory: Option<&Self>, state: State) -> Result<State> {
        let state = state
            .with_option("window", options.window)
            .with_option("ddof", options.ddof)
            .with_option("causal", options.causal)
            .with_option("nan", options.nan);
        match memory {
            Some(window) => window.save(state),
            None => Ok(state),
        }
    }

    fn restore(state: &State, features: usize) -> Result<(SlidingScalerOptions, Option<Self>)> {
        let options = SlidingScalerOptions {
            window: state.option("window")?,
            ddof: state.option("ddof")?,
            causal: state.option("causal")?,
            nan: state.option("nan")?,
        };
        Self::check(&options)?;
        let window = match features {
            0 => None,
            features => Some(Window::restore(
                Self::KIND,
                options.window,
                features,
                state,
            )?),
        };
        Ok((options, window))
    }
}
