//! What the documents say of this crate and of candle, and how the sources are laid out.

mod architecture;
mod candle_faults;
mod comparison;
mod guide;
mod readme;
