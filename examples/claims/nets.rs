//! The networks, and starts that are the same on every run.

use std::hash::{DefaultHasher, Hash, Hasher};

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Init, Linear, Module, ModuleT, VarBuilder, VarMap, linear};
use candle_norm::{Norm, NormConfig, NormedLayer, ops, trainable_vars};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

/// What follows the norm of a hidden layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Relu,
    Tanh,
    Sigmoid,
}

impl Activation {
    pub(crate) fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu => x.relu(),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => candle_nn::ops::sigmoid(x),
        }
    }
}

/// Hidden layers, each with its norm and its activation, and a linear head.
pub(crate) struct Mlp {
    pub(crate) hidden: Vec<NormedLayer>,
    pub(crate) head: Linear,
    pub(crate) activation: Activation,
}

impl Mlp {
    pub(crate) fn new(
        norm: &str,
        widths: &[usize],
        outputs: usize,
        activation: Activation,
        vb: VarBuilder,
    ) -> Result<Self> {
        let norm: NormConfig = norm.parse()?;
        let layer = |(i, pair): (usize, &[usize])| {
            norm.linear(pair[0], pair[1], vb.pp(format!("hidden{i:02}")))
        };
        let hidden = widths.windows(2).enumerate().map(layer);
        Ok(Self {
            hidden: hidden.collect::<Result<_>>()?,
            head: linear(widths[widths.len() - 1], outputs, vb.pp("head"))?,
            activation,
        })
    }
}

impl ModuleT for Mlp {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.hidden {
            x = self.activation.apply(&layer.forward_t(&x, train)?)?;
        }
        self.head.forward(&x)
    }
}

/// A convolution of 3 × 3 with its norm, on maps of one size.
///
/// As one matrix product over all positions: for maps as small as these that is many times as fast as candle's own on the CPU.
struct Conv {
    side: usize,
    /// For each pixel of a kernel and each position, the position that it sees; one behind the last where that is outside.
    seen: Tensor,
    weight: Tensor,
    /// Of weight norm.
    magnitude: Option<Tensor>,
    bias: Option<Tensor>,
    norm: Option<Box<dyn Norm>>,
}

impl Conv {
    fn new(norm: &str, inputs: usize, outputs: usize, side: usize, vb: VarBuilder) -> Result<Self> {
        let mut seen = vec![];
        for kernel in 0..9 {
            for position in 0..side * side {
                let (y, x) = (position / side + kernel / 3, position % side + kernel % 3);
                let inside = (1..=side).contains(&y) && (1..=side).contains(&x);
                let at = if inside {
                    (y - 1) * side + x - 1
                } else {
                    side * side
                };
                seen.push(at as u32);
            }
        }
        let own_bias = ["none", "weight", "instance"].contains(&norm);
        let names = match norm {
            "weight" => [
                "parametrizations.weight.original1",
                "parametrizations.weight.original0",
            ],
            _ => ["weight", ""],
        };
        let zero = |shape, name| vb.get_with_hints(shape, name, Init::Const(0.));
        Ok(Self {
            side,
            seen: Tensor::new(seen, &Device::Cpu)?,
            weight: zero((outputs, 9 * inputs), names[0])?,
            magnitude: match norm {
                "weight" => Some(zero((outputs, 1), names[1])?),
                _ => None,
            },
            bias: match own_bias {
                true => Some(zero((outputs, 1), "bias")?),
                false => None,
            },
            norm: match norm {
                "none" | "weight" => None,
                _ => Some(
                    norm.parse::<NormConfig>()?
                        .channels(outputs, vb.pp("norm"))?,
                ),
            },
        })
    }

    /// `[N, C, side, side]` to as many maps as there are outputs.
    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let (n, c, positions) = (x.dim(0)?, x.dim(1)?, self.side * self.side);
        let by_channel = x.flatten_from(2)?.transpose(0, 1)?.contiguous()?;
        let outside = Tensor::zeros((c, n, 1), DType::F32, &Device::Cpu)?;
        let columns = Tensor::cat(&[&by_channel, &outside], 2)?
            .index_select(&self.seen, 2)?
            .reshape((c, n, 9, positions))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((9 * c, n * positions))?;
        let weight = match &self.magnitude {
            Some(g) => ops::weight_norm(&self.weight, g, Some(0))?,
            None => self.weight.clone(),
        };
        let mut y = weight.matmul(&columns)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let maps = y
            .reshape(((), n, positions))?
            .transpose(0, 1)?
            .contiguous()?;
        let maps = maps.reshape((n, (), self.side, self.side))?;
        match &self.norm {
            Some(norm) => norm.forward_t(&maps, train),
            None => Ok(maps),
        }
    }
}

/// Three convolutions, each with its norm, on images `[N, 1, 8, 8]`.
pub(crate) struct Cnn {
    convs: [Conv; 3],
    head: Linear,
}

impl Cnn {
    pub(crate) fn new(norm: &str, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            convs: [
                Conv::new(norm, 1, 8, 8, vb.pp("conv1"))?,
                Conv::new(norm, 8, 16, 4, vb.pp("conv2"))?,
                Conv::new(norm, 16, 16, 4, vb.pp("conv3"))?,
            ],
            head: linear(16 * 2 * 2, 10, vb.pp("head"))?,
        })
    }
}

/// Means of 2 × 2: a reshape and two sums, where candle's pooling goes pixel by pixel.
fn halved(maps: &Tensor) -> Result<Tensor> {
    let (n, c, h, w) = maps.dims4()?;
    maps.reshape((n * c * h / 2, 2, w / 2, 2))?
        .mean(3)?
        .mean(1)?
        .reshape((n, c, h / 2, w / 2))
}

impl ModuleT for Cnn {
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let [first, second, third] = &self.convs;
        let x = halved(&first.forward(images, train)?.relu()?)?;
        let x = second.forward(&x, train)?.relu()?;
        let x = halved(&third.forward(&x, train)?.relu()?)?;
        self.head.forward(&x.flatten_from(1)?)
    }
}

/// The size of initial weights: `gain / √n`, n the number of inputs, or of inputs and outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start {
    /// √2 / √inputs, times a factor.
    He(f64),
    /// √2 / √(inputs + outputs).
    Xavier,
    /// The same for every layer.
    Fixed(f64),
}

/// A network and its variables.
pub(crate) struct Net<M> {
    pub(crate) model: M,
    pub(crate) vars: VarMap,
}

impl<M> Net<M> {
    /// He-normal weights and zero biases. The parameters of norms start as they are made; weight norm from the same weights as others.
    pub(crate) fn new(seed: u64, build: impl FnOnce(VarBuilder) -> Result<M>) -> Result<Self> {
        Self::started(Start::He(1.), seed, build)
    }

    pub(crate) fn started(
        start: Start,
        seed: u64,
        build: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<Self> {
        let vars = VarMap::new();
        let model = build(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
        let named = vars.data().lock().expect("no thread panicked").clone();
        for (name, var) in &named {
            let ofnorm = name.contains("norm");
            if name.ends_with("bias") {
                var.set(&var.zeros_like()?.detach())?;
            } else if var.rank() >= 2 && !ofnorm && !name.ends_with("original0") {
                let name = name.replace("parametrizations.weight.original1", "weight");
                var.set(&weights(start, seed, &name, var)?)?;
            }
        }
        for (name, magnitude) in &named {
            if let Some(layer) = name.strip_suffix("original0") {
                let direction = &named[&format!("{layer}original1")];
                let lengths = direction.flatten_from(1)?.sqr()?.sum(1)?.sqrt()?;
                magnitude.set(&lengths.reshape(magnitude.shape())?.detach())?;
            }
        }
        Ok(Self { model, vars })
    }

    pub(crate) fn trainable(&self) -> Vec<Var> {
        trainable_vars(&self.vars)
    }
}

/// Drawn by the seed and the name, so that no other layer has a part in it.
fn weights(start: Start, seed: u64, name: &str, var: &Var) -> Result<Tensor> {
    let (outputs, inputs) = (var.dims()[0], var.elem_count() / var.dims()[0]);
    let sigma = match start {
        Start::He(factor) => factor * (2. / inputs as f64).sqrt(),
        Start::Xavier => (2. / (inputs + outputs) as f64).sqrt(),
        Start::Fixed(sigma) => sigma,
    };
    let mut hasher = DefaultHasher::new();
    (seed, name).hash(&mut hasher);
    let normal = Normal::new(0., sigma as f32).map_err(Error::wrap)?;
    let values = normal.sample_iter(StdRng::seed_from_u64(hasher.finish()));
    let values = values.take(var.elem_count()).collect();
    Tensor::from_vec(values, var.shape(), &Device::Cpu)
}
