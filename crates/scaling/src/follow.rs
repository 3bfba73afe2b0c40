//! Scalers of series: a memory that every row changes, behind a lock, and the map that follows from
//! it.

use std::fmt::{self, Display};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use candle_core::{Result, Tensor, bail};

use super::affine::{Map, Maps, scale_of};
use super::optimistic::optimistic;
use super::rows::SeriesRows;
use super::{Causal, Features, Moments, Nan, Scaler, Seen, SeriesStats, State, check};

const VERSION: u32 = 1;

/// A memory of the past of all features.
pub trait Memory: fmt::Debug + Clone + Send + Sync + 'static {
    const KIND: &'static str;

    /// Remedy of a caller who weighs samples.
    const INSTEAD_OF_WEIGHTS: &'static str;

    /// The options of the scaler.
    type Options: fmt::Debug + Copy + PartialEq + Send + Sync;

    fn check(options: &Self::Options) -> Result<()>;
    fn nan(options: &Self::Options) -> Nan;
    fn causal(options: &Self::Options) -> Causal;
    fn new(options: &Self::Options, features: usize) -> Self;

    /// Takes in one row; NaN are values that are not there.
    fn push(&mut self, options: &Self::Options, row: &[f64]);

    /// Runs `f`, and is as before if that fails.
    fn attempt<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let before = self.clone();
        let done = f(self);
        if done.is_err() {
            *self = before;
        }
        done
    }

    /// The mean, as moments, and the variance of a feature, which too few values have none of. A
    /// count of 0 says that nothing is known.
    fn statistics(&self, options: &Self::Options, feature: usize) -> (Moments, Option<f64>);

    /// Whether [`check_saved`](Self::check_saved) finds anything.
    const CHECKED: bool = false;

    /// Whether a file would be refused that has this, with what was seen of each of the features.
    fn check_saved(&self, _: &Features, _: &[Seen]) -> Result<()> {
        Ok(())
    }

    /// `memory` is none before any row.
    fn save(options: &Self::Options, memory: Option<&Self>, state: State) -> Result<State>;

    /// The options, and the memory of `features` features, which is none where they are.
    fn restore(state: &State, features: usize) -> Result<(Self::Options, Option<Self>)>;
}

/// A scaler of series at one moment.
#[derive(Debug, Clone)]
struct Course<M: Memory> {
    options: M::Options,
    features: Features,
    seen: Vec<Seen>,
    memory: Option<M>,
}

impl<M: Memory> Course<M> {
    fn new(options: M::Options, features: Features) -> Self {
        Self {
            options,
            features,
            seen: vec![],
            memory: None,
        }
    }

    fn restored(state: &State) -> Result<Self> {
        state.require(M::KIND, VERSION)?;
        let (features, seen) = (state.features().clone(), state.counts()?.to_vec());
        let (options, memory) = M::restore(state, seen.len())?;
        M::check(&options)?;
        Ok(Self {
            options,
            features,
            seen,
            memory,
        })
    }

    /// Takes rows in.
    fn follow(&mut self, features: Features, rows: &SeriesRows) -> Result<()> {
        let seen = Seen::and_more(M::KIND, &features, &self.seen, &rows.seen)?;
        let known = self.memory.is_some();
        let mut memory = self.take_memory(rows);
        let options = self.options;
        let push = |memory: &mut M| {
            rows.each().for_each(|row| memory.push(&options, row));
            memory.check_saved(&features, &seen)
        };
        let done = match M::CHECKED {
            true => memory.attempt(push),
            false => push(&mut memory),
        };
        match &done {
            Ok(()) => self.took(features, seen, memory),
            Err(_) => self.memory = known.then_some(memory),
        }
        done
    }

    /// Takes rows in, and returns what `judge` makes of the map of each feature before or after
    /// each row, as the options say. If that fails, nothing is taken in.
    fn follow_with<T>(
        &mut self,
        features: Features,
        rows: &SeriesRows,
        judge: impl FnOnce(Vec<Option<Map>>) -> Result<T>,
    ) -> Result<T> {
        let seen = Seen::and_more(M::KIND, &features, &self.seen, &rows.seen)?;
        let known = self.memory.is_some();
        let mut memory = self.take_memory(rows);
        let (options, count) = (self.options, rows.seen.len());
        let before = M::causal(&options) == Causal::Before;
        let judged = memory.attempt(|memory| {
            let mut maps = Vec::with_capacity(rows.values.len());
            for row in rows.each() {
                if before {
                    maps.extend(maps_of(&options, memory, count));
                }
                memory.push(&options, row);
                if !before {
                    maps.extend(maps_of(&options, memory, count));
                }
            }
            memory.check_saved(&features, &seen)?;
            judge(maps)
        });
        match &judged {
            Ok(_) => self.took(features, seen, memory),
            Err(_) => self.memory = known.then_some(memory),
        }
        judged
    }

    fn take_memory(&mut self, rows: &SeriesRows) -> M {
        let memory = self.memory.take();
        memory.unwrap_or_else(|| M::new(&self.options, rows.seen.len()))
    }

    fn took(&mut self, features: Features, seen: Vec<Seen>, memory: M) {
        self.features = features;
        self.seen = seen;
        self.memory = Some(memory);
    }
}

/// The map of a feature, where its past has values.
fn map_of<M: Memory>(options: &M::Options, memory: &M, feature: usize) -> Option<Map> {
    let (moments, var) = memory.statistics(options, feature);
    (moments.count() > 0.).then(|| Map {
        center: [moments.mean(), moments.mean_error()],
        // Too few values to vary do not.
        scale: var.map_or(1., |var| scale_of(moments.mean(), var)),
        offset: 0.,
    })
}

fn maps_of<M: Memory>(
    options: &M::Options,
    memory: &M,
    count: usize,
) -> impl Iterator<Item = Option<Map>> {
    (0..count).map(|feature| map_of(options, memory, feature))
}

/// A scaler of series. Rows are fed to it under a lock, all rows of a call at once.
#[derive(Debug)]
pub(super) struct Following<M: Memory>(RwLock<Course<M>>);

impl<M: Memory> Following<M> {
    pub(super) fn new(options: M::Options) -> Result<Self> {
        M::check(&options)?;
        Ok(Self(RwLock::new(Course::new(options, Features::default()))))
    }

    pub(super) fn from_state(state: &State) -> Result<Self> {
        Ok(Self(RwLock::new(Course::restored(state)?)))
    }

    pub(super) fn named(self, names: Vec<String>) -> Result<Self> {
        let mut course = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let features = Features::named(M::KIND, names)?;
        course.features = course.features.joined(M::KIND, &features)?;
        Ok(Self(RwLock::new(course)))
    }

    fn read<T>(&self, of: impl FnOnce(&Course<M>) -> T) -> T {
        of(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self) -> RwLockWriteGuard<'_, Course<M>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A scaler of its own that is as this is now.
    pub(super) fn copy(&self) -> Self {
        Self(RwLock::new(self.read(Course::clone)))
    }

    pub(super) fn options(&self) -> M::Options {
        self.read(|course| course.options)
    }

    pub(super) fn features(&self) -> Features {
        self.read(|course| course.features.clone())
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.read(|course| course.seen.clone())
    }

    pub(super) fn fit(&self, x: &Tensor) -> Result<()> {
        self.take(x, Features::without_axes, |course, features, rows| {
            *course = Course::new(course.options, course.features.without_axes());
            course.follow(features, &rows)
        })
    }

    /// Calls `to` under the lock with the course, and with `x` as rows of the `known` features.
    fn take<T>(
        &self,
        x: &Tensor,
        known: impl Fn(&Features) -> Features,
        to: impl FnOnce(&mut Course<M>, Features, SeriesRows) -> Result<T>,
    ) -> Result<T> {
        optimistic(
            &self.0,
            |course| (course.features.clone(), course.options),
            |(features, options)| {
                let of_x = known(features).of(M::KIND, x)?;
                SeriesRows::of(M::KIND, &of_x, M::nan(options), x)
            },
            |course, (features, options)| {
                course.options == *options && course.features.names() == features.names()
            },
            |course, rows| {
                let of_x = known(&course.features).of(M::KIND, x)?;
                to(course, of_x, rows)
            },
        )
    }

    pub(super) fn partial_fit(&self, x: &Tensor) -> Result<()> {
        self.take(x, Features::clone, |course, features, rows| {
            course.follow(features, &rows)
        })
    }

    pub(super) fn transform_series(&self, x: &Tensor) -> Result<(Tensor, SeriesStats)> {
        let stats = self.take(x, Features::clone, |course, features, rows| {
            course.follow_with(features, &rows, |maps| SeriesStats::new(M::KIND, x, maps))
        })?;
        Ok((stats.transform(x)?, stats))
    }

    /// The map of now.
    fn affine(&self) -> Result<(Maps, Features)> {
        self.read(|course| {
            let memory = check::fitted(M::KIND, course.memory.as_ref())?;
            let mut maps = vec![];
            let found = maps_of(&course.options, memory, course.seen.len());
            maps.extend(found.map(|map| map.unwrap_or(Map::UNKNOWN)));
            let known = maps.iter().any(Map::is_known);
            some_value_known(M::KIND, &course.features.label(0), known)?;
            Ok((Maps { maps, clip: None }, course.features.clone()))
        })
    }

    pub(super) fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let (affine, features) = self.affine()?;
        affine.transform(M::KIND, &features, x)
    }

    pub(super) fn inverse_transform(&self, y: &Tensor) -> Result<Tensor> {
        let (affine, features) = self.affine()?;
        affine.inverse(M::KIND, &features, y)
    }

    /// One number of each feature.
    pub(super) fn each(&self, of: impl Fn(Moments, f64) -> f64) -> Result<Vec<f64>> {
        self.read(|course| {
            let memory = check::fitted(M::KIND, course.memory.as_ref())?;
            let statistics = (0..course.seen.len()).map(|f| memory.statistics(&course.options, f));
            let known = |(m, var): (Moments, Option<f64>)| match m.count() > 0. {
                true => of(m, var.unwrap_or(f64::NAN)),
                false => f64::NAN,
            };
            Ok(statistics.map(known).collect())
        })
    }

    pub(super) fn of_memory<T>(&self, of: impl FnOnce(&M) -> T) -> Result<T> {
        self.read(|course| check::fitted(M::KIND, course.memory.as_ref()).map(of))
    }

    pub(super) fn scale(&self) -> Result<Vec<f64>> {
        Ok(self.affine()?.0.maps.iter().map(|map| map.scale).collect())
    }

    pub(super) fn reset(&self) {
        let mut course = self.write();
        *course = Course::new(course.options, course.features.without_axes());
    }

    pub(super) fn state(&self) -> Result<State> {
        self.read(|course| {
            let state = State::new(M::KIND, VERSION)
                .with_features(course.features.clone(), course.seen.clone());
            M::save(&course.options, course.memory.as_ref(), state)
        })
    }

    pub(super) fn restore(&self, state: &State) -> Result<()> {
        let mut restored = Course::<M>::restored(state)?;
        let mut course = self.write();
        restored.features = course.features.joined(M::KIND, &restored.features)?;
        *course = restored;
        Ok(())
    }
}

/// Options of a scaler of series.
pub trait SeriesOptions: fmt::Debug + Copy + PartialEq + Send + Sync + 'static {
    /// Memory of the rows.
    type Memory: Memory<Options = Self>;
}

/// A scaler of series, whose rows are scaled in their order.
///
/// [`SlidingScaler`](super::SlidingScaler) and [`EwmScaler`](super::EwmScaler) are such scalers.
#[derive(Debug)]
pub struct SeriesScaler<O: SeriesOptions> {
    pub(super) following: Following<O::Memory>,
}

impl<O: SeriesOptions> SeriesScaler<O> {
    /// A scaler without data.
    ///
    /// # Errors
    /// Options outside of their ranges.
    pub fn new(options: impl Into<O>) -> Result<Self> {
        let following = Following::new(options.into())?;
        Ok(Self { following })
    }

    /// This scaler with a name for each feature, in the order of the trailing axes of data.
    ///
    /// # Errors
    /// Two equal names, or more or less names than features that it was fitted to.
    pub fn with_names<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        let names = names.into_iter().map(S::into).collect();
        let following = self.following.named(names)?;
        Ok(Self { following })
    }

    /// The scaler that `state` is of, which goes on as that would have, to the bit.
    ///
    /// # Errors
    /// A state of another kind or version, or one that is damaged.
    pub fn from_state(state: &State) -> Result<Self> {
        let following = Following::from_state(state)?;
        Ok(Self { following })
    }

    /// The options.
    pub fn options(&self) -> O {
        self.following.options()
    }

    /// Takes in the rows of a series in their order, and scales each by what was seen up to it, or
    /// before it, as `causal` of the options says. Also returns what each row was scaled by, which
    /// brings forecasts back.
    ///
    /// No row depends on a later one: rows that come in one call give what they give one by one.
    /// Where nothing is known of a feature yet, the result is NaN.
    ///
    /// # Shapes
    /// `x`: `[T, features...]`; the result has its shape and dtype, and is differentiable with the
    /// statistics held fixed.
    ///
    /// # Errors
    /// As [`partial_fit`](Scaler::partial_fit); statistics that the dtype of `x` cannot hold.
    /// Nothing is taken in then. A device that fails comes after the rows are in.
    pub fn transform_series(&self, x: &Tensor) -> Result<(Tensor, SeriesStats)> {
        self.following.transform_series(x)
    }

    /// The mean of each feature now; NaN where nothing is known of it.
    ///
    /// # Errors
    /// No data yet.
    pub fn mean(&self) -> Result<Vec<f64>> {
        self.following.each(|moments, _| moments.mean())
    }

    /// The variance of each feature now; NaN where there is none yet.
    ///
    /// # Errors
    /// No data yet.
    pub fn var(&self) -> Result<Vec<f64>> {
        self.following.each(|_, var| var)
    }

    /// The divisor of each feature now: 1 where it does not vary, or has no variance yet.
    ///
    /// # Errors
    /// No data yet.
    pub fn scale(&self) -> Result<Vec<f64>> {
        self.following.scale()
    }
}

super::scaler::files!(impl<O: SeriesOptions> SeriesScaler<O>);

impl<O: SeriesOptions> Scaler for SeriesScaler<O> {
    fn kind(&self) -> &'static str {
        O::Memory::KIND
    }
    fn nan(&self) -> Nan {
        O::Memory::nan(&self.options())
    }
    fn features(&self) -> Features {
        self.following.features()
    }
    fn seen(&self) -> Vec<Seen> {
        self.following.seen()
    }
    fn fit(&self, x: &Tensor) -> Result<()> {
        self.following.fit(x)
    }
    /// Always an error: a row that is there twice would be two steps of the series.
    fn fit_weighted(&self, _: &Tensor, _: &Tensor) -> Result<()> {
        check::no_weights(self.kind(), O::Memory::INSTEAD_OF_WEIGHTS)
    }
    fn partial_fit(&self, x: &Tensor) -> Result<()> {
        self.following.partial_fit(x)
    }
    /// Always an error, as that of `fit_weighted`.
    fn partial_fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.fit_weighted(x, sample_weight)
    }
    /// Always an error: rows of a series have an order, and two pasts have none.
    fn merge(&self, _: &dyn Scaler) -> Result<()> {
        check::unsupported(
            self.kind(),
            "data whose order does not matter to be merged",
            "feed the rows of one series in their order by partial_fit",
        )
    }
    fn transform(&self, x: &Tensor) -> Result<Tensor> {
        self.following.transform(x)
    }
    fn inverse_transform(&self, x: &Tensor) -> Result<Tensor> {
        self.following.inverse_transform(x)
    }
    fn reset(&self) {
        self.following.reset()
    }
    fn snapshot(&self) -> Box<dyn Scaler> {
        let following = self.following.copy();
        Box::new(Self { following })
    }
    fn state(&self) -> Result<State> {
        self.following.state()
    }
    fn restore(&self, state: &State) -> Result<()> {
        self.following.restore(state)
    }
}

/// A memory that has a value of any feature.
fn some_value_known(layer: &str, feature: &dyn Display, known: bool) -> Result<()> {
    if !known {
        bail!(
            "{layer}: expected at least one value of {feature} or another feature among the rows \
            that it remembers, got only NaN"
        )
    }
    Ok(())
}
