//! A residual network learns the digits. Then its batch norms are frozen, and folded into the
//! convolutions before them.
//!
//! ```text
//! cargo run --release --example resnet_digits
//! cargo run --release --example resnet_digits -- --norm group
//! ```
//!
//! It reaches 95 % of the test digits. Their writers are not those of the training digits. With
//! `--norm` none, layer, group or instance, the same network trains without batch statistics, and
//! there is nothing to fold. One run of each had: batch, group and layer 96.2 %, instance 97.0 %,
//! none 95.4 %. All 500 test digits took 91.3 ms with batch norms and 85.0 ms with folded batch
//! norms. The outputs of the two differ by 5e-6. In batches of 2 (`--batch 2`), batch had 98.0 %,
//! group 97.4 %.
//!
//! Change `CHANNELS`, the blocks in `Net::new`, or `Options::batch`. Batch norm needs batches, the
//! others do not.

mod common;

use std::process::ExitCode;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::ops::Identity;
use candle_nn::{Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap};
use candle_norm::{BatchNorm, NormConfig, batch_norm};
use clap::Parser;
use common::{Digits, Training, batches, initialize, largest_difference};
use rand::SeedableRng;
use rand::rngs::StdRng;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of each of the three stages.
const CHANNELS: [usize; 3] = [16, 32, 32];
const BATCH: usize = 32;
const EPOCHS: usize = 10;
const LEARNING_RATE: f64 = 5e-3;
/// Of the test digits, in percent.
const REACHES: f32 = 95.;

/// Trains a residual network on handwritten digits, and folds its batch norms away.
#[derive(Debug, Parser)]
struct Options {
    /// batch, layer, group, group:N (N groups), instance, rms or none
    #[arg(long, default_value = "batch", value_parser = common::norm)]
    norm: NormConfig,
    /// Images in a step
    #[arg(long, default_value_t = BATCH)]
    batch: usize,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// A convolution and its norm.
struct ConvNorm<N> {
    conv: Conv2d,
    norm: N,
}

impl<N: ModuleT> ModuleT for ConvNorm<N> {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.norm.forward_t(&self.conv.forward(xs)?, train)
    }
}

/// Two convolutions, and what goes around them: the input, or a convolution of it where its shape
/// changes.
struct Block<N> {
    first: ConvNorm<N>,
    second: ConvNorm<N>,
    around: Option<ConvNorm<N>>,
}

impl<N: ModuleT> ModuleT for Block<N> {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let ys = self.first.forward_t(xs, train)?.relu()?;
        let ys = self.second.forward_t(&ys, train)?;
        match &self.around {
            Some(around) => ys + around.forward_t(xs, train)?,
            None => ys + xs,
        }?
        .relu()
    }
}

struct Net<N> {
    stem: ConvNorm<N>,
    blocks: Vec<Block<N>>,
    head: Linear,
}

impl<N> Net<N> {
    /// `norm` builds the norm of so many channels.
    fn new(vb: VarBuilder, norm: impl Fn(usize, VarBuilder) -> Result<N>) -> Result<Self> {
        let conv = |name: &str, kernel: usize, (inputs, outputs), stride| {
            let vb = vb.pp(name);
            let config = Conv2dConfig {
                padding: kernel / 2,
                stride,
                ..Default::default()
            };
            Result::Ok(ConvNorm {
                conv: candle_nn::conv2d_no_bias(inputs, outputs, kernel, config, vb.pp("conv"))?,
                norm: norm(outputs, vb.pp("norm"))?,
            })
        };
        let mut blocks = vec![];
        for (i, (&inputs, &outputs)) in CHANNELS[..1]
            .iter()
            .chain(&CHANNELS)
            .zip(&CHANNELS)
            .enumerate()
        {
            let part = |part| format!("blocks.{i}.{part}");
            let stride = if inputs == outputs { 1 } else { 2 };
            blocks.push(Block {
                first: conv(&part("first"), 3, (inputs, outputs), stride)?,
                second: conv(&part("second"), 3, (outputs, outputs), 1)?,
                around: match stride {
                    1 => None,
                    _ => Some(conv(&part("around"), 1, (inputs, outputs), stride)?),
                },
            });
        }
        Ok(Self {
            stem: conv("stem", 3, (1, CHANNELS[0]), 1)?,
            blocks,
            head: candle_nn::linear(CHANNELS[2], 10, vb.pp("head"))?,
        })
    }

    /// The same network with other convolutions and norms.
    fn map<M>(&self, change: impl Fn(&ConvNorm<N>) -> Result<ConvNorm<M>>) -> Result<Net<M>> {
        let block = |block: &Block<N>| {
            Ok(Block {
                first: change(&block.first)?,
                second: change(&block.second)?,
                around: block.around.as_ref().map(&change).transpose()?,
            })
        };
        Ok(Net {
            stem: change(&self.stem)?,
            blocks: self.blocks.iter().map(block).collect::<Result<_>>()?,
            head: self.head.clone(),
        })
    }
}

impl<N: ModuleT> ModuleT for Net<N> {
    /// Images `[N, 1, 8, 8]` to logits `[N, 10]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let mut xs = self.stem.forward_t(images, train)?.relu()?;
        for block in &self.blocks {
            xs = block.forward_t(&xs, train)?;
        }
        self.head.forward(&xs.mean((2, 3))?)
    }
}

fn train(net: &impl ModuleT, vars: &VarMap, digits: &Digits, options: &Options) -> Result<()> {
    initialize(vars, 1)?;
    let mut rng = StdRng::seed_from_u64(1);
    let batches = batches(digits.len(), options.batch, EPOCHS, &mut rng);
    let training = Training {
        steps: if options.quick { 8 } else { batches.len() },
        learning_rate: LEARNING_RATE,
        weight_decay: 0.05,
        warm_up: 0,
    };
    training.run(vars, |step| {
        let batch = digits.select(&batches[step])?;
        cross_entropy(&net.forward_t(&batch.images, true)?, &batch.labels)
    })
}

fn run(options: &Options) -> Result<()> {
    let (digits, test) = Digits::load()?;
    let passes = if options.quick { 2 } else { 10 };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    println!("                            test digits right, time for all 500");
    let NormConfig::Batch(batch) = options.norm else {
        let net = Net::new(vb, |channels, vb| options.norm.channels(channels, vb))?;
        train(&net, &vars, &digits, options)?;
        let trained = test.evaluate(&net, passes)?;
        println!("{:28}{trained}", format!("trained, {}", options.norm));
        println!("Change the norm: --norm batch trains, freezes and folds; the batch: --batch 2.");
        return Ok(());
    };
    let net: Net<BatchNorm> = Net::new(vb, |channels, vb| batch_norm(channels, batch, vb))?;
    train(&net, &vars, &digits, options)?;
    let trained = test.evaluate(&net, passes)?;
    println!("trained, batch              {trained}");
    // No batch moves the statistics any more.
    let frozen = net.map(|ConvNorm { conv, norm }| {
        let (conv, norm) = (conv.clone(), norm.frozen()?);
        Ok(ConvNorm { conv, norm })
    })?;
    let fixed = test.evaluate(&frozen, passes)?;
    println!("statistics frozen           {fixed}");
    // A norm with fixed statistics is a scale and a shift of each channel: the convolution can do
    // both.
    let folded = frozen.map(|ConvNorm { conv, norm }| {
        let (conv, norm) = (norm.fold_into(conv)?, Identity);
        Ok(ConvNorm { conv, norm })
    })?;
    let plain = test.evaluate(&folded, passes)?;
    println!("folded into the convolutions{plain}");

    let by_freezing = largest_difference(&trained.logits, &fixed.logits)?;
    let by_folding = largest_difference(&trained.logits, &plain.logits)?;
    println!("Outputs changed by freezing: {by_freezing:.0e}, by folding: {by_folding:.0e}");
    println!("Change the norm: --norm group, layer, instance, rms or none; the batch: --batch 2.");
    if by_freezing > 1e-4 || by_folding > 1e-3 {
        bail!("expected the same outputs before and after")
    }
    if !options.quick && options.batch == BATCH && plain.accuracy < REACHES {
        bail!("expected {REACHES} % of the digits right")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
