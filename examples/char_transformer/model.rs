//! The model: blocks of attention and a perceptron around a residual stream, with norms before or after.

use candle_core::{D, IndexOp, Module, Result, Tensor};
use candle_nn::ops::softmax;
use candle_nn::{Embedding, Linear, VarBuilder, linear, linear_no_bias};
use candle_norm::{LayerNorm, RmsNorm, layer_norm, rms_norm};
use clap::ValueEnum;

/// Characters that a prediction can look back on.
pub(crate) const CONTEXT: usize = 64;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const BLOCKS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    Layer,
    Rms,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Place {
    Pre,
    Post,
}

/// What normalizes, and where.
#[derive(Debug, Clone, Copy, PartialEq, clap::Args)]
pub(crate) struct Norms {
    /// What normalizes
    #[arg(long, value_enum, default_value_t = Kind::Layer)]
    pub(crate) norm: Kind,
    /// Before the sublayers, or after what they are added to
    #[arg(long, value_enum, default_value_t = Place::Pre)]
    pub(crate) place: Place,
    /// Normalize queries and keys too
    #[arg(long)]
    pub(crate) qk_norm: bool,
}

enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
    None,
}

impl Norm {
    fn new(kind: Kind, vb: VarBuilder) -> Result<Self> {
        Ok(match kind {
            Kind::Layer => Self::Layer(layer_norm(WIDTH, 1e-5, vb)?),
            Kind::Rms => Self::Rms(rms_norm(WIDTH, 1e-6, vb)?),
            Kind::None => Self::None,
        })
    }

    /// The normalized sum, and the sum.
    fn add(&self, update: &Tensor, stream: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Layer(norm) => norm.forward_add(update, stream),
            Self::Rms(norm) => norm.forward_add(update, stream),
            Self::None => {
                let sum = (update + stream)?;
                Ok((sum.clone(), sum))
            }
        }
    }
}

struct Attention {
    qkv: Linear,
    out: Linear,
    qk_norms: Option<[RmsNorm; 2]>,
}

impl Module for Attention {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (n, length, _) = xs.dims3()?;
        let heads = self
            .qkv
            .forward(xs)?
            .reshape((n, length, 3, HEADS, WIDTH / HEADS))?;
        let part = |i| heads.i((.., .., i))?.transpose(1, 2)?.contiguous();
        let (mut q, mut k, v) = (part(0)?, part(1)?, part(2)?);
        if let Some([of_q, of_k]) = &self.qk_norms {
            (q, k) = (of_q.forward(&q)?, of_k.forward(&k)?);
        }
        let scale = ((WIDTH / HEADS) as f64).powf(-0.5);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
        // Nothing is seen of what comes later.
        let mask = (0..length * length).map(|at| match at % length > at / length {
            true => f32::NEG_INFINITY,
            false => 0.,
        });
        let mask = Tensor::from_iter(mask, xs.device())?.reshape((length, length))?;
        let weights = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let mixed = weights.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?;
        self.out.forward(&mixed)
    }
}

struct Block {
    attention: Attention,
    mlp: [Linear; 2],
    norms: [Norm; 2],
}

impl Block {
    fn new(options: Norms, vb: VarBuilder) -> Result<Self> {
        let qk_norm = |name| rms_norm(WIDTH / HEADS, 1e-6, vb.pp(name));
        let qk_norms = match options.qk_norm {
            true => Some([qk_norm("q_norm")?, qk_norm("k_norm")?]),
            false => None,
        };
        Ok(Self {
            attention: Attention {
                qkv: linear_no_bias(WIDTH, 3 * WIDTH, vb.pp("qkv"))?,
                out: linear(WIDTH, WIDTH, vb.pp("out"))?,
                qk_norms,
            },
            mlp: [
                linear(WIDTH, 4 * WIDTH, vb.pp("up"))?,
                linear(4 * WIDTH, WIDTH, vb.pp("down"))?,
            ],
            norms: [
                Norm::new(options.norm, vb.pp("norm1"))?,
                Norm::new(options.norm, vb.pp("norm2"))?,
            ],
        })
    }

    fn mlp(&self, xs: &Tensor) -> Result<Tensor> {
        self.mlp[1].forward(&self.mlp[0].forward(xs)?.relu()?)
    }
}

pub(crate) struct Transformer {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    last: Norm,
    head: Linear,
    place: Place,
}

impl Transformer {
    pub(crate) fn new(vocabulary: usize, options: Norms, vb: VarBuilder) -> Result<Self> {
        let block = |i| Block::new(options, vb.pp(format!("blocks.{i}")));
        Ok(Self {
            tokens: candle_nn::embedding(vocabulary, WIDTH, vb.pp("tokens"))?,
            positions: candle_nn::embedding(CONTEXT, WIDTH, vb.pp("positions"))?,
            blocks: (0..BLOCKS).map(block).collect::<Result<_>>()?,
            last: Norm::new(options.norm, vb.pp("last"))?,
            head: linear(WIDTH, vocabulary, vb.pp("head"))?,
            place: options.place,
        })
    }

    /// Characters `[N, L]` to the logits of those that follow, `[N, L, vocabulary]`.
    pub(crate) fn forward(&self, characters: &Tensor) -> Result<Tensor> {
        let tokens = self.tokens.forward(characters)?;
        let positions = Tensor::arange(0, characters.dim(1)? as u32, characters.device())?;
        let positions = self
            .positions
            .forward(&positions)?
            .broadcast_as(tokens.shape())?
            .contiguous()?;
        if self.place == Place::Post {
            let mut xs = (tokens + positions)?;
            for block in &self.blocks {
                (xs, _) = block.norms[0].add(&block.attention.forward(&xs)?, &xs)?;
                (xs, _) = block.norms[1].add(&block.mlp(&xs)?, &xs)?;
            }
            return self.head.forward(&xs);
        }
        // What the last sublayer adds waits for the norm of the next.
        let (mut update, mut stream) = (tokens, positions);
        for block in &self.blocks {
            let (xs, sum) = block.norms[0].add(&update, &stream)?;
            let (xs, sum) = block.norms[1].add(&block.attention.forward(&xs)?, &sum)?;
            (update, stream) = (block.mlp(&xs)?, sum);
        }
        self.head.forward(&self.last.add(&update, &stream)?.0)
    }
}
