//! Models of candle-transformers with the layers of candle-norm in them. `build.rs` converts their
//! sources by a rename; `tests/training.rs` trains them. Of models whose layers candle-nn does not
//! have, it puts this crate's in their place; `tests/family.rs` compares these with the originals.
//!
//! `cargo test` at the top does not build this package: `cargo test -p candle-norm-transformers`
//! does, and downloads the sources of candle-transformers. Where it cannot, it says so and has
//! nothing to test.

// They are as they are.
#![allow(warnings, clippy::all)]

#[cfg(converted)]
macro_rules! included {
    ($folder:literal: $($name:ident)*) => {
        $(pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $folder, "/", stringify!($name), ".rs"));
        })*
    };
}

#[cfg(converted)]
included!("converted": blocks convnext llama mamba2 model projections quantized_var_builder utils);
#[cfg(converted)]
included!("converted": vit with_tracing);

/// The path of the images through a Flux, whichever norms it has.
#[cfg(converted)]
pub trait WithForward {
    fn forward(
        &self,
        img: &candle_core::Tensor,
        img_ids: &candle_core::Tensor,
        txt: &candle_core::Tensor,
        txt_ids: &candle_core::Tensor,
        timesteps: &candle_core::Tensor,
        y: &candle_core::Tensor,
        guidance: Option<&candle_core::Tensor>,
    ) -> candle_core::Result<candle_core::Tensor>;
}

/// The models as they are, with candle-nn's layers.
#[cfg(converted)]
pub mod originals {
    pub use super::WithForward;

    included!("originals": blocks convnext mamba2 model projections with_tracing);
}
