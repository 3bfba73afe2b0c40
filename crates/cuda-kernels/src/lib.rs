//! CUDA kernels of normalization layers, as sources and PTX, and the geometry of their launches.
//!
//! This crate knows no tensor library. A launch is a [`Launch`]: a kernel's name, a grid, a block and
//! shared memory, all pure functions of the shape (see [`geometry`]).
pub mod geometry;

/// One launch of a kernel. Its arguments are described where the launch is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name.
    pub kernel: String,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}
