//! Fine-tuning a pretrained PyTorch network with BatchNorm: crepe, which recognizes the pitch of a
//! tone.
//!
//! `scripts/convert_crepe.py` wrote its small weights, and PyTorch's outputs for eight tones. This
//! example builds the network with the same names and gets the same outputs. Then it trains on
//! tones that the network fails on: their lowest two harmonics are missing, as on a telephone, and
//! the noise is as strong as the tone. Batches of 8 have poor statistics. Therefore one run keeps
//! the pretrained statistics, and another does not.
//!
//! ```text
//! cargo run --release --example finetune_crepe
//! cargo run --release --example finetune_crepe -- --batch 2
//! ```
//!
//! With frozen statistics, it recognizes 85 % of such tones within half a semitone, and 61.5 %
//! before training. One run had 89.5 %, and 80.5 % with the statistics of each batch of 8; with
//! batches of 2, 77.5 and 59.5 %. Before training, its outputs are PyTorch's to 7e-7. Change the
//! tones in `Tones::draw`, `FIXED`, or `--batch`.

mod common;

use std::f32::consts::TAU;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, bail, safetensors};
use candle_nn::{Conv2d, Conv2dConfig, Init, Linear, VarBuilder, VarMap, linear, ops::sigmoid};
use candle_norm::checkpoint::{self, LoadReport};
use candle_norm::{BatchNorm, BatchNormOptions, FrozenNorm, batch_norm};
use clap::Parser;
use common::{Training, largest_difference, warn_if_quick};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/crepe_tiny");
/// Before and after each of the six convolutions.
const CHANNELS: [usize; 7] = [1, 128, 16, 16, 16, 32, 64];
/// The first layers hear partials, which all tones have: they stay as they are. Their gradients
/// would take most of the time.
const FIXED: usize = 2;
/// Classes of pitch, 20 cents (hundredths of a semitone) apart, and the lowest of them in cents
/// above 10 Hz.
const BINS: usize = 360;
const LOWEST: f32 = 1_997.379_4;
/// Samples of a frame, and of a second.
const FRAME: usize = 1024;
const SAMPLE_RATE: f32 = 16_000.;
const BATCH: usize = 8;
/// Of tones with frozen statistics, in percent.
const REACHES: f32 = 85.;

/// Loads a pretrained pitch network and trains it further.
#[derive(Debug, Parser)]
struct Options {
    /// Statistics in training: frozen (the pretrained ones) or batch (those of each batch)
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

/// Convolutions, each with its norm, and a classifier, under the names that PyTorch's have.
struct Crepe<N> {
    layers: Vec<(Conv2d, N)>,
    classifier: Linear,
}

impl Crepe<BatchNorm> {
    fn new(vb: VarBuilder) -> Result<Self> {
        let options = BatchNormOptions {
            eps: 0.0010000000474974513,
            // That of the checkpoint is 0, with which running statistics never move.
            momentum: Some(0.1),
            ..Default::default()
        };
        let layer = |i: usize| {
            let (kernel, stride) = if i == 1 { (512, 4) } else { (64, 1) };
            let shape = [CHANNELS[i], CHANNELS[i - 1], kernel, 1];
            let config = Conv2dConfig {
                stride,
                ..Default::default()
            };
            // candle's `conv2d` makes square kernels only.
            let conv = vb.pp(format!("conv{i}"));
            let weight = conv.get_with_hints(&shape, "weight", Init::Const(0.))?;
            let bias = conv.get_with_hints(CHANNELS[i], "bias", Init::Const(0.))?;
            let norm = batch_norm(CHANNELS[i], options, vb.pp(format!("conv{i}_BN")))?;
            Ok((Conv2d::new(weight, Some(bias), config), norm))
        };
        Ok(Self {
            layers: (1..CHANNELS.len()).map(layer).collect::<Result<_>>()?,
            classifier: linear(256, BINS, vb.pp("classifier"))?,
        })
    }

    /// The network with the weights of the file, their variables, and what was loaded.
    fn pretrained() -> Result<(Self, VarMap, LoadReport)> {
        let vars = VarMap::new();
        let net = Self::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
        let report = checkpoint::load_into_strict(&vars, format!("{FILES}.safetensors"))?;
        Ok((net, vars, report))
    }

    /// The same variables, trained with these statistics for good.
    fn frozen(self) -> Result<Crepe<FrozenNorm>> {
        let frozen = |(conv, norm): (_, BatchNorm)| Ok((conv, norm.frozen()?));
        Ok(Crepe {
            layers: self.layers.into_iter().map(frozen).collect::<Result<_>>()?,
            classifier: self.classifier,
        })
    }
}

impl<N: ModuleT> ModuleT for Crepe<N> {
    /// Frames `[N, 1024]` to logits `[N, 360]`.
    fn forward_t(&self, frames: &Tensor, train: bool) -> Result<Tensor> {
        let mut xs = frames.unsqueeze(1)?.unsqueeze(3)?;
        for (i, (conv, norm)) in self.layers.iter().enumerate() {
            // The output is as long as the input, but for the stride; an odd rest goes after it.
            let padding = conv.weight().dim(2)? - conv.config().stride;
            let padded = xs.pad_with_zeros(2, padding / 2, padding.div_ceil(2))?;
            xs = max_of_pairs(&norm.forward_t(&conv.forward(&padded)?.relu()?, train)?)?;
            xs = if i < FIXED { xs.detach() } else { xs };
        }
        let features = xs.transpose(1, 2)?.flatten_from(1)?;
        self.classifier.forward(&features.contiguous()?)
    }
}

/// Max pooling of `[N, C, 2 * L, 1]` by two. candle's own passes on a part of its gradient.
fn max_of_pairs(xs: &Tensor) -> Result<Tensor> {
    let (n, c, length, _) = xs.dims4()?;
    let pairs = xs.reshape((n, c, length / 2, 2))?;
    pairs.narrow(3, 0, 1)?.maximum(&pairs.narrow(3, 1, 1)?)
}

/// Frames `[N, 1024]` and their pitches in cents above 10 Hz.
struct Tones {
    frames: Tensor,
    cents: Vec<f32>,
}

impl Tones {
    /// Harmonics 3 to 8 of frequencies from 80 to 600 Hz, in noise of the same power.
    fn draw(count: usize, rng: &mut StdRng) -> Result<Self> {
        let (mut frames, mut cents) = (vec![], vec![]);
        for _ in 0..count {
            let frequency = 80. * 7.5f32.powf(rng.random());
            let phases: [f32; 6] = rng.random();
            frames.extend((0..FRAME).map(|i| {
                let turns =
                    |k: usize| (k + 3) as f32 * frequency * i as f32 / SAMPLE_RATE + phases[k];
                let tone: f32 = (0..6).map(|k| (turns(k) * TAU).sin()).sum();
                tone / 3f32.sqrt() + rng.sample::<f32, _>(StandardNormal)
            }));
            cents.push(1200. * (frequency / 10.).log2());
        }
        let frames = Tensor::from_vec(frames, (count, FRAME), &Device::Cpu)?;
        let centered = frames.broadcast_sub(&frames.mean_keepdim(1)?)?;
        let frames = centered.broadcast_div(&centered.var_keepdim(1)?.sqrt()?)?;
        Ok(Self { frames, cents })
    }

    /// Binary cross entropy to a bell of 25 cents around the pitch.
    fn loss(&self, logits: &Tensor) -> Result<Tensor> {
        let near = |pitch: f32, bin| (-((cents(bin) - pitch) / 25.).powi(2) / 2.).exp();
        let bell = |&pitch| (0..BINS as u32).map(move |bin| near(pitch, bin));
        let targets: Vec<f32> = self.cents.iter().flat_map(bell).collect();
        let targets = Tensor::from_vec(targets, logits.shape(), &Device::Cpu)?;
        // log(1 + exp(x)) − x t, in a form that does not overflow.
        let log = (logits.abs()?.neg()?.exp()? + 1.)?.log()?;
        (logits.relu()? - (logits * targets)? + log)?.mean_all()
    }

    /// The share of tones, in percent, whose highest logit is within half a semitone of the pitch.
    fn accuracy(&self, net: &dyn ModuleT) -> Result<f32> {
        let heard = net.forward_t(&self.frames, false)?.argmax(1)?;
        let heard = heard.to_vec1::<u32>()?;
        let pairs = heard.iter().zip(&self.cents);
        let right = pairs.filter(|&(&bin, &pitch)| (cents(bin) - pitch).abs() < 50.);
        Ok(100. * right.count() as f32 / self.cents.len() as f32)
    }
}

fn cents(bin: u32) -> f32 {
    20. * bin as f32 + LOWEST
}

/// Trains the variables of a network on tones, new ones in each step.
fn train(net: &dyn ModuleT, vars: &VarMap, options: &Options) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(1);
    let training = Training {
        steps: if options.quick { 2 } else { 240 },
        learning_rate: 2e-3,
        weight_decay: 0.01,
        warm_up: 0,
    };
    training.run(vars, |_| {
        let tones = Tones::draw(options.batch, &mut rng)?;
        tones.loss(&net.forward_t(&tones.frames, true)?)
    })
}

fn main() -> Result<()> {
    let options = Options::parse();
    let theirs = safetensors::load(format!("{FILES}.outputs.safetensors"), &Device::Cpu)?;
    let (net, _, report) = Crepe::pretrained()?;
    println!("{report}");
    let outputs = sigmoid(&net.forward_t(&theirs["frames"], false)?)?;
    let difference = largest_difference(&outputs, &theirs["outputs"])?;
    println!("Largest difference to PyTorch's outputs: {difference:.0e}");
    if difference > 1e-4 {
        bail!("expected the outputs of PyTorch")
    }
    let count = if options.quick { 20 } else { 200 };
    let test = Tones::draw(count, &mut StdRng::seed_from_u64(0))?;
    println!("Of {count} tones without their lowest harmonics, heard within half a semitone");
    println!("as it was pretrained      {:5.1} %", test.accuracy(&net)?);
    for &statistics in &options.norm {
        let (net, vars, _) = Crepe::pretrained()?;
        let net: Box<dyn ModuleT> = match statistics {
            Statistics::Frozen => Box::new(net.frozen()?),
            Statistics::Batch => Box::new(net),
        };
        train(&*net, &vars, &options)?;
        let accuracy = test.accuracy(&*net)?;
        let name = format!("{statistics:?} statistics");
        println!("{name:26}{accuracy:5.1} %");
        let default = statistics == Statistics::Frozen && options.batch == BATCH;
        if default && accuracy < REACHES && !options.quick {
            bail!("expected {REACHES} % with frozen statistics")
        }
    }
    println!("Change the batch: --batch 2 or 32; the statistics: --norm frozen or batch.");
    warn_if_quick(options.quick);
    Ok(())
}
