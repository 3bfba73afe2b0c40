//! Settings of properties that are tried on random cases.

use proptest::test_runner::{Config, RngSeed};

use crate::emulated;

/// The environment variable that replaces the seeds of all properties: a whole number.
pub const SEED: &str = "CANDLE_NORM_SEED";

/// `cases` cases of a property, a quarter of them on the emulator of the CUDA kernels: the same on
/// every run, unless [`SEED`] is set.
pub fn config(cases: u32, seed: u64) -> Config {
    let other = std::env::var(SEED).ok();
    Config {
        cases: match emulated::is_chosen() {
            true => cases.div_ceil(4),
            false => cases,
        },
        rng_seed: RngSeed::Fixed(seed_or(other.as_deref(), seed)),
        failure_persistence: None,
        ..Config::default()
    }
}

fn seed_or(other: Option<&str>, seed: u64) -> u64 {
    let Some(other) = other else { return seed };
    other
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("{SEED}: expected a whole number, got {other:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn a_seed_replaces_the_usual_one() {
        assert_eq!(seed_or(None, 7), 7);
        assert_eq!(seed_or(Some(" 12 "), 7), 12);
        assert!(catch_unwind(|| seed_or(Some("twelve"), 7)).is_err());
    }
}
