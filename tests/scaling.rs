//! Scalers: the values of scikit-learn, what must hold of all data, gradients, threads, files, messages.

mod common;

#[path = "scaling/balancer.rs"]
mod balancer;
#[path = "scaling/errors.rs"]
mod errors;
#[path = "scaling/files.rs"]
mod files;
#[path = "scaling/fixtures.rs"]
mod fixtures;
#[path = "scaling/gradients.rs"]
mod gradients;
#[path = "scaling/half.rs"]
mod half;
#[path = "scaling/kinds.rs"]
mod kinds;
#[path = "scaling/limits.rs"]
mod limits;
#[path = "scaling/pipeline.rs"]
mod pipeline;
#[path = "scaling/precision.rs"]
mod precision;
#[path = "scaling/properties.rs"]
mod properties;
#[path = "scaling/target.rs"]
mod target;
#[path = "scaling/threads.rs"]
mod threads;
