//! Rows over their lengths.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, L2Form, UnitRows};
use candle_norm_kernels::{Floor, Length};

impl UnitRows {
    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        let floor = match self.form {
            L2Form::Max => Floor::UpTo(self.eps),
            L2Form::Inside => Floor::Inside(self.eps),
        };
        let (y, saved) = T::unit_forward(elements(args.x)?, self.len, floor);
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Length>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (elements::<T>(from.x)?, elements(from.dy)?);
        let dx = T::unit_backward(x, dy, from.saved, self.len);
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dx),
            dweight: None,
            dbias: None,
        })
    }
}

impl On<Cpu> for UnitRows {
    type Saved = Vec<Length>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Length>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
