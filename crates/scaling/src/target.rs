//! Targets of a regression: scaled for the loss, and back in their own units for people.

use std::fmt;

use candle_core::{DType, Device, Result, Tensor};

use super::Scaler;
use super::check;
use super::moments::columns;

const LAYER: &str = "TargetScaler";

/// A scaler for what a model is to predict.
///
/// Train against [`scale`](Self::scale)d targets, and [`invert`](Self::invert) predictions; a model
/// with several outputs has its own scale for each. Both are differentiable, so a loss can be taken
/// in either unit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{StandardScaler, TargetScaler};
///
/// let prices = Tensor::new(&[[10_000f64], [20_000.], [30_000.]], &Device::Cpu)?;
/// let targets = TargetScaler::new(StandardScaler::default().with_names(["price"])?);
/// targets.fit(&prices)?;
///
/// // A model that is one standard deviation too high for every car.
/// let prediction = (targets.scale(&prices)? + 1.)?;
/// let errors = targets.errors(&prediction, &prices)?;
/// assert!((errors[0].scaled.rmse - 1.).abs() < 1e-12);
/// assert!((errors[0].original.mae - 8164.97).abs() < 0.01);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct TargetScaler {
    scaler: Box<dyn Scaler>,
}

/// Average errors of predictions.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Deviation {
    /// The root of the mean squared error.
    pub rmse: f64,
    /// The mean absolute error.
    pub mae: f64,
}

/// The error of one output of a model, in both units.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TargetError {
    /// The name of the output, or its index.
    pub output: String,
    /// Errors in units of the loss.
    pub scaled: Deviation,
    /// Errors in the target's own units.
    pub original: Deviation,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            output,
            scaled,
            original,
        } = self;
        write!(
            f,
            "{output}: RMSE {:.6} ({:.4} scaled), MAE {:.6} ({:.4} scaled)",
            original.rmse, scaled.rmse, original.mae, scaled.mae
        )
    }
}

impl TargetScaler {
    /// Targets scaled by `scaler`.
    pub fn new(scaler: impl Scaler + 'static) -> Self {
        Self::from_boxed(Box::new(scaler))
    }

    /// [`new`](Self::new) for a scaler of any kind.
    pub fn from_boxed(scaler: Box<dyn Scaler>) -> Self {
        Self { scaler }
    }

    /// The scaler, to be fitted, saved or looked at.
    pub fn scaler(&self) -> &dyn Scaler {
        &*self.scaler
    }

    /// Fits the targets of the training data, `[N, outputs...]` or `[N]`.
    ///
    /// # Errors
    /// As [`Scaler::fit`].
    pub fn fit(&self, targets: &Tensor) -> Result<()> {
        self.scaler.fit(targets)
    }

    /// Takes in more targets.
    ///
    /// # Errors
    /// As [`Scaler::partial_fit`].
    pub fn partial_fit(&self, targets: &Tensor) -> Result<()> {
        self.scaler.partial_fit(targets)
    }

    /// [`fit`](Self::fit) to targets that count by their weight, `[N]`.
    ///
    /// # Errors
    /// As [`Scaler::fit_weighted`].
    pub fn fit_weighted(&self, targets: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.scaler.fit_weighted(targets, sample_weight)
    }

    /// [`partial_fit`](Self::partial_fit) to targets that count by their weight, `[N]`.
    ///
    /// # Errors
    /// As [`Scaler::partial_fit_weighted`].
    pub fn partial_fit_weighted(&self, targets: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.scaler.partial_fit_weighted(targets, sample_weight)
    }

    /// Targets as the loss should see them.
    ///
    /// # Errors
    /// As [`Scaler::transform`].
    pub fn scale(&self, targets: &Tensor) -> Result<Tensor> {
        self.scaler.transform(targets)
    }

    /// Predictions in the units of the targets.
    ///
    /// # Errors
    /// As [`Scaler::inverse_transform`].
    pub fn invert(&self, predictions: &Tensor) -> Result<Tensor> {
        self.scaler.inverse_transform(predictions)
    }

    /// Distance of scaled `predictions` from `targets`, which are in their own units: of each
    /// output, in both units.
    ///
    /// # Errors
    /// Shapes that differ: `[N, 1]` against `[N]` is `N²` differences wherever it is broadcast, and
    /// most often a mistake. No samples. Those of [`Scaler::transform`].
    pub fn errors(&self, predictions: &Tensor, targets: &Tensor) -> Result<Vec<TargetError>> {
        check::samples(LAYER, targets)?;
        check::float(LAYER, "predictions", predictions)?;
        check::shape(LAYER, "predictions", predictions, targets.dims())?;
        let wide = |t: &Tensor| t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64);
        let (predictions, targets) = (wide(predictions)?, wide(targets)?);
        // Both units and the names of one state of the scaler, also while other threads feed it.
        let now = self.scaler.snapshot();
        let scaled = deviations(&(&predictions - now.transform(&targets)?)?)?;
        let original = deviations(&(now.inverse_transform(&predictions)? - &targets)?)?;
        let features = now.features();
        let name = |i: usize| match features.names().and_then(|names| names.get(i)) {
            Some(name) => name.clone(),
            None => i.to_string(),
        };
        let pairs = scaled.into_iter().zip(original).enumerate();
        let errors = pairs.map(|(i, (scaled, original))| TargetError {
            output: name(i),
            scaled,
            original,
        });
        Ok(errors.collect())
    }
}

/// Errors of each column of differences.
fn deviations(differences: &Tensor) -> Result<Vec<Deviation>> {
    let width = differences.dims()[1..].iter().product();
    let count = differences.dims()[0] as f64;
    let mut sums = vec![(0., 0.); width];
    columns(differences, |column, values| {
        let (squares, sizes) = &mut sums[column];
        *squares += values.iter().map(|d| d * d).sum::<f64>();
        *sizes += values.iter().map(|d| d.abs()).sum::<f64>();
        Ok(())
    })?;
    let deviation = |(squares, sizes): (f64, f64)| Deviation {
        rmse: (squares / count).sqrt(),
        mae: sizes / count,
    };
    Ok(sums.into_iter().map(deviation).collect())
}
