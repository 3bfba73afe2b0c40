//! Messages that are alike in all modules: about dtypes, shapes, devices, numbers and files.
//!
//! A message names the layer, says what was expected and what came, and, where there is one, the
//! remedy.

use std::fmt::Display;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};

/// The dtypes that the layers compute on.
const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// A tensor of floating point.
///
/// # Errors
/// Another dtype.
pub fn float(layer: &str, name: &str, x: &Tensor) -> Result<()> {
    if !FLOATS.contains(&x.dtype()) {
        bail!(
            "{layer}: expected {name} with dtype F16, BF16, F32 or F64, got {:?}; convert it with \
            to_dtype",
            x.dtype()
        )
    }
    Ok(())
}

/// A tensor of one dtype.
///
/// # Errors
/// Another dtype.
pub fn dtype(layer: &str, name: &str, value: &Tensor, expected: DType) -> Result<()> {
    if value.dtype() != expected {
        bail!(
            "{layer}: expected {name} with dtype {expected:?}, got {:?}",
            value.dtype()
        )
    }
    Ok(())
}

/// A tensor of one shape.
///
/// # Errors
/// Another shape.
pub fn shape(layer: &str, name: &str, value: &Tensor, expected: &[usize]) -> Result<()> {
    if value.dims() != expected {
        bail!(
            "{layer}: expected {name} with shape {expected:?}, got {:?}",
            value.dims()
        )
    }
    Ok(())
}

/// A tensor on the input's device.
///
/// # Errors
/// Another device.
pub fn same_device(layer: &str, name: &str, value: &Tensor, device: &Device) -> Result<()> {
    if !value.device().same_device(device) {
        bail!(
            "{layer}: expected {name} on the input's device {:?}, got {:?}; move one of them with \
            to_device",
            device.location(),
            value.device().location()
        )
    }
    Ok(())
}

/// Hint where one axis is missing.
pub const NO_BATCH_AXIS: &str = "; if the batch axis is missing, add it with unsqueeze(0)";

/// An input of the shape that `form` describes, as far as its rank says.
///
/// # Errors
/// Fewer axes.
pub fn rank_at_least(layer: &str, x: &Tensor, rank: usize, form: &str) -> Result<()> {
    if x.rank() < rank {
        let hint = match form.starts_with("[N") && x.rank() + 1 == rank {
            true => NO_BATCH_AXIS,
            false => "",
        };
        bail!(
            "{layer}: expected an input of rank at least {rank}, {form}, got {:?}{hint}",
            x.dims()
        )
    }
    Ok(())
}

/// A finite number.
///
/// # Errors
/// NaN and infinity.
pub fn finite(layer: &str, name: &str, value: f64) -> Result<()> {
    if !value.is_finite() {
        bail!("{layer}: expected a finite {name}, got {value}")
    }
    Ok(())
}

/// One thing at least.
///
/// # Errors
/// A count of 0.
pub fn at_least_one(layer: &str, what: &str, count: usize) -> Result<()> {
    if count == 0 {
        bail!("{layer}: expected at least one {what}, got none")
    }
    Ok(())
}

/// A state that only a fault of candle-norm can bring about.
///
/// # Errors
/// Always.
pub fn internal<T>(layer: &str, what: &str) -> Result<T> {
    bail!("{layer}: expected {what}; this is a fault of candle-norm")
}

/// A kernel of a GPU that did not run.
///
/// # Errors
/// Always.
pub fn launch<T>(layer: &str, kernel: &str, why: &str) -> Result<T> {
    bail!("{layer}: expected the kernel {kernel} to run, got an error: {why}; use Path::Composed")
}

/// Kernels that a GPU cannot load.
///
/// # Errors
/// Always.
pub fn not_loaded<T>(layer: &str, built: &str, capability: &str, why: &str) -> Result<T> {
    bail!(
        "{layer}: expected a GPU of compute capability {built} or later, which the kernels are \
        compiled for, got one of {capability}, whose driver says: {why}; use Path::Composed"
    )
}

/// Outcome of reading a file.
///
/// # Errors
/// Whatever came in place of the file.
pub fn file<T, E: Display>(layer: &str, path: &Path, done: std::result::Result<T, E>) -> Result<T> {
    match done {
        Ok(done) => Ok(done),
        Err(e) => bail!(
            "{layer}: expected a whole safetensors file at {}, got: {e}",
            path.display()
        ),
    }
}

/// Outcome of writing a file.
///
/// # Errors
/// Whatever came in place of the file.
pub fn written<T, E: Display>(
    layer: &str,
    path: &Path,
    done: std::result::Result<T, E>,
) -> Result<T> {
    match done {
        Ok(done) => Ok(done),
        Err(e) => bail!(
            "{layer}: expected to write a safetensors file at {}, got: {e}; what was there before \
            is as it was",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_are_not_loaded_name_the_layer_and_both_capabilities() {
        let error = not_loaded::<()>("LayerNorm", "8.0", "7.5", "no binary for this GPU");
        let message = error.expect_err("an error").to_string();
        for part in [
            "LayerNorm: expected ",
            "capability 8.0 or later",
            "got one of 7.5",
            "no binary for this GPU",
            "use Path::Composed",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }
}
