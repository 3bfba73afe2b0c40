//! Layers on many threads: the same bits, no deadlock, no lost update; and what a call allocates.

mod allocations;
mod deadlock;
mod determinism;
mod threads;
