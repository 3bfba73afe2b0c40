//! Models of candle-transformers with the layers of candle-norm in them. `build.rs` converts their
//! sources by a rename, and `tests/training.rs` trains them.
//!
//! `cargo test` at the top does not build this package: `cargo test -p candle-norm-transformers`
//! does, and downloads the sources of candle-transformers. Where it cannot, it says so and has
//! nothing to test.

// They are as they are.
#![allow(warnings, clippy::all)]

#[cfg(converted)]
macro_rules! converted {
    ($($name:ident)*) => {
        $(pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs"));
        })*
    };
}

#[cfg(converted)]
converted!(llama quantized_var_builder utils vit with_tracing);
