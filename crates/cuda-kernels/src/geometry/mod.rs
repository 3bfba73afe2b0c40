//! Grids, blocks and scratch sizes as pure functions of the shape.
pub mod rows;
