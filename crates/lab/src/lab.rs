//! Parts of all experiments: seeds, the search for a learning rate, two threads, a progress bar,
//! and measurements as values.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use candle_core::{Result, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};

/// Learning rates are chosen on seeds from this one on, which no result is measured on.
const TUNING_SEED: u64 = 1000;
/// How much further the search for a rate goes at once where the best one is the last of the list,
/// and how often.
const FURTHER: f64 = 3.;
const EXTENSIONS: usize = 2;

/// The same data twice: what is measured, and a part of what it trains on, cut in two again. Rates
/// are chosen on the latter, so that nothing which a result is measured on has a say in them.
pub(crate) struct Sets<D> {
    pub(crate) tuning: D,
    pub(crate) measured: D,
}

impl<D> Sets<D> {
    pub(crate) fn map<E>(&self, f: impl Fn(&D) -> Result<E>) -> Result<Sets<E>> {
        Ok(Sets {
            tuning: f(&self.tuning)?,
            measured: f(&self.measured)?,
        })
    }
}

/// The same quantity of the same variant at the same place, once for each seed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measure {
    pub(crate) metric: String,
    pub(crate) variant: String,
    /// Where on the axis that is varied; 0 where there is none.
    pub(crate) x: f64,
    /// Infinite where it was never reached.
    pub(crate) values: Vec<f64>,
    /// The learning rate that was chosen, if any was.
    pub(crate) rate: Option<f64>,
}

/// One value of a run: the name of the quantity, the place on the axis that is varied, the value.
pub(crate) type Reading = (&'static str, f64, f64);

/// Results of one run.
pub(crate) struct Trial {
    /// Score by which learning rates are compared: the lower, the better.
    pub(crate) score: f64,
    pub(crate) readings: Vec<Reading>,
}

impl Trial {
    pub(crate) fn new(score: f64, readings: Vec<Reading>) -> Self {
        Self { score, readings }
    }
}

/// Where experiments are run.
pub(crate) struct Lab {
    pub(crate) quick: bool,
    pub(crate) bar: ProgressBar,
    workers: usize,
}

impl Lab {
    pub(crate) fn new(quick: bool, bar: ProgressBar) -> Self {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        Self {
            quick,
            bar,
            workers: cores.min(2),
        }
    }

    /// The seeds that results are measured on.
    pub(crate) fn seeds(&self) -> u64 {
        if self.quick { 2 } else { 5 }
    }

    /// Of `full` steps those that are taken.
    pub(crate) fn steps(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(10) } else { full }
    }

    fn rates(&self, rates: &[f64]) -> Vec<f64> {
        let stride = if self.quick { 2 } else { 1 };
        rates.iter().rev().step_by(stride).rev().copied().collect()
    }

    /// Results of `job` in the order of their numbers, whichever thread was first.
    fn parallel<T: Send>(
        &self,
        count: usize,
        job: impl Fn(usize) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::with_capacity(count));
        thread::scope(|scope| {
            for _ in 0..self.workers.min(count) {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            break;
                        }
                        let result = job(number);
                        self.bar.inc(1);
                        done.lock().expect("no job panicked").push((number, result));
                    }
                });
            }
        });
        let mut done = done.into_inner().expect("no job panicked");
        done.sort_by_key(|(number, _)| *number);
        done.into_iter().map(|(_, result)| result).collect()
    }

    /// The seeds that a rate is chosen on.
    pub(crate) fn tuning_seeds(&self) -> u64 {
        if self.quick { 1 } else { 3 }
    }

    /// The median score of `rate` over the tuning seeds.
    fn scores<D: Sync>(
        &self,
        rates: &[f64],
        data: &D,
        run: &(impl Fn(&D, f64, u64) -> Result<Trial> + Sync),
    ) -> Result<Vec<f64>> {
        let seeds = self.tuning_seeds() as usize;
        let scores = self.parallel(rates.len() * seeds, |i| {
            Ok(run(data, rates[i / seeds], TUNING_SEED + (i % seeds) as u64)?.score)
        })?;
        Ok(scores.chunks(seeds).map(median).collect())
    }

    /// `run` for every seed, at the one of `rates`, which grow, whose runs on the tuning seeds have
    /// the lowest score. Where that is the first or the last and the score still falls, the search
    /// goes on beyond it.
    pub(crate) fn tuned<D: Sync>(
        &self,
        variant: &str,
        rates: &[f64],
        sets: &Sets<D>,
        run: impl Fn(&D, f64, u64) -> Result<Trial> + Sync,
    ) -> Result<Vec<Measure>> {
        let mut rates = self.rates(rates);
        let mut scores = self.scores(&rates, &sets.tuning, &run)?;
        let mut best = lowest(&scores);
        for _ in 0..EXTENSIONS {
            let last = scores.len() - 1;
            let next = match best {
                0 if last > 0 && scores[0] < scores[1] => rates[0] / FURTHER,
                i if i == last && last > 0 && scores[last] < scores[last - 1] => {
                    rates[last] * FURTHER
                }
                _ => break,
            };
            self.bar.inc_length(self.tuning_seeds());
            let score = self.scores(&[next], &sets.tuning, &run)?[0];
            let at = if next < rates[0] { 0 } else { rates.len() };
            rates.insert(at, next);
            scores.insert(at, score);
            best = lowest(&scores);
        }
        let rate = rates[best];
        let trials = self.parallel(self.seeds() as usize, |seed| {
            run(&sets.measured, rate, seed as u64)
        })?;
        gather(variant, Some(rate), trials)
    }

    /// `run` for every seed.
    pub(crate) fn seeded(
        &self,
        variant: &str,
        run: impl Fn(u64) -> Result<Vec<Reading>> + Sync,
    ) -> Result<Vec<Measure>> {
        let trials = self.parallel(self.seeds() as usize, |seed| {
            Ok(Trial::new(0., run(seed as u64)?))
        })?;
        gather(variant, None, trials)
    }

    /// `run` for every seed, one after the other with the machine to itself, for experiments that
    /// measure time.
    pub(crate) fn timed(
        &self,
        run: impl Fn(u64) -> Result<Vec<(String, Reading)>>,
    ) -> Result<Vec<Measure>> {
        let mut measures: Vec<Measure> = vec![];
        for seed in 0..self.seeds() {
            for (variant, (metric, x, value)) in run(seed)? {
                let mine =
                    |m: &&mut Measure| m.variant == variant && m.metric == metric && m.x == x;
                match measures.iter_mut().find(mine) {
                    Some(measure) => measure.values.push(value),
                    None => measures.push(Measure {
                        metric: metric.to_string(),
                        variant,
                        x,
                        values: vec![value],
                        rate: None,
                    }),
                }
            }
            self.bar.inc(1);
        }
        Ok(measures)
    }
}

fn gather(variant: &str, rate: Option<f64>, trials: Vec<Trial>) -> Result<Vec<Measure>> {
    let Some(first) = trials.first() else {
        bail!("{variant}: no trials")
    };
    let measure = |i: usize| Measure {
        metric: first.readings[i].0.to_string(),
        variant: variant.to_string(),
        x: first.readings[i].1,
        values: trials.iter().map(|trial| trial.readings[i].2).collect(),
        rate,
    };
    Ok((0..first.readings.len()).map(measure).collect())
}

/// The first of the lowest.
fn lowest(scores: &[f64]) -> usize {
    let mut best = 0;
    for i in 1..scores.len() {
        if scores[i] < scores[best] {
            best = i;
        }
    }
    best
}

/// The middle one, where NaN, a run that failed, counts as the largest.
pub(crate) fn median(values: &[f64]) -> f64 {
    let or_infinite = |v: &f64| if v.is_nan() { f64::INFINITY } else { *v };
    let mut sorted: Vec<f64> = values.iter().map(or_infinite).collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    if low == high { low } else { (low + high) / 2. }
}

impl Measure {
    pub(crate) fn median(&self) -> f64 {
        median(&self.values)
    }

    pub(crate) fn low(&self) -> f64 {
        self.values.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn high(&self) -> f64 {
        let or_infinite = |v: f64| if v.is_nan() { f64::INFINITY } else { v };
        self.values
            .iter()
            .map(|v| or_infinite(*v))
            .fold(f64::NEG_INFINITY, f64::max)
    }

    pub(crate) fn to_json(&self) -> Value {
        // JSON knows no infinity.
        let number = |v: &f64| {
            if v.is_finite() {
                json!(v)
            } else {
                json!(v.to_string())
            }
        };
        json!({
            "metric": self.metric, "variant": self.variant, "x": self.x, "rate": self.rate,
            "values": self.values.iter().map(number).collect::<Vec<_>>(),
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let number = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok());
        Some(Self {
            metric: value["metric"].as_str()?.to_string(),
            variant: value["variant"].as_str()?.to_string(),
            x: value["x"].as_f64()?,
            values: value["values"]
                .as_array()?
                .iter()
                .map(number)
                .collect::<Option<_>>()?,
            rate: value["rate"].as_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> Lab {
        Lab::new(false, ProgressBar::hidden())
    }

    #[test]
    fn a_variant_is_run_at_the_rate_that_the_tuning_seeds_prefer() -> Result<()> {
        let sets = Sets {
            tuning: "tuning",
            measured: "measured",
        };
        let run = |set: &&str, rate: f64, seed| {
            // On the tuning seeds 0.1 is the best but for one of them, on the others it is not.
            let score = match (*set, seed) {
                ("tuning", TUNING_SEED) => rate,
                ("tuning", s) if s > TUNING_SEED => (rate - 0.1).abs(),
                ("measured", s) if s < TUNING_SEED => -rate,
                _ => bail!("{set} with the seed {seed}"),
            };
            let score = if rate > 0.5 { f64::NAN } else { score };
            Ok(Trial::new(
                score,
                vec![("a", 0., rate), ("b", 3., seed as f64)],
            ))
        };
        let measures = lab().tuned("variant", &[0.01, 0.1, 0.3, 1.], &sets, run)?;
        assert_eq!(measures[0].rate, Some(0.1));
        assert_eq!(measures[0].values, [0.1; 5]);
        assert_eq!(
            (measures[1].x, &measures[1].values[..]),
            (3., &[0., 1., 2., 3., 4.][..])
        );
        Ok(())
    }

    #[test]
    fn the_search_goes_on_beyond_an_end_that_is_the_best() -> Result<()> {
        let sets = Sets {
            tuning: (),
            measured: (),
        };
        let found = |optimum: f64| {
            let run = |_: &(), rate: f64, _| {
                Ok(Trial::new(
                    (rate / optimum).ln().abs(),
                    vec![("a", 0., rate)],
                ))
            };
            Ok::<_, candle_core::Error>(lab().tuned("variant", &[1., 3., 9.], &sets, run)?[0].rate)
        };
        assert_eq!(found(3.)?, Some(3.));
        assert_eq!(found(27.)?, Some(27.));
        assert_eq!(found(1e6)?, Some(81.));
        assert_eq!(found(1. / 3.)?, Some(1. / 3.));
        // Where all are alike there is nowhere to go.
        let run = |_: &(), rate: f64, _| Ok(Trial::new(1., vec![("a", 0., rate)]));
        assert_eq!(
            lab().tuned("variant", &[1., 3., 9.], &sets, run)?[0].rate,
            Some(1.)
        );
        Ok(())
    }

    #[test]
    fn an_error_of_one_run_is_that_of_the_variant() {
        let run = |seed| match seed {
            3 => bail!("no more"),
            _ => Ok(vec![("a", 0., 1.)]),
        };
        assert!(lab().seeded("variant", run).is_err());
    }

    #[test]
    fn what_was_never_reached_survives_the_cache_and_counts_as_the_largest() {
        let measure = Measure {
            metric: "steps".to_string(),
            variant: "none".to_string(),
            x: 2.,
            values: vec![10., f64::INFINITY, f64::NAN, 30., 20.],
            rate: None,
        };
        let back = Measure::from_json(&measure.to_json()).expect("what was written");
        assert_eq!(
            (back.median(), back.low(), back.high()),
            (30., 10., f64::INFINITY)
        );
        assert_eq!(format!("{back:?}"), format!("{measure:?}"));
    }
}
