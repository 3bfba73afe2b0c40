//! What AddressSanitizer must report. The other programs run under it too, with the feature
//! `address-sanitizer`.
mod common;

use candle_norm_cuda_emulator::Order;
use candle_norm_cuda_kernels::geometry::rows::Norm;
use common::{Buffer, USUAL, case};
use std::process::Command;

/// A process of its own runs `test`, which is ignored otherwise; its status and what it prints.
fn run(test: &str) -> (bool, String) {
    let program = std::env::current_exe().unwrap();
    let done = Command::new(program)
        .args(["--ignored", "--exact", "--nocapture", test])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    (done.status.success(), text)
}

#[test]
fn buffers_of_the_right_size_are_not_reported() {
    let (passed, text) = run("right");
    assert!(passed && !text.contains("AddressSanitizer"), "{text}");
}

#[test]
fn an_input_and_an_output_that_are_short_by_one_element_are_reported() {
    for (test, access) in [("short_input", "READ"), ("short_output", "WRITE")] {
        let (passed, text) = run(test);
        assert!(!passed, "{test} was not noticed");
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

#[test]
#[ignore = "run by another test"]
fn right() {
    with_one_less(0, 0);
}

#[test]
#[ignore = "run by another test"]
fn short_input() {
    with_one_less(1, 0);
}

#[test]
#[ignore = "run by another test"]
fn short_output() {
    with_one_less(0, 1);
}
