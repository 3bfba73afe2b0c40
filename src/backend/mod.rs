//! Backends: computations carried out on the storage of one device.
//!
//! A backend implements [`On`] for every computation, one file each. A new device is a new backend
//! and one more variant where [`graph`](crate::graph) picks between them; no layer and no op
//! changes.

pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "internals"))]
pub(crate) mod cuda;
#[cfg(feature = "internals")]
pub(crate) mod reference;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, Layout, Result, Storage, Tensor};

use crate::computations::{Args, Computation, Gradients};
use candle_norm_support::messages;

/// A kind of storage, and who computes on it.
pub(crate) trait Backend: Send + Sync + 'static {
    /// candle's storage of the device.
    type Storage: DeviceStorage;

    /// Whether the backend has a kernel for running statistics.
    const UPDATES: bool = false;

    /// Running statistics after a batch.
    fn updated(layer: &'static str, _: Running<Self::Storage>) -> Result<Updated<Self::Storage>> {
        messages::internal(layer, "running statistics by tensor operations")
    }
}

/// Running statistics, and those of the batch that they take in; all are contiguous.
#[cfg_attr(not(any(feature = "cuda", feature = "internals")), allow(dead_code))]
pub(crate) struct Running<'a, S> {
    pub(crate) mean: View<'a, S>,
    pub(crate) var: View<'a, S>,
    /// The number of batches, an `i64`.
    pub(crate) counter: View<'a, S>,
    pub(crate) batch_mean: View<'a, S>,
    /// As it is taken in: unbiased.
    pub(crate) batch_var: View<'a, S>,
    /// The weight of the batch; without it, one over the number of batches with this one.
    pub(crate) momentum: Option<f64>,
}

/// Running statistics in storage of their own.
pub(crate) struct Updated<S> {
    pub(crate) mean: S,
    pub(crate) var: S,
    pub(crate) counter: S,
}

/// candle's storage of one kind of device.
pub(crate) trait DeviceStorage: BackendStorage + Send + Sync + 'static {
    /// A storage, if it is of this kind.
    fn of(storage: &Storage) -> Option<&Self>;

    /// A storage, if it is of this kind.
    fn from_storage(storage: Storage) -> Option<Self>;

    fn into_storage(self) -> Storage;

    /// The elements, where the host can read them.
    fn on_host(&self) -> Option<&CpuStorage>;
}

macro_rules! device_storage {
    ($storage:ident, $kind:ident, $on_host:expr) => {
        impl DeviceStorage for $storage {
            fn of(storage: &Storage) -> Option<&Self> {
                match storage {
                    Storage::$kind(storage) => Some(storage),
                    _ => None,
                }
            }

            fn from_storage(storage: Storage) -> Option<Self> {
                match storage {
                    Storage::$kind(storage) => Some(storage),
                    _ => None,
                }
            }

            fn into_storage(self) -> Storage {
                Storage::$kind(self)
            }

            fn on_host(&self) -> Option<&CpuStorage> {
                $on_host(self)
            }
        }
    };
}
device_storage!(CpuStorage, Cpu, Some);
device_storage!(CudaStorage, Cuda, |_| None);

/// A tensor as a backend sees it.
#[derive(Debug)]
pub(crate) struct View<'a, S> {
    pub(crate) storage: &'a S,
    pub(crate) layout: &'a Layout,
}

impl<S> Clone for View<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S> Copy for View<'_, S> {}

/// Whether `[N, C, *]` lies in memory as `[N, *, C]`, and not as it is written.
pub(crate) fn is_channels_last(layout: &Layout) -> bool {
    let rank = layout.dims().len();
    if rank < 3 || layout.is_contiguous() {
        return false;
    }
    let mut step = 1;
    let inward = [1].into_iter().chain((2..rank).rev()).chain([0]);
    for axis in inward {
        let size = layout.dims()[axis];
        if size != 1 && layout.stride()[axis] != step {
            return false;
        }
        step *= size;
    }
    true
}

/// A forward that ran.
pub(crate) struct Forward<S, Saved> {
    pub(crate) y: S,
    pub(crate) saved: Saved,
}

/// Arguments of a backward.
pub(crate) struct Backward<'a, S, Saved> {
    pub(crate) x: View<'a, S>,
    pub(crate) weight: Option<View<'a, S>>,
    /// Where the computation [reads it](Computation::backward_reads_bias).
    pub(crate) bias: Option<View<'a, S>>,
    /// The gradient of the output, contiguous.
    pub(crate) dy: View<'a, S>,
    pub(crate) saved: &'a Saved,
    /// Whether anything asks for the gradients of the parameters.
    pub(crate) params: bool,
}

/// A computation on the backend `B`.
pub(crate) trait On<B: Backend>: Computation {
    /// State that the backward needs of the forward, in storage of the backend.
    type Saved: Send + Sync + 'static;

    /// Whether the backend has kernels for it; the composed form serves otherwise.
    fn is_carried_out(&self) -> bool {
        true
    }

    /// Whether the input may lie in memory like this; it is made contiguous otherwise.
    fn takes(&self, x: &Layout) -> bool {
        x.is_contiguous()
    }

    /// The statistics among what was saved, where a layer may ask for them.
    fn statistics(_: &Self::Saved) -> Option<&dyn Statistics> {
        None
    }

    fn forward(&self, args: Args<View<B::Storage>>) -> Result<Forward<B::Storage, Self::Saved>>;

    /// The output alone, where no backward follows.
    fn inference(&self, args: Args<View<B::Storage>>) -> Result<B::Storage> {
        Ok(self.forward(args)?.y)
    }

    /// The gradients: of the input in its dtype, of the parameters in any that is wide enough.
    fn backward(&self, from: Backward<B::Storage, Self::Saved>) -> Result<Gradients<B::Storage>>;
}

/// A sum and what it was normalized to.
pub(crate) struct Added<S, Saved> {
    /// In the accumulator's dtype.
    pub(crate) sum: S,
    /// In the dtype of the input, where that is another.
    pub(crate) rounded: Option<S>,
    pub(crate) normalized: Forward<S, Saved>,
}

/// Rows of a sum: two inputs are added and the sum is normalized in one pass.
pub(crate) trait AddOn<B: Backend>: On<B> {
    /// Whether the backend has kernels for it; the composed form serves otherwise.
    fn is_carried_out_added(&self) -> bool {
        self.is_carried_out()
    }

    fn add_forward(
        &self,
        args: Args<View<B::Storage>>,
        residual: View<B::Storage>,
    ) -> Result<Added<B::Storage, Self::Saved>>;
}

/// Statistics that a forward formed, as tensors outside of the graph: one value for each row,
/// group or channel, in `f64`.
pub(crate) trait Statistics {
    fn mean(&self) -> Result<Tensor>;

    /// Biased.
    fn var(&self) -> Result<Tensor>;

    /// `√(var + eps)`.
    fn std(&self) -> Result<Tensor>;

    /// The mean and the variance of each channel, averaged over the samples.
    fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]>;
}
