//! Messages about weight normalization.

use candle_core::{DType, Result, Tensor, bail};

use candle_norm_support::host;

pub(in crate::layers) use crate::ops::check::{dim, float, same_device, shape};

/// A checkpoint for a layer that is built without a bias.
pub(in crate::layers) fn no_stored_bias(layer: &str, stored: Option<String>) -> Result<()> {
    match stored {
        Some(stored) => bail!(
            "{layer}: expected a checkpoint without a bias, got {stored:?}, which would be dropped \
            unseen; build the layer with a bias, or, if it is another layer's, give each layer its \
            own prefix (vb.pp)"
        ),
        None => Ok(()),
    }
}

pub(super) fn no_bias(layer: &str, bias: Option<&Tensor>) -> Result<()> {
    if bias.is_some() {
        bail!("{layer}: expected a layer without bias to copy from, got one with a bias")
    }
    Ok(())
}

pub(super) fn bias<'a>(layer: &str, bias: Option<&'a Tensor>) -> Result<&'a Tensor> {
    match bias {
        Some(bias) => Ok(bias),
        None => bail!(
            "{layer}: expected a layer with a bias to initialize from a batch, got one without"
        ),
    }
}

/// Magnitudes that a data-dependent initialization can set: one for each output.
pub(super) fn magnitude_per_output(
    layer: &str,
    dim: Option<usize>,
    magnitudes: usize,
    (axis, outputs): (usize, usize),
) -> Result<()> {
    if dim != Some(axis) || magnitudes != outputs {
        bail!(
            "{layer}: expected dim {axis}, the axis of the {outputs} outputs, to initialize from a \
            batch, got {dim:?}"
        )
    }
    Ok(())
}

pub(super) fn not_empty<T>(layer: &str, statistics: Option<T>, x: &Tensor) -> Result<T> {
    match statistics {
        Some(s) => Ok(s),
        None => bail!(
            "{layer}: expected a batch with outputs to initialize from, got input size {:?}",
            x.dims()
        ),
    }
}

/// A batch to initialize from: what has one output for each channel has no variance.
pub(super) fn more_than_one_output(layer: &str, outputs: usize, x: &Tensor) -> Result<()> {
    if outputs == 1 {
        bail!(
            "{layer}: expected more than one output per channel to initialize from, got one of \
            input size {:?}; use a larger batch",
            x.dims()
        )
    }
    Ok(())
}

/// The variances of the outputs that a data-dependent initialization divides by.
pub(super) fn varying(layer: &str, var: &Tensor) -> Result<()> {
    let values = host::vector::<f64>(&var.to_dtype(DType::F64)?)?;
    match values.iter().position(|v| !(*v > 0. && v.is_finite())) {
        Some(channel) => bail!(
            "{layer}: expected outputs that vary over the batch, got a variance of {} in channel \
            {channel}; use a larger batch",
            values[channel]
        ),
        None => Ok(()),
    }
}

pub(super) fn variable(layer: &str, param: &Tensor) -> Result<()> {
    if !param.is_variable() {
        bail!(
            "{layer}: expected parameters that are variables, got plain tensors; build the layer \
            from a VarMap"
        )
    }
    Ok(())
}

/// A norm that is built alone, as one that goes around a layer cannot be.
pub(super) fn goes_around<T>(layer: &str) -> Result<T> {
    bail!(
        "{layer}: expected a norm that follows a layer, got \"weight\", which goes around one; \
         build the two together with NormConfig::linear, conv1d, conv2d, conv_transpose1d or \
         conv_transpose2d"
    )
}
