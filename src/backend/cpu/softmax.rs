//! Softmax of rows.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, Softmax};
use candle_norm_kernels::ExpSum;

impl Softmax {
    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<ExpSum>>> {
        let (y, saved) = T::softmax_forward(elements(args.x)?, self.len, self.log);
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<ExpSum>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (elements::<T>(from.x)?, elements(from.dy)?);
        let dx = T::softmax_backward(x, dy, from.saved, self.len, self.log);
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dx),
            dweight: None,
            dbias: None,
        })
    }
}

impl On<Cpu> for Softmax {
    type Saved = Vec<ExpSum>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<ExpSum>>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<ExpSum>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
