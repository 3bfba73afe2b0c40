//! The network, under the names that PyTorch's has.

use candle_core::{Module, ModuleT, Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Init, Linear, VarBuilder};
use candle_norm::{BatchNorm, BatchNormOptions, FrozenNorm, batch_norm};

/// Before and behind each of the six convolutions.
const CHANNELS: [usize; 7] = [1, 128, 16, 16, 16, 32, 64];
/// Classes of pitch, 20 cents (hundredths of a semitone) apart.
pub(crate) const BINS: usize = 360;
/// The first layers hear partials, which all tones have: they stay as they are. Their gradients would take most of the time.
const FIXED: usize = 2;

/// Half of the convolutions' padding is one longer than the other, so it is not theirs.
struct Layer<N> {
    padding: (usize, usize),
    conv: Conv2d,
    norm: N,
}

pub(crate) struct Crepe<N> {
    layers: Vec<Layer<N>>,
    classifier: Linear,
}

impl Crepe<BatchNorm> {
    pub(crate) fn new(vb: VarBuilder) -> Result<Self> {
        let options = BatchNormOptions {
            eps: 0.0010000000474974513,
            // That of the checkpoint is 0, with which running statistics never move.
            momentum: Some(0.1),
            ..Default::default()
        };
        let layer = |i: usize| {
            let (kernel, stride, padding) = match i {
                1 => (512, 4, (254, 254)),
                _ => (64, 1, (31, 32)),
            };
            let (name, outputs) = (format!("conv{i}"), CHANNELS[i]);
            let shape = (outputs, CHANNELS[i - 1], kernel, 1);
            let weight = vb
                .pp(&name)
                .get_with_hints(shape, "weight", Init::Const(0.))?;
            let bias = vb
                .pp(&name)
                .get_with_hints(outputs, "bias", Init::Const(0.))?;
            let config = Conv2dConfig {
                stride,
                ..Default::default()
            };
            Result::Ok(Layer {
                padding,
                conv: Conv2d::new(weight, Some(bias), config),
                norm: batch_norm(outputs, options, vb.pp(name + "_BN"))?,
            })
        };
        Ok(Self {
            layers: (1..CHANNELS.len()).map(layer).collect::<Result<_>>()?,
            classifier: candle_nn::linear(256, BINS, vb.pp("classifier"))?,
        })
    }

    /// The same weights, trained with these statistics for good.
    pub(crate) fn frozen(&self) -> Result<Crepe<FrozenNorm>> {
        let frozen = |layer: &Layer<BatchNorm>| {
            Ok(Layer {
                padding: layer.padding,
                conv: layer.conv.clone(),
                norm: layer.norm.frozen()?,
            })
        };
        Ok(Crepe {
            layers: self.layers.iter().map(frozen).collect::<Result<_>>()?,
            classifier: self.classifier.clone(),
        })
    }
}

impl<N: ModuleT> ModuleT for Crepe<N> {
    /// Frames `[N, 1024]` to logits `[N, 360]`.
    fn forward_t(&self, frames: &Tensor, train: bool) -> Result<Tensor> {
        let mut xs = frames.unsqueeze(1)?.unsqueeze(3)?;
        for (
            i,
            Layer {
                padding,
                conv,
                norm,
            },
        ) in self.layers.iter().enumerate()
        {
            let padded = xs.pad_with_zeros(2, padding.0, padding.1)?;
            xs = max_of_pairs(&norm.forward_t(&conv.forward(&padded)?.relu()?, train)?)?;
            if i < FIXED {
                xs = xs.detach();
            }
        }
        self.classifier
            .forward(&xs.transpose(1, 2)?.flatten_from(1)?.contiguous()?)
    }
}

/// Max pooling of `[N, C, 2 * L, 1]` by two. candle's own passes on a part of its gradient.
fn max_of_pairs(xs: &Tensor) -> Result<Tensor> {
    let (n, c, length, _) = xs.dims4()?;
    let pairs = xs.reshape((n, c, length / 2, 2))?;
    pairs.narrow(3, 0, 1)?.maximum(&pairs.narrow(3, 1, 1)?)
}
