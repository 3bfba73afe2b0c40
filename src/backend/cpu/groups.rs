//! Group and instance norm.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, ChannelAxes, Gradients, Groups, Spread};
use candle_norm_kernels::{AffinePair, GroupSpec, RowSpec, Stats};

impl Groups {
    fn spec(&self) -> GroupSpec {
        GroupSpec {
            shape: self.axes.into(),
            num_groups: self.num_groups,
            eps: self.eps,
            per_sample: self.spread == Spread::SampleAndChannel,
            activation: self.activation.map(Into::into),
        }
    }

    /// The groups as rows, each with a weight and a bias for each of its elements.
    fn as_rows(&self) -> RowSpec {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        RowSpec {
            len: channels / self.num_groups * inner,
            center: true,
            eps: self.eps,
            round_first: false,
            pairs: outer * self.num_groups,
            activation: self.activation.map(Into::into),
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let x = elements(args.x)?;
        let (y, saved) = match self.spread {
            Spread::Element => T::rows_forward(x, affine, self.as_rows()),
            _ => T::groups_forward(x, affine, self.spec()),
        };
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (weight, bias) = (parameter(from.weight)?, parameter(from.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (x, dy) = (elements(from.x)?, elements(from.dy)?);
        let saved = from.saved;
        let grads = match self.spread {
            Spread::Element => T::rows_backward(x, dy, affine, saved, self.as_rows(), from.params),
            _ => T::groups_backward(x, dy, affine, saved, self.spec()),
        };
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
