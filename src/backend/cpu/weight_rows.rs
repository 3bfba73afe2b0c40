//! Weight norm.

use std::borrow::Cow;

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, WeightRows, argument};
use candle_norm_kernels::Length;

/// `g` of each of `num_rows` rows, if they have one each, or one that is common to all.
fn of_rows<A: Copy>(g: &[A], num_rows: usize) -> Cow<'_, [A]> {
    match g {
        [g] => Cow::Owned(vec![*g; num_rows]),
        _ => Cow::Borrowed(g),
    }
}

impl WeightRows {
    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Length>>> {
        let v = elements(args.x)?;
        let g = widened::<T::Acc>(argument(self, args.weight)?)?;
        let g = of_rows(&g, v.len() / self.len);
        let (w, saved) = T::weight_forward(v, &g, self.len, self.least);
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
        let by_row = of_rows(&g, v.len() / self.len);
        let (dv, mut dg) = T::weight_backward(v, dw, &by_row, from.saved, self.len);
        if g.len() < dg.len() {
            dg = vec![dg.iter().sum()];
        }
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
