//! What all experiments share: seeds, the search for a learning rate, two threads, a bar, and measurements as values.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use candle_core::{Result, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};

/// Learning rates are chosen on this seed alone, which no result is measured on.
const TUNING_SEED: u64 = 1000;

/// The same quantity of the same arm at the same place, once for each seed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measure {
    pub(crate) metric: String,
    pub(crate) arm: String,
    /// Where on the axis that is varied; 0 where there is none.
    pub(crate) x: f64,
    /// Infinite where it was never reached.
    pub(crate) values: Vec<f64>,
    /// The learning rate that was chosen, if any was.
    pub(crate) rate: Option<f64>,
}

/// One value of a run: the name of the quantity, the place on the axis that is varied, the value.
pub(crate) type Reading = (&'static str, f64, f64);

/// What one run gave.
pub(crate) struct Trial {
    /// What learning rates are compared by: the lower, the better.
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
        if self.quick { full.div_ceil(5) } else { full }
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

    /// `run` for every seed, at the one of `rates` whose run on the tuning seed has the lowest score.
    pub(crate) fn tuned(
        &self,
        arm: &str,
        rates: &[f64],
        run: impl Fn(f64, u64) -> Result<Trial> + Sync,
    ) -> Result<Vec<Measure>> {
        let rates = self.rates(rates);
        let scores = self.parallel(rates.len(), |i| Ok(run(rates[i], TUNING_SEED)?.score))?;
        let worst_last = |score: f64| if score.is_nan() { f64::INFINITY } else { score };
        let mut best = 0;
        for i in 1..rates.len() {
            if worst_last(scores[i]) < worst_last(scores[best]) {
                best = i;
            }
        }
        let rate = rates[best];
        let trials = self.parallel(self.seeds() as usize, |seed| run(rate, seed as u64))?;
        gather(arm, Some(rate), trials)
    }

    /// `run` for every seed.
    pub(crate) fn seeded(
        &self,
        arm: &str,
        run: impl Fn(u64) -> Result<Vec<Reading>> + Sync,
    ) -> Result<Vec<Measure>> {
        let trials = self.parallel(self.seeds() as usize, |seed| {
            Ok(Trial::new(0., run(seed as u64)?))
        })?;
        gather(arm, None, trials)
    }

    /// `run` for every seed, one after the other with the machine to itself, for experiments that measure time.
    pub(crate) fn timed(
        &self,
        run: impl Fn(u64) -> Result<Vec<(String, Reading)>>,
    ) -> Result<Vec<Measure>> {
        let mut measures: Vec<Measure> = vec![];
        for seed in 0..self.seeds() {
            for (arm, (metric, x, value)) in run(seed)? {
                let mine = |m: &&mut Measure| m.arm == arm && m.metric == metric && m.x == x;
                match measures.iter_mut().find(mine) {
                    Some(measure) => measure.values.push(value),
                    None => measures.push(Measure {
                        metric: metric.to_string(),
                        arm,
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

fn gather(arm: &str, rate: Option<f64>, trials: Vec<Trial>) -> Result<Vec<Measure>> {
    let Some(first) = trials.first() else {
        bail!("{arm}: no trials")
    };
    let measure = |i: usize| Measure {
        metric: first.readings[i].0.to_string(),
        arm: arm.to_string(),
        x: first.readings[i].1,
        values: trials.iter().map(|trial| trial.readings[i].2).collect(),
        rate,
    };
    Ok((0..first.readings.len()).map(measure).collect())
}

impl Measure {
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        // NaN is a run that failed.
        sorted
            .iter_mut()
            .filter(|v| v.is_nan())
            .for_each(|v| *v = f64::INFINITY);
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        if low == high { low } else { (low + high) / 2. }
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
            "metric": self.metric, "arm": self.arm, "x": self.x, "rate": self.rate,
            "values": self.values.iter().map(number).collect::<Vec<_>>(),
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let number = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok());
        Some(Self {
            metric: value["metric"].as_str()?.to_string(),
            arm: value["arm"].as_str()?.to_string(),
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
    fn an_arm_is_run_at_the_rate_that_the_tuning_seed_prefers() -> Result<()> {
        let run = |rate: f64, seed| {
            // On the tuning seed 0.1 is the best, on the others it is not.
            let score = if seed == TUNING_SEED {
                (rate - 0.1).abs()
            } else {
                -rate
            };
            let score = if rate > 0.5 { f64::NAN } else { score };
            Ok(Trial::new(
                score,
                vec![("a", 0., rate), ("b", 3., seed as f64)],
            ))
        };
        let measures = lab().tuned("arm", &[1., 0.01, 0.1, 0.3], run)?;
        assert_eq!(measures[0].rate, Some(0.1));
        assert_eq!(measures[0].values, [0.1; 5]);
        assert_eq!(
            (measures[1].x, &measures[1].values[..]),
            (3., &[0., 1., 2., 3., 4.][..])
        );
        Ok(())
    }

    #[test]
    fn an_error_of_one_run_is_that_of_the_arm() {
        let run = |seed| match seed {
            3 => bail!("no more"),
            _ => Ok(vec![("a", 0., 1.)]),
        };
        assert!(lab().seeded("arm", run).is_err());
    }

    #[test]
    fn what_was_never_reached_survives_the_cache_and_counts_as_the_largest() {
        let measure = Measure {
            metric: "steps".to_string(),
            arm: "none".to_string(),
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
