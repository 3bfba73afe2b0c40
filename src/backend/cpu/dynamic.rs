//! Dynamic tanh and its kin.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Dynamic, Gradients, Squash, argument};
use candle_norm_kernels::{DynamicParams, DynamicSpec};

impl Dynamic {
    fn spec(&self) -> DynamicSpec {
        DynamicSpec {
            len: self.axes.inner,
            channels: self.channels_first.then_some(self.axes.channels),
            squash: match self.squash {
                Squash::Tanh => candle_norm_kernels::Squash::Tanh,
                Squash::Erf => candle_norm_kernels::Squash::Erf,
            },
        }
    }

    fn params<'a, T: Copy>(&self, line: &'a [T]) -> DynamicParams<'a, T> {
        let (weight, bias) = line[2..].split_at(self.channels());
        DynamicParams {
            alpha: line[0],
            shift: line[1],
            weight,
            bias,
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let line = widened::<T::Acc>(argument(self, args.weight)?)?;
        let y = T::dynamic_forward(elements(args.x)?, self.params(&line), self.spec());
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved: (),
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, ()>,
    ) -> Result<Gradients<CpuStorage>> {
        let line = widened::<T::Acc>(argument(self, from.weight)?)?;
        let (x, dy) = (elements::<T>(from.x)?, elements::<T>(from.dy)?);
        let grads = T::dynamic_backward(x, dy, self.params(&line), self.spec(), from.params);
        let mut dline = vec![grads.dalpha, grads.dshift];
        dline.extend(grads.dweight);
        dline.extend(grads.dbias);
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(grads.dx),
            dweight: from.params.then_some(CpuStorage::F64(dline)),
            dbias: None,
        })
    }
}

impl On<Cpu> for Dynamic {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
