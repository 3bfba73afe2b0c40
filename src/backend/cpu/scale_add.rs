//! A scaled branch that joins a residual.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, parameter, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Computation, Gradients, Places, ScaleAdd, Third, argument};
use candle_norm_kernels::{AffinePair, Shape, Spread};

impl ScaleAdd {
    fn shape(&self) -> Shape {
        Shape {
            outer: self.axes.outer,
            channels: self.axes.channels,
            inner: self.axes.inner,
        }
    }

    fn spread(&self) -> Spread {
        match self.places {
            Places::Column => Spread::Column,
            Places::SampleAndColumn => Spread::SampleAndColumn,
            Places::Channel => Spread::Channel,
            Places::SampleAndChannel => Spread::SampleAndChannel,
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (shape, spread) = (self.shape(), self.spread());
        let x = elements::<T>(args.x)?;
        let weight = widened::<T::Acc>(argument(self, args.weight)?)?;
        let y = match self.third {
            Third::Residual => {
                let residual = elements(argument(self, args.bias)?)?;
                T::scale_add(x, residual, shape, &weight, spread)
            }
            Third::Shift => {
                let shift = parameter::<T::Acc>(args.bias)?;
                let affine = AffinePair {
                    weight: Some(&weight),
                    bias: shift.as_deref(),
                };
                T::scale_shift(x, shape, affine, spread)
            }
        };
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved: (),
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, ()>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (elements::<T>(from.x)?, elements::<T>(from.dy)?);
        let weight = widened::<T::Acc>(argument(self, from.weight)?)?;
        let (shape, spread, params) = (self.shape(), self.spread(), from.params);
        let grads = T::scale_shift_backward(x, dy, shape, Some(&weight), spread, params);
        let dthird = || match self.third {
            Third::Shift => CpuStorage::F64(grads.dbias),
            Third::Residual => T::to_cpu_storage_owned(dy.to_vec()),
        };
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(grads.dx),
            dweight: params.then_some(CpuStorage::F64(grads.dweight)),
            dbias: params.then(dthird),
        })
    }
}

impl On<Cpu> for ScaleAdd {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        with_native!(args.x.dtype(), self.layer(), T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer(), T => self.backward_of::<T>(from))
    }
}
