//! Train steps under the system's allocator, which a program has that chooses none:
//! `cargo bench --bench alloc_system`.

#[path = "alloc/body.rs"]
mod body;

#[global_allocator]
static ALLOCATOR: std::alloc::System = std::alloc::System;

fn main() -> candle_core::Result<()> {
    body::run("system")
}
