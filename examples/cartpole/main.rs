//! Weight norm in a policy: a cart learns to balance a pole, with weight norm, without a norm, and
//! with layer norm.
//!
//! The method is actor and critic (REINFORCE with a learned baseline). The policy chooses left or
//! right, and the value network predicts how long the pole will stand. An action becomes more
//! likely if the pole stood longer than predicted. A batch has steps that follow each other. Batch
//! statistics would mix early and late states of the pole. Weight norm uses no statistics of the
//! data, and layer norm uses none of other steps.
//!
//! ```text
//! cargo run --release --example cartpole
//! cargo run --release --example cartpole -- --norm weight,rms
//! ```
//!
//! With weight norm the pole stands for 450 of 500 steps, as the mean over 20 starts and 3 seeds.
//! One run of each had: weight, none and layer 500, rms 499, after about as many updates. The task
//! is too small to need a norm. The example shows the training loop, not a difference.
//!
//! Change `HIDDEN` in `policy.rs`, `LEARNING_RATE`, or the norm.

#[path = "../common/mod.rs"]
mod common;
mod policy;

use std::process::ExitCode;

use candle_core::{Result, bail};
use candle_norm::NormConfig;
use clap::Parser;
use common::{Training, progress_bar};
use policy::{GOOD, STEPS, train};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LEARNING_RATE: f64 = 5e-3;
const UPDATES: usize = 100;
/// Steps that the pole stands, with weight norm.
const REACHES: f32 = 450.;

/// Trains a policy to balance a pole on a cart, once for each norm.
#[derive(Debug, Parser)]
struct Options {
    /// Kinds, separated by commas: weight, none, layer, rms, batch
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = common::norm,
        default_value = "weight,none,layer"
    )]
    norm: Vec<NormConfig>,
    /// Updates of the policy
    #[arg(long, default_value_t = UPDATES)]
    updates: usize,
    /// Five updates and one seed: a look within seconds
    #[arg(long)]
    quick: bool,
}

fn run(options: &Options) -> Result<()> {
    let (updates, seeds) = if options.quick {
        (5, 1)
    } else {
        (options.updates, 3)
    };
    let training = Training {
        steps: updates,
        learning_rate: LEARNING_RATE,
        weight_decay: 0.01,
        warm_up: 0,
    };
    println!("          the pole stands, of {STEPS} steps  stood {GOOD} in training after updates");
    for &norm in &options.norm {
        let outcomes = (0..seeds).map(|seed| train(norm, &training, seed, &progress_bar(updates)));
        let (stands, good): (Vec<_>, Vec<_>) =
            outcomes.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let mean = stands.iter().sum::<f32>() / seeds as f32;
        let after = |good: Option<usize>| good.map_or("never".into(), |n| format!("{n:5}"));
        let after = good.into_iter().map(after).collect::<Vec<_>>().join(" ");
        let name = norm.to_string();
        println!("{name:10}{stands:4.0?} mean {mean:4.0}  {after}");
        let weight = matches!(norm, NormConfig::Weight(_));
        if weight && !options.quick && updates == UPDATES && mean < REACHES {
            bail!("expected {REACHES} steps with weight norm")
        }
    }
    println!("Change the norms: --norm rms,batch; the length of training: --updates 50.");
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
