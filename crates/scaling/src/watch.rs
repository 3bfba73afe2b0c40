//! The reference and the recent rows that a drift monitor compares.

use std::collections::VecDeque;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::drift::{DriftEvent, DriftMetric, DriftOptions, DriftReport};
use super::reference::{Column, LEAST_VALUES, Reference, aligned, ascending};
use super::rows::SeriesRows;
use super::state::MOST_VALUES;
use super::{Features, Seen, State, check};

pub(super) const LAYER: &str = "DriftMonitor";

const VERSION: u32 = 1;

/// More bins than samples fill.
const MOST_BINS: usize = 10_000;

/// A mean or a variance that differs by fewer standard errors than this may do so by chance.
const STANDARD_ERRORS: f64 = 5.;

/// A monitor at one moment.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub(super) options: DriftOptions,
    pub(super) features: Features,
    pub(super) reference: Option<Arc<Reference>>,
    /// Last values of each feature. What is missing takes no place, so that a feature with gaps
    /// has as many as one without.
    recent: Vec<VecDeque<f64>>,
    /// For each feature, whether a value came since it was last looked at: the same values are not
    /// told twice.
    fresh: Vec<bool>,
    pub(super) step: u64,
    /// Step of each feature up to which there is no event.
    quiet: Vec<u64>,
    /// Events of calls that returned an error in their place.
    pub(super) untold: Vec<DriftEvent>,
}

impl Watch {
    pub(super) fn new(options: DriftOptions) -> Result<Self> {
        let holds = (2..=MOST_BINS).contains(&options.bins);
        let expected = format!("between 2 and {MOST_BINS}");
        check::option(LAYER, "bins", holds, &expected, &options.bins)?;
        for (name, value, least) in [
            ("window", options.window, 2),
            ("min_count", options.min_count, 2),
            ("check_every", options.check_every, 1),
        ] {
            let expected = format!("of at least {least}");
            check::option(LAYER, name, value >= least, &expected, &value)?;
        }
        let holds = options.min_count <= options.window;
        let got = options.min_count;
        check::option(LAYER, "min_count", holds, "of at most the window", &got)?;
        for (name, threshold, least) in [
            ("mean_shift", options.mean_shift, 0.),
            ("variance_ratio", options.variance_ratio, 1.),
            ("population_stability", options.population_stability, 0.),
            ("ks_p_value", options.ks_p_value, 0.),
        ] {
            let threshold = threshold.unwrap_or(least + 1.);
            let expected = format!("above {least}");
            check::option(LAYER, name, threshold > least, &expected, &threshold)?;
        }
        Ok(Self {
            options,
            features: Features::default(),
            reference: None,
            recent: vec![],
            fresh: vec![],
            step: 0,
            quiet: vec![],
            untold: vec![],
        })
    }

    /// Forgets all but options and names.
    pub(super) fn reset(&mut self) {
        self.features = self.features.without_axes();
        self.reference = None;
        self.forget_recent();
        self.quiet.clear();
        self.untold.clear();
        self.step = 0;
    }

    /// Forgets the recent values.
    fn forget_recent(&mut self) {
        let features = self.reference.as_ref().map_or(0, |r| r.columns.len());
        self.recent = vec![VecDeque::new(); features];
        self.fresh = vec![false; features];
    }

    pub(super) fn set_names(&mut self, names: Vec<String>) -> Result<()> {
        let features = Features::named(LAYER, names)?;
        self.features = self.features.joined(LAYER, &features)?;
        Ok(())
    }

    /// The values of `x` as rows of this watch.
    pub(super) fn rows(&self, x: &Tensor) -> Result<SeriesRows> {
        check::fitted(LAYER, self.reference.as_ref())?;
        let rows = SeriesRows::of(LAYER, &self.features.of(LAYER, x)?, self.options.nan, x)?;
        let steps = self.step.saturating_add(x.dims()[0] as u64);
        check::countable(LAYER, "rows", &"all features", steps, MOST_VALUES)?;
        Ok(rows)
    }

    /// Takes `x` as the reference, which has `least` values of each feature at least.
    pub(super) fn fit_to(&mut self, x: &Tensor, least: usize) -> Result<()> {
        let features = self.features.without_axes().of(LAYER, x)?;
        let rows = SeriesRows::of(LAYER, &features, self.options.nan, x)?;
        for (feature, seen) in rows.seen.iter().enumerate() {
            let (label, values) = (features.label(feature), seen.values as usize);
            enough_values(&label, values, least.min(LEAST_VALUES))?;
            enough_values(&label, values, least)?;
        }
        self.fit(x)
    }

    pub(super) fn fit(&mut self, x: &Tensor) -> Result<()> {
        let features = self.features.without_axes().of(LAYER, x)?;
        let rows = SeriesRows::of(LAYER, &features, self.options.nan, x)?;
        let reference = self.referring(&features, rows.values)?;
        self.features = features;
        self.quiet = vec![0; reference.columns.len()];
        self.reference = Some(Arc::new(reference));
        self.forget_recent();
        Ok(())
    }

    pub(super) fn referring(&self, features: &Features, values: Vec<f64>) -> Result<Reference> {
        let (count, bins) = (features.count(), self.options.bins);
        let rows = values.len() as u64 / count.max(1) as u64;
        let mut columns = Vec::with_capacity(count);
        let mut seen = Vec::with_capacity(count);
        for feature in 0..count {
            let numbers = ascending(&values, feature, count);
            let label = features.label(feature);
            enough_values(&label, numbers.len(), LEAST_VALUES)?;
            seen.push(Seen {
                values: numbers.len() as u64,
                nan: rows - numbers.len() as u64,
            });
            columns.push(Column::new(numbers, bins));
        }
        Ok(Reference {
            values,
            columns,
            seen,
        })
    }

    /// Takes a reference, instead of the one that there was, from now on. A feature whose values it
    /// kept goes on as it was.
    pub(super) fn refer_to(&mut self, reference: Reference) {
        self.reference = Some(Arc::new(reference));
        let quiet = self.step.saturating_add(self.options.cool_down as u64);
        for feature in 0..self.recent.len() {
            if self.has_new(feature) {
                self.recent[feature].clear();
                self.fresh[feature] = false;
                self.quiet[feature] = quiet;
            }
        }
    }

    /// Whether a feature has recent values enough for a reference of its own.
    fn has_new(&self, feature: usize) -> bool {
        self.recent[feature].len() >= LEAST_VALUES
    }

    /// Rows that could be the next reference: of each feature what `choose` takes of the values of
    /// the reference and the recent ones. A feature without new values, whose sensor is silent,
    /// keeps those of the reference, so that the others need not wait for it.
    pub(super) fn next_reference(&self, choose: impl Fn(&[f64], &[f64]) -> Vec<f64>) -> Vec<f64> {
        let features = self.recent.len();
        let reference = self.reference.as_ref().map_or(&[][..], |r| &r.values);
        let column = |feature: usize| {
            let column = reference.iter().skip(feature).step_by(features);
            let before: Vec<f64> = column.copied().filter(|v| !v.is_nan()).collect();
            match self.has_new(feature) {
                true => choose(&before, &self.recent_values(feature)),
                false => before,
            }
        };
        aligned(&(0..features).map(column).collect::<Vec<_>>())
    }

    fn recent_values(&self, feature: usize) -> Vec<f64> {
        self.recent[feature].iter().copied().collect()
    }

    /// The recent values as rows.
    fn recent(&self) -> Vec<f64> {
        let features = 0..self.recent.len();
        aligned(&features.map(|f| self.recent_values(f)).collect::<Vec<_>>())
    }

    /// The recent values of a feature, ascending.
    fn recent_of(&self, feature: usize) -> Vec<f64> {
        let mut values = self.recent_values(feature);
        values.sort_by(f64::total_cmp);
        values
    }

    /// Takes one row in, and says what crossed its threshold.
    pub(super) fn row(&mut self, row: &[f64]) -> Vec<DriftEvent> {
        self.step = self.step.saturating_add(1);
        self.push(row);
        let due = self.step.is_multiple_of(self.options.check_every as u64);
        match &self.reference {
            Some(reference) if due => self.events(&reference.clone()),
            _ => vec![],
        }
    }

    /// Appends the values of a row to those of their features.
    fn push(&mut self, row: &[f64]) {
        for (feature, value) in row.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
            let recent = &mut self.recent[feature];
            if recent.len() >= self.options.window {
                recent.pop_front();
            }
            recent.push_back(*value);
            self.fresh[feature] = true;
        }
    }

    fn events(&mut self, reference: &Reference) -> Vec<DriftEvent> {
        let mut events = vec![];
        for (feature, column) in reference.columns.iter().enumerate() {
            let enough = self.recent[feature].len() >= self.options.min_count;
            if self.step <= self.quiet[feature] || !enough || !self.fresh[feature] {
                continue;
            }
            self.fresh[feature] = false;
            let numbers = self.recent_of(feature);
            let name = self.features.label(feature).to_string();
            let report = column.compare(&numbers, feature, name);
            let crossed = self.crossed(&report);
            if !crossed.is_empty() {
                self.quiet[feature] = self.step.saturating_add(self.options.cool_down as u64);
                events.extend(crossed);
            }
        }
        events
    }

    fn crossed(&self, report: &DriftReport) -> Vec<DriftEvent> {
        let options = &self.options;
        let ratio = report.variance_ratio;
        let metrics = [
            (
                DriftMetric::MeanShift,
                options.mean_shift,
                report.mean_shift,
                report.mean_shift.abs(),
            ),
            (
                DriftMetric::VarianceRatio,
                options.variance_ratio,
                ratio,
                ratio.max(ratio.recip()),
            ),
            (
                DriftMetric::PopulationStability,
                options.population_stability,
                report.population_stability,
                report.population_stability,
            ),
            // The smaller, the farther apart.
            (
                DriftMetric::KolmogorovSmirnov,
                options.ks_p_value,
                report.ks_p_value,
                report.ks_p_value,
            ),
        ];
        let by_chance = |errors: f64| errors.abs() <= STANDARD_ERRORS;
        let crosses = |metric, threshold: f64, size: f64| match metric {
            DriftMetric::KolmogorovSmirnov => size < threshold,
            DriftMetric::MeanShift => size > threshold && !by_chance(report.mean_z),
            DriftMetric::VarianceRatio => size > threshold && !by_chance(report.variance_z),
            DriftMetric::PopulationStability => size > threshold,
        };
        (metrics.into_iter())
            .filter_map(|(metric, threshold, value, size)| {
                let threshold = threshold.filter(|t| crosses(metric, *t, size))?;
                Some(DriftEvent {
                    step: self.step,
                    feature: report.feature,
                    name: report.name.clone(),
                    metric,
                    value,
                    threshold,
                })
            })
            .collect()
    }

    pub(super) fn report(&self) -> Result<Vec<DriftReport>> {
        let reference = check::fitted(LAYER, self.reference.as_ref())?;
        let mut reports = vec![];
        for (feature, column) in reference.columns.iter().enumerate() {
            let numbers = self.recent_of(feature);
            let label = self.features.label(feature);
            recent_values(&label, numbers.len())?;
            reports.push(column.compare(&numbers, feature, label.to_string()));
        }
        Ok(reports)
    }

    /// Rows as a tensor `[N, features...]`.
    pub(super) fn tensor(&self, values: &[f64]) -> Result<Tensor> {
        let axes = self.features.axes().unwrap_or_default();
        let rows = values.len() / self.features.count().max(1);
        Tensor::from_slice(values, [&[rows], axes].concat(), &Device::Cpu)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.reference.as_ref().map_or(vec![], |r| r.seen.clone())
    }

    pub(super) fn state(&self) -> Result<State> {
        let DriftOptions {
            window,
            min_count,
            check_every,
            cool_down,
            bins,
            mean_shift,
            variance_ratio,
            population_stability,
            ks_p_value,
            nan,
        } = self.options;
        // A threshold that no number crosses is none.
        let threshold = |t: Option<f64>| t.unwrap_or(f64::NAN);
        let mut state = State::new(LAYER, VERSION)
            .with_features(self.features.clone(), self.seen())
            .with_option("window", window)
            .with_option("min_count", min_count)
            .with_option("check_every", check_every)
            .with_option("cool_down", cool_down)
            .with_option("bins", bins)
            .with_option("mean_shift", threshold(mean_shift))
            .with_option("variance_ratio", threshold(variance_ratio))
            .with_option("population_stability", threshold(population_stability))
            .with_option("ks_p_value", threshold(ks_p_value))
            .with_option("nan", nan)
            .with_option("step", self.step);
        if let Some(reference) = &self.reference {
            let quiet: Vec<_> = self.quiet.iter().map(u64::to_string).collect();
            let fresh: Vec<_> = self.fresh.iter().map(bool::to_string).collect();
            state = state
                .with_option("quiet", quiet.join(" "))
                .with_option("fresh", fresh.join(" "))
                .with_tensor("reference", self.tensor(&reference.values)?)
                .with_tensor("recent", self.tensor(&self.recent())?);
        }
        Ok(state)
    }

    pub(super) fn restored(state: &State) -> Result<Self> {
        state.require(LAYER, VERSION)?;
        let threshold = |name| -> Result<Option<f64>> {
            let value: f64 = state.option(name)?;
            Ok((!value.is_nan()).then_some(value))
        };
        let mut watch = Self::new(DriftOptions {
            window: state.option("window")?,
            min_count: state.option("min_count")?,
            check_every: state.option("check_every")?,
            cool_down: state.option("cool_down")?,
            bins: state.option("bins")?,
            mean_shift: threshold("mean_shift")?,
            variance_ratio: threshold("variance_ratio")?,
            population_stability: threshold("population_stability")?,
            ks_p_value: threshold("ks_p_value")?,
            nan: state.option("nan")?,
        })?;
        watch.features = state.features().clone();
        watch.step = state.option("step")?;
        check::saved_value(
            LAYER,
            "step",
            &"all features",
            watch.step as f64,
            watch.step <= MOST_VALUES,
        )?;
        if state.counts()?.is_empty() {
            return Ok(watch);
        }
        let (reference, recent) = (state.tensor("reference")?, state.tensor("recent")?);
        state.features().of(LAYER, reference)?;
        watch.fit(reference)?;
        for (i, (saved, seen)) in state.seen().iter().zip(watch.seen()).enumerate() {
            let (label, holds) = (watch.features.label(i), *saved == seen);
            check::saved_value(LAYER, "count", &label, saved.values as f64, holds)?;
        }
        if recent.elem_count() > 0 {
            let features = watch.features.of(LAYER, recent)?;
            let rows = SeriesRows::of(LAYER, &features, watch.options.nan, recent)?;
            let most = watch.options.window.min(recent.dims()[0]);
            check::saved_length(LAYER, "recent", most, recent.dims()[0])?;
            rows.each().for_each(|row| watch.push(row));
        }
        let features = watch.quiet.len();
        watch.quiet = each(state, "quiet", features)?;
        watch.fresh = each(state, "fresh", features)?;
        let last = (watch.step).saturating_add(watch.options.cool_down as u64);
        for (i, quiet) in watch.quiet.iter().enumerate() {
            let (label, holds) = (watch.features.label(i), *quiet <= last);
            check::saved_value(LAYER, "quiet", &label, *quiet as f64, holds)?;
        }
        Ok(watch)
    }
}

/// An option that has a value for each feature.
fn each<T: FromStr<Err: Display>>(state: &State, name: &str, features: usize) -> Result<Vec<T>> {
    let text: String = state.option(name)?;
    let values: std::result::Result<Vec<T>, _> = text.split(' ').map(str::parse).collect();
    let values = check::well_formed(LAYER, name, values)?;
    check::saved_length(LAYER, name, features, values.len())?;
    Ok(values)
}

/// A reference that something can be compared with.
fn enough_values(feature: &dyn Display, values: usize, least: usize) -> Result<()> {
    if values < least {
        bail!(
            "{LAYER}: expected a reference of at least {least} values of {feature}, got {values}; \
            fit it to more rows"
        )
    }
    Ok(())
}

fn recent_values(feature: &dyn Display, values: usize) -> Result<()> {
    if values == 0 {
        bail!("{LAYER}: expected recent values of {feature}, got none; observe some rows first")
    }
    Ok(())
}
