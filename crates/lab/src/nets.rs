//! The networks, and initial values that are the same on every run.

use std::hash::{DefaultHasher, Hash, Hasher};

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Init, Linear, Module, ModuleT, VarBuilder, VarMap, linear};
use candle_norm::{Norm, NormConfig, NormedLayer, ops, trainable_vars};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

/// Step after the norm of a hidden layer.
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
        Self::with(norm.parse()?, widths, outputs, activation, vb)
    }

    pub(crate) fn with(
        norm: NormConfig,
        widths: &[usize],
        outputs: usize,
        activation: Activation,
        vb: VarBuilder,
    ) -> Result<Self> {
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

impl Mlp {
    pub(crate) fn norms(&self) -> Vec<&dyn Norm> {
        self.hidden.iter().map(NormedLayer::norm).collect()
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

/// Two hidden layers of 64 on rows of 64 pixels, each with its norm before its ReLU or after it.
pub(crate) struct Placed<N> {
    pub(crate) hidden: Vec<(Linear, N)>,
    pub(crate) head: Linear,
    before: bool,
}

impl<N> Placed<N> {
    pub(crate) fn new(
        before: bool,
        norm: impl Fn(VarBuilder) -> Result<N>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let layer = |i| {
            let vb = vb.pp(format!("hidden{i:02}"));
            Ok((linear(64, 64, vb.clone())?, norm(vb.pp("norm"))?))
        };
        Ok(Self {
            hidden: (0..2).map(layer).collect::<Result<_>>()?,
            head: linear(64, 10, vb.pp("head"))?,
            before,
        })
    }
}

impl<N: ModuleT> ModuleT for Placed<N> {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = x.clone();
        for (layer, norm) in &self.hidden {
            x = layer.forward(&x)?;
            x = match self.before {
                true => norm.forward_t(&x, train)?.relu()?,
                false => norm.forward_t(&x.relu()?, train)?,
            };
        }
        self.head.forward(&x)
    }
}

/// A convolution of 3 × 3 with its norm, on maps of one size.
///
/// As one matrix from all positions of the input to all of the output, most of it zeros: for maps
/// as small as these that is many times as fast as candle's own convolution on the CPU.
struct Conv {
    side: usize,
    /// Where in the weight each element of the matrix is; one past the last where two positions
    /// do not see each other.
    places: Tensor,
    weight: Tensor,
    /// Of weight norm.
    magnitude: Option<Tensor>,
    bias: Option<Tensor>,
    norm: Option<Box<dyn Norm>>,
}

/// The pixel of the kernel through which `output` sees `input`, if it does.
fn pixel(input: usize, output: usize, side: usize) -> Option<usize> {
    let offset = |i: usize, o: usize| (i + 1).checked_sub(o).filter(|d| *d < 3);
    Some(3 * offset(input / side, output / side)? + offset(input % side, output % side)?)
}

impl Conv {
    fn new(norm: &str, inputs: usize, outputs: usize, side: usize, vb: VarBuilder) -> Result<Self> {
        let positions = side * side;
        let mut places = vec![];
        for input in 0..inputs * positions {
            for output in 0..outputs * positions {
                let (channel, kernel) = (input / positions, output / positions);
                let place = pixel(input % positions, output % positions, side)
                    .map_or(9 * inputs * outputs, |k| {
                        (kernel * inputs + channel) * 9 + k
                    });
                places.push(place as u32);
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
            places: Tensor::new(places, &Device::Cpu)?,
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
        let (n, x) = (x.dim(0)?, x.flatten_from(1)?);
        let weight = match &self.magnitude {
            Some(g) => ops::weight_norm(&self.weight, g, Some(0))?,
            None => self.weight.clone(),
        };
        let nothing = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        let matrix = Tensor::cat(&[&weight.flatten_all()?, &nothing], 0)?;
        let matrix = matrix
            .index_select(&self.places, 0)?
            .reshape((x.dim(1)?, ()))?;
        let mut maps = x.matmul(&matrix)?.reshape((n, (), self.side * self.side))?;
        if let Some(bias) = &self.bias {
            maps = maps.broadcast_add(bias)?;
        }
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
    halving: [Tensor; 2],
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
            halving: [halving(8)?, halving(4)?],
            head: linear(16 * 2 * 2, 10, vb.pp("head"))?,
        })
    }
}

/// The matrix from maps of `side` to maps of half that side, each pixel the mean of four: candle
/// sums rows of two numbers one by one.
fn halving(side: usize) -> Result<Tensor> {
    let half = side / 2;
    let mut matrix = vec![0f32; side * side * half * half];
    for position in 0..side * side {
        let to = position / side / 2 * half + position % side / 2;
        matrix[position * half * half + to] = 0.25;
    }
    Tensor::from_vec(matrix, (side * side, half * half), &Device::Cpu)
}

/// Maps `[N, C, side, side]` by the matrix of [`halving`].
fn halved(maps: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let (n, c, side, _) = maps.dims4()?;
    maps.reshape((n * c, side * side))?
        .matmul(matrix)?
        .reshape((n, c, side / 2, side / 2))
}

impl ModuleT for Cnn {
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let [first, second, third] = &self.convs;
        let x = halved(&first.forward(images, train)?.relu()?, &self.halving[0])?;
        let x = second.forward(&x, train)?.relu()?;
        let x = halved(&third.forward(&x, train)?.relu()?, &self.halving[1])?;
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
    /// He-normal weights and zero biases. The parameters of norms start as they are made; weight
    /// norm from the same weights as others.
    pub(crate) fn new(seed: u64, build: impl FnOnce(VarBuilder) -> Result<M>) -> Result<Self> {
        Self::started(Start::He(1.), seed, build)
    }

    pub(crate) fn started(
        start: Start,
        seed: u64,
        build: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<Self> {
        Self::typed(DType::F32, start, seed, build)
    }

    /// The same start, rounded to `dtype`.
    pub(crate) fn typed(
        dtype: DType,
        start: Start,
        seed: u64,
        build: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<Self> {
        let vars = VarMap::new();
        let model = build(VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
        let named = vars.data().lock().expect("no thread panicked").clone();
        for (name, var) in &named {
            let ofnorm = name.contains("norm");
            if name.ends_with("bias") {
                var.set(&var.zeros_like()?.detach())?;
            } else if var.rank() >= 2 && !ofnorm && !name.ends_with("original0") {
                let name = name.replace("parametrizations.weight.original1", "weight");
                var.set(&weights(start, seed, &name, var)?.to_dtype(var.dtype())?)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_convolution_as_a_matrix_is_the_convolution() -> Result<()> {
        let net = Net::new(3, |vb| Conv::new("none", 2, 3, 4, vb))?;
        let x = Tensor::arange(0f32, 64., &Device::Cpu)?
            .sin()?
            .reshape((2, 2, 4, 4))?;
        let want = x.conv2d(&net.model.weight.reshape((3, 2, 3, 3))?, 1, 1, 1, 1)?;
        let apart = (net.model.forward(&x, true)? - want)?.abs()?.max_all()?;
        assert!(apart.to_scalar::<f32>()? < 1e-5);
        Ok(())
    }

    #[test]
    fn weight_norm_starts_from_the_same_network() -> Result<()> {
        let x = Tensor::arange(0f32, 128., &Device::Cpu)?
            .cos()?
            .reshape((2, 1, 8, 8))?;
        let [plain, weight] = ["none", "weight"].map(|norm| {
            Net::new(5, |vb| Cnn::new(norm, vb))?
                .model
                .forward_t(&x, true)
        });
        let apart = (plain? - weight?)?.abs()?.max_all()?;
        assert!(apart.to_scalar::<f32>()? < 1e-5);
        Ok(())
    }
}
