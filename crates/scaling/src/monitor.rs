//! Whether the data of today are still those that a scaler, or a model, was fitted to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor};

use super::watch::Watch;
use super::{DriftEvent, DriftOptions, DriftReport, Features, State};

/// Compares the recent values of each feature of a series with a reference, and says when they
/// differ.
///
/// - *Mean shift*: `(m − μ) / σ`, with the mean `m` of the recent values, and μ and σ of the
///   reference. There is an event where it is also more than five standard errors
///   `√(v · (1/n + 1/m))` for `n` and `m` values, by their pooled variance `v`.
/// - *Variance ratio*: `s² / σ²`, both biased. There is an event where `s² − σ²` is also more than
///   five standard errors `√(k · (1/n + 1/m))`, by the pooled variance `k` of the squared distances
///   from the mean: `(κ − 1) σ⁴` for a kurtosis κ. A value far out raises the variance and its
///   error alike, so that this holds for heavy tails too, even for those that have no kurtosis
///   (Layard, 1973, "Robust large-sample tests for homogeneity of variances",
///   <https://doi.org/10.1080/01621459.1973.10481363>).
/// - *Population stability index*: `Σ (pᵢ − qᵢ) · ln(pᵢ / qᵢ)` over bins, of which the reference
///   has the shares `pᵢ` and the recent values `qᵢ`. The edges are the quantiles of the reference
///   at `k / bins`, by linear interpolation; the outer bins are open, an edge belongs to the bin
///   above it, and equal edges are one. A share of 0 counts as 10⁻⁴. Evidently has this formula,
///   and the same 10⁻⁴, over bins of equal width. Without any change the index is about
///   `(bins − 1) · (1/n + 1/m)` for `n` and `m` values.
/// - *Kolmogorov–Smirnov*: the greatest distance of the two distribution functions, and its
///   p-value: exact up to 2²⁰ pairs of values, as SciPy's `ks_2samp` with `method="exact"`, and
///   Kolmogorov's limit beyond. With ties the p-value is too high.
///
/// Metrics are formed each [`check_every`](DriftOptions::check_every) rows, of the features that
/// had a value since. Missing values take no place in a window: a feature with gaps is compared by
/// as many values as one without. Methods take `&self`, so that threads can share a monitor; an
/// error changes nothing. The rows of the reference and the values of the windows are kept.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{DriftMetric, DriftMonitor, DriftOptions};
///
/// let monitor = DriftMonitor::new(DriftOptions::default())?.with_names(["ppm"])?;
/// let season = |level: f64, rows: usize| {
///     let rows: Vec<_> = (0..rows).map(|i| level + (i as f64 * 2.4).sin()).collect();
///     Tensor::new(rows, &Device::Cpu)
/// };
/// monitor.fit(&season(315., 1000)?)?;
/// assert!(monitor.observe(&season(315., 400)?)?.is_empty());
///
/// let events = monitor.observe(&season(318., 100)?)?;
/// // Rows of both levels together are wider than those of either.
/// assert_eq!((events[0].metric, events[0].step), (DriftMetric::VarianceRatio, 410));
/// assert!(events[0].to_string().starts_with(r#"step 410: feature 0 "ppm": variance ratio"#));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct DriftMonitor(Mutex<Watch>);

impl DriftMonitor {
    /// A monitor without a reference.
    ///
    /// # Errors
    /// Options outside of their ranges.
    pub fn new(options: DriftOptions) -> Result<Self> {
        Ok(Self(Mutex::new(Watch::new(options)?)))
    }

    /// This monitor with a name for each feature, in the order of the trailing axes of data.
    ///
    /// # Errors
    /// Two equal names, or more or less names than features of the reference.
    pub fn with_names<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        self.lock()
            .set_names(names.into_iter().map(S::into).collect())?;
        Ok(self)
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The options.
    pub fn options(&self) -> DriftOptions {
        self.lock().options
    }

    /// The features, as far as they are known.
    pub fn features(&self) -> Features {
        self.lock().features.clone()
    }

    /// Number of rows observed since the first [`fit`](Self::fit).
    pub fn steps(&self) -> u64 {
        self.lock().step
    }

    /// Takes `x`, `[N, features...]`, as the reference, and forgets recent rows and cool-downs.
    ///
    /// # Errors
    /// Data that are empty, not of floating point, infinite, NaN where that is refused, of other
    /// features than the names say, or fewer values of a feature than [`bins`](DriftOptions::bins).
    pub fn fit(&self, x: &Tensor) -> Result<()> {
        let mut watch = self.lock();
        let bins = watch.options.bins;
        watch.fit_to(x, bins)
    }

    /// Takes in rows `[N, features...]` in their order, and returns what crossed its threshold at
    /// which of them.
    ///
    /// Rows that come in one call give what they give one by one.
    ///
    /// # Errors
    /// As [`fit`](Self::fit); also other features than those of the reference, or no reference.
    pub fn observe(&self, x: &Tensor) -> Result<Vec<DriftEvent>> {
        let mut watch = self.lock();
        let rows = watch.rows(x)?;
        Ok(rows.each().flat_map(|row| watch.row(row)).collect())
    }

    /// All metrics of each feature, by the recent rows of now.
    ///
    /// # Errors
    /// No reference, or a feature without recent values.
    pub fn report(&self) -> Result<Vec<DriftReport>> {
        self.lock().report()
    }

    /// All that the monitor knows, to be saved with a scaler or a model.
    ///
    /// # Errors
    /// Only those of candle.
    pub fn state(&self) -> Result<State> {
        self.lock().state()
    }

    /// The monitor that `state` is of, which goes on as that would have.
    ///
    /// # Errors
    /// A state of another kind or version, or one that is damaged.
    pub fn from_state(state: &State) -> Result<Self> {
        Ok(Self(Mutex::new(Watch::restored(state)?)))
    }
}
