//! The copy with two axes transposed: candle's own goes element by element, on one thread.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, elements, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, Transpose};

fn transposed(x: Arg) -> Result<CpuStorage> {
    let (a, b, c) = x.layout.shape().dims3()?;
    with_native!(x.dtype(), Transpose.layer(), T => {
        use candle_core::WithDType;
        use candle_norm_kernels::Float;
        Ok(T::to_cpu_storage_owned(T::transposed(elements::<T>(x)?, [a, b, c])))
    })
}

impl On<Cpu> for Transpose {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let y = transposed(args.x)?;
        Ok(Forward { y, saved: () })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        Ok(Gradients {
            dx: transposed(from.dy)?,
            dweight: None,
            dbias: None,
        })
    }
}
