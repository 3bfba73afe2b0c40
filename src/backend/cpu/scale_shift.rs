//! Planes scaled and shifted, each by coefficients of its own.

use candle_core::{CpuStorage, Result, WithDType};

use super::{Arg, Cpu, Native, elements, parameter, widened, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, ScaleShift, argument};
use candle_norm_kernels::{AffinePair, Order, Shape, Statistics, Stats, Wanted};

/// The statistics that subtract `mean` and divide by nothing.
pub(super) fn about(mean: f64) -> Stats {
    Stats {
        mean: mean.into(),
        var: 1.,
        inv_std: 1.,
    }
}

/// Values in the precision that a kernel computes in.
pub(super) fn narrowed<A: WithDType>(values: impl Iterator<Item = f64>) -> Vec<A> {
    values.map(A::from_f64).collect()
}

impl ScaleShift {
    /// A plane is a channel of one sample.
    fn shape(&self) -> Shape {
        Shape {
            outer: 1,
            channels: self.planes(),
            inner: self.axes.inner,
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (planes, channels) = (self.planes(), self.axes.channels);
        let coefficients = widened::<f64>(argument(self, args.weight)?)?;
        let (scale, rest) = coefficients.split_at(planes);
        let (shift, means) = rest.split_at(planes);
        let scale = narrowed::<T::Acc>(scale.iter().copied());
        let shift = match parameter::<f64>(args.bias)? {
            None => narrowed::<T::Acc>(shift.iter().copied()),
            Some(bias) => {
                let samples = shift.chunks(channels);
                narrowed(samples.flat_map(|shift| shift.iter().zip(&*bias).map(|(s, b)| s + b)))
            }
        };
        let affine = AffinePair {
            weight: Some(&scale),
            bias: Some(&shift),
        };
        let given: Vec<Stats> = means.iter().copied().map(about).collect();
        let (x, order) = (elements::<T>(args.x)?, Order::ChannelsFirst);
        let statistics = Statistics::Given(&given);
        let (y, _) = T::channels_forward(x, order, self.shape(), affine, statistics);
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved: given,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (planes, channels) = (self.planes(), self.axes.channels);
        let coefficients = widened::<f64>(argument(self, from.weight)?)?;
        let scale = narrowed::<T::Acc>(coefficients[..planes].iter().copied());
        let (x, dy, order) = (
            elements::<T>(from.x)?,
            elements(from.dy)?,
            Order::ChannelsFirst,
        );
        let wanted = Wanted {
            own: None,
            params: from.params,
        };
        let (shape, weight) = (self.shape(), Some(&scale[..]));
        let grads = T::channels_backward(x, order, dy, shape, weight, from.saved, wanted);
        let params = from.params.then(|| {
            let mut dbias = vec![0.; channels];
            for sample in grads.dbias.chunks(channels) {
                for (sum, d) in dbias.iter_mut().zip(sample) {
                    *sum += d;
                }
            }
            let mut coefficients = grads.dweight;
            coefficients.extend(grads.dbias);
            coefficients.resize(3 * planes, 0.);
            [coefficients, dbias].map(CpuStorage::F64)
        });
        let (dweight, dbias) = params.map(|[d, b]| (d, b)).unzip();
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(grads.dx),
            dweight,
            dbias,
        })
    }
}

impl On<Cpu> for ScaleShift {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
