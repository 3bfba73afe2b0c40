//! The emulator of the CUDA kernels, which every program that this crate is part of has for
//! `Path::Emulated`.
//!
//! `CANDLE_NORM_EMULATED_ORDER` is the order of the threads of a block: `ascending`, `descending`
//! or `shuffled`. The first is the default; results have the same bits in all of them.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::OnceLock;

use candle_norm::internals::{Argument, Launch, install_emulator};
pub use candle_norm_cuda_emulator::Order;
use candle_norm_cuda_emulator::{Args, launch};

/// Runs before `main`: the test harness has no other place that all programs share.
#[used]
#[cfg_attr(target_os = "linux", unsafe(link_section = ".init_array"))]
#[cfg_attr(
    target_vendor = "apple",
    unsafe(link_section = "__DATA,__mod_init_func")
)]
#[cfg_attr(windows, unsafe(link_section = ".CRT$XCU"))]
static INSTALL: extern "C" fn() = {
    extern "C" fn install() {
        install_emulator(run);
    }
    install
};

/// Whether the environment has whole programs run on the emulator, which takes a microsecond for
/// each element.
pub fn is_chosen() -> bool {
    std::env::var("CANDLE_NORM_PATH").is_ok_and(|path| path == "emulated")
}

thread_local! {
    static ORDER: Cell<Option<Order>> = const { Cell::new(None) };
}

/// Runs `f`, whose launches on this thread run their own threads in `order`.
pub fn with_order<T>(order: Order, f: impl FnOnce() -> T) -> T {
    let before = ORDER.replace(Some(order));
    let result = f();
    ORDER.set(before);
    result
}

/// The order of threads that the caller or the environment asks for.
fn order() -> Result<Order, String> {
    if let Some(order) = ORDER.get() {
        return Ok(order);
    }
    static NAME: OnceLock<String> = OnceLock::new();
    let read = || std::env::var("CANDLE_NORM_EMULATED_ORDER").unwrap_or_default();
    match NAME.get_or_init(read).as_str() {
        "" | "ascending" => Ok(Order::Ascending),
        "descending" => Ok(Order::Descending),
        "shuffled" => Ok(Order::Shuffled(5)),
        other => Err(format!("there is no order of threads `{other}`")),
    }
}

/// Runs a launch on the emulator.
fn run(what: &Launch, arguments: Vec<Argument<'_>>) -> Result<(), String> {
    let order = order()?;
    let mut args = Args::new();
    for argument in arguments {
        args = match argument {
            Argument::Read(words, skipped) => {
                let bytes = words.as_ptr().cast::<u8>();
                let len = size_of_val(words) - skipped;
                // SAFETY: the bytes are those of the words but for the first of them, and live as
                // long.
                args.read(unsafe { std::slice::from_raw_parts(bytes.add(skipped), len) })
            }
            Argument::Write(words) => args.write(words),
            Argument::Null => args.null(),
            Argument::I64(v) => args.i64(v),
            Argument::I32(v) => args.i32(v),
            Argument::F64(v) => args.f64(v),
        };
    }
    // SAFETY: the backend passes the arguments that the geometry's functions describe, with memory
    // of their sizes.
    let done = unsafe {
        launch(
            &what.kernel,
            what.grid,
            what.block,
            what.shared,
            args,
            order,
        )
    };
    done.map_err(|fault| fault.to_string())
}
