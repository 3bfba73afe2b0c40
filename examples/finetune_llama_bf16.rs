//! Fine-tuning a transformer of Llama's shape from a checkpoint in bf16, with its parameters in
//! f32.
//!
//! The network computes in bf16, and the optimizer updates parameters in f32 ("master weights"). If
//! a weight were in bf16, an update of less than 1/512 of it would be lost. The other run has its
//! parameters in bf16 and shows what this costs.
//!
//! ```text
//! cargo run --release --example finetune_llama_bf16
//! cargo run --release --example finetune_llama_bf16 -- --params f32 --lr 0.001
//! ```
//!
//! It reaches 3.7 bits a character on text that it was not trained on. One run had 4.796 bits
//! before fine-tuning, 3.589 with parameters in f32, and 3.872 with parameters in bf16.
//!
//! To use it for a model of your own: `Linear` and `Embedding` hold parameters of any dtype and
//! convert them for the computation. The norms of this crate take f32 parameters together with bf16
//! activations. `load_into_strict` converts the file, and `optimizers` excludes norms from weight
//! decay. The names of the tensors are those of Hugging Face.
//!
//! candle's `ops::softmax_last_dim` and `rotary_emb::rope` pass no gradients back. Train with
//! `softmax` and `rope_slow`.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;

use candle_core::{D, DType, Device, Module, Result, Tensor, bail, safetensors};
use candle_nn::{AdamW, Init, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_nn::{loss::cross_entropy, ops::softmax, rotary_emb::rope_slow};
use candle_norm::{Cast, RmsNorm, RmsNormOptions, checkpoint, param_groups, rms_norm};
use clap::{Parser, ValueEnum};
use common::{initialize, progress_bar};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Texts that the checkpoint has learned and is to learn: verse, then the prose of a license.
const BEFORE: &[u8] = include_bytes!("data/sonnets.txt");
const AFTER: &[u8] = include_bytes!("../LICENSE-APACHE");
/// A character is its ASCII code.
const VOCABULARY: usize = 128;
const CONTEXT: usize = 64;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = WIDTH / HEADS;
const INNER: usize = 172;
const BLOCKS: usize = 2;
const BATCH: usize = 8;
const STEPS: usize = 200;
const LEARNING_RATE: f64 = 5e-4;
/// Bits a character with parameters in f32, on text that was not trained on.
const REACHES: f32 = 3.7;

/// Fine-tunes a checkpoint in bf16.
#[derive(Debug, Parser)]
struct Options {
    /// Dtype that the parameters are trained in: f32, bf16
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["f32", "bf16"])]
    params: Vec<Params>,
    /// Learning rate of the first step; it falls to zero
    #[arg(long, default_value_t = LEARNING_RATE)]
    lr: f64,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Params {
    F32,
    Bf16,
}

/// Multiplies by its weight in the dtype of the input. The gradient comes back in the dtype of the
/// weight.
struct Linear(Tensor);

impl Linear {
    fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((outputs, inputs), "weight", Init::Const(0.))?;
        Ok(Self(weight))
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let weight = self.0.to_dtype(xs.dtype())?;
        candle_nn::Linear::new(weight, None).forward(xs)
    }
}

/// Looks rows up, then converts them: the gradients of a row that occurs often are summed in the
/// dtype of the weight.
struct Embedding(Tensor, DType);

impl Module for Embedding {
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let rows = candle_nn::Embedding::new(self.0.clone(), WIDTH).forward(tokens)?;
        rows.to_dtype(self.1)
    }
}

struct Block {
    input_norm: RmsNorm,
    post_attention_norm: RmsNorm,
    qkv: [Linear; 3],
    out: Linear,
    gate_up: [Linear; 2],
    down: Linear,
}

impl Block {
    fn new(vb: VarBuilder) -> Result<Self> {
        let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let kv = KV_HEADS * HEAD;
        Ok(Self {
            input_norm: norm(vb.pp("input_layernorm"))?,
            post_attention_norm: norm(vb.pp("post_attention_layernorm"))?,
            qkv: [
                Linear::new(WIDTH, WIDTH, attention.pp("q_proj"))?,
                Linear::new(WIDTH, kv, attention.pp("k_proj"))?,
                Linear::new(WIDTH, kv, attention.pp("v_proj"))?,
            ],
            out: Linear::new(WIDTH, WIDTH, attention.pp("o_proj"))?,
            gate_up: [
                Linear::new(WIDTH, INNER, mlp.pp("gate_proj"))?,
                Linear::new(WIDTH, INNER, mlp.pp("up_proj"))?,
            ],
            down: Linear::new(INNER, WIDTH, mlp.pp("down_proj"))?,
        })
    }

    fn attention(&self, xs: &Tensor, rotation: &[Tensor; 2]) -> Result<Tensor> {
        let (n, length, _) = xs.dims3()?;
        let heads = |linear: &Linear, count| {
            let heads = xs.apply(linear)?.reshape((n, length, count, HEAD))?;
            heads.transpose(1, 2)?.contiguous()
        };
        let [q, k, v] = &self.qkv;
        let rotate = |x: Tensor| rope_slow(&x, &rotation[0], &rotation[1]);
        // Queries share keys and values in groups.
        let repeat = |x: Tensor| {
            let shape = (n, KV_HEADS, HEADS / KV_HEADS, length, HEAD);
            let repeated = x.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?;
            repeated.reshape((n, HEADS, length, HEAD))
        };
        let q = rotate(heads(q, HEADS)?)?;
        let k = repeat(rotate(heads(k, KV_HEADS)?)?)?;
        let v = repeat(heads(v, KV_HEADS)?)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? * (HEAD as f64).powf(-0.5))?;
        // The logarithm of 1 and 0: nothing is seen of what comes later.
        let mask = Tensor::tril2(length, DType::F32, xs.device())?.log()?;
        let weights = softmax(
            &scores.to_dtype(DType::F32)?.broadcast_add(&mask)?,
            D::Minus1,
        )?;
        let mixed = weights.to_dtype(xs.dtype())?.matmul(&v)?;
        mixed.transpose(1, 2)?.flatten_from(2)?.apply(&self.out)
    }

    fn mlp(&self, xs: &Tensor) -> Result<Tensor> {
        let [gate, up] = &self.gate_up;
        (xs.apply(gate)?.silu()? * xs.apply(up)?)?.apply(&self.down)
    }
}

/// Llama's norm: statistics in f32, rounded to the dtype of the input before the weight is applied.
fn norm(vb: VarBuilder) -> Result<RmsNorm> {
    let options = RmsNormOptions {
        eps: Some(1e-5),
        cast: Cast::BeforeWeight,
        ..Default::default()
    };
    rms_norm(WIDTH, options, vb)
}

struct Llama {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    /// Cosines and sines of the rotary embedding.
    rotation: [Tensor; 2],
}

impl Llama {
    /// Parameters of the dtype of `vb`, activations of the dtype `compute`.
    fn new(compute: DType, vb: VarBuilder) -> Result<Self> {
        let model = vb.pp("model");
        let tokens = model.pp("embed_tokens");
        let tokens = tokens.get_with_hints((VOCABULARY, WIDTH), "weight", Init::Const(0.))?;
        let block = |i| Block::new(model.pp(format!("layers.{i}")));
        let angle = |position: usize, i: usize| {
            position as f32 * 10_000f32.powf(-2. * i as f32 / HEAD as f32)
        };
        let angles = (0..CONTEXT).flat_map(|at| (0..HEAD / 2).map(move |i| angle(at, i)));
        let angles = Tensor::from_iter(angles, vb.device())?.reshape((CONTEXT, HEAD / 2))?;
        Ok(Self {
            embedding: Embedding(tokens, compute),
            blocks: (0..BLOCKS).map(block).collect::<Result<_>>()?,
            norm: norm(model.pp("norm"))?,
            head: Linear::new(WIDTH, VOCABULARY, vb.pp("lm_head"))?,
            rotation: [
                angles.cos()?.to_dtype(compute)?,
                angles.sin()?.to_dtype(compute)?,
            ],
        })
    }

    /// Characters `[N, L]` to the logits of those that follow, `[N, L, VOCABULARY]`.
    fn forward(&self, characters: &Tensor) -> Result<Tensor> {
        // What a sublayer adds waits for the norm before the next.
        let mut stream = characters.apply(&self.embedding)?;
        let mut update = stream.zeros_like()?;
        for block in &self.blocks {
            let (xs, sum) = block.input_norm.forward_add(&update, &stream)?;
            let attended = block.attention(&xs, &self.rotation)?;
            let (xs, sum) = block.post_attention_norm.forward_add(&attended, &sum)?;
            (update, stream) = (block.mlp(&xs)?, sum);
        }
        let (xs, _) = self.norm.forward_add(&update, &stream)?;
        xs.apply(&self.head)
    }

    /// Cross entropy of the windows of the text that begin at `starts`, in nats a character.
    fn loss(&self, text: &[u8], starts: &[usize]) -> Result<Tensor> {
        let windows = |shift| {
            let window = |start: &usize| &text[start + shift..][..CONTEXT];
            let codes = starts.iter().flat_map(window).map(|&code| u32::from(code));
            Tensor::from_iter(codes, &Device::Cpu)?.reshape((starts.len(), CONTEXT))
        };
        // In bf16 the logarithms of small probabilities would be rounded to three digits.
        let logits = self.forward(&windows(0)?)?.to_dtype(DType::F32)?;
        cross_entropy(&logits.flatten_to(1)?, &windows(1)?.flatten_all()?)
    }

    /// Bits a character of a text that was not trained on.
    fn bits(&self, text: &[u8]) -> Result<f32> {
        let starts: Vec<usize> = (0..text.len() - CONTEXT).step_by(CONTEXT).collect();
        Ok(self.loss(text, &starts)?.to_scalar::<f32>()? / std::f32::consts::LN_2)
    }
}

/// Weight decay for the weights and none for norms, which it would pull to zero.
fn optimizers(vars: &VarMap) -> Result<[AdamW; 2]> {
    let groups = param_groups(vars);
    let decayed = ParamsAdamW {
        weight_decay: 0.1,
        ..Default::default()
    };
    let plain = ParamsAdamW {
        weight_decay: 0.,
        ..decayed.clone()
    };
    let decayed = AdamW::new(groups.decay, decayed)?;
    Ok([decayed, AdamW::new(groups.no_decay, plain)?])
}

fn train(model: &Llama, vars: &VarMap, text: &[u8], steps: usize, rate: f64) -> Result<()> {
    let mut optimizers = optimizers(vars)?;
    let mut rng = StdRng::seed_from_u64(1);
    let bar = progress_bar(steps);
    for step in 0..steps {
        let starts = [(); BATCH].map(|()| rng.random_range(0..text.len() - CONTEXT));
        let grads = model.loss(text, &starts)?.backward()?;
        for optimizer in &mut optimizers {
            optimizer.set_learning_rate(rate * (1. - step as f64 / steps as f64));
            optimizer.step(&grads)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Writes all variables in bf16, as checkpoints are published. To train on later, save the f32
/// ones: `VarMap::save`.
fn save_bf16(vars: &VarMap, file: &Path) -> Result<()> {
    let vars = vars.data().lock().expect("no thread panicked");
    let tensors = vars
        .iter()
        .map(|(name, var)| Ok((name.clone(), var.to_dtype(DType::BF16)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    safetensors::save(&tensors, file)
}

/// Stands for the checkpoint that you have: a network trained on verse, in a file in bf16.
fn pretrain(file: &Path, quick: bool) -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let model = Llama::new(DType::F32, vb)?;
    initialize(&vars, 1)?;
    train(
        &model,
        &vars,
        BEFORE,
        if quick { 5 } else { 2 * STEPS },
        5e-3,
    )?;
    save_bf16(&vars, file)
}

fn run(options: &Options) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.safetensors");
    pretrain(&file, options.quick)?;
    let (seen, unseen) = AFTER.split_at(AFTER.len() * 9 / 10);
    let mut scores = [f32::NAN; 2];
    for &params in &options.params {
        let vars = VarMap::new();
        let dtype = match params {
            Params::F32 => DType::F32,
            Params::Bf16 => DType::BF16,
        };
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let model = Llama::new(DType::BF16, vb)?;
        // Every tensor of the file has its variable, and every variable its tensor, or this is an
        // error.
        let report = checkpoint::load_into_strict(&vars, &file)?;
        let before = model.bits(unseen)?;
        let steps = if options.quick { 5 } else { STEPS };
        train(&model, &vars, seen, steps, options.lr)?;
        let after = model.bits(unseen)?;
        println!(
            "{report}. Parameters in {dtype:?}: {before:.3} bits a character before, {after:.3} \
            after"
        );
        save_bf16(&vars, &folder.path().join("finetuned.safetensors"))?;
        scores[params as usize] = after;
    }
    println!(
        "Change the dtype of the parameters: --params f32 or bf16; the learning rate: --lr 0.005."
    );
    let [f32_params, bf16_params] = scores;
    let default = !options.quick && options.lr == LEARNING_RATE;
    if default && (f32_params > REACHES || f32_params >= bf16_params) {
        bail!("expected {REACHES} bits at most, and fewer with parameters in f32")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}
