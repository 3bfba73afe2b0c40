//! Messages about series, and about what is watched in them.

use std::fmt::Display;

use candle_core::{Result, bail};

/// A memory that has a value of any feature.
pub(crate) fn known(layer: &str, feature: &dyn Display, known: bool) -> Result<()> {
    if !known {
        bail!(
            "{layer}: expected at least one value of {feature} or another feature among the rows \
            that it remembers, got only NaN"
        )
    }
    Ok(())
}

/// A value whose squares can be summed.
pub(crate) fn summable(
    layer: &str,
    feature: &dyn Display,
    row: usize,
    value: f64,
    largest: f64,
) -> Result<()> {
    if value.abs() > largest {
        bail!(
            "{layer}: expected values of at most {largest:.2e}, whose squares can be summed, got \
            {value:e} in sample {row} of {feature}; take a larger unit"
        )
    }
    Ok(())
}

/// Two parts of one scaler that do the same with NaN.
pub(crate) fn same_nan(layer: &str, scaler: &dyn Display, monitor: &dyn Display) -> Result<()> {
    let (scaler, monitor) = (scaler.to_string(), monitor.to_string());
    if scaler != monitor {
        bail!(
            "{layer}: expected the same nan for the scaler and the monitor, got {scaler} and \
            {monitor}; set one in the options of the other"
        )
    }
    Ok(())
}

/// A scaler that could be fitted again after an event.
pub(crate) fn refitted<E: Display>(
    layer: &str,
    event: &dyn Display,
    fitted: std::result::Result<(), E>,
) -> Result<()> {
    match fitted {
        Ok(()) => Ok(()),
        Err(e) => bail!(
            "{layer}: expected rows that the scaler can be fitted to after {event}, got: {e}. The \
            rows count; the scaler stays as it was until the next event"
        ),
    }
}

/// The stretches of a saved window.
pub(crate) fn stretches(layer: &str, text: &str, hold: bool) -> Result<()> {
    if !hold {
        bail!(
            "{layer}: expected five ascending ends of stretches as a window has them in the saved \
            state, got {text:?}"
        )
    }
    Ok(())
}

/// A reference that something can be compared with.
pub(crate) fn enough_values(
    layer: &str,
    feature: &dyn Display,
    values: usize,
    least: usize,
) -> Result<()> {
    if values < least {
        bail!(
            "{layer}: expected a reference of at least {least} values of {feature}, got {values}; \
            fit it to more rows"
        )
    }
    Ok(())
}

pub(crate) fn recent_values(layer: &str, feature: &dyn Display, values: usize) -> Result<()> {
    if values == 0 {
        bail!("{layer}: expected recent values of {feature}, got none; observe some rows first")
    }
    Ok(())
}

/// A saved scaler that does the same after an event.
pub(crate) fn same_reaction(layer: &str, expected: &dyn Display, got: &dyn Display) -> Result<()> {
    let (expected, got) = (expected.to_string(), got.to_string());
    if expected != got {
        bail!(
            "{layer}: expected the state of a scaler that answers drift by {expected}, got {got}; \
            use from_state"
        )
    }
    Ok(())
}
