//! Scalers for data and targets, which are fitted once, saved with the model, and watched.
//!
//! A [`Scaler`] has scikit-learn's `fit`, `partial_fit`, `transform` and `inverse_transform` over
//! candle tensors `[N, features...]`: statistics in `f64` whatever the dtype, transformations by
//! tensor operations that gradients pass through, on any device. No layer and no model is needed
//! for any of it.
//!
//! | item | for |
//! | --- | --- |
//! | [`StandardScaler`], [`MinMaxScaler`], [`MaxAbsScaler`], [`RobustScaler`] | data in any order |
//! | [`SlidingScaler`], [`EwmScaler`] | series, by their last rows |
//! | [`AdaptiveScaler`], [`DriftMonitor`] | data that change |
//! | [`TargetScaler`] | what a model predicts, with errors in both units |
//! | [`Archive`], [`State`], [`load`], [`from_state`] | files, also beside a model |
//! | [`half_precision`] | what `f16` would lose |
//! | [`LossBalancer`] | several losses on one scale |
//!
//! candle-norm has all of this as [`candle_norm::scaling`], with `RevIn` and `Pipeline` beside it;
//! the examples name it so. A program that has this crate alone writes `candle_norm_scaling`. That
//! page has the formulas side by side and the edges, and [Data and targets] says which scaler when.
//!
//! [`candle_norm::scaling`]: https://docs.rs/candle-norm/latest/candle_norm/scaling/
//! [Data and targets]: https://docs.rs/candle-norm/latest/candle_norm/guide/scaling/

#![cfg_attr(docsrs, feature(doc_cfg))]

mod adaptive;
mod affine;
mod archive;
mod causal;
mod check;
mod data;
mod drift;
mod ewm;
mod extremes;
mod features;
mod fitted;
mod follow;
mod half;
mod loss_balancer;
mod max_abs;
mod min_max;
mod moments;
mod monitor;
mod optimistic;
mod parse;
mod reference;
mod registry;
mod robust;
mod rows;
mod scaler;
mod series_stats;
mod sliding;
mod standard;
mod state;
mod target;
mod two_samples;
mod watch;
mod window;

pub use adaptive::{AdaptiveScaler, OnDrift};
pub use archive::Archive;
pub use causal::Causal;
pub use data::Nan;
pub use drift::{DriftEvent, DriftMetric, DriftOptions, DriftReport};
pub use ewm::{EwmScaler, EwmScalerOptions};
pub use features::Features;
pub use fitted::FittedScaler;
pub use follow::SeriesScaler;
pub use half::{HalfFinding, HalfProblem, half_precision};
pub use loss_balancer::{LossBalancer, LossBalancerOptions};
pub use max_abs::{MaxAbsScaler, MaxAbsScalerOptions};
pub use min_max::{MinMaxScaler, MinMaxScalerOptions};
pub use moments::Moments;
pub use monitor::DriftMonitor;
pub use parse::ParseOptionError;
pub use registry::{from_state, load};
pub use robust::{RobustScaler, RobustScalerOptions};
pub use scaler::{PREFIX, Scaler};
pub use series_stats::SeriesStats;
pub use sliding::{SlidingScaler, SlidingScalerOptions};
pub use standard::{StandardScaler, StandardScalerOptions};
pub use state::{Seen, State};
pub use target::{Deviation, TargetError, TargetScaler};

// The example of the README is a test too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
