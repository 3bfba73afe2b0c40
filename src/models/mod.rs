//! Tools for whole models: norms by value, files, optimizers, averaged weights, inference.

mod averaged;
pub mod checkpoint;
mod config;
mod fold;
mod name;
mod normed_layer;
mod optim;
mod pipeline;
mod recalibrate;

pub use averaged::{Average, AveragedModel, AveragedModelOptions, Decay, Warmup};
pub use config::NormConfig;
pub use fold::{Follower, fold};
pub use normed_layer::NormedLayer;
pub use optim::{ParamGroups, param_groups, trainable_vars};
pub use pipeline::Pipeline;
pub use recalibrate::recalibrate;
