//! Moments of data: all that scalers take from the kernels.

pub use candle_norm_kernels::Moments;
pub(super) use candle_norm_support::columns;
