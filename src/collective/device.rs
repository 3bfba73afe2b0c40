//! Sums in the memory of devices.

use candle_core::DeviceLocation;
#[cfg(feature = "cuda")]
use candle_core::Result;

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
#[cfg(feature = "cuda")]
use candle_norm_support::messages;

#[cfg(feature = "cuda")]
use super::Call;

/// Sums of an engine over values in the memory of devices, where they are.
///
/// For each call on a device the ranks have met on the host, so that an error of one of them is an
/// error of all before the device waits for anyone.
pub trait DeviceSums: Send + Sync {
    /// Whether values of a device are summed where they are.
    ///
    /// On the CPU that is [`all_reduce_sum`](super::Collective::all_reduce_sum) itself: tests of an
    /// engine run what a device would.
    fn serves(&self, location: DeviceLocation) -> bool;

    /// [`all_reduce_sum`](super::Collective::all_reduce_sum) in the memory of a CUDA device, in the
    /// order of its stream.
    ///
    /// # Errors
    /// Faults of the engine.
    #[cfg(feature = "cuda")]
    fn all_reduce_sum_cuda(&self, call: &Call, values: &mut CudaSlice<f64>) -> Result<()> {
        let _ = (call, values);
        messages::internal("DeviceSums", "sums on the CPU")
    }

    /// [`all_reduce_sum_f32`](super::Collective::all_reduce_sum_f32), likewise.
    ///
    /// # Errors
    /// As [`all_reduce_sum_cuda`](Self::all_reduce_sum_cuda).
    #[cfg(feature = "cuda")]
    fn all_reduce_sum_f32_cuda(&self, call: &Call, values: &mut CudaSlice<f32>) -> Result<()> {
        let _ = (call, values);
        messages::internal("DeviceSums", "sums on the CPU")
    }
}
