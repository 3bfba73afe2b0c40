//! Layer norm and RMS norm.

use std::borrow::Cow;

use candle_core::{CpuStorage, Result, WithDType};

use super::{Accumulator, Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{AddOn, Added, Backward, Forward, On};
use crate::computations::{Args, Cast, Gradients, Rows};
use candle_norm_kernels::{AffinePair, RowSpec, Stats};

impl Rows {
    fn spec(&self) -> RowSpec {
        RowSpec {
            len: self.len,
            center: self.center,
            eps: self.eps,
            round_first: self.cast == Cast::BeforeWeight,
            pairs: self.pairs,
            activation: self.activation.map(Into::into),
        }
    }

    /// The factor of each column.
    fn factor<'a, A: Accumulator>(&self, weight: Option<Arg<'a>>) -> Result<Option<Cow<'a, [A]>>> {
        let mut weight = parameter::<A>(weight)?;
        if let (Some(weight), true) = (&mut weight, self.offset != 0.) {
            let offset = A::from_f64(self.offset);
            for w in weight.to_mut() {
                *w += offset;
            }
        }
        Ok(weight)
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (self.factor(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (y, saved) = T::rows_forward(elements(args.x)?, affine, self.spec());
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn inference_of<T: Native>(&self, args: Args<Arg>) -> Result<CpuStorage> {
        let (weight, bias) = (self.factor(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let y = T::rows_inference(elements(args.x)?, affine, self.spec());
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let Backward { saved, params, .. } = from;
        let (weight, bias) = (self.factor(from.weight)?, parameter(from.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let dy = elements::<T>(from.dy)?;
        let spec = self.spec();
        if from.x.dtype() == self.output {
            let x = elements(from.x)?;
            let grads = T::rows_backward(x, dy, affine, saved, spec, params);
            Ok(stored(grads, params))
        } else {
            let x = elements(from.x)?;
            let grads = T::rows_backward_unrounded(x, dy, affine, saved, spec, params);
            Ok(stored(grads, params))
        }
    }

    fn add_forward_of<T: Native>(
        &self,
        args: Args<Arg>,
        residual: Arg,
    ) -> Result<Added<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (self.factor(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (x, residual) = (elements::<T>(args.x)?, elements(residual)?);
        let added = T::rows_add_forward(x, residual, affine, self.spec());
        let is_rounded = T::DTYPE != <T::Acc as WithDType>::DTYPE;
        Ok(Added {
            sum: <T::Acc as WithDType>::to_cpu_storage_owned(added.sum),
            rounded: is_rounded.then(|| T::to_cpu_storage_owned(added.rounded)),
            normalized: Forward {
                y: T::to_cpu_storage_owned(added.y),
                saved: added.stats,
            },
        })
    }
}

impl On<Cpu> for Rows {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn inference(&self, args: Args<Arg>) -> Result<CpuStorage> {
        with_native!(args.x.dtype(), self.layer, T => self.inference_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        with_native!(self.output, self.layer, T => self.backward_of::<T>(from))
    }
}

impl AddOn<Cpu> for Rows {
    fn add_forward(&self, args: Args<Arg>, residual: Arg) -> Result<Added<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.add_forward_of::<T>(args, residual))
    }
}
