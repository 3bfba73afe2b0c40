//! The mixture of switchable norm: a few numbers for each plane, in `f64`.

use candle_core::{DType, Result};
use candle_norm_cuda_kernels::geometry::mixture::{self, GIVEN, INSTANCE, LOGITS, OWN};

use super::operands::in_dtype;
use super::statistics::Moments;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Batch, Gradients, Mixture, argument};
use candle_norm_support::messages;

/// The mixture as a backward finds it.
pub(crate) struct Mixed<L: Launcher> {
    /// Of the planes, as they were in the forward.
    moments: L::Storage,
    logits: L::Storage,
    layers: L::Storage,
    /// The moments of channels, if they are mixed in.
    batch: Option<L::Storage>,
    /// The mixed mean, the mixed variance, and one over its root, of each plane.
    normal: L::Storage,
    /// Statistics of the batch, where they are its own.
    statistics: Option<Moments<L>>,
}

impl Mixture {
    fn geometry(&self) -> mixture::Mixture {
        mixture::Mixture {
            samples: self.axes.outer as u64,
            channels: self.axes.channels as u64,
        }
    }

    fn num_planes(&self) -> usize {
        self.axes.outer * self.axes.channels
    }

    fn flags(&self) -> i32 {
        let of_batch = match self.batch {
            Batch::Own => OWN,
            Batch::Given { .. } => GIVEN,
            Batch::Absent | Batch::Joint { .. } => 0,
        };
        of_batch | if self.instance { INSTANCE } else { 0 }
    }
}

impl<L: Launcher> On<Cuda<L>> for Mixture {
    type Saved = Mixed<L>;

    fn is_carried_out(&self) -> bool {
        !matches!(self.batch, Batch::Joint { .. })
    }

    fn statistics(saved: &Mixed<L>) -> Option<&dyn Statistics> {
        saved.statistics.as_ref().map(|s| s as &dyn Statistics)
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, Mixed<L>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let (channels, planes) = (self.axes.channels, self.num_planes());
        let (shape, factors) = (self.geometry(), self.factors());
        let sizes = [shape.samples, shape.channels];
        let alloc = |len: usize| device.alloc(DType::F64, len);
        let weight = device.maybe_param(args.weight, DType::F64)?;
        let logits = device.param(argument(self, args.bias)?, DType::F64)?;
        // An optimizer may step before the backward.
        let logits = device.copied(&logits)?;
        let moments = device.copied(&device.param(args.x, DType::F64)?)?;
        let mut layers = alloc(2 * self.axes.outer)?;
        let (mut batch, mut statistics) = match &self.batch {
            Batch::Absent => (None, None),
            Batch::Own => {
                let statistics = Moments::alloc(device, DType::F64, channels)?;
                (Some(alloc(2 * channels)?), Some(statistics))
            }
            Batch::Given { mean, var } => {
                let mut both = alloc(2 * channels)?;
                for (i, vector) in [mean, var].into_iter().enumerate() {
                    let vector = in_dtype(self.layer, vector, DType::F64)?;
                    let vector = Operand::<L::Storage>::whole(vector, channels);
                    device.copy_into(&vector, &mut both, i * channels)?;
                }
                (Some(both), None)
            }
            Batch::Joint { .. } => messages::internal(self.layer, "its composed form")?,
        };
        let own = matches!(self.batch, Batch::Own);
        let unions = shape.unions();
        let call = device
            .call(&unions)
            .read_all(&moments)
            .write(&mut layers)
            .maybe_write(batch.as_mut().filter(|_| own));
        let call = match &mut statistics {
            Some(statistics) => call.write_moments(statistics),
            None => call.null().null().null().null(),
        };
        call.sizes(sizes)
            .float(factors.plane)
            .float(factors.layer)
            .float(factors.batch)
            .float(self.eps)
            .int(self.flags())
            .run()?;
        let (mut y, mut normal) = (alloc(3 * planes)?, alloc(3 * planes)?);
        device
            .call(&shape.forward())
            .read_all(&moments)
            .maybe_read(weight.as_ref())
            .read_all(&logits)
            .read_all(&layers)
            .maybe_read_all(batch.as_ref())
            .write(&mut y)
            .write(&mut normal)
            .sizes(sizes)
            .float(factors.plane)
            .float(self.eps)
            .int(self.flags())
            .run()?;
        Ok(Forward {
            y,
            saved: Mixed {
                moments,
                logits,
                layers,
                batch,
                normal,
                statistics,
            },
        })
    }

    fn backward(&self, from: Backward<L::Storage, Mixed<L>>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (saved, shape, factors) = (from.saved, self.geometry(), self.factors());
        let sizes = [shape.samples, shape.channels];
        let alloc = |len: usize| device.alloc(DType::F64, len);
        let weight = device.maybe_param(from.weight, DType::F64)?;
        let dy = device.param(from.dy, DType::F64)?;
        let (samples, channels) = (self.axes.outer, self.axes.channels);
        let (mut by_sample, mut by_channel) = (alloc(2 * samples)?, alloc(2 * channels)?);
        let mut dweight = alloc(channels)?;
        let mut partial = alloc(LOGITS as usize * samples)?;
        device
            .call(&shape.sums())
            .read_all(&saved.moments)
            .maybe_read(weight.as_ref())
            .read_all(&saved.layers)
            .maybe_read_all(saved.batch.as_ref())
            .read_all(&saved.normal)
            .read(&dy)
            .write(&mut by_sample)
            .write(&mut by_channel)
            .write(&mut dweight)
            .write(&mut partial)
            .sizes(sizes)
            .float(factors.plane)
            .int(self.flags())
            .run()?;
        let mut dx = alloc(2 * self.num_planes())?;
        let mut dlogits = alloc(2 * self.sources())?;
        device
            .call(&shape.backward())
            .read_all(&saved.moments)
            .maybe_read(weight.as_ref())
            .read_all(&saved.logits)
            .read_all(&saved.layers)
            .maybe_read_all(saved.batch.as_ref())
            .read_all(&saved.normal)
            .read(&dy)
            .read_all(&by_sample)
            .read_all(&by_channel)
            .read_all(&partial)
            .write(&mut dx)
            .write(&mut dlogits)
            .sizes(sizes)
            .float(factors.plane)
            .float(factors.layer)
            .float(factors.batch)
            .int(self.flags())
            .run()?;
        Ok(Gradients {
            dx,
            dweight: Some(dweight),
            dbias: Some(dlogits),
        })
    }
}
