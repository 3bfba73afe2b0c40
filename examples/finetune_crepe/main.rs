//! Fine-tuning a pretrained PyTorch network with BatchNorm: crepe, which hears the pitch of a tone.
//!
//! `scripts/convert_crepe.py` wrote its small weights, and what PyTorch answers to eight tones. Here the network is built under the same
//! names and gives PyTorch's answers. Then it learns tones that it fails on: their lowest two harmonics are missing, as on a telephone,
//! and there is as much noise as tone. Batches of 8 make poor statistics, so one run keeps the pretrained ones, and another does not.
//!
//! ```text
//! cargo run --release --example finetune_crepe
//! cargo run --release --example finetune_crepe -- --norm batch --batch 2
//! ```
//!
//! It reaches 85 % of such tones within half a semitone, with statistics frozen, from 61.5 % before. One run had 89.5 %, and 80.5 % with those of
//! each batch.
//!
//! Change the tones in `tones.rs`, `FIXED` in `network.rs`, or `--batch`.

#[path = "../common/mod.rs"]
mod common;
mod network;
mod tones;

use candle_core::{DType, Device, ModuleT, Result, Tensor, bail};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use candle_norm::checkpoint::{self, LoadReport};
use candle_norm::{BatchNorm, trainable_vars};
use clap::Parser;
use common::largest_difference;
use network::Crepe;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tones::Tones;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/crepe_tiny");
const BATCH: usize = 8;
const LEARNING_RATE: f64 = 2e-3;
/// Of tones with frozen statistics, in percent.
const REACHES: f32 = 85.;

/// Loads a pretrained pitch network and trains it further.
#[derive(Debug, Parser)]
struct Options {
    /// What normalizes in training: frozen (the pretrained statistics) or batch (those of each batch)
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["frozen", "batch"])]
    norm: Vec<Statistics>,
    /// Tones in a step
    #[arg(long, default_value_t = BATCH)]
    batch: usize,
    /// Two steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Statistics {
    Frozen,
    Batch,
}

/// Binary cross entropy of logits, which does not overflow.
fn loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log = (logits.abs()?.neg()?.exp()? + 1.)?.log()?;
    (logits.relu()? - (logits * targets)? + log)?.mean_all()
}

/// Trains the variables of a network; its accuracy afterwards, in inference.
fn tuned(net: &impl ModuleT, vars: &VarMap, test: &Tones, options: &Options) -> Result<f32> {
    let steps = if options.quick { 2 } else { 240 };
    let mut optimizer = AdamW::new_lr(trainable_vars(vars), LEARNING_RATE)?;
    let mut rng = StdRng::seed_from_u64(1);
    let bar = common::progress_bar(steps);
    for step in 0..steps {
        let tones = Tones::draw(options.batch, &mut rng)?;
        let loss = loss(&net.forward_t(&tones.frames, true)?, &tones.targets()?)?;
        optimizer.set_learning_rate(LEARNING_RATE * (1. - step as f64 / steps as f64));
        optimizer.backward_step(&loss)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    test.accuracy(net)
}

/// The network with the weights of the file, their variables, and what was loaded.
fn pretrained() -> Result<(Crepe<BatchNorm>, VarMap, LoadReport)> {
    let vars = VarMap::new();
    let net = Crepe::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let report = checkpoint::load_into_strict(&vars, format!("{FILES}.safetensors"))?;
    Ok((net, vars, report))
}

fn main() -> Result<()> {
    let options = Options::parse();
    let theirs =
        candle_core::safetensors::load(format!("{FILES}.outputs.safetensors"), &Device::Cpu)?;
    let (net, _, report) = pretrained()?;
    println!("{report}");
    let outputs = candle_nn::ops::sigmoid(&net.forward_t(&theirs["frames"], false)?)?;
    let difference = largest_difference(&outputs, &theirs["outputs"])?;
    println!("Largest difference to PyTorch's outputs: {difference:.0e}");
    if difference > 1e-4 {
        bail!("expected the outputs of PyTorch")
    }
    let count = if options.quick { 20 } else { 200 };
    let test = Tones::draw(count, &mut StdRng::seed_from_u64(0))?;
    println!("Of {count} tones without their lowest harmonics, heard within half a semitone");
    println!(
        "{:26}{:5.1} %",
        "as it was pretrained",
        test.accuracy(&net)?
    );
    for &statistics in &options.norm {
        let (net, vars, _) = pretrained()?;
        let accuracy = match statistics {
            Statistics::Frozen => tuned(&net.frozen()?, &vars, &test, &options)?,
            Statistics::Batch => tuned(&net, &vars, &test, &options)?,
        };
        let name = format!("{statistics:?} statistics");
        println!("{name:26}{accuracy:5.1} %");
        let default = statistics == Statistics::Frozen && options.batch == BATCH;
        if default && accuracy < REACHES && !options.quick {
            bail!("expected {REACHES} % with frozen statistics")
        }
    }
    println!("Change the batch: --batch 2 or 32; the statistics: --norm frozen or batch.");
    Ok(())
}
