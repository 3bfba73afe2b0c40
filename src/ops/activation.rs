//! Activations that are fused with the norm before them.

use candle_core::{Result, bail};
use candle_nn::Activation as Named;

use super::check;
use crate::computations::Activation;

/// `activation` as it is computed after a norm.
pub(crate) fn fused(layer: &str, activation: Option<Named>) -> Result<Option<Activation>> {
    Ok(Some(match activation {
        None => return Ok(None),
        Some(Named::Relu) => Activation::Relu,
        Some(Named::Relu6) => Activation::Relu6,
        Some(Named::LeakyRelu(slope)) => {
            check::finite(layer, "slope of LeakyRelu", slope)?;
            Activation::LeakyRelu(slope)
        }
        Some(Named::Silu | Named::Swish) => Activation::Silu,
        Some(Named::Gelu) => Activation::Gelu,
        Some(Named::NewGelu | Named::GeluPytorchTanh) => Activation::GeluTanh,
        Some(Named::HardSwish) => Activation::HardSwish,
        Some(Named::Sigmoid) => Activation::Sigmoid,
        Some(Named::Mish) => Activation::Mish,
        Some(other) => bail!(
            "{layer}: expected an activation of Relu, Relu6, LeakyRelu, Silu, Swish, Gelu, \
            NewGelu, GeluPytorchTanh, HardSwish, Sigmoid or Mish, got {other:?}; call other \
            activations after the layer"
        ),
    }))
}
