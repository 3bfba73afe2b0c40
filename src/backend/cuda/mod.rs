//! NVIDIA GPUs: candle's storages as arguments of the CUDA kernels.
//!
//! The launches of a computation are written once, over a [`Launcher`]. The driver is one, under
//! the feature `cuda`; the emulator of the tests is another, under the feature `internals`. Nothing
//! here copies to the host or waits for the device, except for synchronized statistics, which pass
//! through the host on their way to other ranks.

#[cfg_attr(not(feature = "internals"), allow(unreachable_pub))]
pub(crate) mod asked;
mod channels;
#[cfg(feature = "cuda")]
pub(crate) mod driver;
#[cfg(feature = "internals")]
pub(crate) mod emulated;
mod gated;
mod groups;
mod launches;
mod lengths;
mod mixture;
mod modulate;
mod operands;
mod plane_moments;
mod pointwise;
mod rows;
mod running;
mod scale_add;
mod scale_shift;
mod softmax;
mod statistics;
mod synchronized;
mod transpose;
mod unit_rows;
mod weight_rows;
mod without_kernels;

use std::marker::PhantomData;

use candle_core::{DType, Result};
use candle_norm_cuda_kernels::Launch;

use super::{Backend, DeviceStorage, Running, Updated, View};
use operands::{Call, Device, Operand};

/// A way to run the kernels on storages of one kind.
pub(crate) trait Launcher: Send + Sync + 'static {
    type Storage: DeviceStorage;

    /// `len` elements that have no values yet, at least one, on the device of `like`.
    fn alloc(like: &Self::Storage, dtype: DType, len: usize) -> Result<Self::Storage>;

    /// Launches a kernel of `layer` on the device of `like`.
    fn launch(
        layer: &'static str,
        like: &Self::Storage,
        launch: &Launch,
        args: &mut [Arg<'_, Self::Storage>],
    ) -> Result<()>;
}

/// An argument of a kernel.
#[derive(Debug)]
pub(crate) enum Arg<'a, S> {
    /// The elements of a storage from one of them on.
    Read(&'a S, usize),
    /// A storage of its own.
    Write(&'a mut S),
    Null,
    I64(i64),
    I32(i32),
    F64(f64),
}

/// The fused kernels of NVIDIA GPUs, launched by `L`.
pub(crate) struct Cuda<L>(PhantomData<L>);

impl<L: Launcher> Backend for Cuda<L> {
    type Storage = L::Storage;
    const UPDATES: bool = true;

    fn updated(layer: &'static str, from: Running<L::Storage>) -> Result<Updated<L::Storage>> {
        running::updated::<L>(layer, from)
    }
}
