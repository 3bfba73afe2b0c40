//! Checks of the path that a computation takes, and of what it finds there.

use candle_core::{Result, Tensor, bail};

/// The fused path was forced: whether it can serve `x`.
pub(crate) fn served(layer: &str, x: &Tensor, served: bool) -> Result<()> {
    if !served {
        bail!(
            "{layer}: expected an input on the CPU, which the fused path serves, got one on {:?}; \
            use Path::Auto",
            x.device().location()
        )
    }
    Ok(())
}

/// Check that the backward finds the input of the forward.
pub(crate) fn unchanged(layer: &str, unchanged: bool) -> Result<()> {
    if !unchanged {
        bail!(
            "{layer}: expected the input of the forward in the backward, got other values in its \
            place, as Var::set and slice_set write them; run the forward again, or set the \
            variable after the backward"
        )
    }
    Ok(())
}
