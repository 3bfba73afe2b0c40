//! Training of one model. Network, initial values, batches and optimizer are the same for all ways
//! of scaling.

use crate::common::initialize;
use crate::data::{Cars, Split};
use crate::scheme::Scheme;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{
    Activation, AdamW, Optimizer, ParamsAdamW, Sequential, VarBuilder, VarMap, linear, loss, seq,
};
use candle_norm::scaling::{Scaler, TargetScaler};
use candle_norm::trainable_vars;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// The share of the variance of prices that a model has to explain.
pub(crate) const GOAL: f64 = 0.9;

const BATCH: usize = 64;
const HIDDEN: usize = 32;

/// The test is asked after every so many steps.
const EVERY: usize = 10;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) steps: usize,
    pub(crate) seeds: u64,
    pub(crate) lr: f64,
}

/// The error of predictions in dollars, and how much they vary beside the prices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) rmse: f64,
    pub(crate) mae: f64,
    pub(crate) r2: f64,
    /// The standard deviation of the predictions over that of the prices: 0 for one value for all.
    pub(crate) spread: f64,
}

/// Results of a run.
pub(crate) struct Run {
    /// Before the first update, in the unit of the loss.
    pub(crate) first_loss: f64,
    /// Steps, and the root mean squared error of the test in dollars.
    pub(crate) curve: Vec<(usize, f64)>,
    /// After so many steps the test was explained as [`GOAL`] asks.
    pub(crate) reached: Option<usize>,
    /// All cars of the test at once.
    pub(crate) together: Answer,
    /// The same cars, one by one.
    pub(crate) alone: Answer,
    pub(crate) trained: Trained,
}

/// A model that can be asked for prices.
pub(crate) struct Trained {
    pub(crate) scheme: Scheme,
    pub(crate) model: Sequential,
    pub(crate) vars: VarMap,
    pub(crate) inputs: Option<Box<dyn Scaler>>,
    pub(crate) targets: Option<TargetScaler>,
}

/// The network, which a file is loaded into too.
pub(crate) fn network(vb: VarBuilder, features: usize) -> Result<Sequential> {
    Ok(seq()
        .add(linear(features, HIDDEN, vb.pp("first"))?)
        .add(Activation::Relu)
        .add(linear(HIDDEN, HIDDEN, vb.pp("second"))?)
        .add(Activation::Relu)
        .add(linear(HIDDEN, 1, vb.pp("last"))?))
}

impl Trained {
    fn new(scheme: Scheme, cars: &Split, seed: u64) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let model = network(vb, cars.names.len())?;
        initialize(&vars, seed)?;
        Ok(Self {
            scheme,
            model,
            vars,
            inputs: scheme.input_scaler(cars)?,
            targets: scheme.target_scaler(cars)?,
        })
    }

    /// In the unit of the loss.
    pub(crate) fn scaled(&self, inputs: &Tensor) -> Result<Tensor> {
        let x = self.scheme.prepared(self.inputs.as_deref(), inputs)?;
        x.apply(&self.model)
    }

    pub(crate) fn dollars(&self, inputs: &Tensor) -> Result<Tensor> {
        let y = self.scaled(inputs)?;
        match &self.targets {
            Some(targets) => targets.invert(&y),
            None => Ok(y),
        }
    }

    /// Each car by itself, as a service is asked.
    fn dollars_one_by_one(&self, cars: &Cars) -> Result<Tensor> {
        let one = |i| self.dollars(&cars.inputs.narrow(0, i, 1)?);
        let prices: Vec<Tensor> = (0..cars.count()).map(one).collect::<Result<_>>()?;
        Tensor::cat(&prices, 0)
    }

    fn loss(&self, inputs: &Tensor, prices: &Tensor) -> Result<Tensor> {
        let wanted = match &self.targets {
            Some(targets) => targets.scale(prices)?,
            None => prices.clone(),
        };
        loss::mse(&self.scaled(inputs)?, &wanted)
    }
}

/// How good predictions in dollars are.
pub(crate) fn answer(dollars: &Tensor, cars: &Cars) -> Result<Answer> {
    let numbers = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, wanted) = (numbers(dollars)?, numbers(&cars.prices)?);
    let differences = || got.iter().zip(&wanted).map(|(g, w)| g - w);
    let squared = mean(differences().map(|d| d * d));
    Ok(Answer {
        rmse: squared.sqrt(),
        mae: mean(differences().map(f64::abs)),
        r2: 1. - squared / variance(&wanted),
        spread: (variance(&got) / variance(&wanted)).sqrt(),
    })
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

fn variance(values: &[f64]) -> f64 {
    let center = mean(values.iter().copied());
    mean(values.iter().map(|v| (v - center).powi(2)))
}

pub(crate) fn train(
    scheme: Scheme,
    cars: &Split,
    seed: u64,
    settings: Settings,
    mut advance: impl FnMut(),
) -> Result<Run> {
    let trained = Trained::new(scheme, cars, seed)?;
    let parameters = ParamsAdamW {
        lr: settings.lr,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(trainable_vars(&trained.vars), parameters)?;
    let mut order: Vec<u32> = (0..cars.train.count() as u32).collect();
    let mut shuffle = StdRng::seed_from_u64(seed);
    let per_epoch = order.len() / BATCH;
    let (mut first_loss, mut curve, mut reached) = (f64::NAN, vec![], None);
    for step in 0..settings.steps {
        let place = step % per_epoch;
        if place == 0 {
            order.shuffle(&mut shuffle);
        }
        let batch = Tensor::new(&order[place * BATCH..(place + 1) * BATCH], &Device::Cpu)?;
        let inputs = cars.train.inputs.index_select(&batch, 0)?;
        let prices = cars.train.prices.index_select(&batch, 0)?;
        if step % EVERY == 0 {
            let answer = answer(&trained.dollars(&cars.test.inputs)?, &cars.test)?;
            curve.push((step, answer.rmse));
            if reached.is_none() && answer.r2 >= GOAL {
                reached = Some(step);
            }
        }
        let loss = trained.loss(&inputs, &prices)?;
        if step == 0 {
            first_loss = f64::from(loss.to_scalar::<f32>()?);
        }
        optimizer.backward_step(&loss)?;
        advance();
    }
    let together = answer(&trained.dollars(&cars.test.inputs)?, &cars.test)?;
    curve.push((settings.steps, together.rmse));
    if reached.is_none() && together.r2 >= GOAL {
        reached = Some(settings.steps);
    }
    Ok(Run {
        first_loss,
        curve,
        reached,
        together,
        alone: answer(&trained.dollars_one_by_one(&cars.test)?, &cars.test)?,
        trained,
    })
}
