//! Several ranks: groups of threads, their faults, and layers and models on them.

mod threads;
