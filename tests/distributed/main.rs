//! Several ranks: groups of threads, their faults, and layers and models on them.

mod batch_norm;
mod in_place;
mod other_layers;
mod second_order;
mod shares;
mod threads;
mod training;
