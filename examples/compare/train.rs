//! One training run: the same data in the same order for every norm, and a record of each step.

use crate::data::{self, Digits, Labeled, TRAIN_SIZE};
use crate::model::{Classifier, LAYERS, initialize};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Result, Var, bail};
use candle_nn::{ModuleT, Optimizer, SGD, VarBuilder, VarMap, loss};
use candle_norm::{NormConfig, trainable_vars};
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::time::Instant;

/// Settings that all runs have in common.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) epochs: usize,
    pub(crate) batch_size: usize,
    pub(crate) lr: f64,
    pub(crate) seeds: usize,
}

impl Settings {
    /// Steps of a whole run. Images that do not fill a batch wait for the next epoch's order.
    pub(crate) fn steps(&self) -> usize {
        self.epochs * (TRAIN_SIZE / self.batch_size)
    }

    /// The learning rate after so many steps. It falls to zero, so that the last steps do not throw
    /// the weights about and the accuracy at the end is that of the kind of norm, not of the last
    /// batches.
    fn rate_at(&self, steps: usize) -> f64 {
        self.lr * (1. - steps as f64 / self.steps() as f64)
    }

    /// The test digits are classified after these steps: often while the accuracy climbs, rarely
    /// once it is level.
    pub(crate) fn measures_accuracy_after(&self, step: usize) -> bool {
        let every = if step <= 150 { 5 } else { 25 };
        step.is_multiple_of(every) || step == self.steps()
    }
}

/// One step of a run, counted from 1.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) step: usize,
    /// Cross-entropy of the batch before the update.
    pub(crate) loss: f64,
    /// Euclidean norm of the gradient of each layer's parameters, in the order of [`LAYERS`].
    pub(crate) layer_gradients: [f64; LAYERS.len()],
    /// Forward, backward and update.
    pub(crate) milliseconds: f64,
    /// Share of the test digits that are classified rightly after the update, where it was
    /// measured.
    pub(crate) accuracy: Option<f64>,
}

impl Step {
    /// Euclidean norm of the gradient of all parameters.
    pub(crate) fn gradient(&self) -> f64 {
        self.layer_gradients
            .iter()
            .map(|norm| norm * norm)
            .sum::<f64>()
            .sqrt()
    }
}

/// All steps of one network.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) seed: u64,
    pub(crate) steps: Vec<Step>,
    /// Whether the loss stopped being a number, which ends a run early.
    pub(crate) diverged: bool,
}

/// Trains one network; `advance` is told the number of steps that were done.
pub(crate) fn train(
    norm: &NormConfig,
    seed: u64,
    digits: &Digits,
    settings: &Settings,
    advance: impl Fn(u64),
) -> Result<Run> {
    let device = digits.train.images.device();
    let varmap = VarMap::new();
    let model = Classifier::new(norm, VarBuilder::from_varmap(&varmap, DType::F32, device))?;
    initialize(&varmap, seed, device)?;
    let layers = vars_of_layers(&varmap);
    let mut optimizer = SGD::new(trainable_vars(&varmap), settings.lr)?;
    let mut order = StdRng::seed_from_u64(seed);
    let mut run = Run {
        seed,
        steps: Vec::with_capacity(settings.steps()),
        diverged: false,
    };
    while run.steps.len() < settings.steps() && !run.diverged {
        for positions in data::shuffled(TRAIN_SIZE, &mut order).chunks_exact(settings.batch_size) {
            let batch = digits.train.select(positions)?;
            let start = Instant::now();
            let loss = loss::cross_entropy(&model.forward_t(&batch.images, true)?, &batch.labels)?;
            let gradients = loss.backward()?;
            optimizer.set_learning_rate(settings.rate_at(run.steps.len()));
            optimizer.step(&gradients)?;
            device.synchronize()?;
            let milliseconds = start.elapsed().as_secs_f64() * 1e3;

            let step = run.steps.len() + 1;
            let loss = f64::from(loss.to_scalar::<f32>()?);
            run.diverged = !loss.is_finite();
            let accuracy = match run.diverged || settings.measures_accuracy_after(step) {
                true => Some(accuracy(&model, &digits.test)?),
                false => None,
            };
            let layer_gradients = gradient_norms(&layers, &gradients)?;
            run.steps.push(Step {
                step,
                loss,
                layer_gradients,
                milliseconds,
                accuracy,
            });
            advance(1);
            if run.diverged {
                advance((settings.steps() - step) as u64);
                break;
            }
        }
    }
    Ok(run)
}

/// Share of the images whose largest logit is that of their class.
fn accuracy(model: &Classifier, set: &Labeled) -> Result<f64> {
    let predictions = model.forward_t(&set.images, false)?.argmax(D::Minus1)?;
    let right = predictions
        .eq(&set.labels)?
        .to_dtype(DType::F32)?
        .mean_all()?;
    Ok(f64::from(right.to_scalar::<f32>()?))
}

/// The trainable variables of each layer, by the prefix of their names.
fn vars_of_layers(varmap: &VarMap) -> [Vec<(String, Var)>; LAYERS.len()] {
    let trainable: Vec<_> = trainable_vars(varmap).iter().map(|var| var.id()).collect();
    let variables = varmap
        .data()
        .lock()
        .expect("no thread panics while it holds the variables");
    LAYERS.map(|layer| {
        let of_layer = |name: &str| {
            name.strip_prefix(layer)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        let mut vars: Vec<_> = variables
            .iter()
            .filter(|(name, var)| of_layer(name) && trainable.contains(&var.id()))
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect();
        vars.sort_by(|(a, _), (b, _)| a.cmp(b));
        vars
    })
}

/// The gradient's norm in each layer. A parameter that got no gradient is an error: it would not
/// train.
fn gradient_norms(
    layers: &[Vec<(String, Var)>; LAYERS.len()],
    gradients: &GradStore,
) -> Result<[f64; LAYERS.len()]> {
    let mut norms = [0.; LAYERS.len()];
    for (norm, vars) in norms.iter_mut().zip(layers) {
        for (name, var) in vars {
            let Some(gradient) = gradients.get(var) else {
                bail!("{name} got no gradient")
            };
            *norm += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        *norm = norm.sqrt();
    }
    Ok(norms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn steps(norm: &str, seed: u64, lr: f64) -> Result<Run> {
        let settings = Settings {
            epochs: 1,
            batch_size: TRAIN_SIZE / 3,
            lr,
            seeds: 1,
        };
        let digits = Digits::load(&Device::Cpu)?;
        train(&norm.parse()?, seed, &digits, &settings, |_| ())
    }

    fn losses(run: &Run) -> Vec<f64> {
        run.steps.iter().map(|step| step.loss).collect()
    }

    #[test]
    fn a_seed_decides_the_whole_run() -> Result<()> {
        let run = steps("batch", 1, 0.1)?;
        assert_eq!(losses(&run), losses(&steps("batch", 1, 0.1)?));
        assert_ne!(losses(&run), losses(&steps("batch", 2, 0.1)?));
        Ok(())
    }

    #[test]
    fn weight_norm_starts_from_the_same_network() -> Result<()> {
        let [plain, weight] = ["none", "weight"].map(|norm| steps(norm, 1, 0.1));
        let (plain, weight) = (losses(&plain?), losses(&weight?));
        assert!((plain[0] - weight[0]).abs() < 1e-5, "{plain:?} {weight:?}");
        assert_ne!(plain[2], weight[2]);
        Ok(())
    }

    #[test]
    fn every_kind_learns_and_every_layer_gets_its_gradient() -> Result<()> {
        for norm in [
            "none", "batch", "layer", "group:8", "instance", "rms", "weight",
        ] {
            let run = steps(norm, 0, 0.1)?;
            let [first, _, last] = &run.steps[..] else {
                panic!("{norm}: {} steps", run.steps.len())
            };
            assert!(last.loss < first.loss && !run.diverged, "{norm}");
            assert!(
                first.layer_gradients.iter().all(|norm| *norm > 0.),
                "{norm}"
            );
            assert!(last.accuracy.is_some() && first.accuracy.is_none());
        }
        Ok(())
    }

    #[test]
    fn a_run_ends_where_the_loss_stops_being_a_number() -> Result<()> {
        let run = steps("none", 0, 1e30)?;
        assert!(run.diverged && run.steps.len() < 3);
        assert!(run.steps.last().is_some_and(|step| step.accuracy.is_some()));
        Ok(())
    }
}
