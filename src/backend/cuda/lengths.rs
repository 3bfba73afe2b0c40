//! The lengths of rows as outputs.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry::weight::{Floor, Weight};

use super::operands::dtype;
use super::weight_rows::Lengthened;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, Lengths};

impl Lengths {
    fn geometry<L: Launcher>(&self, device: Device<L>, x: &Operand<L::Storage>) -> Result<Weight> {
        Ok(Weight {
            types: device.types(x.dtype(), [])?,
            rows: (x.len() / self.len) as u64,
            len: self.len as u64,
        })
    }
}

impl<L: Launcher> On<Cuda<L>> for Lengths {
    type Saved = ();

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, ()>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let mut y = device.alloc(accumulator(x.dtype()), x.len() / self.len)?;
        let rows = Lengthened {
            shape: self.geometry(device, &x)?,
            g: None,
            floor: Floor::Below,
            least: 0.,
        };
        rows.forward(device, &x, None, Some(&mut y))?;
        Ok(Forward { y, saved: () })
    }

    /// The directions of the rows times the gradients of their lengths.
    fn backward(&self, from: Backward<L::Storage, ()>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let x = device.input(from.x)?;
        let shape = self.geometry(device, &x)?;
        let dlengths = device.param(from.dy, dtype(shape.types.param()))?;
        let mut dx = device.alloc(x.dtype(), x.len())?;
        let rows = Lengthened {
            shape,
            g: Some(&dlengths),
            floor: Floor::Below,
            least: 0.,
        };
        rows.forward(device, &x, Some(&mut dx), None)?;
        Ok(Gradients {
            dx,
            dweight: None,
            dbias: None,
        })
    }
}
