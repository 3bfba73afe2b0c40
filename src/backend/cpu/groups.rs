//! Group and instance norm.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Gradients, Groups};
use candle_norm_kernels::{AffinePair, GroupSpec, Stats};

impl Groups {
    fn spec(&self) -> GroupSpec {
        GroupSpec {
            shape: self.axes.into(),
            num_groups: self.num_groups,
            eps: self.eps,
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (y, saved) = T::groups_forward(elements(args.x)?, affine, self.spec());
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let weight = parameter(from.weight)?;
        let (x, dy) = (elements(from.x)?, elements(from.dy)?);
        let grads = T::groups_backward(x, dy, weight.as_deref(), from.saved, self.spec());
        Ok(stored(grads, from.params))
    }
}

impl On<Cpu> for Groups {
    type Saved = Vec<Stats>;

    fn statistics(saved: &Vec<Stats>) -> Option<&dyn Statistics> {
        Some(saved)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
