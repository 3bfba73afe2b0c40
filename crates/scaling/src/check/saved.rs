//! Messages about saved states.

use std::fmt::Display;

use candle_core::{Result, bail};

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
