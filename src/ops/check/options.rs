//! Checks of what a layer is configured with.

use candle_core::{Result, bail};

pub(crate) fn eps(layer: &str, eps: f64) -> Result<()> {
    if !(eps.is_finite() && eps > 0.) {
        bail!("{layer}: expected eps > 0 and finite, got {eps}; 1e-5 is usual")
    }
    Ok(())
}

pub(crate) fn momentum(layer: &str, momentum: Option<f64>) -> Result<()> {
    match momentum {
        Some(m) if !(0. ..=1.).contains(&m) => bail!(
            "{layer}: expected a momentum between 0 and 1 (the weight of the new batch), got {m}; \
            use None for the cumulative average"
        ),
        _ => Ok(()),
    }
}

pub(crate) fn normalized_shape(layer: &str, normalized_shape: &[usize]) -> Result<()> {
    if normalized_shape.is_empty() {
        bail!("{layer}: expected a normalized_shape of at least one axis, got []")
    }
    Ok(())
}

pub(crate) fn one_axis(layer: &str, normalized_shape: &[usize]) -> Result<usize> {
    match normalized_shape {
        [n] => Ok(*n),
        _ => bail!(
            "{layer}: expected one size for channels_first, the number of channels, got \
            normalized_shape {normalized_shape:?}"
        ),
    }
}

pub(crate) fn dim(layer: &str, dim: Option<usize>, weight: &[usize]) -> Result<()> {
    match dim {
        Some(d) if d >= weight.len() => bail!(
            "{layer}: expected dim below the weight's rank {}, got {d} for weight shape {weight:?}",
            weight.len()
        ),
        _ => Ok(()),
    }
}

pub(crate) fn groups(layer: &str, num_groups: usize, num_channels: usize) -> Result<()> {
    if num_groups == 0 || !num_channels.is_multiple_of(num_groups) {
        let hint = match divisors(num_channels, num_groups) {
            found if found.is_empty() => String::new(),
            found => format!("; {} do", found.join(", ")),
        };
        let order = match num_groups > num_channels {
            true => "; are the two numbers in their order?",
            false => "",
        };
        bail!(
            "{layer}: expected num_groups ({num_groups}) to divide num_channels \
            ({num_channels}){hint}{order}"
        )
    }
    Ok(())
}

/// The divisors of `n`; where there are many, those nearest to `wanted`.
fn divisors(n: usize, wanted: usize) -> Vec<String> {
    const MOST: usize = 12;
    const SEARCHED: usize = 1 << 16;
    let small = (1..=n.min(SEARCHED)).take_while(|d| d.checked_mul(*d).is_some_and(|s| s <= n));
    let mut found: Vec<usize> = small
        .filter(|d| n.is_multiple_of(*d))
        .flat_map(|d| [d, n / d])
        .collect();
    found.sort_unstable();
    found.dedup();
    found.sort_by_key(|d| d.abs_diff(wanted));
    found.truncate(MOST);
    found.sort_unstable();
    found.iter().map(usize::to_string).collect()
}
