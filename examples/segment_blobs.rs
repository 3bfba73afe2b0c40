//! A U-Net segments blobs in images whose contrast varies a hundredfold, trained with two images in
//! a batch.
//!
//! ```text
//! cargo run --release --example segment_blobs
//! cargo run --release --example segment_blobs -- --norm none,batch,group:4,instance,layer
//! ```
//!
//! Each norm has the better of two learning rates, which is chosen on separate images. Then it is
//! trained with three seeds. The score is the Dice coefficient, the overlap of the predicted and
//! the true blobs: 1 is perfect, 0 is none.
//!
//! It reaches 0.9 with `--norm group:4`. Three seeds of each had, as the median with the range:
//! layer 0.916 (0.874 to 0.917), group:4 0.915 (0.903 to 0.919), instance 0.910 (0.904 to 0.914),
//! none 0.845 (0.173 to 0.875), batch 0.777 (0.690 to 0.786). Each norm is best at 0.01, the higher
//! of the two rates.
//!
//! Change the norms, `--batch`, or the range of the contrast in `Blobs::draw`.

mod common;

use std::process::ExitCode;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, bail};
use candle_nn::{Conv2d, Conv2dConfig, VarBuilder, VarMap};
use candle_norm::{NormConfig, NormedLayer};
use clap::Parser;
use common::{Training, initialize, picture, progress_bar};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SIZE: usize = 24;
/// At 24, 12 and 6 pixels.
const CHANNELS: [usize; 3] = [8, 16, 32];
/// Standard deviation of the noise where a blob has height 1.
const NOISE: f32 = 0.5;
const BATCH: usize = 2;
const STEPS: usize = 200;
const SEEDS: u64 = 3;
/// Learning rates to choose from, on a seed that no result comes from.
const RATES: [f64; 2] = [3e-3, 1e-2];
const TUNING_SEED: u64 = 1000;
/// The median Dice coefficient of the default norm.
const REACHES: f32 = 0.9;

/// Trains a U-Net to segment blobs, in batches of two.
#[derive(Debug, Parser)]
struct Options {
    /// Kinds to compare: group:N (N groups), instance, layer, rms, batch, switch, weight, none
    #[arg(long, value_delimiter = ',', default_value = "group:4", value_parser = common::norm)]
    norm: Vec<NormConfig>,
    /// Images in a step
    #[arg(long, default_value_t = BATCH)]
    batch: usize,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// Images `[N, 1, 24, 24]`, and masks of the same shape with 1 in a blob and 0 elsewhere.
struct Blobs {
    images: Tensor,
    masks: Tensor,
}

impl Blobs {
    /// Two to four discs an image, in noise. The contrast multiplies both.
    fn draw(count: usize, rng: &mut StdRng) -> Result<Self> {
        let (mut images, mut masks) = (vec![], vec![]);
        for _ in 0..count {
            let contrast = 0.1 * 100f32.powf(rng.random());
            let discs: Vec<[f32; 3]> = (0..rng.random_range(2..=4))
                .map(|_| {
                    let center = 3.0..SIZE as f32 - 3.;
                    let [x, y] = [center.clone(), center].map(|range| rng.random_range(range));
                    [x, y, rng.random_range(2.0..4.)]
                })
                .collect();
            for pixel in 0..SIZE * SIZE {
                let (x, y) = ((pixel % SIZE) as f32, (pixel / SIZE) as f32);
                let inside = |&[at, high, radius]: &[f32; 3]| (x - at).hypot(y - high) <= radius;
                let mask = f32::from(u8::from(discs.iter().any(inside)));
                let noise: f32 = rng.sample(StandardNormal);
                images.push(contrast * (mask + NOISE * noise));
                masks.push(mask);
            }
        }
        let tensor = |values| Tensor::from_vec(values, (count, 1, SIZE, SIZE), &Device::Cpu);
        Ok(Self {
            images: tensor(images)?,
            masks: tensor(masks)?,
        })
    }

    /// Binary cross entropy of the logits, in a form that does not overflow.
    fn loss(&self, logits: &Tensor) -> Result<Tensor> {
        let log = (logits.abs()?.neg()?.exp()? + 1.)?.log()?;
        (logits.relu()? - (logits * &self.masks)? + log)?.mean_all()
    }

    /// Dice coefficient of the predicted pixels, as the mean over the images.
    fn dice(&self, logits: &Tensor) -> Result<f32> {
        let predicted = logits.gt(0.)?.to_dtype(DType::F32)?;
        let pixels = |mask: &Tensor| mask.flatten_from(1)?.sum(1);
        let both = pixels(&(&predicted * &self.masks)?)?;
        let each = (pixels(&predicted)? + pixels(&self.masks)?)?;
        ((both * 2.)? / each)?.mean_all()?.to_scalar()
    }
}

/// Two convolutions, each with its norm.
struct Block(NormedLayer, NormedLayer);

impl ModuleT for Block {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.0.forward_t(xs, train)?.relu()?;
        self.1.forward_t(&xs, train)?.relu()
    }
}

struct UNet {
    down: [Block; 2],
    bottom: Block,
    up: [Block; 2],
    out: Conv2d,
}

impl UNet {
    fn new(norm: NormConfig, vb: VarBuilder) -> Result<Self> {
        let padded = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let block = |name, inputs, outputs| {
            let conv = |inputs, part| norm.conv2d(inputs, outputs, 3, padded, vb.pp(name).pp(part));
            Result::Ok(Block(conv(inputs, "first")?, conv(outputs, "second")?))
        };
        let [c24, c12, c6] = CHANNELS;
        Ok(Self {
            down: [block("down24", 1, c24)?, block("down12", c24, c12)?],
            bottom: block("bottom", c12, c6)?,
            up: [
                block("up12", c6 + c12, c12)?,
                block("up24", c12 + c24, c24)?,
            ],
            out: candle_nn::conv2d(c24, 1, 1, Default::default(), vb.pp("out"))?,
        })
    }
}

impl ModuleT for UNet {
    /// Images `[N, 1, 24, 24]` to the logits of their masks.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let at24 = self.down[0].forward_t(images, train)?;
        let at12 = self.down[1].forward_t(&at24.avg_pool2d(2)?, train)?;
        let xs = self.bottom.forward_t(&at12.avg_pool2d(2)?, train)?;
        let xs = Tensor::cat(&[&xs.upsample_nearest2d(12, 12)?, &at12], 1)?;
        let xs = self.up[0].forward_t(&xs, train)?;
        let xs = Tensor::cat(&[&xs.upsample_nearest2d(24, 24)?, &at24], 1)?;
        self.out.forward(&self.up[1].forward_t(&xs, train)?)
    }
}

/// A network that was trained on images of its own.
fn train(
    norm: NormConfig,
    learning_rate: f64,
    seed: u64,
    options: &Options,
    bar: &ProgressBar,
) -> Result<UNet> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let net = UNet::new(norm, vb)?;
    initialize(&vars, seed)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let training = Training {
        steps: if options.quick { 5 } else { STEPS },
        learning_rate,
        weight_decay: 0.01,
        warm_up: 0,
    };
    training.run_with(&vars, bar, |_| {
        let blobs = Blobs::draw(options.batch, &mut rng)?;
        blobs.loss(&net.forward_t(&blobs.images, true)?)
    })?;
    Ok(net)
}

fn run(options: &Options) -> Result<()> {
    let draw = |seed| Blobs::draw(100, &mut StdRng::seed_from_u64(seed));
    // Away from the seeds that networks draw their images by.
    let (validation, test) = (draw(u64::MAX - 1)?, draw(u64::MAX)?);
    let (rates, seeds) = match options.quick {
        true => (&RATES[..1], 1),
        false => (&RATES[..], SEEDS),
    };
    println!("                 Dice coefficient on 100 images: median (range of {seeds} seeds)");
    let mut shown = vec![];
    for &norm in &options.norm {
        let bar = progress_bar(STEPS);
        let mut best = (f32::NEG_INFINITY, rates[0]);
        for &rate in rates {
            bar.reset();
            let net = train(norm, rate, TUNING_SEED, options, &bar)?;
            let dice = validation.dice(&net.forward_t(&validation.images, false)?)?;
            best = if dice > best.0 { (dice, rate) } else { best };
        }
        let mut scores = vec![];
        for seed in 0..seeds {
            bar.reset();
            let net = train(norm, best.1, seed, options, &bar)?;
            let logits = net.forward_t(&test.images, false)?;
            scores.push(test.dice(&logits)?);
            shown = vec![test.masks.clone(), logits.gt(0.)?.to_dtype(DType::F32)?];
        }
        scores.sort_by(f32::total_cmp);
        let (median, last) = (scores[scores.len() / 2], scores[scores.len() - 1]);
        println!(
            "{:16} {median:.3} ({:.3} to {last:.3}), learning rate {}",
            norm.to_string(),
            scores[0],
            best.1
        );
        let default = matches!(norm, NormConfig::Group { num_groups: 4, .. });
        if default && options.batch == BATCH && !options.quick && median < REACHES {
            bail!("expected a Dice coefficient of {REACHES} with group norm")
        }
    }
    println!("\nThe blobs of an image, and what the last network found:");
    let first: Vec<_> = shown
        .iter()
        .map(|masks| masks.narrow(0, 0, 1)?.avg_pool2d(2)?.get(0)?.get(0))
        .collect::<Result<_>>()?;
    println!("{}", picture(&first)?);
    println!("Change the norms: --norm none,batch,instance,layer; the batch: --batch 16.");
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
