//! The classifier: three convolutions, each with the norm that is compared, and a linear head.

use crate::data::{CLASSES, SIDE};
use candle_core::{Device, Error, Result, Tensor};
use candle_nn::{Conv2dConfig, Linear, Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{NormConfig, NormedLayer};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

/// Names of the layers, in the order of the forward pass; each is the prefix of its variables'
/// names.
pub(crate) const LAYERS: [&str; 4] = ["conv1", "conv2", "conv3", "head"];
/// Channels that go into each convolution, and out of the last.
pub(crate) const CHANNELS: [usize; 4] = [1, 16, 16, 32];
/// Edge of a kernel.
const KERNEL: usize = 3;
/// Number of features after two rounds of pooling: pixels times channels.
const FEATURES: usize = CHANNELS[3] * (SIDE / 4) * (SIDE / 4);

/// Only the value of `norm` differs between the networks that are compared.
#[derive(Debug)]
pub(crate) struct Classifier {
    convs: [NormedLayer; 3],
    head: Linear,
}

impl Classifier {
    pub(crate) fn new(norm: &NormConfig, vb: VarBuilder) -> Result<Self> {
        let config = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let conv = |layer: usize| {
            let (inputs, outputs) = (CHANNELS[layer], CHANNELS[layer + 1]);
            norm.conv2d(inputs, outputs, KERNEL, config, vb.pp(LAYERS[layer]))
        };
        Ok(Self {
            convs: [conv(0)?, conv(1)?, conv(2)?],
            head: candle_nn::linear(FEATURES, CLASSES, vb.pp(LAYERS[3]))?,
        })
    }
}

impl ModuleT for Classifier {
    /// Images (n, 1, 8, 8) to logits (n, 10).
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let [conv1, conv2, conv3] = &self.convs;
        // Average pooling: the gradient of candle's max_pool2d is too small by the number of pooled
        // pixels.
        let xs = conv1.forward_t(images, train)?.relu()?.avg_pool2d(2)?;
        let xs = conv2.forward_t(&xs, train)?.relu()?;
        let xs = conv3.forward_t(&xs, train)?.relu()?.avg_pool2d(2)?;
        self.head.forward(&xs.flatten_from(1)?)
    }
}

/// Gives every network of a seed the same start, whatever its norm: He-normal weights, zero biases.
///
/// Candle's own initialization cannot be seeded on the CPU. Weight norm starts from the same
/// weights too, split into their lengths and directions. Parameters of the other norms keep the
/// ones and zeros they are made with.
pub(crate) fn initialize(varmap: &VarMap, seed: u64, device: &Device) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let variables = varmap
        .data()
        .lock()
        .expect("no thread panics while it holds the variables");
    for (layer, name) in LAYERS.iter().enumerate() {
        let shape = match CHANNELS.get(layer + 1) {
            Some(&outputs) => vec![outputs, CHANNELS[layer], KERNEL, KERNEL],
            None => vec![CLASSES, FEATURES],
        };
        let fan_in: usize = shape[1..].iter().product();
        let normal = Normal::new(0., (2. / fan_in as f32).sqrt()).map_err(Error::wrap)?;
        let values: Vec<f32> = normal
            .sample_iter(&mut rng)
            .take(shape.iter().product())
            .collect();
        let weight = Tensor::from_vec(values, shape, device)?;
        for (variable, var) in variables.iter() {
            let Some(part) = variable
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('.'))
            else {
                continue;
            };
            match part.strip_prefix("layer.").unwrap_or(part) {
                "weight" | "parametrizations.weight.original1" => var.set(&weight)?,
                "parametrizations.weight.original0" => {
                    let lengths = weight.flatten_from(1)?.sqr()?.sum(1)?.sqrt()?;
                    var.set(&lengths.reshape(var.shape())?)?;
                }
                "bias" => var.set(&var.zeros_like()?)?,
                _ => {}
            }
        }
    }
    Ok(())
}
