//! Tools for whole models: configurations, checkpoints, averages, optimizers, and code of
//! candle-nn.

mod averaged;
mod checkpoint_files;
mod checkpoints;
mod drop_in;
mod family_checkpoints;
mod loading;
mod norm_config;
mod optim;
