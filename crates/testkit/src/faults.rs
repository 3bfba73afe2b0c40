//! Faults of candle, and whether they are still there.
//!
//! A newer candle without one of them is good news, so that no test fails by it. `.ci/run` prints
//! the table of all faults.

/// Prints a row of the table of faults.
///
/// Where:
///
/// - `still`: candle has the fault
/// - `then`: the consequence for this crate, once it has not
pub fn report(fault: &str, still: bool, then: &str) {
    let state = match still {
        true => "still there".to_string(),
        false => format!("**mended**: {then}"),
    };
    // The harness may have begun a line.
    println!("\n| candle: {fault} | {state} |");
}
