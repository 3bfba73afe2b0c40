//! The mean and variance of each plane.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result};
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::channels::Planes;

use super::launches::{Affine, By, Form, normalized, own};
use super::operands::{cast, copied};
use super::statistics::Moments;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, PlaneMoments};

impl PlaneMoments {
    /// A plane is a channel of one sample.
    fn planes(&self, types: Types, elements: usize) -> Planes {
        Planes {
            types,
            outer: 1,
            channels: (elements / self.len) as u64,
            inner: self.len as u64,
        }
    }
}

impl<L: Launcher> On<Cuda<L>> for PlaneMoments {
    type Saved = Moments<L>;

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, Moments<L>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let planes = self.planes(device.types(x.dtype(), [])?, x.len());
        let saved = own(device, Form::along(planes), &x, true, 1.)?;
        let count = planes.channels as usize;
        let line = Layout::contiguous(count);
        let mut y = device.alloc(DType::F64, 2 * count)?;
        copied(&saved.wide_mean()?, &line, &mut y, 0)?;
        copied(&saved.wide_var()?, &line, &mut y, count)?;
        Ok(Forward { y, saved })
    }

    /// With n values in a plane, `dx = (x − mean) · 2 dvar / n + dmean / n`.
    fn backward(&self, from: Backward<L::Storage, Moments<L>>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let x = device.input(from.x)?;
        let planes = self.planes(device.types(x.dtype(), [])?, x.len());
        let count = planes.channels as usize;
        let grad = |row: usize, factor: f64| {
            let start = from.dy.layout.start_offset() + row * count;
            let line = Layout::contiguous_with_offset(count, start);
            let grad = from
                .dy
                .storage
                .affine(&line, factor / self.len as f64, 0.)?;
            let grad = cast(&grad, &Layout::contiguous(count), accumulator(x.dtype()))?;
            Ok::<_, candle_core::Error>(Some(Operand::whole(grad, count)))
        };
        let affine = Affine {
            weight: grad(1, 2.)?,
            bias: grad(0, 1.)?,
        };
        let by = By::about(&from.saved.mean, Some(&from.saved.rest));
        let form = Form::along(planes);
        Ok(Gradients {
            dx: normalized(device, form, &x, &affine, &by)?,
            dweight: None,
            dbias: None,
        })
    }
}
