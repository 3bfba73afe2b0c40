//! A transformer learns Shakespeare's sonnets, character by character.
//!
//! Every sublayer adds to the residual stream and the sum is normalized: `forward_add` does both in one pass over memory. In a pre-norm
//! block the sum goes on as the stream, and its norm into the next sublayer; in a post-norm block the norm itself goes on.
//!
//! ```text
//! cargo run --release --example char_transformer
//! cargo run --release --example char_transformer -- --norm rms --place post --qk-norm
//! ```
//!
//! It reaches 3.0 bits a character on the last sonnets, which it has not seen. The frequencies of the characters alone need 4.5.
//! One run of each had: layer and rms 2.90, layer after the sublayers 2.87, rms with normalized queries and keys 2.90, none 3.33.
//!
//! Change the norm and its place, and `--lr`. At 0.05, ten times the default, layer had 3.08 bits, and 2.88 with `--qk-norm`; after the
//! sublayers it learned nothing, with 4.51.

#[path = "../common/mod.rs"]
mod common;
mod model;

use std::process::ExitCode;

use candle_core::{DType, Device, Error, IndexOp, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::ops::softmax;
use candle_nn::{Optimizer, VarBuilder, VarMap};
use clap::Parser;
use model::{CONTEXT, Kind, Norms, Place, Transformer};
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TEXT: &str = include_str!("../data/sonnets.txt");
const BATCH: usize = 16;
const LEARNING_RATE: f64 = 5e-3;
/// Bits a character, on text that was not trained on.
const REACHES: f32 = 3.;

/// Trains a character-level transformer on Shakespeare's sonnets.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    norms: Norms,
    /// Learning rate after the warm-up
    #[arg(long, default_value_t = LEARNING_RATE)]
    lr: f64,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// Cross entropy of the text at `starts`, in nats a character.
fn loss(model: &Transformer, text: &[u32], starts: &[usize]) -> Result<Tensor> {
    let at = |shift| {
        let windows = starts
            .iter()
            .flat_map(|start| &text[start + shift..start + shift + CONTEXT]);
        Tensor::from_iter(windows.copied(), &Device::Cpu)?.reshape((starts.len(), CONTEXT))
    };
    let logits = model.forward(&at(0)?)?.flatten_to(1)?;
    cross_entropy(&logits, &at(1)?.flatten_all()?)
}

fn train(model: &Transformer, vars: &VarMap, text: &[u32], options: &Options) -> Result<()> {
    let mut optimizers = common::adamw(vars, 0.1)?;
    let mut rng = StdRng::seed_from_u64(1);
    let steps = if options.quick { 10 } else { 800 };
    let bar = common::progress_bar(steps);
    for step in 0..steps {
        let starts = [(); BATCH].map(|()| rng.random_range(0..text.len() - CONTEXT));
        let grads = loss(model, text, &starts)?.backward()?;
        let (warm, left) = ((step + 1) as f64 / 50., 1. - step as f64 / steps as f64);
        for optimizer in &mut optimizers {
            optimizer.set_learning_rate(options.lr * warm.min(left));
            optimizer.step(&grads)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Goes on with the text, each character drawn by its odds.
fn write(model: &Transformer, text: &mut Vec<u32>, count: usize) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(2);
    for _ in 0..count {
        let seen = &text[text.len().saturating_sub(CONTEXT)..];
        let logits = model.forward(&Tensor::new(seen, &Device::Cpu)?.unsqueeze(0)?)?;
        let odds = softmax(&logits.i((0, seen.len() - 1))?, 0)?.to_vec1::<f32>()?;
        let drawn = WeightedIndex::new(odds).map_err(Error::wrap)?;
        text.push(rng.sample(drawn) as u32);
    }
    Ok(())
}

fn run(options: &Options) -> Result<()> {
    let mut alphabet: Vec<char> = TEXT.chars().collect();
    alphabet.sort_unstable();
    alphabet.dedup();
    let number = |c| alphabet.binary_search(&c).unwrap_or(0) as u32;
    let text: Vec<u32> = TEXT.chars().map(number).collect();
    let (seen, unseen) = text.split_at(text.len() * 9 / 10);

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model = Transformer::new(alphabet.len(), options.norms, vb)?;
    common::initialize(&vars, 1)?;
    train(&model, &vars, seen, options)?;

    let starts: Vec<usize> = (0..unseen.len() - CONTEXT).step_by(CONTEXT).collect();
    let bits = loss(&model, unseen, &starts)?.to_scalar::<f32>()? / std::f32::consts::LN_2;
    let mut sample = vec![number('\n')];
    write(&model, &mut sample, if options.quick { 20 } else { 300 })?;
    let sample: String = sample.into_iter().map(|i| alphabet[i as usize]).collect();
    println!("{sample}\n");
    let norms = options.norms;
    println!(
        "{bits:.3} bits a character on sonnets that it has not seen: {:?}-norm, {:?}, QK-norm {}",
        norms.place, norms.norm, norms.qk_norm
    );
    println!("Change the norm: --norm rms or none; its place: --place post; --qk-norm; --lr 0.05.");
    let default = (norms.norm, norms.place, options.lr) == (Kind::Layer, Place::Pre, LEARNING_RATE);
    if default && !options.quick && bits.is_nan() | (bits > REACHES) {
        bail!("expected {REACHES} bits at most")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(|| run(&options))
}
