//! Train steps under jemalloc: `cargo bench --bench alloc_jemalloc`.

#[path = "alloc/body.rs"]
mod body;

#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> candle_core::Result<()> {
    body::run("jemalloc")
}
