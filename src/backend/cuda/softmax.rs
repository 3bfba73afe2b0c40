//! Softmax of rows, and its logarithm.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry::slots;

use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, Softmax};

/// The largest element of each row, and the sum of the exponentials of all less it.
pub(crate) struct ExpSums<S> {
    largest: S,
    sum: S,
}

impl Softmax {
    fn geometry<L: Launcher>(
        &self,
        device: Device<L>,
        x: &Operand<L::Storage>,
    ) -> Result<slots::Softmax> {
        Ok(slots::Softmax {
            types: device.types(x.dtype(), [])?,
            rows: (x.len() / self.len) as u64,
            len: self.len as u64,
        })
    }
}

impl<L: Launcher> On<Cuda<L>> for Softmax {
    type Saved = ExpSums<L::Storage>;

    fn forward(
        &self,
        args: Args<View<L::Storage>>,
    ) -> Result<Forward<L::Storage, ExpSums<L::Storage>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let shape = self.geometry(device, &x)?;
        let of_rows = || device.alloc(accumulator(x.dtype()), shape.rows as usize);
        let mut y = device.alloc(x.dtype(), x.len())?;
        let mut saved = ExpSums {
            largest: of_rows()?,
            sum: of_rows()?,
        };
        device
            .call(&shape.forward())
            .read(&x)
            .write(&mut y)
            .write(&mut saved.largest)
            .write(&mut saved.sum)
            .sizes([shape.rows, shape.len])
            .flag(self.log)
            .run()?;
        Ok(Forward { y, saved })
    }

    fn backward(
        &self,
        from: Backward<L::Storage, ExpSums<L::Storage>>,
    ) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (device.input(from.x)?, device.input(from.dy)?);
        let shape = self.geometry(device, &x)?;
        let mut dx = device.alloc(x.dtype(), x.len())?;
        device
            .call(&shape.backward())
            .read(&x)
            .read(&dy)
            .read_all(&from.saved.largest)
            .read_all(&from.saved.sum)
            .write(&mut dx)
            .sizes([shape.rows, shape.len])
            .flag(self.log)
            .run()?;
        Ok(Gradients {
            dx,
            dweight: None,
            dbias: None,
        })
    }
}
