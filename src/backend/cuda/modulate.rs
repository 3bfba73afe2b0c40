//! Scale and shift alone, of any spread.

use candle_core::Result;

use super::launches::Affine;
use super::operands::dtype;
use super::pointwise::{grads_of_scaled, scaled, takes};
use super::{Cuda, Device, Launcher, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, Modulate};

impl<L: Launcher> On<Cuda<L>> for Modulate {
    type Saved = ();

    fn is_carried_out(&self) -> bool {
        takes(self.dims, self.along)
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, ()>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let types = device.types(x.dtype(), [args.weight, args.bias])?;
        let affine = Affine {
            weight: device.maybe_param(args.weight, dtype(types.param()))?,
            bias: device.maybe_param(args.bias, dtype(types.param()))?,
        };
        let y = scaled(types, self.dims, self.along, affine).forward(device, &x, None)?;
        Ok(Forward { y, saved: () })
    }

    fn backward(&self, from: Backward<L::Storage, ()>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (device.input(from.x)?, device.input(from.dy)?);
        let types = device.types(x.dtype(), [from.weight])?;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        let axes = (self.dims, self.along);
        grads_of_scaled(device, types, axes, [&x, &dy], weight, from.params)
    }
}
