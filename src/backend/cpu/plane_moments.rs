//! The moments of planes as outputs.

use candle_core::{CpuStorage, Result};

use super::scale_shift::{about, narrowed};
use super::{Arg, Cpu, Native, elements, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, PlaneMoments};
use candle_norm_kernels::{AffinePair, Order, Shape, Statistics, Stats};

impl PlaneMoments {
    fn forward_of<T: Native>(&self, x: Arg) -> Result<Forward<CpuStorage, Vec<f64>>> {
        let moments = T::row_moments(elements(x)?, self.len, true);
        let means: Vec<f64> = moments.iter().map(|m| m.mean()).collect();
        let vars = moments.iter().map(|m| m.var());
        let y = means.iter().copied().chain(vars).collect();
        Ok(Forward {
            y: CpuStorage::F64(y),
            saved: means,
        })
    }

    /// With n values in a plane, `dx = (x − mean) · 2 dvar / n + dmean / n`.
    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<f64>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (means, dy) = (from.saved, elements::<f64>(from.dy)?);
        let scaled = |grads: &[f64], factor: f64| -> Vec<T::Acc> {
            narrowed(grads.iter().map(|d| d * (factor / self.len as f64)))
        };
        let (dmean, dvar) = dy.split_at(means.len());
        let (shift, scale) = (scaled(dmean, 1.), scaled(dvar, 2.));
        let affine = AffinePair {
            weight: Some(&scale),
            bias: Some(&shift),
        };
        let given: Vec<Stats> = means.iter().copied().map(about).collect();
        let shape = Shape {
            outer: 1,
            channels: means.len(),
            inner: self.len,
        };
        let x = elements::<T>(from.x)?;
        let order = Order::ChannelsFirst;
        let (dx, _) = T::channels_forward(x, order, shape, affine, Statistics::Given(&given));
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dx),
            dweight: None,
            dbias: None,
        })
    }
}

impl On<Cpu> for PlaneMoments {
    type Saved = Vec<f64>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<f64>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args.x))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<f64>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
