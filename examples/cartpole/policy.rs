//! The pole, the game, and the training of a policy.

use candle_core::{D, DType, Device, ModuleT, Result, Tensor};
use candle_nn::ops::{log_softmax, softmax};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use candle_norm::{NormConfig, NormedLayer};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::common::{Training, initialize};

const HIDDEN: usize = 32;
/// Games that are played side by side.
const GAMES: usize = 16;
/// After so many the pole has stood.
pub(crate) const STEPS: usize = 500;
/// A mean of so many over the games of an update is good.
pub(crate) const GOOD: usize = 400;
/// Worth of a reward a step later.
const DISCOUNT: f32 = 0.99;

/// Position and speed of the cart, angle and speed of the pole.
type State = [f32; 4];

/// Pushes the cart to the right or left for a fiftieth of a second: the cart-pole of Barto, Sutton
/// and Anderson (1983).
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

    fn forward(&self, states: &[State], train: bool) -> Result<Tensor> {
        let mut xs = Tensor::from_slice(states.as_flattened(), (states.len(), 4), &Device::Cpu)?;
        for layer in &self.hidden {
            xs = layer.forward_t(&xs, train)?.tanh()?;
        }
        self.head.forward(&xs)
    }
}

/// States and actions of all games, and the returns that followed.
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
        let odds = softmax(&policy.forward(&seen, false)?, D::Minus1)?.to_vec2::<f32>()?;
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

/// Trains a policy; how long the pole stands then, and after which update it first stood for
/// [`GOOD`] steps while it learned.
pub(crate) fn train(
    norm: NormConfig,
    training: &Training,
    seed: u64,
    bar: &ProgressBar,
) -> Result<(f32, Option<usize>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let policy = Net::new(norm, 2, vb.pp("policy"))?;
    let value = Net::new(norm, 1, vb.pp("value"))?;
    initialize(&vars, seed)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut good = None;
    training.run_with(&vars, bar, |update| {
        let played = play(&policy, GAMES, false, &mut rng)?;
        let count = played.states.len();
        if count >= GOOD * GAMES {
            good.get_or_insert(update);
        }
        let actions = Tensor::from_vec(played.actions, (count, 1), &Device::Cpu)?;
        // In units of the longest, so that the value network starts near them.
        let returns = Tensor::from_vec(played.returns, count, &Device::Cpu)?;
        let returns = (returns * f64::from(1. - DISCOUNT))?;
        let error = (returns - value.forward(&played.states, true)?.squeeze(1)?)?;
        let advantage = error.detach();
        let advantage = advantage.broadcast_sub(&advantage.mean_all()?)?;
        let deviation = (advantage.sqr()?.mean_all()?.sqrt()? + 1e-6)?;
        let log = log_softmax(&policy.forward(&played.states, true)?, D::Minus1)?
            .gather(&actions, 1)?
            .squeeze(1)?;
        let gain = (log * advantage.broadcast_div(&deviation)?)?.mean_all()?;
        error.sqr()?.mean_all()? - gain
    })?;
    let test = play(&policy, 20, true, &mut StdRng::seed_from_u64(1000))?;
    Ok((test.states.len() as f32 / 20., good))
}
