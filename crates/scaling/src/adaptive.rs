//! A scaler that is fitted again when its data have changed.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor, bail};

use super::check;
use super::watch::Watch;
use super::{
    DriftEvent, DriftOptions, DriftReport, Features, Nan, ParseOptionError, Scaler, Seen, State,
    from_state,
};

const LAYER: &str = "AdaptiveScaler";
const VERSION: u32 = 1;

/// Data that an [`AdaptiveScaler`] is fitted to after an event.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OnDrift {
    /// The recent rows.
    Refit,
    /// Recent values of each feature, and values of what it was fitted to before: as many, evenly
    /// spaced, as leave the recent ones this share of all, between 0 and 1.
    Blend(f64),
}

impl fmt::Display for OnDrift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refit => f.write_str("refit"),
            Self::Blend(share) => write!(f, "blend {share}"),
        }
    }
}

impl FromStr for OnDrift {
    type Err = ParseOptionError;

    fn from_str(text: &str) -> std::result::Result<Self, ParseOptionError> {
        let blend = |share: &str| share.parse().ok().map(Self::Blend);
        match text {
            "refit" => Some(Self::Refit),
            _ => text.strip_prefix("blend ").and_then(blend),
        }
        .ok_or_else(|| ParseOptionError::new(text, "refit nor blend with a share"))
    }
}

/// A scaler and the monitor that watches its data: after an event the scaler is fitted anew, and
/// the monitor compares with what it was fitted to.
///
/// Rows go in by [`observe`](Self::observe), and are scaled by [`transform`](Scaler::transform):
/// first the one or first the other, as the rows should be scaled with or without themselves. The
/// scaler is replaced as a whole, so that other threads see the old or the new one.
///
/// The recent rows of an event are, in part, from before the change. Where that matters there is a
/// second event, once the rest of them differs from the mixture.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{AdaptiveScaler, DriftOptions, OnDrift, Scaler, StandardScaler};
///
/// let options = DriftOptions::default();
/// let scaler = AdaptiveScaler::new(StandardScaler::default(), options, OnDrift::Refit)?;
/// let season = |level: f64, rows: usize| {
///     let rows: Vec<_> = (0..rows).map(|i| level + (i as f64 * 2.4).sin()).collect();
///     Tensor::new(rows, &Device::Cpu)
/// };
/// scaler.fit(&season(0., 1000)?)?;
/// assert!(scaler.observe(&season(0., 400)?)?.is_empty());
/// // At the first event most of the recent rows are from before; the second settles it.
/// let events = scaler.observe(&season(9., 600)?)?;
/// assert_eq!((events[0].step, events[events.len() - 1].step), (410, 620));
/// let y = scaler.transform(&Tensor::new(&[9f64], &Device::Cpu)?)?;
/// assert!(y.to_vec1::<f64>()?[0].abs() < 0.1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct AdaptiveScaler {
    scaler: Box<dyn Scaler>,
    watch: Mutex<Watch>,
    on_drift: OnDrift,
}

impl AdaptiveScaler {
    /// The name of the type, which messages and files have.
    pub(super) const KIND: &'static str = LAYER;

    /// `scaler`, which is fitted again by `fit` or by events; what it was fitted to before is not
    /// known here.
    ///
    /// # Errors
    /// Options outside of their ranges; a scaler and a monitor that do not do the same with NaN.
    pub fn new(
        scaler: impl Scaler + 'static,
        options: DriftOptions,
        on_drift: OnDrift,
    ) -> Result<Self> {
        Self::of(Box::new(scaler), Watch::new(options)?, on_drift)
    }

    fn of(scaler: Box<dyn Scaler>, mut watch: Watch, on_drift: OnDrift) -> Result<Self> {
        if let OnDrift::Blend(share) = on_drift {
            let holds = share > 0. && share < 1.;
            check::option(
                LAYER,
                "the share of a blend",
                holds,
                "between 0 and 1",
                &share,
            )?;
        }
        same_nan(&scaler.nan(), &watch.options.nan)?;
        if let Some(names) = scaler.features().names() {
            watch.set_names(names.to_vec())?;
        }
        Ok(Self {
            scaler,
            watch: Mutex::new(watch),
            on_drift,
        })
    }

    /// The scaler that `state` is of, which goes on as that would have.
    ///
    /// # Errors
    /// A state of another kind or version, one that is damaged, or one around a scaler that is not
    /// of this crate.
    pub fn from_state(state: &State) -> Result<Self> {
        let (scaler, watch, on_drift) = parts(state)?;
        Self::of(from_state(&scaler)?, watch, on_drift)
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A [`snapshot`](Scaler::snapshot) of the scaler that it wraps: fitting that would say nothing
    /// to the monitor.
    pub fn scaler(&self) -> Box<dyn Scaler> {
        self.scaler.snapshot()
    }

    /// Reaction to an event.
    pub fn on_drift(&self) -> OnDrift {
        self.on_drift
    }

    /// All metrics of each feature, by the recent rows of now.
    ///
    /// # Errors
    /// A scaler without data, or a feature without recent values.
    pub fn report(&self) -> Result<Vec<DriftReport>> {
        self.lock().report()
    }

    /// Takes in rows `[N, features...]` in their order; where metrics cross their thresholds,
    /// returns the events and fits the scaler anew.
    ///
    /// Rows that come in one call give what they give one by one. A feature with fewer than two
    /// values since the last event, as that of a sensor that has gone silent, is fitted to what it
    /// was fitted to before, and the others to their recent values.
    ///
    /// # Errors
    /// - A scaler that was not fitted; rows as [`fit`](Scaler::fit) refuses them. Neither scaler
    ///   nor monitor has changed then.
    /// - After an event, recent rows that the scaler refuses to be fitted to. All rows count then,
    ///   scaler and reference stay as they were, and the next event tries again. The message has
    ///   the first event that it befell; the next call that succeeds returns all events of this one
    ///   before its own. A [`state`](Scaler::state) does not have them.
    pub fn observe(&self, x: &Tensor) -> Result<Vec<DriftEvent>> {
        self.observe_by(&mut self.lock(), x)
    }

    fn observe_by(&self, watch: &mut Watch, x: &Tensor) -> Result<Vec<DriftEvent>> {
        let (events, done) = self.take_in(watch, x)?;
        watch.untold.extend(events);
        done.map(|()| std::mem::take(&mut watch.untold))
    }

    /// Takes rows in; returns their events, and whether the scaler could be fitted to all that it
    /// should have been.
    fn take_in(&self, watch: &mut Watch, x: &Tensor) -> Result<(Vec<DriftEvent>, Result<()>)> {
        let rows = watch.rows(x)?;
        let (mut events, mut done, mut fitted) = (vec![], Ok(()), None);
        for row in rows.each() {
            let now = watch.row(row);
            if let Some(event) = now.first() {
                match self.answer(watch) {
                    Ok(rows) => fitted = Some(rows),
                    Err(error) => {
                        done = done.and(refitted(event, Err(error)));
                    }
                }
            }
            events.extend(now);
        }
        // Whoever transforms meanwhile sees the scaler before this call or after it, and none that
        // was fitted in between.
        if let Some(rows) = fitted {
            done = done.and(self.scaler.fit(&rows));
        }
        Ok((events, done))
    }

    /// Gives the monitor a new reference after an event, which it returns; changes nothing where
    /// the scaler cannot be fitted to it.
    fn answer(&self, watch: &mut Watch) -> Result<Tensor> {
        let values = watch.next_reference(|before, recent| match self.on_drift {
            OnDrift::Refit => recent.to_vec(),
            OnDrift::Blend(share) => blended(before, recent, share),
        });
        let reference = watch.referring(&watch.features, values)?;
        let rows = watch.tensor(&reference.values)?;
        self.scaler.snapshot().fit(&rows)?;
        watch.refer_to(reference);
        Ok(rows)
    }

    fn fit_by(&self, current: &mut Watch, x: &Tensor) -> Result<()> {
        let mut watch = Watch::new(current.options)?;
        watch.step = current.step;
        watch.features = current.features.without_axes();
        watch.fit_to(x, current.options.bins)?;
        self.scaler.fit(x)?;
        *current = watch;
        Ok(())
    }
}

/// Values of before and recent ones, the recent ones with this share of all.
fn blended(before: &[f64], recent: &[f64], share: f64) -> Vec<f64> {
    let wanted = recent.len() as f64 * (1. - share) / share;
    // Where there are too few values of before, all of them, and less of the recent ones.
    let (new, old) = match wanted <= before.len() as f64 {
        true => (recent.len(), wanted.round() as usize),
        false => {
            let new = (before.len() as f64 * share / (1. - share)).round().max(1.);
            (new as usize, before.len())
        }
    };
    let mut blended = evenly(before, old);
    blended.extend(evenly(recent, new.min(recent.len())));
    blended
}

/// `count` of `values`, evenly spaced, the last of them included.
fn evenly(values: &[f64], count: usize) -> Vec<f64> {
    let place = |i: usize| (i * values.len() / count).max(1) - 1;
    (1..=count).map(|i| values[place(i)]).collect()
}

super::scaler::files!(impl AdaptiveScaler);

impl Scaler for AdaptiveScaler {
    fn kind(&self) -> &'static str {
        LAYER
    }

    fn nan(&self) -> Nan {
        self.lock().options.nan
    }

    fn features(&self) -> Features {
        self.scaler.features()
    }

    fn seen(&self) -> Vec<Seen> {
        self.scaler.seen()
    }

    /// Fits the scaler to `x`, which becomes the reference of the monitor; forgets recent rows,
    /// cool-downs, and events that were not returned.
    ///
    /// # Errors
    /// As [`Scaler::fit`]; also fewer values of a feature than [`bins`](DriftOptions::bins), as
    /// [`DriftMonitor::fit`](super::DriftMonitor::fit).
    fn fit(&self, x: &Tensor) -> Result<()> {
        self.fit_by(&mut self.lock(), x)
    }

    /// Always an error: the monitor compares rows as they come.
    fn fit_weighted(&self, _: &Tensor, _: &Tensor) -> Result<()> {
        check::no_weights(LAYER, "leave out rows that should not count")
    }

    /// Always an error, as that of [`fit_weighted`](Scaler::fit_weighted).
    fn partial_fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        self.fit_weighted(x, sample_weight)
    }

    /// [`observe`](AdaptiveScaler::observe) without its events; before any data, `fit`. Rows change
    /// the scaler when there is an event, and not before.
    fn partial_fit(&self, x: &Tensor) -> Result<()> {
        let mut watch = self.lock();
        match watch.reference.is_some() {
            true => self.take_in(&mut watch, x)?.1,
            false => self.fit_by(&mut watch, x),
        }
    }

    /// Always an error: the rows that one of two scalers was fitted to are no reference for the
    /// other.
    fn merge(&self, _: &dyn Scaler) -> Result<()> {
        check::unsupported(
            LAYER,
            "data whose order does not matter to be merged",
            "merge scalers first, and wrap the result",
        )
    }

    fn transform(&self, x: &Tensor) -> Result<Tensor> {
        self.scaler.transform(x)
    }

    fn inverse_transform(&self, x: &Tensor) -> Result<Tensor> {
        self.scaler.inverse_transform(x)
    }

    fn reset(&self) {
        let mut current = self.lock();
        current.reset();
        self.scaler.reset();
    }

    fn snapshot(&self) -> Box<dyn Scaler> {
        let watch = self.lock();
        Box::new(Self {
            scaler: self.scaler.snapshot(),
            watch: Mutex::new(watch.clone()),
            on_drift: self.on_drift,
        })
    }

    fn state(&self) -> Result<State> {
        let watch = self.lock();
        let mut state = State::new(LAYER, VERSION)
            .with_features(self.features(), self.seen())
            .with_option("on_drift", self.on_drift);
        for (part, inner) in [
            ("scaler", self.scaler.state()?),
            ("monitor", watch.state()?),
        ] {
            state = state.with_option(part, inner.metadata());
            for (name, tensor) in inner.tensors() {
                state = state.with_tensor(&format!("{part}.{name}"), tensor.clone());
            }
        }
        Ok(state)
    }

    fn restore(&self, state: &State) -> Result<()> {
        let (scaler, watch, on_drift) = parts(state)?;
        same_reaction(&self.on_drift, &on_drift)?;
        let mut current = self.lock();
        let rehearsal = self.scaler.snapshot();
        rehearsal.restore(&scaler)?;
        same_nan(&rehearsal.nan(), &watch.options.nan)?;
        self.scaler.restore(&scaler)?;
        *current = watch;
        Ok(())
    }
}

/// Content of a state.
fn parts(state: &State) -> Result<(State, Watch, OnDrift)> {
    state.require(LAYER, VERSION)?;
    let part = |part: &str| -> Result<State> {
        let metadata: String = state.option(part)?;
        let start = format!("{part}.");
        let named = state.tensors().iter().filter_map(|(name, tensor)| {
            let name = name.strip_prefix(&start)?;
            Some((name.to_string(), tensor.clone()))
        });
        State::from_metadata(&metadata, named.collect::<BTreeMap<_, _>>())
    };
    let (scaler, watch) = (part("scaler")?, Watch::restored(&part("monitor")?)?);
    scaler.features().joined(LAYER, &watch.features)?;
    if watch.reference.is_some() {
        let counts = Some(scaler.counts()?).filter(|seen| !seen.is_empty());
        check::present(
            LAYER,
            "data of the scaler, of which the monitor has some",
            counts,
        )?;
    }
    Ok((scaler, watch, state.option("on_drift")?))
}

/// Two parts of one scaler that do the same with NaN.
fn same_nan(scaler: &dyn Display, monitor: &dyn Display) -> Result<()> {
    let (scaler, monitor) = (scaler.to_string(), monitor.to_string());
    if scaler != monitor {
        bail!(
            "{LAYER}: expected the same nan for the scaler and the monitor, got {scaler} and \
            {monitor}; set one in the options of the other"
        )
    }
    Ok(())
}

/// A scaler that could be fitted again after an event.
fn refitted<E: Display>(event: &dyn Display, fitted: std::result::Result<(), E>) -> Result<()> {
    match fitted {
        Ok(()) => Ok(()),
        Err(e) => bail!(
            "{LAYER}: expected rows that the scaler can be fitted to after {event}, got: {e}. The \
            rows count; the scaler stays as it was until the next event"
        ),
    }
}

/// A saved scaler that does the same after an event.
fn same_reaction(expected: &dyn Display, got: &dyn Display) -> Result<()> {
    let (expected, got) = (expected.to_string(), got.to_string());
    if expected != got {
        bail!(
            "{LAYER}: expected the state of a scaler that answers drift by {expected}, got {got}; \
            use from_state"
        )
    }
    Ok(())
}
