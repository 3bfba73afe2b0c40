//! Messages about averaged weights.

use std::path::Path;

use candle_core::{Result, bail};

pub(super) use crate::ops::check::at_least_one;
pub(super) use candle_norm_support::messages::{file, written};

pub(super) fn decay(layer: &str, name: &str, decay: f64) -> Result<()> {
    if !(0. ..=1.).contains(&decay) {
        bail!(
            "{layer}: expected {name} between 0 and 1 (the weight of the past), got {decay}; 0.999 \
            is usual"
        )
    }
    Ok(())
}

/// The least decay of a warm-up, which ends at `decay`.
pub(super) fn min_decay(layer: &str, min_decay: f64, decay: f64) -> Result<()> {
    if min_decay > decay {
        bail!(
            "{layer}: expected min_decay of at most decay, {decay}, got {min_decay}; lower \
            min_decay or raise decay"
        )
    }
    Ok(())
}

pub(super) fn positive(layer: &str, name: &str, value: f64) -> Result<()> {
    if !(value.is_finite() && value > 0.) {
        bail!("{layer}: expected {name} of the warm-up to be finite and above 0, got {value}")
    }
    Ok(())
}

/// Check that the model has its own values.
pub(super) fn swapped(layer: &str, call: &str, swapped: bool) -> Result<()> {
    if swapped {
        bail!(
            "{layer}: expected {call} while the model has its own values, got it while it has the \
            averages; call swap_out first"
        )
    }
    Ok(())
}

/// Check that the averages are in the model.
pub(super) fn not_swapped<T>(layer: &str, own: Option<T>) -> Result<T> {
    match own {
        Some(own) => Ok(own),
        None => bail!(
            "{layer}: expected swap_out after swap_in, got it while the model has its own values"
        ),
    }
}

/// `differs` is the first variable that the model or its averages lack, or that has another shape
/// in one of them.
pub(super) fn same_variables(layer: &str, differs: Option<&str>) -> Result<()> {
    match differs {
        Some(name) => bail!(
            "{layer}: expected the variables that the model had when it was averaged first, got a \
            difference in {name}; build the whole model before AveragedModel::new"
        ),
        None => Ok(()),
    }
}

/// The number of updates in the file at `path`.
pub(super) fn of_averages(layer: &str, path: &Path, updates: Option<u64>) -> Result<u64> {
    match updates {
        Some(updates) => Ok(updates),
        None => bail!(
            "{layer}: expected a file of AveragedModel::save, got {} without a number of updates; \
            to start from a checkpoint, load it into the model and call AveragedModel::new",
            path.display()
        ),
    }
}
