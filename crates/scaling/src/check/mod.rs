//! Messages about the data, options and states of several scalers. A rule of one file alone is in
//! that file.

mod calls;
mod data;
mod saved;

pub(crate) use calls::{fitted, option, unsupported};
pub(crate) use candle_norm_support::messages::{
    at_least_one, dtype, file, finite, float, internal, rank_at_least, same_device, shape, written,
};
pub(crate) use data::{feature_count, no_weights, representable, samples, usable};
pub(crate) use saved::{countable, present, saved_length, saved_value, well_formed};
