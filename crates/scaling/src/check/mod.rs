//! Messages about scalers: their data, options, states and files.

mod calls;
mod data;
mod files;
mod saved;
mod series;

pub(crate) use calls::{fitted, option, unsupported};
pub(crate) use candle_norm_support::messages::{
    at_least_one, dtype, file, finite, float, internal, rank_at_least, same_device, shape, written,
};
pub(crate) use data::{
    distinct_names, feature_count, feature_shape, has_values, name_count, no_weights,
    representable, same_name, samples, some_weight, usable, usable_weight, weight_per_sample,
};
pub(crate) use files::{free_name, loaded, no_part, nothing_lost, writable};
pub(crate) use saved::{
    countable, kind, known_kind, present, saved_length, saved_value, some_features, version,
    well_formed,
};
pub(crate) use series::{
    enough_values, known, recent_values, refitted, same_nan, same_reaction, stretches, summable,
};
