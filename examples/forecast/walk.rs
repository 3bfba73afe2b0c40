//! Training on the first rows, and forecasting over the other rows.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Optimizer};
use candle_norm::trainable_vars;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::model::{HORIZON, Kind, Model, WINDOW};
use crate::scales::{Scales, Scaling};
use crate::series::Series;

const BATCH: usize = 64;
const LEARNING_RATE: f64 = 5e-3;

/// A series under one normalization.
pub(crate) struct Walk<'a> {
    series: &'a Series,
    scaling: Scaling,
    scales: &'a Scales,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(series: &'a Series, scaling: Scaling, scales: &'a Scales) -> Self {
        Self {
            series,
            scaling,
            scales,
        }
    }

    /// `len` rows from `shift` rows after the first of a window on, for windows that end at
    /// `origins`: normalized by what was known at the end of the window.
    fn rows(&self, origins: &[usize], shift: usize, len: usize) -> Result<Tensor> {
        let width = self.series.width();
        let mut values = Vec::with_capacity(origins.len() * len * width);
        for &origin in origins {
            let first = origin + 1 + shift - WINDOW;
            for row in first..first + len {
                for s in 0..width {
                    let (center, scale) = self.scale(origin, s);
                    values.push(((self.series.values[row * width + s] - center) / scale) as f32);
                }
            }
        }
        Tensor::from_vec(values, (origins.len(), len, width), &Device::Cpu)
    }

    fn scale(&self, origin: usize, series: usize) -> (f64, f64) {
        let at = origin * self.series.width() + series;
        (self.scales.center[at], self.scales.scale[at])
    }

    /// A network trained on windows and targets of the first rows alone.
    pub(crate) fn train(
        &self,
        kind: Kind,
        steps: usize,
        seed: u64,
        progress: impl Fn(u64),
    ) -> Result<Model> {
        let reversible = self.scaling == Scaling::Reversible;
        let model = Model::new(kind, self.series.width(), reversible, seed)?;
        let mut optimizer = AdamW::new_lr(trainable_vars(&model.vars), LEARNING_RATE)?;
        let mut rng = StdRng::seed_from_u64(seed);
        for step in 0..steps {
            let last = self.series.train - HORIZON;
            let origins: Vec<usize> = (0..BATCH)
                .map(|_| rng.random_range(WINDOW - 1..last))
                .collect();
            let target = self.rows(&origins, WINDOW, HORIZON)?;
            let mut error = (model.forward(&self.rows(&origins, 0, WINDOW)?)? - target)?;
            if reversible {
                // In the units of the windows, one series would drown the others.
                let windows = self.rows(&origins, 0, WINDOW)?;
                let spread = (windows.var_keepdim(1)?.sqrt()? + 1e-3)?;
                error = error.broadcast_div(&spread)?;
            }
            optimizer.set_learning_rate(LEARNING_RATE * (1. - step as f64 / steps as f64));
            optimizer.backward_step(&error.sqr()?.mean_all()?)?;
            progress(1);
        }
        Ok(model)
    }

    /// The rows of the test at which a forecast is made.
    pub(crate) fn origins(&self) -> Vec<usize> {
        (self.series.train..self.series.rows() - HORIZON).collect()
    }

    /// The forecasts made at rows, `[rows, HORIZON, width]`, in units of the series.
    pub(crate) fn forecasts(&self, model: &Model, origins: &[usize]) -> Result<Vec<f64>> {
        let width = self.series.width();
        let ys = model.forward(&self.rows(origins, 0, WINDOW)?)?;
        let ys = ys.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let restored = ys.iter().enumerate().map(|(i, y)| {
            let (center, scale) = self.scale(origins[i / (HORIZON * width)], i % width);
            y * scale + center
        });
        Ok(restored.collect())
    }

    /// The error of the forecast at each row of the test: the mean over horizon and series of the
    /// absolute error, in units of the mean absolute error of repeating the last value.
    pub(crate) fn errors(&self, model: &Model) -> Result<Vec<f64>> {
        let (width, origins) = (self.series.width(), self.origins());
        let value = |row: usize, s: usize| self.series.values[row * width + s];
        let mut naive = vec![0.; width];
        for &origin in &origins {
            for (s, naive) in naive.iter_mut().enumerate() {
                for h in 1..=HORIZON {
                    *naive += (value(origin + h, s) - value(origin, s)).abs();
                }
            }
        }
        let per_series = (origins.len() * HORIZON) as f64;
        let forecasts = self.forecasts(model, &origins)?;
        Ok((origins.iter().enumerate())
            .map(|(i, &origin)| {
                let mut error = 0.;
                for h in 0..HORIZON {
                    for (s, naive) in naive.iter().enumerate() {
                        let forecast = forecasts[(i * HORIZON + h) * width + s];
                        error += (forecast - value(origin + 1 + h, s)).abs() * per_series / naive;
                    }
                }
                error / (HORIZON * width) as f64
            })
            .collect())
    }
}

/// Errors of a normalization.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) scaling: Scaling,
    /// Over the seeds, of the mean error.
    pub(crate) median: f64,
    pub(crate) range: [f64; 2],
    /// Of the median seed, in the first and the second half of the test.
    pub(crate) halves: [f64; 2],
    /// Of the median seed, at each row of the test.
    pub(crate) errors: Vec<f64>,
}

impl Outcome {
    /// Of the errors of each seed.
    pub(crate) fn of(scaling: Scaling, runs: &[Vec<f64>]) -> Self {
        let mean = |errors: &[f64]| errors.iter().sum::<f64>() / errors.len() as f64;
        let mut runs: Vec<&Vec<f64>> = runs.iter().collect();
        runs.sort_by(|a, b| mean(a).total_cmp(&mean(b)));
        let errors = runs[runs.len() / 2].clone();
        let (first, second) = errors.split_at(errors.len() / 2);
        Self {
            scaling,
            median: mean(&errors),
            range: [mean(runs[0]), mean(runs[runs.len() - 1])],
            halves: [mean(first), mean(second)],
            errors,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows after a row change neither the network nor any forecast made at it or before.
    #[test]
    fn no_forecast_looks_ahead() -> Result<()> {
        let mut series = Series::stocks()?;
        series.values.truncate(400 * 4);
        series.train = 200;
        let known = 300;
        let mut other = series.clone();
        for (i, value) in other.values.iter_mut().enumerate().skip((known + 1) * 4) {
            *value *= 3. + (i % 7) as f64;
        }
        let origins: Vec<usize> = (200..=known).collect();
        for kind in [Kind::Linear, Kind::Gru] {
            for scaling in Scaling::ALL {
                let made = |series: &Series| -> Result<(Vec<f64>, Vec<f64>)> {
                    let scales = scaling.scales(series)?;
                    let walk = Walk::new(series, scaling, &scales);
                    let model = walk.train(kind, 5, 1, |_| ())?;
                    Ok((walk.forecasts(&model, &origins)?, walk.errors(&model)?))
                };
                let (ours, theirs) = (made(&series)?, made(&other)?);
                assert_eq!(ours.0, theirs.0, "{}", scaling.name());
                assert_ne!(ours.1, theirs.1, "{}", scaling.name());
            }
        }
        Ok(())
    }

    #[test]
    fn repeating_the_last_value_has_an_error_of_one() -> Result<()> {
        let series = Series::co2()?;
        let scales = Scaling::Raw.scales(&series)?;
        let walk = Walk::new(&series, Scaling::Raw, &scales);
        // A weight of one for the last row of the window, and of zero for all others.
        let model = Model::new(Kind::Linear, 1, false, 0)?;
        for (name, var) in model.vars.data().lock().unwrap().iter() {
            let mut weights = vec![0f32; var.elem_count()];
            if name == "head.weight" {
                weights
                    .iter_mut()
                    .skip(WINDOW - 1)
                    .step_by(WINDOW)
                    .for_each(|w| *w = 1.);
            }
            var.set(&Tensor::from_vec(weights, var.shape(), &Device::Cpu)?)?;
        }
        let errors = walk.errors(&model)?;
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        assert!((mean - 1.).abs() < 1e-3, "{mean}");
        Ok(())
    }

    #[test]
    fn the_median_seed_is_told() {
        let runs = [vec![1., 3.], vec![5., 5.], vec![2., 4.]];
        let outcome = Outcome::of(Scaling::Raw, &runs);
        assert_eq!(
            (outcome.median, outcome.range, outcome.halves),
            (3., [2., 5.], [2., 4.])
        );
    }
}
