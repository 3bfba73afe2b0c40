//! Several ranks: groups of threads, their faults, and layers and models on them.

mod batch_norm;
mod other_layers;
mod shares;
mod threads;
mod training;
