//! Group and instance norm.

use candle_core::Result;
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::groups;

use super::launches::{
    Affine, By, Spread, alloc_backs, grad_input_of_planes, grad_sums_of_planes,
    own_and_normalized_planes,
};
use super::operands::dtype;
use super::statistics::Moments;
use super::{Cuda, Device, Launcher, View};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::composed::accumulator;
use crate::computations::{self, Args, Gradients, Groups};

impl Groups {
    fn geometry(&self, types: Types) -> groups::Groups {
        groups::Groups {
            types,
            samples: self.axes.outer as u64,
            channels: self.axes.channels as u64,
            inner: self.axes.inner as u64,
            num_groups: self.num_groups as u64,
        }
    }

    /// A group is a plane, in which each channel has a weight.
    fn spread(&self) -> Spread {
        Spread {
            span: self.axes.inner as u64,
            period: self.num_groups as u64,
        }
    }
}

impl<L: Launcher> On<Cuda<L>> for Groups {
    type Saved = Moments<L>;

    fn is_carried_out(&self) -> bool {
        self.spread == computations::Spread::Channel && self.activation.is_none()
    }

    fn statistics(saved: &Moments<L>) -> Option<&dyn Statistics> {
        Some(saved)
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, Moments<L>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let types = device.types(x.dtype(), [args.weight, args.bias])?;
        let affine = Affine {
            weight: device.maybe_param(args.weight, dtype(types.param()))?,
            bias: device.maybe_param(args.bias, dtype(types.param()))?,
        };
        let planes = self.geometry(types).as_planes();
        let spread = self.spread();
        let (y, saved) =
            own_and_normalized_planes(device, planes, &x, &affine, spread, true, self.eps)?;
        Ok(Forward { y, saved })
    }

    fn backward(&self, from: Backward<L::Storage, Moments<L>>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy, saved) = (device.input(from.x)?, device.input(from.dy)?, from.saved);
        let types = device.types(x.dtype(), [from.weight])?;
        let of_params = dtype(types.param());
        let weight = device.maybe_param(from.weight, of_params)?;
        let shape = self.geometry(types);
        let (planes, channels) = (shape.as_planes(), shape.as_channels());
        let by = By::own(saved);
        let param = || device.alloc(of_params, self.axes.channels);
        let mut dweight = from.params.then(param).transpose()?;
        let mut dbias = from.params.then(param).transpose()?;
        // A group that fits is one launch, and the merge has the parameters alone.
        let fit = shape.grad_fit();
        let (mut fitted, partial, parts) = match &fit {
            Some(launch) => {
                let mut dx = device.alloc(x.dtype(), x.len())?;
                let len = 2 * channels.channels as usize;
                let partial = || device.alloc(accumulator(x.dtype()), len);
                let mut partial = from.params.then(partial).transpose()?;
                device
                    .call(launch)
                    .read(&x)
                    .read(&dy)
                    .maybe_read(weight.as_ref())
                    .read_all(&saved.mean)
                    .read_all(&saved.rest)
                    .read_all(&saved.inv_std)
                    .write(&mut dx)
                    .maybe_write(partial.as_mut())
                    .sizes([shape.per_group(), shape.inner, shape.num_groups])
                    .parts(shape.runs())
                    .run()?;
                (Some(dx), partial, 1)
            }
            None => {
                let per_mean = shape.per_group();
                let both = [&x, &dy];
                let mean = Some(&saved.mean);
                let partial = grad_sums_of_planes(device, channels, both, mean, per_mean)?;
                (None, Some(partial), channels.parts())
            }
        };
        let mut backs = match fitted {
            Some(_) => None,
            None => Some(alloc_backs(device, types, planes.channels)?),
        };
        if let Some(partial) = &partial {
            device
                .call(&shape.grad_merge(fitted.is_none()))
                .read_all(partial)
                .maybe_read(weight.as_ref())
                .read_all(&saved.mean)
                .read_all(&saved.rest)
                .read_all(&saved.inv_std)
                .maybe_write(dweight.as_mut())
                .maybe_write(dbias.as_mut())
                .write_backs(backs.as_mut())
                .sizes([shape.samples, shape.channels, shape.num_groups])
                .parts(parts)
                .float(planes.inner as f64)
                .run()?;
        }
        let dx = match fitted.take() {
            Some(dx) => dx,
            None => grad_input_of_planes(
                device,
                planes,
                [&x, &dy],
                weight.as_ref(),
                self.spread(),
                &by,
                backs.as_ref(),
            )?,
        };
        Ok(Gradients { dx, dweight, dbias })
    }
}
