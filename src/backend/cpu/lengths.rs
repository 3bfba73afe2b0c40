//! The lengths of rows as outputs.

use candle_core::{CpuStorage, Result, WithDType};

use super::{Arg, Cpu, Native, elements, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, Lengths};
use candle_norm_kernels::Length;

impl Lengths {
    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        let saved = T::row_lengths(elements(args.x)?, self.len);
        let y = saved
            .iter()
            .map(|l| <T::Acc as WithDType>::from_f64(l.value()));
        Ok(Forward {
            y: T::Acc::to_cpu_storage_owned(y.collect()),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Length>>,
    ) -> Result<Gradients<CpuStorage>> {
        let dlengths = widened::<f64>(from.dy)?;
        let x = elements::<T>(from.x)?;
        let dx = T::row_lengths_backward(x, &dlengths, from.saved, self.len);
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dx),
            dweight: None,
            dbias: None,
        })
    }
}

impl On<Cpu> for Lengths {
    type Saved = Vec<Length>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Length>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
