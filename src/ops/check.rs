//! Rules that the inputs and options of several layers must meet, and the messages of those that do
//! not. A rule of one layer alone is in the file of that layer.
//!
//! A message names the layer, says what was expected and what came, and, where there is one, the
//! remedy.

mod input;
mod options;
mod statistics;

pub(crate) use candle_norm_support::messages::{
    NO_BATCH_AXIS, at_least_one, dtype, finite, float, rank_at_least, same_device, shape,
};
pub(crate) use input::{Param, channels, channels_first, countable, features, input, param_dtype};
pub(crate) use options::{dim, eps, groups, momentum, normalized_shape, one_axis};
pub(crate) use statistics::{counter, more_than_one_value, statistic};
