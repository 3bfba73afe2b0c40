//! Moments of data: all that scalers take from the kernels.

pub use crate::ops::Moments;
pub(super) use crate::ops::columns;
