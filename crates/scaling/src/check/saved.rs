//! Messages about saved states.

use std::fmt::Display;

use candle_core::{Result, bail};

use super::feature_count;

/// Saved axes of one feature at least.
pub(crate) fn some_features(layer: &str, axes: &[usize]) -> Result<()> {
    if feature_count(axes) == 0 {
        bail!("{layer}: expected axes of at least one feature in the saved state, got {axes:?}")
    }
    Ok(())
}

/// A count that an `f64` holds exactly, as files have it.
pub(crate) fn countable(
    layer: &str,
    what: &str,
    feature: &dyn Display,
    count: u64,
    most: u64,
) -> Result<()> {
    if count > most {
        bail!(
            "{layer}: expected at most {most} {what} of {feature} in all, got {count}; fit it anew"
        )
    }
    Ok(())
}

pub(crate) fn kind(layer: &str, got: &str) -> Result<()> {
    if layer != got {
        bail!("{layer}: expected the state of a {layer}, got that of a {got}")
    }
    Ok(())
}

pub(crate) fn version(layer: &str, expected: u32, got: u32) -> Result<()> {
    if expected != got {
        bail!(
            "{layer}: expected state of version {expected}, got version {got}; it was written by \
            another version of candle-norm"
        )
    }
    Ok(())
}

/// Something of a saved state.
pub(crate) fn present<T>(layer: &str, what: &str, found: Option<T>) -> Result<T> {
    match found {
        Some(found) => Ok(found),
        None => {
            bail!("{layer}: expected {what} in the saved state, got none; the file is not whole")
        }
    }
}

pub(crate) fn well_formed<T, E: Display>(
    layer: &str,
    what: &str,
    parsed: std::result::Result<T, E>,
) -> Result<T> {
    match parsed {
        Ok(parsed) => Ok(parsed),
        Err(e) => bail!("{layer}: expected {what} of the saved state to be well-formed, got: {e}"),
    }
}

pub(crate) fn saved_length(layer: &str, what: &str, expected: usize, got: usize) -> Result<()> {
    if expected != got {
        bail!("{layer}: expected {expected} values of {what} in the saved state, got {got}")
    }
    Ok(())
}

/// A saved statistic in its range.
pub(crate) fn saved_value(
    layer: &str,
    what: &str,
    feature: &dyn Display,
    value: f64,
    holds: bool,
) -> Result<()> {
    if !holds {
        bail!("{layer}: expected a possible {what} of {feature} in the saved state, got {value}")
    }
    Ok(())
}

/// A kind that a state can be of.
pub(crate) fn known_kind<T>(kinds: &[&str], got: &str) -> Result<T> {
    let layer = "scaling";
    let remedy = match got {
        "DriftMonitor" | "LossBalancer" => format!("; call {got}::from_state"),
        "Pipeline" => String::from("; call Pipeline::load"),
        _ => String::new(),
    };
    bail!("{layer}: expected the state of one of {kinds:?}, got that of a {got:?}{remedy}")
}
