//! Constructors of scalers by the name of their kind.

use std::path::Path;

use candle_core::{Result, bail};

use super::fitted::{FittedScaler, Rule};
use super::follow::{Memory, SeriesOptions, SeriesScaler};
use super::{
    AdaptiveScaler, Archive, EwmScalerOptions, MaxAbsScalerOptions, MinMaxScalerOptions, PREFIX,
    RobustScalerOptions, Scaler, SlidingScalerOptions, StandardScalerOptions, State,
};

/// A kind, and the constructor of its scaler.
type Entry = (&'static str, fn(&State) -> Result<Box<dyn Scaler>>);

const fn fitted<O: Rule>() -> Entry {
    (O::KIND, |state| {
        Ok(Box::new(FittedScaler::<O>::from_state(state)?))
    })
}

const fn of_series<O: SeriesOptions>() -> Entry {
    (O::Memory::KIND, |state| {
        Ok(Box::new(SeriesScaler::<O>::from_state(state)?))
    })
}

const KINDS: &[Entry] = &[
    (AdaptiveScaler::KIND, |state| {
        Ok(Box::new(AdaptiveScaler::from_state(state)?))
    }),
    of_series::<EwmScalerOptions>(),
    fitted::<MaxAbsScalerOptions>(),
    fitted::<MinMaxScalerOptions>(),
    fitted::<RobustScalerOptions>(),
    of_series::<SlidingScalerOptions>(),
    fitted::<StandardScalerOptions>(),
];

/// The scaler of any kind of this crate that `state` is of.
///
/// # Errors
/// A state of no scaler of this crate, of another version, or one that is damaged.
pub fn from_state(state: &State) -> Result<Box<dyn Scaler>> {
    match KINDS.iter().find(|(kind, _)| *kind == state.kind()) {
        Some((_, make)) => make(state),
        None => {
            let kinds: Vec<_> = KINDS.iter().map(|(kind, _)| *kind).collect();
            known_kind(&kinds, state.kind())
        }
    }
}

/// The scaler in a file that [`save`](FittedScaler::save) wrote, whichever of this crate it is.
///
/// # Errors
/// A file that is not whole, or does not hold a scaler of this crate and version.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::scaling::{self, MinMaxScaler, Scaler};
///
/// let scaler = MinMaxScaler::default().with_names(["ppm"])?;
/// scaler.fit(&Tensor::new(&[310f32, 420.], &Device::Cpu)?)?;
/// let file = std::env::temp_dir().join("candle-norm-load.safetensors");
/// scaler.save(&file)?;
///
/// let restored = scaling::load(&file)?;
/// assert_eq!((restored.kind(), restored.seen()[0].values), ("MinMaxScaler", 2));
/// restored.partial_fit(&Tensor::new(&[430f32], &Device::Cpu)?)?;
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn load(path: impl AsRef<Path>) -> Result<Box<dyn Scaler>> {
    from_state(&Archive::read(path)?.state(PREFIX)?)
}

/// A kind that a state can be of.
fn known_kind<T>(kinds: &[&str], got: &str) -> Result<T> {
    let layer = "scaling";
    let remedy = match got {
        "DriftMonitor" | "LossBalancer" => format!("; call {got}::from_state"),
        "Pipeline" => String::from("; call Pipeline::load"),
        _ => String::new(),
    };
    bail!("{layer}: expected the state of one of {kinds:?}, got that of a {got:?}{remedy}")
}
