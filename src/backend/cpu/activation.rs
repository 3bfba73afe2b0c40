//! Activations as the kernels have them.

use crate::computations::Activation;

impl From<Activation> for candle_norm_kernels::Activation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Relu => Self::Relu,
            Activation::Relu6 => Self::Relu6,
            Activation::LeakyRelu(slope) => Self::LeakyRelu(slope),
            Activation::Silu => Self::Silu,
            Activation::Gelu => Self::Gelu,
            Activation::GeluTanh => Self::GeluTanh,
            Activation::HardSwish => Self::HardSwish,
            Activation::Sigmoid => Self::Sigmoid,
            Activation::Mish => Self::Mish,
        }
    }
}
