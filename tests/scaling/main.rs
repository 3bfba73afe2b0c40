//! Scalers: the values of scikit-learn, what must hold of all data, gradients, threads, files,
//! messages.

mod balancer;
mod errors;
mod files;
mod fixtures;
mod gradients;
mod half;
mod kinds;
mod limits;
#[cfg(feature = "serde")]
mod options;
mod pipeline;
mod precision;
mod properties;
mod series;
mod target;
mod threads;
