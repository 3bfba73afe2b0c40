//! Several losses on one scale.

use std::fmt::Display;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::state::MOST_VALUES;
use super::{Features, Seen, State, check};

const KIND: &str = "LossBalancer";
const VERSION: u32 = 1;

/// Options of a [`LossBalancer`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct LossBalancerOptions {
    /// The weight of the past in the running size, from 0 (this step alone) to below 1. Default
    /// 0.99: about the last hundred steps.
    pub decay: f64,
}

impl Default for LossBalancerOptions {
    fn default() -> Self {
        Self { decay: 0.99 }
    }
}

/// The terms of a multi-task loss, each divided by its running size, so that none leads by its unit
/// alone.
///
/// ```text
/// total = Σᵢ lossᵢ / sizeᵢ        sizeᵢ ← (decay · sizeᵢ + (1 − decay) · |lossᵢ|) / (1 − decayᵗ)
/// ```
///
/// Where:
/// - `sizeᵢ` is the exponentially weighted mean of the absolute value of a term, the present step
///   included, freed of its start at zero;
/// - `t` is the number of steps.
///
/// The size is a number, not part of the graph: the gradient of a term is its own, divided by the
/// size. A term that was always zero is divided by 1, and a size below the least normal number of
/// the dtype that is computed in, 1.2e-38 in `f32`, counts as that number. Dollars squared and a
/// cross entropy then weigh alike at first, and a term falls behind the others as it shrinks below
/// what it was.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::LossBalancer;
///
/// let balancer = LossBalancer::new(["price", "class"], Default::default())?;
/// let loss = |v: f32| Tensor::new(v, &Device::Cpu).unwrap();
/// let total = balancer.balance(&[loss(5e8), loss(0.7)])?;
/// assert!((total.to_scalar::<f32>()? - 2.).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct LossBalancer(RwLock<Arc<Sizes>>);

#[derive(Debug, Clone)]
struct Sizes {
    options: LossBalancerOptions,
    terms: Features,
    steps: u64,
    /// The weighted sum of what was, before it is divided by the sum of the weights.
    running: Vec<f64>,
}

impl Sizes {
    fn count(&self) -> usize {
        self.running.len()
    }

    /// The sum of the weights of all steps.
    fn weight(&self) -> f64 {
        1. - self.options.decay.powf(self.steps as f64)
    }

    fn sizes(&self) -> Vec<f64> {
        let size = |running: &f64| match *running == 0. {
            true => 1.,
            false => running / self.weight(),
        };
        self.running.iter().map(size).collect()
    }

    fn after(&self, losses: &[f64]) -> Result<Self> {
        let decay = self.options.decay;
        let running = self.running.iter().zip(losses);
        let next = Self {
            running: running
                .map(|(r, l)| decay * r + (1. - decay) * l.abs())
                .collect(),
            steps: self.steps.saturating_add(1),
            ..self.clone()
        };
        check::countable(KIND, "steps", &"all terms", next.steps, MOST_VALUES)?;
        for (i, size) in next.sizes().iter().enumerate() {
            check::finite(KIND, &format!("the size of {}", self.terms.label(i)), *size)?;
        }
        Ok(next)
    }

    /// The sum of the terms divided by their sizes, in `f32` at least.
    fn total(&self, terms: &[Tensor]) -> Result<Tensor> {
        let mut total: Option<Tensor> = None;
        for (term, size) in terms.iter().zip(self.sizes()) {
            // The inverse of a smaller size, which is the gradient, would be infinite.
            let (wide, least) = match term.dtype() {
                DType::F64 => (DType::F64, f64::MIN_POSITIVE),
                _ => (DType::F32, f64::from(f32::MIN_POSITIVE)),
            };
            let term = (term.to_dtype(wide)?.reshape(())? / size.max(least))?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        check::present(KIND, "a term", total)
    }
}

impl LossBalancer {
    /// A balancer of the terms of these names.
    ///
    /// # Errors
    /// No names, two equal ones, or a decay that is not from 0 to below 1.
    pub fn new<S: Into<String>>(
        names: impl IntoIterator<Item = S>,
        options: LossBalancerOptions,
    ) -> Result<Self> {
        let names: Vec<String> = names.into_iter().map(S::into).collect();
        check::at_least_one(KIND, "term", names.len())?;
        check_decay(options.decay)?;
        Ok(Self(RwLock::new(Arc::new(Sizes {
            options,
            running: vec![0.; names.len()],
            terms: Features::named(KIND, names)?,
            steps: 0,
        }))))
    }

    /// The balancer that `state` is of.
    ///
    /// # Errors
    /// A state of another kind or version, or one that is damaged.
    pub fn from_state(state: &State) -> Result<Self> {
        Ok(Self(RwLock::new(Arc::new(restored(state)?))))
    }

    /// The sum of the terms, each divided by its running size, of which these terms are already
    /// part.
    ///
    /// Terms are tensors of one element, in the order of the names, of one dtype and device. The
    /// result is a scalar in `f32`, or in `f64` for `f64`.
    ///
    /// # Errors
    /// More or fewer terms than names, a term that is not one number of floating point, or is NaN
    /// or infinite; no size is changed then.
    pub fn balance(&self, terms: &[Tensor]) -> Result<Tensor> {
        let losses = self.values(terms)?;
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let next = current.after(&losses)?;
        let total = next.total(terms)?;
        *current = Arc::new(next);
        Ok(total)
    }

    /// [`balance`](Self::balance) by the sizes as they are, for evaluation.
    ///
    /// # Errors
    /// As [`balance`](Self::balance).
    pub fn evaluate(&self, terms: &[Tensor]) -> Result<Tensor> {
        self.values(terms)?;
        self.now().total(terms)
    }

    /// The running size of each term: 1 before there was any.
    pub fn sizes(&self) -> Vec<f64> {
        self.now().sizes()
    }

    /// All that this balancer knows.
    ///
    /// # Errors
    /// Only those of candle.
    pub fn state(&self) -> Result<State> {
        let now = self.now();
        let seen = Seen {
            values: now.steps,
            nan: 0,
        };
        State::new(KIND, VERSION)
            .with_features(now.terms.clone(), vec![seen; now.count()])
            .with_option("decay", now.options.decay)
            .with_values("running", &now.running)
    }

    /// Becomes the balancer that `state` is of, its decay included.
    ///
    /// # Errors
    /// A state of another kind, version or set of terms, or one that is damaged; nothing is changed
    /// then.
    pub fn restore(&self, state: &State) -> Result<()> {
        let restored = restored(state)?;
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        current.terms.joined(KIND, &restored.terms)?;
        *current = Arc::new(restored);
        Ok(())
    }

    fn now(&self) -> Arc<Sizes> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The terms as numbers.
    fn values(&self, terms: &[Tensor]) -> Result<Vec<f64>> {
        let now = self.now();
        let first = now.terms.label(now.count().min(terms.len()));
        term_count(KIND, now.count(), terms.len(), &first)?;
        let mut values = vec![];
        for (i, term) in terms.iter().enumerate() {
            let label = now.terms.label(i).to_string();
            check::float(KIND, &label, term)?;
            check::dtype(KIND, &label, term, terms[0].dtype())?;
            check::same_device(KIND, &label, term, terms[0].device())?;
            scalar(KIND, &label, term)?;
            let value = term
                .detach()
                .reshape(())?
                // Not every device has `f64`.
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F64)?
                .to_scalar()?;
            check::finite(KIND, &label, value)?;
            values.push(value);
        }
        Ok(values)
    }
}

fn check_decay(decay: f64) -> Result<()> {
    let holds = (0. ..1.).contains(&decay);
    check::option(KIND, "decay", holds, "from 0 to below 1", &decay)
}

fn restored(state: &State) -> Result<Sizes> {
    state.require(KIND, VERSION)?;
    let count = state.features().count();
    check::at_least_one(KIND, "term", count)?;
    let counts = state.counts()?;
    check::saved_length(KIND, "counts", count, counts.len())?;
    let steps = counts.first().map_or(0, |seen| seen.values);
    for (i, seen) in counts.iter().enumerate() {
        let label = state.features().label(i);
        let holds = (seen.values, seen.nan) == (steps, 0);
        check::saved_value(KIND, "count", &label, seen.values as f64, holds)?;
    }
    let running = state.values("running", count)?;
    for (i, size) in running.iter().enumerate() {
        let label = state.features().label(i);
        let holds = size.is_finite() && *size >= 0.;
        check::saved_value(KIND, "running size", &label, *size, holds)?;
    }
    let decay = state.option("decay")?;
    check_decay(decay)?;
    let sizes = Sizes {
        options: LossBalancerOptions { decay },
        terms: state.features().clone(),
        steps,
        running,
    };
    for (i, size) in sizes.sizes().iter().enumerate() {
        let label = state.features().label(i);
        check::saved_value(KIND, "running size", &label, *size, size.is_finite())?;
    }
    Ok(sizes)
}

/// One number, such as a term of a loss.
fn scalar(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    if value.elem_count() != 1 {
        bail!(
            "{layer}: expected {name} as one number, got shape {:?}; take its mean",
            value.dims()
        )
    }
    Ok(())
}

/// As many terms as names.
fn term_count(layer: &str, expected: usize, got: usize, first: &dyn Display) -> Result<()> {
    if expected != got {
        let what = match got < expected {
            true => "is missing",
            false => "is too many",
        };
        bail!("{layer}: expected {expected} terms, got {got}: {first} {what}")
    }
    Ok(())
}
