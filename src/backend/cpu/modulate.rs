//! Scale and shift alone, of any spread.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::Along;
use crate::computations::{Args, Gradients, Modulate};
use candle_norm_kernels::{AffinePair, Shape, Spread};

impl Modulate {
    fn shape(&self) -> Shape {
        let [outer, channels, inner] = self.dims;
        Shape {
            outer,
            channels,
            inner,
        }
    }

    fn spread(&self) -> Spread {
        match self.along {
            Along::Middle => Spread::Channel,
            Along::Ends => Spread::SampleAndColumn,
            Along::All => Spread::SampleAndElement,
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let y = T::scale_shift(elements(args.x)?, self.shape(), affine, self.spread());
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved: (),
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, ()>,
    ) -> Result<Gradients<CpuStorage>> {
        let weight = parameter(from.weight)?;
        let (x, dy, params) = (elements::<T>(from.x)?, elements(from.dy)?, from.params);
        let (shape, weight, spread) = (self.shape(), weight.as_deref(), self.spread());
        let grads = T::scale_shift_backward(x, dy, shape, weight, spread, params);
        Ok(stored(grads, params))
    }
}

impl On<Cpu> for Modulate {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
