//! Train steps under mimalloc: `cargo bench --bench alloc_mimalloc`.

#[path = "alloc/body.rs"]
mod body;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> candle_core::Result<()> {
    body::run("mimalloc")
}
