//! A small diffusion transformer (DiT) draws the digits that it is asked for.
//!
//! The time and the class reach every block through AdaLN-Zero: `condition_projection` makes
//! shifts, scales and gates of them, `forward_modulated_by` shifts and scales behind a norm without
//! parameters, and `gated_residual` lets the sublayer in. All gates start from zero, so that the
//! network starts as the identity. It learns by flow matching: the velocity from noise to an image.
//!
//! ```text
//! cargo run --release --example dit_digits
//! cargo run --release --example dit_digits -- --drawn-start --guidance 1
//! ```
//!
//! Of its samples, 95 % have a training digit of the class that they were asked for as their
//! nearest one. One run had 99.2 %, and 96.0 % of the test digits. The mean squared distance of two
//! samples of a class was 2.90, that of two test digits 5.25: guidance makes samples more alike.
//!
//! Change the start (`--drawn-start`), `--guidance`, or `BLOCKS`.

mod common;
#[path = "common/samples.rs"]
mod samples;

use std::process::ExitCode;

use candle_core::{DType, Device, IndexOp, Result, Tensor, bail};
use candle_nn::{Embedding, Linear, VarBuilder, VarMap, embedding, linear};
use candle_norm::ops::{GateOptions, gated_residual, softmax_last_dim};
use candle_norm::{Affine, ChunkOrder, ConditionProjection, LayerNorm, LayerNormOptions};
use candle_norm::{condition_projection, layer_norm};
use clap::Parser;
use common::{Digits, Training, batches, initialize};
use rand::{Rng, SeedableRng, rngs::StdRng};
use samples::noise;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Side of a patch; an image of 8×8 has 16 of them.
const PATCH: usize = 2;
const TOKENS: usize = (8 / PATCH) * (8 / PATCH);
const WIDTH: usize = 64;
const HEADS: usize = 4;
const BLOCKS: usize = 3;
const BATCH: usize = 64;
const EPOCHS: usize = 40;
/// The class of an image whose class is not told: what guidance leads away from.
const UNTOLD: u32 = 10;
const GUIDANCE: f64 = 2.;
/// Steps from noise to an image.
const STEPS: usize = 50;
/// Samples of the class that they were asked for, in percent.
const REACHES: f32 = 95.;
/// The distances within a class, relative to those of real digits: one image a class is no sample.
const VARIETY: f32 = 0.4;

/// Trains a diffusion transformer on handwritten digits, and draws some.
#[derive(Debug, Parser)]
struct Options {
    /// Start shifts, scales and gates from weights that are drawn, and not from zero
    #[arg(long)]
    drawn_start: bool,
    /// How far samples are led towards their class; 1 is as the network learned it
    #[arg(long, default_value_t = GUIDANCE)]
    guidance: f64,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

/// A norm without parameters of its own.
fn norm(vb: VarBuilder) -> Result<LayerNorm> {
    let mut options = LayerNormOptions::from(1e-6);
    options.affine = Affine::None;
    layer_norm(WIDTH, options, vb)
}

/// Attention of all patches to each other, and a perceptron, both modulated by the condition.
struct Block {
    condition: ConditionProjection,
    norm: LayerNorm,
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            condition: condition_projection(WIDTH, WIDTH, ChunkOrder::DIT, vb.clone())?,
            norm: norm(vb.pp("norm"))?,
            qkv: linear(WIDTH, 3 * WIDTH, vb.pp("qkv"))?,
            out: linear(WIDTH, WIDTH, vb.pp("out"))?,
            up: linear(WIDTH, 4 * WIDTH, vb.pp("up"))?,
            down: linear(4 * WIDTH, WIDTH, vb.pp("down"))?,
        })
    }

    fn attention(&self, xs: &Tensor) -> Result<Tensor> {
        let n = xs.dim(0)?;
        let qkv = (xs.apply(&self.qkv)?).reshape((n, TOKENS, 3, HEADS, WIDTH / HEADS))?;
        let part = |i| qkv.i((.., .., i))?.transpose(1, 2)?.contiguous();
        let (q, k, v): (_, Tensor, _) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * ((WIDTH / HEADS) as f64).powf(-0.5))?;
        let mixed = softmax_last_dim(&scores)?.matmul(&v)?;
        mixed.transpose(1, 2)?.flatten_from(2)?.apply(&self.out)
    }

    fn forward(&self, xs: &Tensor, condition: &Tensor) -> Result<Tensor> {
        let chunks = self.condition.forward(condition)?;
        let add = |xs: &Tensor, update: Tensor, part| {
            let options = GateOptions::default();
            gated_residual(xs, &update, chunks.gate(part)?, None, options)
        };
        let normed = |xs, part| (self.norm).forward_modulated_by(xs, &chunks.modulation(part)?);
        let xs = add(xs, self.attention(&normed(xs, 0)?)?, 0)?;
        let update = normed(&xs, 1)?.apply(&self.up)?.gelu_erf()?;
        add(&xs, update.apply(&self.down)?, 1)
    }
}

struct Dit {
    /// Of the pixels of a patch.
    patches: Linear,
    places: Tensor,
    time: Linear,
    classes: Embedding,
    condition: Linear,
    blocks: Vec<Block>,
    last: (ConditionProjection, LayerNorm, Linear),
}

impl Dit {
    fn new(options: &Options, vars: &VarMap) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
        let (size, last) = (PATCH * PATCH, vb.pp("last"));
        let block = |i| Block::new(vb.pp(format!("blocks.{i}")));
        let net = Self {
            patches: linear(size, WIDTH, vb.pp("patches"))?,
            places: vb.get((TOKENS, WIDTH), "places")?,
            time: linear(1, WIDTH, vb.pp("time"))?,
            classes: embedding(UNTOLD as usize + 1, WIDTH, vb.pp("classes"))?,
            condition: linear(WIDTH, WIDTH, vb.pp("condition"))?,
            blocks: (0..BLOCKS).map(block).collect::<Result<_>>()?,
            last: (
                condition_projection(WIDTH, WIDTH, ChunkOrder::DIT_FINAL, last.clone())?,
                norm(last.pp("norm"))?,
                linear(WIDTH, size, last.pp("linear"))?,
            ),
        };
        initialize(vars, 1)?;
        // All variables were drawn: these belong at zero.
        for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
            if !options.drawn_start && name.contains("adaLN") || name == "last.linear.weight" {
                var.set(&var.zeros_like()?.detach())?;
            }
        }
        Ok(net)
    }

    /// The velocity of images `[N, 1, 8, 8]` of these classes at times `[N]` from 0 to 1.
    fn forward(&self, images: &Tensor, times: &Tensor, classes: &Tensor) -> Result<Tensor> {
        let (n, side) = (images.dim(0)?, 8 / PATCH);
        let grid = images.reshape((n, side, PATCH, side, PATCH))?;
        let patches = (grid.transpose(2, 3)?.contiguous()?).reshape((n, TOKENS, PATCH * PATCH))?;
        let mut xs = patches.apply(&self.patches)?.broadcast_add(&self.places)?;
        let time = times.unsqueeze(1)?.apply(&self.time)?;
        let condition = (time + classes.apply(&self.classes)?)?.silu()?;
        let condition = condition.apply(&self.condition)?;
        for block in &self.blocks {
            xs = block.forward(&xs, &condition)?;
        }
        let (projection, norm, linear) = &self.last;
        let chunks = projection.forward(&condition)?;
        let xs = norm.forward_modulated_by(&xs, &chunks.modulation(0)?)?;
        let patches = xs.apply(linear)?.reshape((n, side, side, PATCH, PATCH))?;
        patches.transpose(2, 3)?.contiguous()?.reshape((n, 1, 8, 8))
    }

    /// Images of these classes, from noise.
    fn sample(&self, classes: &Tensor, guidance: f64, rng: &mut StdRng) -> Result<Tensor> {
        let n = classes.elem_count();
        let untold = Tensor::full(UNTOLD, n, &Device::Cpu)?;
        let both = Tensor::cat(&[classes, &untold], 0)?;
        let velocity = |xs: &Tensor, time: f64| {
            let times = Tensor::full(time as f32, 2 * n, &Device::Cpu)?;
            let twice = Tensor::cat(&[xs, xs], 0)?;
            let both = self.forward(&twice, &times, &both)?.detach();
            let untold = both.narrow(0, n, n)?;
            &untold + ((both.narrow(0, 0, n)? - &untold)? * guidance)?
        };
        let mut xs = noise(n, rng)?;
        for step in 0..STEPS {
            xs = (&xs + (velocity(&xs, step as f64 / STEPS as f64)? / STEPS as f64)?)?;
        }
        ((xs + 1.)? / 2.)?.clamp(0f32, 1f32)
    }
}

fn train(net: &Dit, vars: &VarMap, digits: &Digits, quick: bool) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(1);
    let batches = batches(digits.len(), BATCH, EPOCHS, &mut rng);
    let training = Training {
        steps: if quick { 8 } else { batches.len() },
        learning_rate: 3e-3,
        weight_decay: 0.01,
        warm_up: 50,
    };
    training.run(vars, |step| {
        let batch = digits.select(&batches[step])?;
        let (images, noise) = (((batch.images * 2.)? - 1.)?, noise(BATCH, &mut rng)?);
        let times: [f32; BATCH] = [(); BATCH].map(|()| rng.random());
        let times = Tensor::new(&times, &Device::Cpu)?;
        // One class in ten is not told.
        let told = [(); BATCH].map(|()| u8::from(rng.random_bool(0.9)));
        let untold = Tensor::full(UNTOLD, BATCH, &Device::Cpu)?;
        let classes = Tensor::new(&told, &Device::Cpu)?.where_cond(&batch.labels, &untold)?;
        let velocity = (images - &noise)?;
        let between = (&noise + velocity.broadcast_mul(&times.reshape((BATCH, 1, 1, 1))?)?)?;
        let error = (net.forward(&between, &times, &classes)? - velocity)?;
        error.sqr()?.mean_all()
    })
}

fn run(options: &Options) -> Result<()> {
    let (digits, test) = Digits::load()?;
    let vars = VarMap::new();
    let net = Dit::new(options, &vars)?;
    train(&net, &vars, &digits, options.quick)?;

    let count = if options.quick { 10u32 } else { 50 };
    let labels = Tensor::from_iter((0..10 * count).map(|i| i % 10), &Device::Cpu)?;
    let images = net.sample(&labels, options.guidance, &mut StdRng::seed_from_u64(0))?;
    let drawn = Digits { images, labels };
    samples::write("dit_digits", &drawn.images.narrow(0, 0, 100)?)?;
    let (_, variety) = samples::judge("test digits", &test, &digits)?;
    let (right, own) = samples::judge("samples", &drawn, &digits)?;
    println!("Change the start: --drawn-start; how far samples are led: --guidance 1 or 4.");
    let default = !options.drawn_start && options.guidance == GUIDANCE && !options.quick;
    if default && (right < REACHES || own < VARIETY * variety) {
        bail!("expected {REACHES} % of the classes, and {VARIETY} of the variety of real digits")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
