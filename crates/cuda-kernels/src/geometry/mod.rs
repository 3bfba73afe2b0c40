//! Grids, blocks and scratch sizes as pure functions of the shape.
//!
//! Nothing here depends on the card: the number of partial sums, and with it every bit of a result,
//! is the same on all of them. No launch goes beyond compute capability 8.0.
pub mod channels;
pub mod groups;
pub mod mixture;
pub mod pointwise;
pub mod rows;
pub mod slots;
pub mod transpose;
pub mod weight;

#[cfg(test)]
mod limits;

/// The grid of a list of blocks, which kernels count by `block_of_list`: longer ones than a grid is
/// wide have several lines, and the last line may have blocks without work.
fn list(blocks: u64) -> [u32; 3] {
    let lines = blocks.div_ceil(i32::MAX as u64).max(1);
    [blocks.div_ceil(lines) as u32, lines as u32, 1]
}
