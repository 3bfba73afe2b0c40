//! Messages about series: their windows, their steps, and what is watched in them.

use candle_core::{Result, Tensor, bail};

/// Windows of series, `[N, T, C]`.
pub(crate) fn windows(layer: &str, x: &Tensor, series: usize) -> Result<()> {
    match x.dims() {
        [_, _, c] if *c == series => Ok(()),
        dims => bail!(
            "{layer}: expected windows [N, T, {series}], the series on the last axis, got shape {dims:?}"
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
    let values = weight.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
    match values.iter().position(|v| *v == 0.) {
        Some(series) => bail!(
            "{layer}: expected {name} that can be divided by, got 0 for series {series}; a series that is multiplied by 0 cannot be restored"
        ),
        None => Ok(()),
    }
}
