//! A scaled branch that joins a residual.

use candle_core::Result;

use super::launches::Affine;
use super::operands::dtype;
use super::pointwise::{grads_of_scaled, scaled, takes};
use super::{Cuda, Device, Launcher, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::Along;
use crate::computations::{Args, ChannelAxes, Gradients, Places, ScaleAdd, Third, argument};

impl ScaleAdd {
    /// The axes of the input, and how weights lie along them.
    fn places_along(&self) -> ([usize; 3], Along) {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        match self.places {
            Places::Column => ([outer * channels, inner, 1], Along::Middle),
            Places::SampleAndColumn => ([outer, channels, inner], Along::Ends),
            Places::Channel => ([outer, channels, inner], Along::Middle),
            Places::SampleAndChannel => ([1, outer * channels, inner], Along::Middle),
        }
    }
}

impl<L: Launcher> On<Cuda<L>> for ScaleAdd {
    type Saved = ();

    fn is_carried_out(&self) -> bool {
        let (dims, along) = self.places_along();
        takes(dims, along)
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, ()>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let (shift, residual) = match self.third {
            Third::Shift => (args.bias, None),
            Third::Residual => (None, Some(device.input(argument(self, args.bias)?)?)),
        };
        let types = device.types(x.dtype(), [args.weight, shift])?;
        let weight = argument(self, args.weight)?;
        let affine = Affine {
            weight: Some(device.param(weight, dtype(types.param()))?),
            bias: device.maybe_param(shift, dtype(types.param()))?,
        };
        let (dims, along) = self.places_along();
        let elements = scaled(types, dims, along, affine);
        let y = elements.forward(device, &x, residual.as_ref())?;
        Ok(Forward { y, saved: () })
    }

    fn backward(&self, from: Backward<L::Storage, ()>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (device.input(from.x)?, device.input(from.dy)?);
        let types = device.types(x.dtype(), [from.weight])?;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        let axes = self.places_along();
        let grads = grads_of_scaled(device, types, axes, [&x, &dy], weight, from.params)?;
        Ok(match self.third {
            Third::Shift => grads,
            Third::Residual => Gradients {
                dbias: from.params.then(|| device.copied(&dy)).transpose()?,
                ..grads
            },
        })
    }
}
