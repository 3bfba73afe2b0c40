//! Statements of the documents about this crate and candle, and how the sources are laid out.

mod architecture;
mod candle_faults;
mod comparison;
mod guide;
mod readme;
