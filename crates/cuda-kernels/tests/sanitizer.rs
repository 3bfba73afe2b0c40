//! Reports that AddressSanitizer must make. The other programs run under it too, with the feature
//! `address-sanitizer`.
mod common;

use candle_norm_cuda_emulator::Order;
use candle_norm_cuda_kernels::geometry::rows::Norm;
use common::{Buffer, USUAL, case};
use std::process::Command;

/// The environment variable that tells a process which buffers are short.
const SHORT: &str = "CANDLE_NORM_SHORT_BUFFER";

/// A process of its own launches a kernel, whose input or output is short; its status, and its
/// standard error.
fn run(short: &str) -> (bool, String) {
    let program = std::env::current_exe().unwrap();
    let done = Command::new(program)
        .args(["--exact", "--nocapture", "a_launch"])
        .env(SHORT, short)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    (done.status.success(), text)
}

#[test]
fn buffers_of_the_right_size_are_not_reported() {
    let (passed, text) = run("none");
    assert!(passed && !text.contains("AddressSanitizer"), "{text}");
}

#[test]
fn an_input_and_an_output_that_are_short_by_one_element_are_reported() {
    for (short, access) in [("input", "READ"), ("output", "WRITE")] {
        let (passed, text) = run(short);
        assert!(!passed, "a short {short} was not noticed");
        assert!(
            text.contains("heap-buffer-overflow") && text.contains(access),
            "{text}"
        );
        assert!(text.contains("rows.cu"), "no line of the kernel: {text}");
    }
}

const COLS: usize = 37;

fn with_one_less(input: usize, output: usize) {
    let mut case = case::<f32, f32>(Norm::ALL[0], 3, COLS, &USUAL);
    case.x = Buffer::new(&case.x.slice()[input..], 0);
    let _ = case.forward(Order::Ascending, 3 * COLS - output);
}

/// A launch with whole buffers; with a short one in the processes of the other tests.
#[test]
fn a_launch() {
    match std::env::var(SHORT).as_deref() {
        Ok("input") => with_one_less(1, 0),
        Ok("output") => with_one_less(0, 1),
        _ => with_one_less(0, 0),
    }
}
