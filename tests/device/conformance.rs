//! Conformance cases on the device.

use std::path::PathBuf;

use crate::runner::run_folder;

#[test]
fn every_case_of_the_folder_passes() {
    let top = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let folder = std::env::var_os("CANDLE_NORM_CONFORMANCE");
    let folder = top.join(folder.unwrap_or_else(|| "tests/fixtures/conformance".into()));
    let report = run_folder(&folder);
    print!("{report}");
    let closing = report.closing_line();
    assert!(report.passes(), "{closing} of {}", folder.display());
}
