//! Training on digits and on cars, and the measurements during training.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, ModuleT, Optimizer, ParamsAdamW, SGD};
use candle_norm::scaling::{Scaler, StandardScaler};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::cars::{Cars, Split};
use crate::common::Digits;
use crate::lab::Sets;

pub(crate) fn scalar(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.to_scalar()
}

/// Either of candle's optimizers; AdamW once for each group of variables that has a decay of its
/// own.
pub(crate) enum Optim {
    Sgd(SGD),
    Adam(Vec<AdamW>),
}

impl Optim {
    pub(crate) fn sgd(vars: Vec<Var>, rate: f64) -> Result<Self> {
        Ok(Self::Sgd(SGD::new(vars, rate)?))
    }

    pub(crate) fn adam(vars: Vec<Var>, rate: f64) -> Result<Self> {
        Self::adam_with([(vars, 0.)], rate)
    }

    /// Groups of variables, each with its decay.
    pub(crate) fn adam_with(
        groups: impl IntoIterator<Item = (Vec<Var>, f64)>,
        lr: f64,
    ) -> Result<Self> {
        let optimizer = |(vars, weight_decay)| {
            let params = ParamsAdamW {
                lr,
                weight_decay,
                ..Default::default()
            };
            AdamW::new(vars, params)
        };
        Ok(Self::Adam(
            groups.into_iter().map(optimizer).collect::<Result<_>>()?,
        ))
    }

    pub(crate) fn step(&mut self, loss: &Tensor) -> Result<()> {
        self.follow(&loss.backward()?)
    }

    pub(crate) fn set_rate(&mut self, rate: f64) {
        match self {
            Self::Sgd(o) => o.set_learning_rate(rate),
            Self::Adam(all) => all.iter_mut().for_each(|o| o.set_learning_rate(rate)),
        }
    }

    pub(crate) fn follow(&mut self, gradients: &GradStore) -> Result<()> {
        match self {
            Self::Sgd(o) => o.step(gradients),
            Self::Adam(all) => all.iter_mut().try_for_each(|o| o.step(gradients)),
        }
    }
}

/// Rows in an order that the seed decides, without end.
pub(crate) struct Batches {
    order: Vec<u32>,
    next: usize,
    rng: StdRng,
}

impl Batches {
    pub(crate) fn new(rows: usize, seed: u64) -> Self {
        Self {
            order: (0..rows as u32).collect(),
            next: rows,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// The positions of the next `size` rows.
    pub(crate) fn next(&mut self, size: usize) -> Result<Tensor> {
        if self.next + size > self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.next = 0;
        }
        let batch = &self.order[self.next..self.next + size];
        self.next += size;
        Tensor::new(batch, &Device::Cpu)
    }

    /// The next `size` of these digits.
    pub(crate) fn of(&mut self, digits: &Digits, size: usize) -> Result<Digits> {
        let rows = self.next(size)?;
        Ok(Digits {
            images: digits.images.index_select(&rows, 0)?,
            labels: digits.labels.index_select(&rows, 0)?,
        })
    }
}

/// Digits to train on, and others to test on.
pub(crate) type DigitSets = (Digits, Digits);

/// Rates are tuned on 297 of the digits to train on, with the other 1000.
pub(crate) fn digits() -> Result<Sets<DigitSets>> {
    let measured = Digits::load()?;
    let part = |rows: std::ops::Range<u32>| measured.0.select(&rows.collect::<Vec<_>>());
    Ok(Sets {
        tuning: (part(0..1000)?, part(1000..1297)?),
        measured,
    })
}

/// Digits as rows of 64 pixels.
pub(crate) fn flat_digits() -> Result<Sets<DigitSets>> {
    let flat = |d: &Digits| -> Result<Digits> {
        Ok(Digits {
            images: d.images.flatten_from(1)?,
            labels: d.labels.clone(),
        })
    };
    digits()?.map(|(train, test)| Ok((flat(train)?, flat(test)?)))
}

/// Rates are tuned on a quarter of the cars to train on, with the other three.
pub(crate) fn cars() -> Result<Sets<Split>> {
    let measured = Split::load()?;
    let taught = 3 * measured.train.count() / 4;
    let part = |from: usize, to: usize| -> Result<Cars> {
        Ok(Cars {
            inputs: measured.train.inputs.narrow(0, from, to - from)?,
            prices: measured.train.prices.narrow(0, from, to - from)?,
        })
    };
    Ok(Sets {
        tuning: Split {
            names: measured.names.clone(),
            train: part(0, taught)?,
            test: part(taught, measured.train.count())?,
        },
        measured,
    })
}

/// Training of a classifier of digits.
pub(crate) struct Course {
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    /// Every so many steps the accuracy is measured.
    pub(crate) every: usize,
    /// The accuracy in percent to be reached.
    pub(crate) goal: f32,
    pub(crate) seed: u64,
}

/// Results of training.
pub(crate) struct Learned {
    /// On the test images, in percent, at the end.
    pub(crate) accuracy: f64,
    /// The cross entropy on them.
    loss: f64,
    /// The step at which the goal was reached first; infinite if it never was.
    pub(crate) reached: f64,
}

impl Learned {
    /// Results of a network of which only the logits are known.
    pub(crate) fn of(logits: &Tensor, test: &Digits) -> Result<Self> {
        let loss = scalar(&cross_entropy(logits, &test.labels)?)?;
        Ok(Self {
            accuracy: f64::from(test.accuracy(logits)?),
            loss,
            reached: f64::INFINITY,
        })
    }

    /// Lower is better: by the accuracy and, where as many are right, by the loss. Few digits
    /// decide on a rate, so that several rates often have as many right.
    pub(crate) fn rank(&self) -> f64 {
        // A loss that is not a number comes last.
        -self.accuracy + 1e-3 * self.loss.min(100.)
    }

    /// Lower is better: by the steps to the goal, then by the errors.
    pub(crate) fn score(&self, steps: usize) -> f64 {
        self.reached.min(2. * steps as f64) + (100. - self.accuracy) / 100.
    }
}

impl Course {
    pub(crate) fn run(
        &self,
        net: &impl ModuleT,
        mut optimizer: Optim,
        (train, test): &DigitSets,
    ) -> Result<Learned> {
        let mut batches = Batches::new(train.labels.dim(0)?, self.seed);
        let mut reached = f64::INFINITY;
        for step in 1..=self.steps {
            let batch = batches.of(train, self.batch)?;
            let loss = cross_entropy(&net.forward_t(&batch.images, true)?, &batch.labels)?;
            optimizer.step(&loss)?;
            if step % self.every == 0 {
                if !scalar(&loss)?.is_finite() {
                    break;
                }
                let logits = net.forward_t(&test.images, false)?;
                if reached.is_infinite() && test.accuracy(&logits)? >= self.goal {
                    reached = step as f64;
                }
            }
        }
        Ok(Learned {
            reached,
            ..Learned::of(&net.forward_t(&test.images, false)?, test)?
        })
    }
}

/// Cars with z-scored inputs, and their prices in dollars and as z-scores.
pub(crate) struct Prices {
    pub(crate) train: Tensor,
    pub(crate) test: Tensor,
    pub(crate) dollars: [Tensor; 2],
    pub(crate) scores: [Tensor; 2],
}

impl Prices {
    pub(crate) fn new(split: &Split) -> Result<Self> {
        let (inputs, prices) = (StandardScaler::default(), StandardScaler::default());
        inputs.fit(&split.train.inputs)?;
        prices.fit(&split.train.prices)?;
        let dollars = [split.train.prices.clone(), split.test.prices.clone()];
        Ok(Self {
            train: inputs.transform(&split.train.inputs)?,
            test: inputs.transform(&split.test.inputs)?,
            scores: [
                prices.transform(&dollars[0])?,
                prices.transform(&dollars[1])?,
            ],
            dollars,
        })
    }
}

/// 1 less the squared error by the variance of the target.
pub(crate) fn r2(prediction: &Tensor, target: &Tensor) -> Result<f64> {
    let error = scalar(&(prediction - target)?.sqr()?.mean_all()?)?;
    let mean = target.broadcast_sub(&target.mean_keepdim(0)?)?;
    Ok(1. - error / scalar(&mean.sqr()?.mean_all()?)?)
}

/// Training of a regression.
pub(crate) struct Regression<'a> {
    /// To train on, and to test on.
    pub(crate) x: [&'a Tensor; 2],
    pub(crate) y: [&'a Tensor; 2],
    pub(crate) steps: usize,
    pub(crate) goal: f64,
    pub(crate) seed: u64,
}

impl Regression<'_> {
    /// The step at which R² on the test set reached the goal, and R² at the end.
    pub(crate) fn run(&self, net: &impl ModuleT, mut optimizer: Optim) -> Result<(f64, f64)> {
        const EVERY: usize = 2;
        let mut batches = Batches::new(self.x[0].dim(0)?, self.seed);
        let mut reached = f64::INFINITY;
        for step in 1..=self.steps {
            let rows = batches.next(64)?;
            let prediction = net.forward_t(&self.x[0].index_select(&rows, 0)?, true)?;
            let loss = (prediction - self.y[0].index_select(&rows, 0)?)?
                .sqr()?
                .mean_all()?;
            optimizer.step(&loss)?;
            if step % EVERY == 0 && reached.is_infinite() {
                let r2 = r2(&net.forward_t(self.x[1], false)?, self.y[1])?;
                if !r2.is_finite() {
                    break;
                }
                if r2 >= self.goal {
                    reached = step as f64;
                }
            }
        }
        Ok((reached, r2(&net.forward_t(self.x[1], false)?, self.y[1])?))
    }
}
