//! Weights and biases, one for each channel or for parts of it, along the axes of a tensor.

use candle_core::{Result, Tensor};

use super::ChannelAxes;
use super::activation::{Activation, activated};
use super::composed::{self, Along};

/// How the weights and biases of channels are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Spread {
    /// One for each channel, `[C]`.
    #[default]
    Channel,
    /// One for each channel of each sample, `[N, C]`.
    SampleAndChannel,
    /// One for each element, `[N, C, *]`.
    Element,
}

impl Spread {
    /// Three axes, and how weights lie along them.
    pub(crate) fn along(self, axes: ChannelAxes) -> ([usize; 3], Along) {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = axes;
        match self {
            Self::Channel => ([outer, channels, inner], Along::Middle),
            Self::SampleAndChannel => ([1, outer * channels, inner], Along::Middle),
            Self::Element => ([outer, channels, inner], Along::All),
        }
    }
}

/// Weights and biases as a composed form applies them.
#[derive(Debug)]
pub(super) struct Affine<'a> {
    pub(super) weight: Option<&'a Tensor>,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) dims: [usize; 3],
    pub(super) along: Along,
    /// Follows weight and bias.
    pub(super) activation: Option<Activation>,
}

impl Affine<'_> {
    /// `act(normal · weight + bias)`, for elements in the order of the input, in any shape.
    pub(super) fn apply(&self, normal: &Tensor) -> Result<Tensor> {
        let normal = normal.reshape(self.dims.to_vec())?;
        let u = composed::affine(&normal, self.weight, self.bias, self.along)?;
        activated(self.activation, u)
    }

    /// The gradients of weight and bias, and `g`, that of `normal`.
    pub(super) fn gradients(&self, normal: &Tensor, dy: &Tensor) -> Result<AffineGradients> {
        let dims = self.dims.to_vec();
        let dy = dy.contiguous()?.reshape(dims.as_slice())?;
        let normal = normal.contiguous()?.reshape(dims)?;
        let dy = match self.activation {
            None => dy,
            Some(activation) => {
                let u = composed::affine(&normal, self.weight, self.bias, self.along)?;
                (dy * activation.slope(&u)?)?
            }
        };
        Ok(AffineGradients {
            g: composed::affine(&dy, self.weight, None, self.along)?,
            dweight: composed::summed((&dy * &normal)?, self.along)?,
            dbias: composed::summed(dy, self.along)?,
        })
    }
}

pub(super) struct AffineGradients {
    pub(super) g: Tensor,
    pub(super) dweight: Tensor,
    pub(super) dbias: Tensor,
}
