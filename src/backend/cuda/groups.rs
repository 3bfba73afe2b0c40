//! Group and instance norm.

use candle_core::Result;
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::groups;
use candle_norm_cuda_kernels::geometry::pointwise::Pointwise;

use super::launches::{
    Affine, By, Form, Spread, alloc_backs, grad_input, grad_sums, own, own_and_normalized,
};
use super::operands::dtype;
use super::pointwise::Elements;
use super::statistics::Moments;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::composed::accumulator;
use crate::computations::{self, Args, Gradients, Groups};

impl Groups {
    fn geometry(&self, types: Types) -> groups::Groups {
        let shape = groups::Groups {
            types,
            samples: self.axes.outer as u64,
            channels: self.axes.channels as u64,
            inner: self.axes.inner as u64,
            num_groups: self.num_groups as u64,
        };
        match self.spread {
            computations::Spread::SampleAndChannel => shape.by_sample(),
            computations::Spread::Channel | computations::Spread::Element => shape,
        }
    }

    /// Whether the kernels of groups do all.
    fn is_plain(&self) -> bool {
        self.spread != computations::Spread::Element && self.activation.is_none()
    }

    /// The elements of normalized groups.
    fn elements<'a, L: Launcher>(
        &self,
        types: Types,
        affine: Affine<'a, L::Storage>,
        saved: &'a Moments<L>,
    ) -> Elements<'a, L::Storage> {
        let [outer, channels, inner] =
            [self.axes.outer, self.axes.channels, self.axes.inner].map(|n| n as u64);
        Elements {
            shape: Pointwise {
                types,
                dims: [outer, channels, inner],
                weights: self.spread.places(self.axes),
                stats: [channels, 1, channels / self.num_groups as u64],
            },
            affine,
            by: By::own(saved),
            offset: 0.,
            flags: 0,
            activation: self.activation,
        }
    }

    /// The gradients without an activation.
    fn gradients<L: Launcher>(
        &self,
        device: Device<L>,
        types: Types,
        [x, dy]: [&Operand<L::Storage>; 2],
        weight: Option<&Operand<L::Storage>>,
        saved: &Moments<L>,
        params: bool,
    ) -> Result<Gradients<L::Storage>> {
        let shape = self.geometry(types);
        let (planes, channels) = (shape.as_planes(), shape.as_channels());
        let form = form(shape);
        let by = By::own(saved);
        let param = || device.alloc(dtype(types.param()), shape.channels as usize);
        let mut dweight = params.then(param).transpose()?;
        let mut dbias = params.then(param).transpose()?;
        // A group that fits is one launch, and the merge has the parameters alone.
        let fit = shape.grad_fit();
        let (mut fitted, partial, parts) = match &fit {
            Some(launch) => {
                let mut dx = device.alloc(x.dtype(), x.len())?;
                let len = 2 * channels.channels as usize;
                let partial = || device.alloc(accumulator(x.dtype()), len);
                let mut partial = params.then(partial).transpose()?;
                device
                    .call(launch)
                    .read(x)
                    .read(dy)
                    .maybe_read(weight)
                    .by(&by)
                    .write(&mut dx)
                    .maybe_write(partial.as_mut())
                    .sizes([shape.per_group(), shape.inner, shape.num_groups])
                    .parts(shape.runs())
                    .run()?;
                (Some(dx), partial, 1)
            }
            None => {
                let (mean, per_mean) = (by.mean.as_ref(), shape.per_group());
                let along = Form::along(channels);
                let partial = grad_sums(device, along, [x, dy], mean, per_mean)?;
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
                .maybe_read(weight)
                .by(&by)
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
            None => grad_input(device, form, [x, dy], weight, &by, backs.as_ref())?,
        };
        Ok(Gradients { dx, dweight, dbias })
    }
}

/// A group is a plane, in which each channel has a weight.
fn form(shape: groups::Groups) -> Form {
    let spread = Spread {
        span: shape.inner,
        period: shape.num_groups,
    };
    Form::Planes(shape.as_planes(), spread)
}

impl<L: Launcher> On<Cuda<L>> for Groups {
    type Saved = Moments<L>;

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
        let (form, eps) = (form(self.geometry(types)), self.eps);
        if self.is_plain() {
            let (y, saved) = own_and_normalized(device, form, &x, &affine, true, eps)?;
            return Ok(Forward { y, saved });
        }
        let saved = own(device, form, &x, true, eps)?;
        let y = self
            .elements(types, affine, &saved)
            .forward(device, &x, None)?;
        Ok(Forward { y, saved })
    }

    fn backward(&self, from: Backward<L::Storage, Moments<L>>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy, saved) = (device.input(from.x)?, device.input(from.dy)?, from.saved);
        let types = device.types(x.dtype(), [from.weight, from.bias])?;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        if self.is_plain() {
            let both = [&x, &dy];
            return self.gradients(device, types, both, weight.as_ref(), saved, from.params);
        }
        let bias = device.maybe_param(from.bias, dtype(types.param()))?;
        let affine = Affine { weight, bias };
        let by_element = self.spread == computations::Spread::Element;
        let elements = self.elements(types, affine, saved);
        let (both, params) = ([&x, &dy], from.params);
        elements.gradients(device, both, from.weight, by_element, params, |wide| {
            let weight = wide.weight.as_ref();
            self.gradients(
                device,
                wide.types,
                [&wide.x, &wide.grad],
                weight,
                saved,
                wide.params,
            )
        })
    }
}
