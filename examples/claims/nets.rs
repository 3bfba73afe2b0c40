//! The networks, and starts that are the same on every run.

use std::hash::{DefaultHasher, Hash, Hasher};

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, Linear, Module, ModuleT, VarBuilder, VarMap, linear};
use candle_norm::{NormConfig, NormedLayer, trainable_vars};
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

/// Three convolutions, each with its norm, on images `[N, 1, 8, 8]`.
pub(crate) struct Cnn {
    convs: [NormedLayer; 3],
    head: Linear,
}

impl Cnn {
    pub(crate) fn new(norm: &str, vb: VarBuilder) -> Result<Self> {
        let norm: NormConfig = norm.parse()?;
        let config = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let conv = |name, inputs, outputs| norm.conv2d(inputs, outputs, 3, config, vb.pp(name));
        Ok(Self {
            convs: [
                conv("conv1", 1, 8)?,
                conv("conv2", 8, 16)?,
                conv("conv3", 16, 16)?,
            ],
            head: linear(16 * 2 * 2, 10, vb.pp("head"))?,
        })
    }
}

impl ModuleT for Cnn {
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let [first, second, third] = &self.convs;
        let x = first.forward_t(images, train)?.relu()?.avg_pool2d(2)?;
        let x = second.forward_t(&x, train)?.relu()?;
        let x = third.forward_t(&x, train)?.relu()?.avg_pool2d(2)?;
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
