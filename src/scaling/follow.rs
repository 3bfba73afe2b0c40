//! What the scalers of series share: a memory that every row changes, behind a lock, and the map that follows from it.

use std::fmt;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use candle_core::{DType, Device, Result, Tensor};

use super::affine::{Affine, Map};
use super::{Features, Moments, Nan, Seen, State};
use crate::ops::check;

const VERSION: u32 = 1;

/// What a row of a series is scaled by. Neither choice looks ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Causal {
    /// The rows before it. A value far from all others keeps its whole distance.
    Before,
    /// The rows before it and itself.
    #[default]
    Through,
}

impl fmt::Display for Causal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before => "before",
            Self::Through => "through",
        })
    }
}

impl FromStr for Causal {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "before" => Ok(Self::Before),
            "through" => Ok(Self::Through),
            _ => Err(format!("{text:?} is neither before nor through")),
        }
    }
}

/// What is remembered of the past of all features.
pub(super) trait Memory: fmt::Debug + Clone + Send + Sync {
    const KIND: &'static str;

    /// The options of the scaler.
    type Options: fmt::Debug + Copy + Send + Sync;

    fn check(options: &Self::Options) -> Result<()>;
    fn nan(options: &Self::Options) -> Nan;
    fn causal(options: &Self::Options) -> Causal;
    fn new(options: &Self::Options, features: usize) -> Self;

    /// Takes in one row; NaN are values that are not there.
    fn push(&mut self, options: &Self::Options, row: &[f64]);

    /// The mean, as moments, and the variance of a feature: NaN where there is none yet. A count of 0 says that nothing is known.
    fn statistics(&self, options: &Self::Options, feature: usize) -> (Moments, f64);

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
        let (features, seen) = (state.features().clone(), state.seen().to_vec());
        if !seen.is_empty() {
            check::scaling::saved_length(M::KIND, "counts", features.count(), seen.len())?;
        }
        let (options, memory) = M::restore(state, seen.len())?;
        M::check(&options)?;
        Ok(Self {
            options,
            features,
            seen,
            memory,
        })
    }

    fn map(&self, memory: &M, feature: usize) -> Option<Map> {
        let (moments, var) = memory.statistics(&self.options, feature);
        let std = var.sqrt();
        let varies = std > f64::EPSILON * moments.mean().abs();
        (moments.count() > 0.).then(|| Map {
            center: [moments.mean(), moments.mean_error()],
            scale: if varies { std } else { 1. },
            offset: 0.,
        })
    }

    /// The map of each feature, where its past has values.
    fn maps(&self, memory: &M) -> Vec<Option<Map>> {
        (0..self.seen.len()).map(|f| self.map(memory, f)).collect()
    }

    /// Takes rows in, and calls `at` with the course before or after each of them, as the options say.
    fn follow(&mut self, rows: Rows, mut at: impl FnMut(&Self, &M)) {
        let mut memory = match self.memory.take() {
            Some(memory) => memory,
            None => M::new(&self.options, rows.seen.len()),
        };
        if self.seen.is_empty() {
            self.seen = vec![Seen::default(); rows.seen.len()];
        }
        for (seen, more) in self.seen.iter_mut().zip(&rows.seen) {
            *seen = seen.plus(*more);
        }
        let causal = M::causal(&self.options);
        // There is a feature where there are values.
        for row in rows.values.chunks(rows.seen.len().max(1)) {
            if causal == Causal::Before {
                at(self, &memory);
            }
            memory.push(&self.options, row);
            if causal == Causal::Through {
                at(self, &memory);
            }
        }
        self.memory = Some(memory);
    }
}

/// Rows of a series, checked.
pub(super) struct Rows {
    /// One row after the other.
    pub(super) values: Vec<f64>,
    /// Of each feature.
    pub(super) seen: Vec<Seen>,
}

impl Rows {
    /// The rows of `x`, which has the features.
    pub(super) fn of(layer: &str, features: &Features, nan: Nan, x: &Tensor) -> Result<Self> {
        check::scaling::samples(layer, x)?;
        let wide = x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let values = wide.flatten_all()?.to_vec1::<f64>()?;
        let mut seen = vec![Seen::default(); features.count()];
        for (i, &value) in values.iter().enumerate() {
            let (row, feature) = (i / seen.len(), i % seen.len());
            if value.is_infinite() || (value.is_nan() && nan == Nan::Refuse) {
                check::scaling::usable(layer, &features.label(feature), row, value)?;
            }
            match value.is_nan() {
                true => seen[feature].nan += 1,
                false => seen[feature].values += 1,
            }
        }
        Ok(Self { values, seen })
    }
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

    fn write<T>(&self, to: impl FnOnce(&mut Course<M>) -> T) -> T {
        to(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
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
        self.write(|course| {
            let features = course.features.without_axes().of(M::KIND, x)?;
            let rows = Rows::of(M::KIND, &features, M::nan(&course.options), x)?;
            *course = Course::new(course.options, features);
            course.follow(rows, |_, _| ());
            Ok(())
        })
    }

    /// Takes rows in; `at` is called with the course and its memory before or after each of them.
    fn follow(&self, x: &Tensor, at: impl FnMut(&Course<M>, &M)) -> Result<()> {
        // Outside of the lock: those who transform need not wait for it.
        let (features, options) = self.read(|course| (course.features.clone(), course.options));
        let rows = Rows::of(M::KIND, &features.of(M::KIND, x)?, M::nan(&options), x)?;
        self.write(|course| {
            course.features = course.features.of(M::KIND, x)?;
            course.follow(rows, at);
            Ok(())
        })
    }

    pub(super) fn partial_fit(&self, x: &Tensor) -> Result<()> {
        self.follow(x, |_, _| ())
    }

    pub(super) fn transform_series(&self, x: &Tensor) -> Result<(Tensor, SeriesStats)> {
        let mut maps = vec![];
        self.follow(x, |course, memory| maps.extend(course.maps(memory)))?;
        let stats = SeriesStats::new(M::KIND, x, maps)?;
        Ok((stats.transform(x)?, stats))
    }

    /// The map of now.
    fn affine(&self) -> Result<(Affine, Features)> {
        self.read(|course| {
            let memory = check::scaling::fitted(M::KIND, course.memory.as_ref())?;
            let mut maps = vec![];
            for (i, map) in course.maps(memory).into_iter().enumerate() {
                let label = course.features.label(i);
                maps.push(check::series::known(M::KIND, &label, map)?);
            }
            Ok((Affine { maps, clip: None }, course.features.clone()))
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
            let memory = check::scaling::fitted(M::KIND, course.memory.as_ref())?;
            let statistics = (0..course.seen.len()).map(|f| memory.statistics(&course.options, f));
            let known = |(m, var): (Moments, f64)| match m.count() > 0. {
                true => of(m, var),
                false => f64::NAN,
            };
            Ok(statistics.map(known).collect())
        })
    }

    pub(super) fn of_memory<T>(&self, of: impl FnOnce(&M) -> T) -> Result<T> {
        self.read(|course| check::scaling::fitted(M::KIND, course.memory.as_ref()).map(of))
    }

    pub(super) fn scale(&self) -> Result<Vec<f64>> {
        Ok(self.affine()?.0.maps.iter().map(|map| map.scale).collect())
    }

    pub(super) fn reset(&self) {
        self.write(|course| {
            *course = Course::new(course.options, course.features.without_axes());
        });
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
        self.write(|course| {
            restored.features = course.features.joined(M::KIND, &restored.features)?;
            *course = restored;
            Ok(())
        })
    }
}

/// What each row of a series was scaled by.
#[derive(Debug, Clone)]
pub struct SeriesStats {
    layer: &'static str,
    /// The rows as features of one sample.
    features: Features,
    affine: Affine,
    /// NaN where nothing was known of a feature, else 0; none where all was.
    unknown: Option<Vec<f64>>,
}

impl SeriesStats {
    fn new(layer: &'static str, x: &Tensor, maps: Vec<Option<Map>>) -> Result<Self> {
        let nothing = |map: &Option<Map>| if map.is_none() { f64::NAN } else { 0. };
        let unknown = maps.iter().any(Option::is_none);
        let unknown = unknown.then(|| maps.iter().map(nothing).collect());
        let neutral = Map {
            center: [0.; 2],
            scale: 1.,
            offset: 0.,
        };
        let maps = maps.into_iter().map(|m| m.unwrap_or(neutral)).collect();
        Ok(Self {
            layer,
            features: Features::default().of(layer, &x.unsqueeze(0)?)?,
            affine: Affine { maps, clip: None },
            unknown,
        })
    }

    /// What was subtracted: of one row after the other, each feature; NaN where nothing was known.
    pub fn mean(&self) -> Vec<f64> {
        self.each(|map| map.center[0])
    }

    /// What was divided by, in the same order.
    pub fn scale(&self) -> Vec<f64> {
        self.each(|map| map.scale)
    }

    fn each(&self, of: fn(&Map) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.affine.maps.iter().map(of).collect();
        for (value, nothing) in values.iter_mut().zip(self.unknown.iter().flatten()) {
            *value += nothing;
        }
        values
    }

    /// Other values of the same rows, each scaled as its row was: of the shape and dtype of `x`, on its device, and differentiable.
    ///
    /// # Errors
    /// Another shape than that of the series.
    pub fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.where_known(x)?.unsqueeze(0)?;
        let y = self.affine.transform(self.layer, &self.features, &x)?;
        y.squeeze(0)
    }

    /// Values in units of the scaled rows, such as forecasts made at each of them, back in their own units.
    ///
    /// # Errors
    /// Another shape than that of the series.
    pub fn inverse_transform(&self, y: &Tensor) -> Result<Tensor> {
        let y = self.where_known(y)?.unsqueeze(0)?;
        let x = self.affine.inverse(self.layer, &self.features, &y)?;
        x.squeeze(0)
    }

    /// `x`, and NaN where nothing is known.
    fn where_known(&self, x: &Tensor) -> Result<Tensor> {
        let axes = self.features.axes().unwrap_or_default();
        check::shape(self.layer, "values of the series", x, axes)?;
        check::float(self.layer, "values of the series", x)?;
        match &self.unknown {
            Some(unknown) => {
                let unknown = Tensor::from_slice(unknown, x.dims(), &Device::Cpu)?;
                x + unknown.to_dtype(x.dtype())?.to_device(x.device())?
            }
            None => Ok(x.clone()),
        }
    }
}

/// The public face of a scaler with a field `following`, of a memory.
macro_rules! scaler_of_series {
    ($name:ident, $options:ident) => {
        impl $name {
            /// A scaler without data.
            ///
            /// # Errors
            /// Options outside of their ranges.
            pub fn new(options: impl Into<$options>) -> candle_core::Result<Self> {
                let following = $crate::scaling::follow::Following::new(options.into())?;
                Ok(Self { following })
            }

            /// This scaler with a name for each feature, in the order of the trailing axes of data.
            ///
            /// # Errors
            /// Two equal names, or more or less names than features that it was fitted to.
            pub fn with_names<S: Into<String>>(
                self,
                names: impl IntoIterator<Item = S>,
            ) -> candle_core::Result<Self> {
                let names = names.into_iter().map(S::into).collect();
                let following = self.following.named(names)?;
                Ok(Self { following })
            }

            /// The scaler that `state` is of, which goes on as that would have, to the bit.
            ///
            /// # Errors
            /// A state of another kind or version, or one that is damaged.
            pub fn from_state(state: &$crate::scaling::State) -> candle_core::Result<Self> {
                let following = $crate::scaling::follow::Following::from_state(state)?;
                Ok(Self { following })
            }

            /// The options.
            pub fn options(&self) -> $options {
                self.following.options()
            }

            /// Takes in the rows of a series in their order, and scales each by what was seen up to it, or before it, as
            /// [`causal`]($options::causal) says. Also returns what each row was scaled by, which brings forecasts back.
            ///
            /// No row depends on a later one: rows that come in one call give what they give one by one. Where nothing is known of a feature yet,
            /// the result is NaN.
            ///
            /// # Shapes
            /// `x`: `[T, features...]`; the result has its shape and dtype, and is differentiable with the statistics held fixed.
            ///
            /// # Errors
            /// As [`partial_fit`]($crate::scaling::Scaler::partial_fit). Nothing is taken in then.
            pub fn transform_series(
                &self,
                x: &candle_core::Tensor,
            ) -> candle_core::Result<(candle_core::Tensor, $crate::scaling::SeriesStats)> {
                self.following.transform_series(x)
            }

            /// The mean of each feature now; NaN where nothing is known of it.
            ///
            /// # Errors
            /// No data yet.
            pub fn mean(&self) -> candle_core::Result<Vec<f64>> {
                self.following.each(|moments, _| moments.mean())
            }

            /// The variance of each feature now; NaN where there is none yet.
            ///
            /// # Errors
            /// No data yet.
            pub fn var(&self) -> candle_core::Result<Vec<f64>> {
                self.following.each(|_, var| var)
            }

            /// What each feature is divided by now: 1 where it does not vary, or has no variance yet.
            ///
            /// # Errors
            /// No data yet.
            pub fn scale(&self) -> candle_core::Result<Vec<f64>> {
                self.following.scale()
            }
        }

        impl $crate::scaling::Scaler for $name {
            fn kind(&self) -> &'static str {
                stringify!($name)
            }
            fn features(&self) -> $crate::scaling::Features {
                self.following.features()
            }
            fn seen(&self) -> Vec<$crate::scaling::Seen> {
                self.following.seen()
            }
            fn fit(&self, x: &candle_core::Tensor) -> candle_core::Result<()> {
                self.following.fit(x)
            }
            fn partial_fit(&self, x: &candle_core::Tensor) -> candle_core::Result<()> {
                self.following.partial_fit(x)
            }
            /// Always an error: rows of a series have an order, and two pasts have none.
            fn merge(&self, _: &dyn $crate::scaling::Scaler) -> candle_core::Result<()> {
                $crate::ops::check::scaling::unsupported(
                    self.kind(),
                    "data whose order does not matter to be merged",
                    "feed the rows of one series in their order by partial_fit",
                )
            }
            fn transform(
                &self,
                x: &candle_core::Tensor,
            ) -> candle_core::Result<candle_core::Tensor> {
                self.following.transform(x)
            }
            fn inverse_transform(
                &self,
                x: &candle_core::Tensor,
            ) -> candle_core::Result<candle_core::Tensor> {
                self.following.inverse_transform(x)
            }
            fn reset(&self) {
                self.following.reset()
            }
            fn state(&self) -> candle_core::Result<$crate::scaling::State> {
                self.following.state()
            }
            fn restore(&self, state: &$crate::scaling::State) -> candle_core::Result<()> {
                self.following.restore(state)
            }
        }
    };
}
pub(super) use scaler_of_series;
