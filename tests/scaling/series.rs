//! Series: windows, exponential weights, reversible normalization, drift. What each must give is in
//! `tests/fixtures/scaling`, written by `scripts/make_scaling_series.py`.

mod alarms;
mod atomic;
mod drift;
mod following;
mod following_edges;
mod gaps;
mod rev_in;
mod rev_in_missing;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Result, Tensor};

use testkit::data::values;

/// A file of numbers by name.
struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn load(name: &str) -> Result<Self> {
        let path = format!(
            "{}/tests/fixtures/scaling/series_{name}.safetensors",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../..")
        );
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    #[track_caller]
    fn tensor(&self, name: &str) -> Tensor {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("no {name}"))
            .clone()
    }

    #[track_caller]
    fn values(&self, name: &str) -> Vec<f64> {
        values(&self.tensor(name)).expect("numbers")
    }
}

/// Says that there is nothing more to come, also when a test fails on the way: who waits for it
/// would wait for ever.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
