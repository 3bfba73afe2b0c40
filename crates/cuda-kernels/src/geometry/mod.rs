//! Grids, blocks and scratch sizes as pure functions of the shape.
//!
//! Nothing here depends on the card: the number of partial sums, and with it every bit of a result,
//! is the same on all of them. No launch goes beyond compute capability 8.0.
pub mod channels;
pub mod groups;
pub mod rows;
pub mod transpose;
pub mod weight;
