//! Messages about options, and about calls that a scaler cannot serve.

use std::fmt::Display;

use candle_core::{Result, bail};

/// A fitted scaler.
pub(crate) fn fitted<T>(layer: &str, fitted: Option<T>) -> Result<T> {
    match fitted {
        Some(fitted) => Ok(fitted),
        None => {
            bail!("{layer}: expected a fitted scaler, got one without data; call fit or restore it")
        }
    }
}

/// An option that has a range.
pub(crate) fn option(
    layer: &str,
    name: &str,
    holds: bool,
    expected: &str,
    got: &dyn Display,
) -> Result<()> {
    if !holds {
        bail!("{layer}: expected {name} {expected}, got {got}")
    }
    Ok(())
}

/// A call that no scaler of this kind can serve.
pub(crate) fn unsupported<T>(layer: &str, what: &str, remedy: &str) -> Result<T> {
    bail!("{layer}: expected {what}, got a call that needs it; {remedy}")
}
