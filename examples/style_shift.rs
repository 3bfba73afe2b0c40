//! Instance norm against a shift of contrast and brightness, and adaptive instance norm, which
//! changes one style to another.
//!
//! A classifier learns digits of one contrast and brightness, and is tested on others. Instance
//! norm removes mean and scale of every channel of every image, and with them the shift. Batch norm
//! removes those of the training data, and the shift stays. Adaptive instance norm (AdaIN) gives
//! each image the mean and standard deviation of a training image. It works with any norm in the
//! classifier.
//!
//! ```text
//! cargo run --release --example style_shift
//! cargo run --release --example style_shift -- --norm batch,group:1
//! ```
//!
//! With instance norm it reaches 93 % of the shifted digits. One run of each had, unshifted,
//! shifted, and shifted with AdaIN: instance 94.8, 94.8 and 94.8 %; batch 96.4, 47.4 and 95.8 %;
//! layer 94.4, 53.8 and 94.4 %; none 91.8, 53.6 and 92.0 %.
//!
//! Change the shift in `shifted`, or the norms.

mod common;

use std::process::ExitCode;

use candle_core::{DType, Device, IndexOp, Module, ModuleT, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{Linear, VarBuilder, VarMap};
use candle_norm::{NormConfig, NormedLayer, ops};
use clap::Parser;
use common::{Digits, Training, batches, initialize, largest_difference, picture};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EPOCHS: usize = 8;
const BATCH: usize = 32;
const LEARNING_RATE: f64 = 5e-3;
/// Inside the root. The deviation of a digit of low contrast is 0.05.
const EPS: f64 = 1e-6;
/// Of the shifted digits, in percent, with instance norm.
const REACHES: f32 = 93.;

/// Trains a classifier for each norm, and shows it digits of another contrast and brightness.
#[derive(Debug, Parser)]
struct Options {
    /// Kinds, separated by commas: instance, batch, layer, group, group:N, rms, weight, none
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = common::norm,
        default_value = "instance,batch,layer,group:1,none"
    )]
    norm: Vec<NormConfig>,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// Convolutions without padding: around an image that is brighter, a frame of zeros would be
/// darker.
struct Net {
    conv1: NormedLayer,
    conv2: NormedLayer,
    head: Linear,
}

impl Net {
    fn new(norm: NormConfig, vb: VarBuilder) -> Result<Self> {
        let conv = |inputs, outputs, name| {
            norm.conv2d(inputs, outputs, 3, Default::default(), vb.pp(name))
        };
        Ok(Self {
            conv1: conv(1, 16, "conv1")?,
            conv2: conv(16, 32, "conv2")?,
            head: candle_nn::linear(32 * 2 * 2, 10, vb.pp("head"))?,
        })
    }
}

impl ModuleT for Net {
    /// Images `[N, 1, 8, 8]` to logits `[N, 10]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.conv1.forward_t(images, train)?.relu()?;
        let xs = self.conv2.forward_t(&xs, train)?.relu()?;
        self.head.forward(&xs.avg_pool2d(2)?.flatten_from(1)?)
    }
}

/// Gives each image its own contrast, from a quarter to twice, and its own brightness.
fn shifted(images: &Tensor, rng: &mut StdRng) -> Result<Tensor> {
    let count = images.dim(0)?;
    let mut draw = |from: f32, to: f32| {
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(from..to)).collect();
        Tensor::from_vec(values, (count, 1, 1, 1), &Device::Cpu)
    };
    let (contrast, brightness) = (draw(-2., 1.)?, draw(-1., 1.)?);
    let contrast = (contrast * std::f64::consts::LN_2)?.exp()?;
    images.broadcast_mul(&contrast)?.broadcast_add(&brightness)
}

/// Mean and deviation of the channels of an image `[1, C, H, W]`, each `[C]`.
fn style(image: &Tensor) -> Result<(Tensor, Tensor)> {
    let channels = image.squeeze(0)?.flatten_from(1)?;
    let mean = channels.mean_keepdim(1)?;
    let var = channels.broadcast_sub(&mean)?.sqr()?.mean(1)?;
    Ok((mean.squeeze(1)?, var.sqrt()?))
}

/// Adaptive instance norm: images `[N, C, H, W]`, or feature maps, in the style of one
/// `[1, C, H, W]` (Huang and Belongie, 2017, <https://arxiv.org/abs/1703.06868>).
///
/// It is an instance norm whose scale and shift are not learned: they are the deviation and the
/// mean of the style.
fn adain(content: &Tensor, style_image: &Tensor) -> Result<Tensor> {
    let (mean, deviation) = style(style_image)?;
    let (moved, _) = ops::instance_norm(content, Some(&deviation), Some(&mean), EPS)?;
    Ok(moved)
}

fn train(net: &Net, vars: &VarMap, digits: &Digits, quick: bool) -> Result<()> {
    initialize(vars, 1)?;
    let batches = batches(digits.len(), BATCH, EPOCHS, &mut StdRng::seed_from_u64(1));
    let training = Training {
        steps: if quick { 20 } else { batches.len() },
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
    let style_image = digits.images.i(..1)?;
    let test_as = |images| Digits {
        images,
        labels: test.labels.clone(),
    };
    let shifted = test_as(shifted(&test.images, &mut StdRng::seed_from_u64(0))?);
    let moved = test_as(adain(&shifted.images, &style_image)?);
    let first: Vec<_> = [&style_image, &test.images, &shifted.images, &moved.images]
        .iter()
        .map(|images| images.i((0, 0)))
        .collect::<Result<_>>()?;
    println!("{}", picture(&first)?);
    println!(
        "A training image, a test image, the same shifted, and moved to the style of the first."
    );
    let (wanted, got) = (style(&style_image)?, style(&moved.images.i(..1)?)?);
    let apart = largest_difference(&wanted.0, &got.0)?.max(largest_difference(&wanted.1, &got.1)?);
    println!("Mean and deviation differ from those of the style by {apart:.0e}\n");
    if apart > 1e-3 {
        bail!("expected the statistics of the style")
    }

    println!("test digits right     plain  shifted  moved by AdaIN");
    for &norm in &options.norm {
        let vars = VarMap::new();
        let net = Net::new(
            norm,
            VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
        )?;
        train(&net, &vars, &digits, options.quick)?;
        let accuracy = |set: &Digits| Result::Ok(set.evaluate(&net, 1)?.accuracy);
        let (plain, under_shift) = (accuracy(&test)?, accuracy(&shifted)?);
        let moved = accuracy(&moved)?;
        let name = norm.to_string();
        println!("{name:18}{plain:7.1} % {under_shift:6.1} % {moved:13.1} %");
        let instance = matches!(norm, NormConfig::Instance(_));
        if instance && !options.quick && under_shift < REACHES {
            bail!("expected {REACHES} % of the shifted digits right")
        }
    }
    println!("Change the norms: --norm group:4,rms,weight; the shift: the ranges in `shifted`.");
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
