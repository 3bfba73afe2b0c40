//! Rows over their lengths.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry::weight::{Floor, Weight};

use super::weight_rows::{Lengthened, Norms};
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, L2Form, UnitRows};

impl UnitRows {
    fn lengthened<'a, L: Launcher>(
        &self,
        device: Device<L>,
        x: &Operand<L::Storage>,
    ) -> Result<Lengthened<'a, L::Storage>> {
        Ok(Lengthened {
            shape: Weight {
                types: device.types(x.dtype(), [])?,
                rows: (x.len() / self.len) as u64,
                len: self.len as u64,
            },
            g: None,
            floor: match self.form {
                L2Form::Max => Floor::UpTo,
                L2Form::Inside => Floor::Inside,
            },
            least: self.eps,
        })
    }
}

impl<L: Launcher> On<Cuda<L>> for UnitRows {
    type Saved = Norms<L::Storage>;

    fn forward(
        &self,
        args: Args<View<L::Storage>>,
    ) -> Result<Forward<L::Storage, Norms<L::Storage>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let mut y = device.alloc(x.dtype(), x.len())?;
        let rows = self.lengthened(device, &x)?;
        let saved = rows.forward(device, &x, Some(&mut y), None)?;
        Ok(Forward { y, saved })
    }

    fn backward(
        &self,
        from: Backward<L::Storage, Norms<L::Storage>>,
    ) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (device.input(from.x)?, device.input(from.dy)?);
        let rows = self.lengthened(device, &x)?;
        Ok(Gradients {
            dx: rows.backward(device, [&x, &dy], from.saved, None)?,
            dweight: None,
            dbias: None,
        })
    }
}
