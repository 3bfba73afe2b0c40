//! Layer norm and RMS norm.

use std::borrow::Cow;

use candle_core::{CpuStorage, Result, WithDType};

use super::{Accumulator, Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{AddOn, Added, Backward, Forward, On};
use crate::computations::{Args, Cast, Gradients, Rows};
use crate::kernels::affine::Affine;
use crate::kernels::rows::{self, RowSpec};
use crate::kernels::simd::{Elem, Real};
use crate::kernels::stats::Stats;

impl Rows {
    fn spec(&self) -> RowSpec {
        RowSpec {
            len: self.len,
            center: self.center,
            eps: self.eps,
            round_first: self.cast == Cast::BeforeWeight,
        }
    }

    /// The factor of each column.
    fn factor<'a, A: Accumulator>(&self, weight: Option<Arg<'a>>) -> Result<Option<Cow<'a, [A]>>> {
        let mut weight = parameter::<A>(weight)?;
        if let (Some(weight), true) = (&mut weight, self.offset != 0.) {
            let offset: A = Real::from_f64(self.offset);
            for w in weight.to_mut() {
                *w += offset;
            }
        }
        Ok(weight)
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (self.factor(args.weight)?, parameter(args.bias)?);
        let affine = Affine {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (y, saved) = rows::forward::<T>(elements(args.x)?, affine, self.spec());
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<X: Native, T: Native<Acc = X::Acc>>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let weight = self.factor(from.weight)?;
        let (x, dy) = (elements::<X>(from.x)?, elements::<T>(from.dy)?);
        let spec = self.spec();
        let grads = rows::backward(x, dy, weight.as_deref(), from.saved, spec, from.params);
        Ok(stored(grads, from.params))
    }

    fn add_forward_of<T: Native>(
        &self,
        args: Args<Arg>,
        residual: Arg,
    ) -> Result<Added<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (self.factor(args.weight)?, parameter(args.bias)?);
        let affine = Affine {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (x, residual) = (elements::<T>(args.x)?, elements(residual)?);
        let added = rows::add_forward(x, residual, affine, self.spec());
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

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let rounded = from.x.dtype() == self.output;
        with_native!(self.output, self.layer, T => match rounded {
            true => self.backward_of::<T, T>(from),
            false => self.backward_of::<<T as Elem>::Acc, T>(from),
        })
    }
}

impl AddOn<Cpu> for Rows {
    fn add_forward(&self, args: Args<Arg>, residual: Arg) -> Result<Added<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.add_forward_of::<T>(args, residual))
    }
}
