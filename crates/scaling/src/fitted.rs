//! Scalers that are fitted to a data set as a whole: statistics of each feature
//! behind a lock, and the map that follows from them.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use candle_core::{DType, Result, Tensor, bail};

use super::affine::{Map, Maps};
use super::check;
use super::data::{Nan, each_feature, sample_weights};
use super::optimistic::optimistic;
use super::{Features, Scaler, Seen, State};

/// The version of the states of these scalers.
const VERSION: u32 = 1;

/// A way to scale: its options.
pub trait Rule: Debug + Clone + PartialEq + Send + Sync + 'static {
    const KIND: &'static str;

    /// Statistic of one feature.
    type Statistic: Debug + Clone + Send + Sync;

    fn check(&self) -> Result<()>;
    fn nan(&self) -> Nan;
    fn empty(&self) -> Result<Self::Statistic>;
    fn take(statistic: &mut Self::Statistic, values: &[f64]) -> Result<()>;

    /// Takes values that count `weights` times, all above 0.
    fn take_weighted(_: &mut Self::Statistic, _: &[f64], _: &[f64]) -> Result<()> {
        check::no_weights(Self::KIND, "repeat the samples by their weight")
    }

    fn merge(into: &mut Self::Statistic, from: &Self::Statistic) -> Result<()>;

    /// A number that is not finite where the statistic is too large for an `f64`.
    fn largest(_: &Self::Statistic) -> f64 {
        0.
    }

    /// The map of a feature of which there are values.
    fn map(&self, statistic: &Self::Statistic) -> Result<Map>;

    fn clip(&self) -> Option<[f64; 2]> {
        None
    }

    fn save(&self, state: State, statistics: &[Self::Statistic]) -> Result<State>;

    /// The options and statistics of a saved state, of `state.seen().len()` features.
    fn restore(state: &State) -> Result<(Self, Vec<Self::Statistic>)>;
}

/// A scaler at one moment.
#[derive(Debug, Clone)]
pub(super) struct Fit<R: Rule> {
    pub(super) rule: R,
    pub(super) features: Features,
    seen: Vec<Seen>,
    pub(super) statistics: Vec<R::Statistic>,
    /// Follows from the statistics when it is first asked for.
    affine: OnceLock<Maps>,
}

impl<R: Rule> Fit<R> {
    fn new(rule: R, features: Features) -> Self {
        Self {
            rule,
            features,
            seen: vec![],
            statistics: vec![],
            affine: OnceLock::new(),
        }
    }

    /// The statistics of `x` alone, each sample by its weight if there are weights.
    fn of(rule: R, features: &Features, x: &Tensor, weights: Option<&[f64]>) -> Result<Self> {
        check::samples(R::KIND, x)?;
        let features = features.of(R::KIND, x)?;
        let mut statistics = vec![rule.empty()?; features.count()];
        let take = |feature: usize, values: &[f64], weights: Option<&[f64]>| match weights {
            Some(weights) => R::take_weighted(&mut statistics[feature], values, weights),
            None => R::take(&mut statistics[feature], values),
        };
        let seen = each_feature(R::KIND, &features, rule.nan(), x, weights, take)?;
        Self {
            seen,
            statistics,
            ..Self::new(rule, features)
        }
        .held()
    }

    /// This, if an `f64` can hold its statistics.
    fn held(self) -> Result<Self> {
        for (i, statistic) in self.statistics.iter().enumerate() {
            let (label, largest) = (self.features.label(i), R::largest(statistic));
            check::representable(R::KIND, &label, largest, DType::F64)?;
        }
        Ok(self)
    }

    /// These and what `other` saw.
    fn with(&self, other: Self) -> Result<Self> {
        let features = self.features.joined(R::KIND, &other.features)?;
        let rule = self.rule.clone();
        let (mut seen, mut statistics) = (self.seen.clone(), self.statistics.clone());
        if seen.is_empty() && self.rule == other.rule {
            (seen, statistics) = (other.seen, other.statistics);
        } else if !other.seen.is_empty() {
            // Made by the rule of this one, which the other may differ from.
            statistics.resize(other.seen.len(), rule.empty()?);
            for (a, b) in statistics.iter_mut().zip(&other.statistics) {
                R::merge(a, b)?;
            }
            seen = Seen::and_more(R::KIND, &features, &seen, &other.seen)?;
        }
        Self {
            seen,
            statistics,
            ..Self::new(rule, features)
        }
        .held()
    }

    fn restored(state: &State) -> Result<Self> {
        state.require(R::KIND, VERSION)?;
        let features = state.features().clone();
        let seen = state.counts()?.to_vec();
        let (rule, statistics) = R::restore(state)?;
        rule.check()?;
        Ok(Self {
            seen,
            statistics,
            ..Self::new(rule, features)
        })
    }

    /// One number of each feature, from its statistic; NaN where there are no values.
    pub(super) fn each(&self, of: impl Fn(&R::Statistic) -> Result<f64>) -> Result<Vec<f64>> {
        self.affine()?;
        let features = self.statistics.iter().zip(&self.seen);
        let one = |(statistic, seen): (_, &Seen)| match seen.values {
            0 => Ok(f64::NAN),
            _ => of(statistic),
        };
        features.map(one).collect()
    }

    /// The map of each feature.
    pub(super) fn affine(&self) -> Result<&Maps> {
        let fitted = Some(&self.seen).filter(|seen| !seen.is_empty());
        check::fitted(R::KIND, fitted)?;
        if let Some(affine) = self.affine.get() {
            return Ok(affine);
        }
        let mut maps = Vec::with_capacity(self.statistics.len());
        let values = self.seen.iter().map(|seen| seen.values).max();
        has_values(R::KIND, values.unwrap_or_default())?;
        for (statistic, seen) in self.statistics.iter().zip(&self.seen) {
            maps.push(match seen.values {
                0 => Map::UNKNOWN,
                _ => self.rule.map(statistic)?,
            });
        }
        let clip = self.rule.clip();
        Ok(self.affine.get_or_init(|| Maps { maps, clip }))
    }
}

/// A scaler: a snapshot that is replaced as a whole.
#[derive(Debug)]
pub(super) struct Fitted<R: Rule>(RwLock<Arc<Fit<R>>>);

impl<R: Rule> Fitted<R> {
    pub(super) fn new(rule: R) -> Result<Self> {
        rule.check()?;
        Ok(Self::of(Fit::new(rule, Features::default())))
    }

    /// A scaler of the default options of a rule, which are sound.
    pub(super) fn with_defaults() -> Self
    where
        R: Default,
    {
        Self::of(Fit::new(R::default(), Features::default()))
    }

    fn of(snapshot: Fit<R>) -> Self {
        Self(RwLock::new(Arc::new(snapshot)))
    }

    pub(super) fn from_state(state: &State) -> Result<Self> {
        Ok(Self::of(Fit::restored(state)?))
    }

    pub(super) fn named(self, names: Vec<String>) -> Result<Self> {
        let snapshot = self.snapshot();
        let features = Features::named(R::KIND, names)?;
        let features = snapshot.features.joined(R::KIND, &features)?;
        Ok(Self::of(Fit {
            features,
            ..(*snapshot).clone()
        }))
    }

    /// The scaler as it is now; nothing that happens later reaches it.
    pub(super) fn snapshot(&self) -> Arc<Fit<R>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A scaler of its own that is as this is now.
    pub(super) fn copy(&self) -> Self {
        Self(RwLock::new(self.snapshot()))
    }

    /// Replaces the snapshot by what `next` makes of it, unless that fails. Writers wait for each
    /// other, so that none is lost.
    fn replace(&self, next: impl FnOnce(&Fit<R>) -> Result<Fit<R>>) -> Result<()> {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(next(&current)?);
        Ok(())
    }

    pub(super) fn fit(&self, x: &Tensor, weights: Option<&Tensor>) -> Result<()> {
        self.take(x, weights, Features::without_axes, |_, fresh| Ok(fresh))
    }

    pub(super) fn partial_fit(&self, x: &Tensor, weights: Option<&Tensor>) -> Result<()> {
        self.take(x, weights, Features::clone, Fit::with)
    }

    /// Replaces the snapshot by what `next` makes of it and of the statistics of `x`, whose
    /// features are the `known` ones.
    fn take(
        &self,
        x: &Tensor,
        weights: Option<&Tensor>,
        known: impl Fn(&Features) -> Features,
        next: impl FnOnce(&Fit<R>, Fit<R>) -> Result<Fit<R>>,
    ) -> Result<()> {
        check::samples(R::KIND, x)?;
        let weights = weights.map(|w| sample_weights(R::KIND, x, w)).transpose()?;
        optimistic(
            &self.0,
            Arc::clone,
            |now| {
                Fit::of(
                    now.rule.clone(),
                    &known(&now.features),
                    x,
                    weights.as_deref(),
                )
            },
            |current, now| {
                current.rule == now.rule && current.features.names() == now.features.names()
            },
            |current, of_x| {
                *current = Arc::new(next(current, of_x)?);
                Ok(())
            },
        )
    }

    pub(super) fn merge(&self, other: &State) -> Result<()> {
        let more = Fit::restored(other)?;
        self.replace(|current| current.with(more))
    }

    pub(super) fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let now = self.snapshot();
        now.affine()?.transform(R::KIND, &now.features, x)
    }

    pub(super) fn inverse_transform(&self, y: &Tensor) -> Result<Tensor> {
        let now = self.snapshot();
        now.affine()?.inverse(R::KIND, &now.features, y)
    }

    /// One number of each feature, from its statistic; NaN where there are no values.
    pub(super) fn each(&self, of: impl Fn(&R::Statistic) -> f64) -> Result<Vec<f64>> {
        self.snapshot().each(|statistic| Ok(of(statistic)))
    }

    pub(super) fn features(&self) -> Features {
        self.snapshot().features.clone()
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.snapshot().seen.clone()
    }

    pub(super) fn reset(&self) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let features = current.features.without_axes();
        *current = Arc::new(Fit::new(current.rule.clone(), features));
    }

    pub(super) fn state(&self) -> Result<State> {
        let now = self.snapshot();
        let state =
            State::new(R::KIND, VERSION).with_features(now.features.clone(), now.seen.clone());
        now.rule.save(state, &now.statistics)
    }

    pub(super) fn restore(&self, state: &State) -> Result<()> {
        let restored = Fit::<R>::restored(state)?;
        self.replace(|current| {
            let features = current.features.joined(R::KIND, &restored.features)?;
            Ok(Fit {
                features,
                ..restored
            })
        })
    }
}

/// A scaler that is fitted to a data set as a whole, by the rule that its options are.
///
/// [`StandardScaler`](super::StandardScaler), [`MinMaxScaler`](super::MinMaxScaler),
/// [`MaxAbsScaler`](super::MaxAbsScaler) and [`RobustScaler`](super::RobustScaler) are such
/// scalers.
#[derive(Debug)]
pub struct FittedScaler<O: Rule> {
    pub(super) fitted: Fitted<O>,
}

impl<O: Rule> FittedScaler<O> {
    /// A scaler without data.
    ///
    /// # Errors
    /// Options outside of their ranges.
    pub fn new(options: O) -> Result<Self> {
        let fitted = Fitted::new(options)?;
        Ok(Self { fitted })
    }

    /// This scaler with a name for each feature, in the order of the trailing axes of data.
    ///
    /// # Errors
    /// Two equal names, or more or less names than features that it was fitted to.
    pub fn with_names<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        let names = names.into_iter().map(S::into).collect();
        let fitted = self.fitted.named(names)?;
        Ok(Self { fitted })
    }

    /// The scaler that `state` is of.
    ///
    /// # Errors
    /// A state of another kind or version, or one that is damaged.
    pub fn from_state(state: &State) -> Result<Self> {
        let fitted = Fitted::from_state(state)?;
        Ok(Self { fitted })
    }

    /// The options.
    pub fn options(&self) -> O {
        self.fitted.snapshot().rule.clone()
    }

    /// The divisor of each feature: where it does not vary, 1, or 1 over the width of the range of
    /// a [`MinMaxScaler`](super::MinMaxScaler). NaN where there are no values of it.
    ///
    /// # Errors
    /// No data yet.
    pub fn scale(&self) -> Result<Vec<f64>> {
        let now = self.fitted.snapshot();
        Ok(now.affine()?.maps.iter().map(|map| map.scale).collect())
    }
}

impl<O: Rule + Default> Default for FittedScaler<O> {
    fn default() -> Self {
        let fitted = Fitted::with_defaults();
        Self { fitted }
    }
}

super::scaler::files!(impl<O: Rule> FittedScaler<O>);

impl<O: Rule> Scaler for FittedScaler<O> {
    fn kind(&self) -> &'static str {
        O::KIND
    }
    fn nan(&self) -> Nan {
        self.fitted.snapshot().rule.nan()
    }
    fn features(&self) -> Features {
        self.fitted.features()
    }
    fn seen(&self) -> Vec<Seen> {
        self.fitted.seen()
    }
    fn fit(&self, x: &Tensor) -> Result<()> {
        self.fitted.fit(x, None)
    }
    fn fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.fitted.fit(x, Some(sample_weight))
    }
    fn partial_fit(&self, x: &Tensor) -> Result<()> {
        self.fitted.partial_fit(x, None)
    }
    fn partial_fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.fitted.partial_fit(x, Some(sample_weight))
    }
    fn merge(&self, other: &dyn Scaler) -> Result<()> {
        self.fitted.merge(&other.state()?)
    }
    fn transform(&self, x: &Tensor) -> Result<Tensor> {
        self.fitted.transform(x)
    }
    fn inverse_transform(&self, x: &Tensor) -> Result<Tensor> {
        self.fitted.inverse_transform(x)
    }
    fn reset(&self) {
        self.fitted.reset()
    }
    fn snapshot(&self) -> Box<dyn Scaler> {
        let fitted = self.fitted.copy();
        Box::new(Self { fitted })
    }
    fn state(&self) -> Result<State> {
        self.fitted.state()
    }
    fn restore(&self, state: &State) -> Result<()> {
        self.fitted.restore(state)
    }
}

/// Data that have a value of any feature.
fn has_values(layer: &str, values: u64) -> Result<()> {
    if values == 0 {
        bail!("{layer}: expected at least one value of any feature, got only NaN")
    }
    Ok(())
}
