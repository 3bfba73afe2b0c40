//! Messages that are alike in every room: about dtypes, shapes and files.
//!
//! A message names the layer, says what was expected and what came, and, where there is one, the
//! remedy.

use std::fmt::Display;
use std::path::Path;

use candle_core::{DType, Result, Tensor, bail};

/// The dtypes that the layers compute on.
const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

pub(crate) fn float(layer: &str, name: &str, x: &Tensor) -> Result<()> {
    if !FLOATS.contains(&x.dtype()) {
        bail!(
            "{layer}: expected {name} with dtype F16, BF16, F32 or F64, got {:?}; convert it with \
            to_dtype",
            x.dtype()
        )
    }
    Ok(())
}

pub(crate) fn dtype(layer: &str, name: &str, value: &Tensor, expected: DType) -> Result<()> {
    if value.dtype() != expected {
        bail!(
            "{layer}: expected {name} with dtype {expected:?}, got {:?}",
            value.dtype()
        )
    }
    Ok(())
}

pub(crate) fn shape(layer: &str, name: &str, value: &Tensor, expected: &[usize]) -> Result<()> {
    if value.dims() != expected {
        bail!(
            "{layer}: expected {name} with shape {expected:?}, got {:?}",
            value.dims()
        )
    }
    Ok(())
}

/// Hint where one axis is missing.
pub(crate) const NO_BATCH_AXIS: &str = "; if the batch axis is missing, add it with unsqueeze(0)";

pub(crate) fn rank_at_least(layer: &str, x: &Tensor, rank: usize, form: &str) -> Result<()> {
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

/// A state that only a fault of this crate can bring about.
pub(crate) fn internal<T>(layer: &str, what: &str) -> Result<T> {
    bail!("{layer}: expected {what}; this is a fault of candle-norm")
}

/// A kernel of a GPU that did not run.
#[cfg(any(feature = "cuda", feature = "internals"))]
pub(crate) fn launch<T>(layer: &str, kernel: &str, why: &str) -> Result<T> {
    bail!("{layer}: expected the kernel {kernel} to run, got an error: {why}; use Path::Composed")
}

/// Kernels that a GPU cannot load.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn not_loaded<T>(layer: &str, built: &str, capability: &str, why: &str) -> Result<T> {
    bail!(
        "{layer}: expected a GPU of compute capability {built} or later, which the kernels are \
        compiled for, got one of {capability}, whose driver says: {why}; use Path::Composed"
    )
}

/// Outcome of reading a file.
pub(crate) fn file<T, E: Display>(
    layer: &str,
    path: &Path,
    done: std::result::Result<T, E>,
) -> Result<T> {
    match done {
        Ok(done) => Ok(done),
        Err(e) => bail!(
            "{layer}: expected a whole safetensors file at {}, got: {e}",
            path.display()
        ),
    }
}

/// Outcome of writing a file.
pub(crate) fn written<T, E: Display>(
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
