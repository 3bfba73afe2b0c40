//! Runs every conformance case of a folder through the public layers.
//!
//! ```text
//! cargo test --release --test conformance                        # tests/fixtures/conformance
//! CANDLE_NORM_CONFORMANCE=some/folder cargo test --release --test conformance -- --nocapture
//! CANDLE_NORM_DEVICE=cuda cargo test --release --features cuda --test conformance -- --nocapture
//! ```
//!
//! A case is a safetensors file: inputs, a cotangent, a configuration, and what must come out in
//! float64 (`conformance/case.rs` has the format). `scripts/make_conformance.py` writes the cases
//! of this repository; anyone else's run the same way. Every case is run on every path that serves
//! it, on contiguous input and on strided views of the same values, and backpropagated by candle's
//! own `backward`. A new layer is one entry in the table of `conformance/layers.rs`.

mod case;
mod compare;
mod family;
mod layers;
mod ranks;
mod runner;
mod self_test;

use std::path::PathBuf;

/// Linked for its emulator of the CUDA kernels.
use testkit as _;

/// Device of the cases where the environment names none.
const DEFAULT_DEVICE: &str = "cpu";

#[test]
fn every_case_of_the_folder_passes() {
    let folder = match std::env::var_os("CANDLE_NORM_CONFORMANCE") {
        // cargo starts a test in the folder of its package; a relative path is from the top.
        Some(folder) => top().join(folder),
        None => own_cases(),
    };
    let report = runner::run_folder(&folder);
    print!("{report}");
    assert!(
        report.passes(),
        "{} of {}",
        report.closing_line(),
        folder.display()
    );
}

/// The folder of the workspace.
fn top() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The cases of this repository.
fn own_cases() -> PathBuf {
    top().join("tests/fixtures/conformance")
}
