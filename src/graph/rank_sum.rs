//! Sums over the ranks of a group as nodes of candle's graph.

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType, backend::BackendStorage};

use crate::collective::{Call, Collective};
use crate::computations::{RankSum, SumNodes};
use candle_norm_support::{host, messages};

/// The nodes of sums over ranks.
pub(crate) const SUMS_OVER_RANKS: SumNodes = SumNodes {
    formed: sums_over_ranks,
    in_place,
};

/// A node of sums that were formed before.
struct Summed {
    sums: Vec<f64>,
    by: RankSum,
}

/// `sums` of what the ranks `contributed`, `[n]` in `f64` on the CPU. The gradient of the
/// contribution is the sum over all ranks of their gradients.
fn sums_over_ranks(contributed: &Tensor, sums: Vec<f64>, by: &RankSum) -> Result<Tensor> {
    let by = by.clone();
    contributed.apply_op1(Summed { sums, by })
}

impl CustomOp1 for Summed {
    fn name(&self) -> &'static str {
        self.by.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F64(self.sums.clone()), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let sums = self.by.of(host::vector(&dy.detach())?)?;
        Ok(Some(sums_over_ranks(dy, sums, &self.by)?))
    }
}

/// The sums over all ranks of `values`, `[n]` in `f64` or `f32`, in their own memory, where
/// [`DeviceSums`](crate::collective::DeviceSums) serve it.
pub(crate) fn sum_in_place(
    group: &dyn Collective,
    name: &'static str,
    values: &Tensor,
) -> Result<()> {
    values.inplace_op1(&SumInPlace { group, name })
}

struct SumInPlace<'a> {
    group: &'a dyn Collective,
    name: &'static str,
}

impl InplaceOp1 for SumInPlace<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        let call = Call::new(self.name);
        match storage {
            CpuStorage::F64(all) => self.group.all_reduce_sum(&call, &mut all[range]),
            CpuStorage::F32(all) => self.group.all_reduce_sum_f32(&call, &mut all[range]),
            _ => messages::internal(self.name, "values in F64 or F32"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let call = Call::new(self.name);
        let Some(engine) = self.group.device_sums() else {
            return messages::internal(self.name, "a group with sums on devices");
        };
        // What is summed is a tensor of its own.
        let len = layout.shape().elem_count();
        match storage.dtype() {
            DType::F64 if storage.as_cuda_slice::<f64>()?.len() == len => {
                engine.all_reduce_sum_cuda(&call, storage.as_cuda_slice_mut()?)
            }
            DType::F32 if storage.as_cuda_slice::<f32>()?.len() == len => {
                engine.all_reduce_sum_f32_cuda(&call, storage.as_cuda_slice_mut()?)
            }
            _ => messages::internal(self.name, "values in F64 or F32 that are all of a tensor"),
        }
    }
}

/// A node of sums in the memory of a device.
struct SummedInPlace {
    forward: RankSum,
    backward: RankSum,
}

/// The sums over all ranks of what they `contributed`, `[n]` in `f64`, on the device of that. The
/// gradient of the contribution is the sum over all ranks of their gradients.
fn in_place(contributed: &Tensor, names: [&RankSum; 2]) -> Result<Tensor> {
    let [forward, backward] = names.map(RankSum::clone);
    let node = SummedInPlace { forward, backward };
    contributed.contiguous()?.apply_op1(node)
}

impl SummedInPlace {
    fn op(&self) -> SumInPlace<'_> {
        SumInPlace {
            group: &*self.forward.group,
            name: self.forward.name,
        }
    }
}

impl CustomOp1 for SummedInPlace {
    fn name(&self) -> &'static str {
        self.forward.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (mut own, shape) = (storage.clone(), layout.shape().clone());
        self.op().cpu_fwd(&mut own, layout)?;
        let range = layout.start_offset()..layout.start_offset() + shape.elem_count();
        match own {
            CpuStorage::F64(all) => Ok((CpuStorage::F64(all[range].to_vec()), shape)),
            _ => messages::internal(self.forward.name, "values in F64"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = layout.shape().clone();
        let range = layout.start_offset()..layout.start_offset() + shape.elem_count();
        let values = storage.as_cuda_slice::<f64>()?.slice(range);
        let stream = storage.device.cuda_stream();
        let own = stream.clone_dtod(&values);
        let own = own.map_err(|e| candle_core::Error::Cuda(Box::new(e)))?;
        let mut own = CudaStorage::wrap_cuda_slice(own, storage.device.clone());
        self.op().cuda_fwd(&mut own, &Layout::contiguous(&shape))?;
        Ok((own, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        in_place(dy, [&self.backward; 2]).map(Some)
    }
}
