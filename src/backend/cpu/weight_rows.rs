//! Weight norm.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, WeightRows, argument};
use crate::kernels::Length;

impl WeightRows {
    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        let g = widened::<T::Acc>(argument(self, args.weight)?)?;
        let (w, saved) = T::weight_forward(elements(args.x)?, &g, self.len);
        Ok(Forward {
            y: T::to_cpu_storage_owned(w),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Length>>,
    ) -> Result<Gradients<CpuStorage>> {
        let g = widened::<T::Acc>(argument(self, from.weight)?)?;
        let (v, dw) = (elements::<T>(from.x)?, elements(from.dy)?);
        let (dv, dg) = T::weight_backward(v, dw, &g, from.saved, self.len);
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dv),
            dweight: from.params.then_some(CpuStorage::F64(dg)),
            dbias: None,
        })
    }
}

impl On<Cpu> for WeightRows {
    type Saved = Vec<Length>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Length>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
