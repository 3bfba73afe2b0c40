//! Weight norm in a policy: a cart learns to balance a pole, with weight norm, without a norm, and with layer norm.
//!
//! Actor and critic (REINFORCE with a learned baseline): the policy picks left or right, the value network says how long the pole will
//! stand, and an action is made likelier if the pole stood longer than that. Batches are of steps that follow each other, so batch
//! statistics would mix what the pole did early and late; weight norm takes none of the data, and layer norm none of other steps.
//!
//! ```text
//! cargo run --release --example cartpole
//! cargo run --release --example cartpole -- --norm weight,rms
//! ```
//!
//! With weight norm the pole stands for 450 of 500 steps, in the mean over 20 starts and 3 seeds. So it does without a norm and with
//! layer norm, after about as many updates: the task is too small to need one. It shows the loop, not a difference.
//!
//! Change `HIDDEN`, `LEARNING_RATE`, or the norm.

mod common;

use std::process::ExitCode;

use candle_core::{D, DType, Device, ModuleT, Result, Tensor, bail};
use candle_nn::ops::{log_softmax, softmax};
use candle_nn::{AdamW, Linear, Module, Optimizer, VarBuilder, VarMap};
use candle_norm::{NormConfig, NormedLayer, trainable_vars};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HIDDEN: usize = 32;
const LEARNING_RATE: f64 = 5e-3;
/// Games that are played side by side.
const GAMES: usize = 16;
/// After so many the pole has stood.
const STEPS: usize = 500;
/// A mean of so many over the games of an update is good.
const GOOD: usize = 400;
/// What a reward is worth a step later.
const DISCOUNT: f32 = 0.99;
const UPDATES: usize = 100;
/// Steps that the pole stands, with weight norm.
const REACHES: f32 = 450.;

/// Trains a policy to balance a pole on a cart, once for each norm.
#[derive(Debug, Parser)]
struct Options {
    /// Kinds, separated by commas: weight, none, layer, rms
    #[arg(long, value_delimiter = ',', value_parser = common::norm, default_value = "weight,none,layer")]
    norm: Vec<NormConfig>,
    /// Updates of the policy
    #[arg(long, default_value_t = UPDATES)]
    updates: usize,
    /// Five updates and one seed: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// Position and speed of the cart, angle and speed of the pole.
type State = [f32; 4];

/// Pushes the cart to the right or left for a fiftieth of a second: the cart-pole of Barto, Sutton and Anderson (1983).
fn push([x, v, angle, spin]: State, right: bool) -> State {
    const GRAVITY: f32 = 9.8;
    const POLE: f32 = 0.1;
    const BOTH: f32 = 1.1; // masses of pole and cart
    const HALF: f32 = 0.5; // of the pole's length
    const TIME: f32 = 0.02;
    let force = if right { 10. } else { -10. };
    let (sin, cos) = angle.sin_cos();
    let pull = (force + POLE * HALF * spin * spin * sin) / BOTH;
    let turn = (GRAVITY * sin - cos * pull) / (HALF * (4. / 3. - POLE * cos * cos / BOTH));
    let push = pull - POLE * HALF * turn * cos / BOTH;
    [
        x + TIME * v,
        v + TIME * push,
        angle + TIME * spin,
        spin + TIME * turn,
    ]
}

fn has_fallen([x, _, angle, _]: State) -> bool {
    x.abs() > 2.4 || angle.abs() > 12f32.to_radians()
}

/// Two hidden layers with their norms: a policy with two outputs, or a value with one.
struct Net {
    hidden: [NormedLayer; 2],
    head: Linear,
}

impl Net {
    fn new(norm: NormConfig, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let hidden = [
            norm.linear(4, HIDDEN, vb.pp("hidden1"))?,
            norm.linear(HIDDEN, HIDDEN, vb.pp("hidden2"))?,
        ];
        let head = candle_nn::linear(HIDDEN, outputs, vb.pp("head"))?;
        Ok(Self { hidden, head })
    }

    fn forward(&self, states: &[State]) -> Result<Tensor> {
        let mut xs = Tensor::from_slice(states.as_flattened(), (states.len(), 4), &Device::Cpu)?;
        for layer in &self.hidden {
            xs = layer.forward_t(&xs, true)?.tanh()?;
        }
        self.head.forward(&xs)
    }
}

/// What was seen and done in all games, and what followed.
#[derive(Default)]
struct Played {
    states: Vec<State>,
    actions: Vec<u32>,
    returns: Vec<f32>,
}

/// Plays `games` to their end; `greedy` takes the better action instead of drawing one.
fn play(policy: &Net, games: usize, greedy: bool, rng: &mut StdRng) -> Result<Played> {
    let mut played = Played::default();
    let mut states: Vec<State> = (0..games)
        .map(|_| [(); 4].map(|()| rng.random_range(-0.05..0.05)))
        .collect();
    // Of each game, where its steps are in `played`.
    let mut steps = vec![vec![]; games];
    let mut running: Vec<usize> = (0..games).collect();
    while !running.is_empty() {
        let seen: Vec<State> = running.iter().map(|&game| states[game]).collect();
        let odds = softmax(&policy.forward(&seen)?.detach(), D::Minus1)?.to_vec2::<f32>()?;
        for (&game, odds) in running.iter().zip(odds) {
            let right = odds[1] > if greedy { 0.5 } else { rng.random() };
            steps[game].push(played.states.len());
            played.states.push(states[game]);
            played.actions.push(right.into());
            states[game] = push(states[game], right);
        }
        running.retain(|&game| !has_fallen(states[game]) && steps[game].len() < STEPS);
    }
    // A step is worth 1 and what comes after it.
    played.returns = vec![0.; played.states.len()];
    for (game, steps) in steps.iter().enumerate() {
        // A pole that still stands would have gone on.
        let mut after = if has_fallen(states[game]) {
            0.
        } else {
            1. / (1. - DISCOUNT)
        };
        for &step in steps.iter().rev() {
            after = 1. + DISCOUNT * after;
            played.returns[step] = after;
        }
    }
    Ok(played)
}

/// How long the pole stands after training, and after which update it first stood for [`GOOD`] steps while it learned.
type Outcome = (f32, Option<usize>);

fn train(norm: NormConfig, updates: usize, seed: u64, tick: impl Fn()) -> Result<Outcome> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let (policy, value) = (
        Net::new(norm, 2, vb.pp("policy"))?,
        Net::new(norm, 1, vb.pp("value"))?,
    );
    common::initialize(&vars, seed)?;
    let mut optimizer = AdamW::new_lr(trainable_vars(&vars), LEARNING_RATE)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut solved = None;
    for update in 0..updates {
        let Played {
            states,
            actions,
            returns,
        } = play(&policy, GAMES, false, &mut rng)?;
        let count = states.len();
        if solved.is_none() && count >= GOOD * GAMES {
            solved = Some(update);
        }
        let actions = Tensor::from_vec(actions, (count, 1), &Device::Cpu)?;
        // In units of the longest, so that the value network starts near them.
        let returns = (Tensor::from_vec(returns, count, &Device::Cpu)? * f64::from(1. - DISCOUNT))?;
        let error = (returns - value.forward(&states)?.squeeze(1)?)?;
        let advantage = error.detach();
        let advantage = advantage.broadcast_sub(&advantage.mean_all()?)?;
        let deviation = (advantage.sqr()?.mean_all()?.sqrt()? + 1e-6)?;
        let log = log_softmax(&policy.forward(&states)?, D::Minus1)?
            .gather(&actions, 1)?
            .squeeze(1)?;
        let gain = (log * advantage.broadcast_div(&deviation)?)?.mean_all()?;
        let loss = (error.sqr()?.mean_all()? - gain)?;
        optimizer.set_learning_rate(LEARNING_RATE * (1. - update as f64 / updates as f64));
        optimizer.backward_step(&loss)?;
        tick();
    }
    let test = play(&policy, 20, true, &mut StdRng::seed_from_u64(1000))?;
    Ok((test.states.len() as f32 / 20., solved))
}

fn run(options: &Options) -> Result<()> {
    let (updates, seeds) = if options.quick {
        (5, 1)
    } else {
        (options.updates, 3)
    };
    println!("          the pole stands, of {STEPS} steps  stood {GOOD} in training after updates");
    let bar = common::progress_bar(options.norm.len() * seeds * updates);
    let mut missed = false;
    for &norm in &options.norm {
        let outcomes = (0..seeds as u64).map(|seed| train(norm, updates, seed, || bar.inc(1)));
        let (stands, solved): (Vec<_>, Vec<_>) =
            outcomes.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let mean = stands.iter().sum::<f32>() / seeds as f32;
        let after = |solved: Option<usize>| solved.map_or("never".into(), |n| format!("{n:5}"));
        let after = solved.into_iter().map(after).collect::<Vec<_>>().join(" ");
        bar.suspend(|| {
            println!(
                "{:10}{stands:4.0?} mean {mean:4.0}  {after}",
                norm.to_string()
            )
        });
        let weight = matches!(norm, NormConfig::Weight(_));
        missed |= weight && !options.quick && updates == UPDATES && mean < REACHES;
    }
    bar.finish_and_clear();
    println!("Change the norms: --norm rms; the length of training: --updates 50.");
    if missed {
        bail!("expected {REACHES} steps with weight norm")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(|| run(&options))
}
