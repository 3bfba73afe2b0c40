//! Messages about series: their windows, their steps, and what is watched in them.

use std::fmt::Display;

use candle_core::{DType, Result, Tensor, bail};

/// Windows of series, `[N, T, C]`.
pub(crate) fn windows(layer: &str, x: &Tensor, series: usize) -> Result<()> {
    match x.dims() {
        [_, _, c] if *c == series => Ok(()),
        dims => bail!(
            "{layer}: expected windows [N, T, {series}], the series on the last axis, got shape {dims:?}"
        ),
    }
}

/// Mask of the values of windows that are there.
pub(crate) fn mask(layer: &str, mask: &Tensor, windows: &Tensor) -> Result<()> {
    let (n, t, c) = windows.dims3()?;
    match mask.dims() {
        [a, b, d] if (*a, *b) == (n, t) && [c, 1].contains(d) => Ok(()),
        dims => bail!(
            "{layer}: expected a mask [{n}, {t}, {c}] or [{n}, {t}, 1] of the windows, got shape {dims:?}"
        ),
    }
}

/// Windows that have a variance.
pub(crate) fn more_than_one_step(layer: &str, x: &Tensor) -> Result<()> {
    if x.dims()[1] < 2 && x.elem_count() > 0 {
        bail!(
            "{layer}: expected windows of at least 2 steps, got shape {:?}; one step has no variance",
            x.dims()
        )
    }
    Ok(())
}

/// Statistics of as many windows as there are forecasts.
pub(crate) fn same_windows(layer: &str, forecasts: usize, windows: usize) -> Result<()> {
    if forecasts != windows {
        bail!(
            "{layer}: expected forecasts of the {windows} windows that the statistics are of, got {forecasts}"
        )
    }
    Ok(())
}

/// A weight that can be divided by.
pub(crate) fn invertible(layer: &str, name: &str, weight: &Tensor) -> Result<()> {
    let values = weight.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    match values.iter().position(|v| *v == 0.) {
        Some(series) => bail!(
            "{layer}: expected {name} that can be divided by, got 0 for series {series}; a series that is multiplied by 0 cannot be restored"
        ),
        None => Ok(()),
    }
}

/// A memory that has a value of any feature.
pub(crate) fn known(layer: &str, feature: &dyn Display, known: bool) -> Result<()> {
    if !known {
        bail!(
            "{layer}: expected at least one value of {feature} or another feature among the rows that it remembers, got only NaN"
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
            "{layer}: expected values of at most {largest:.2e}, whose squares can be summed, got {value:e} in sample {row} of {feature}; take a larger unit"
        )
    }
    Ok(())
}

/// Two parts of one scaler that do the same with NaN.
pub(crate) fn same_nan(layer: &str, scaler: &dyn Display, monitor: &dyn Display) -> Result<()> {
    let (scaler, monitor) = (scaler.to_string(), monitor.to_string());
    if scaler != monitor {
        bail!(
            "{layer}: expected the same nan for the scaler and the monitor, got {scaler} and {monitor}; set one in the options of the other"
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
            "{layer}: expected rows that the scaler can be fitted to after {event}, got: {e}. The rows count; the scaler stays as it was until the next event"
        ),
    }
}

/// The stretches of a saved window.
pub(crate) fn stretches(layer: &str, text: &str, hold: bool) -> Result<()> {
    if !hold {
        bail!(
            "{layer}: expected five ascending ends of stretches as a window has them in the saved state, got {text:?}"
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
            "{layer}: expected a reference of at least {least} values of {feature}, got {values}; fit it to more rows"
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
            "{layer}: expected the state of a scaler that answers drift by {expected}, got {got}; use from_state"
        )
    }
    Ok(())
}
