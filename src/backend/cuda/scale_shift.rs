//! Planes scaled and shifted, each by coefficients of its own.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result};
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::channels::{Columns, Planes};

use super::launches::{Affine, By, Form, Wanted, column_sums, grads, normalized};
use super::operands::{Pair, cast, copied};
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, ScaleShift, argument};

impl ScaleShift {
    /// A plane is a channel of one sample.
    fn form(&self, types: Types) -> Form {
        Form::along(Planes {
            types,
            outer: 1,
            channels: self.planes() as u64,
            inner: self.axes.inner as u64,
        })
    }

    /// One row of coefficients, in storage of its own.
    fn row<S: BackendStorage>(&self, coefficients: View<S>, row: usize, to: DType) -> Result<S> {
        let start = coefficients.layout.start_offset() + row * self.planes();
        let line = Layout::contiguous_with_offset(self.planes(), start);
        cast(coefficients.storage, &line, to)
    }

    /// A matrix with one row for each sample, and a column for each channel.
    fn matrix<L: Launcher>(&self, device: Device<L>, dtype: DType) -> Result<Columns> {
        let (samples, channels) = (self.axes.outer as u64, self.axes.channels as u64);
        Ok(Columns::new(device.types(dtype, [])?, samples, channels, 1))
    }

    /// Shifts with the bias of their channel, in the wider of both dtypes.
    fn with_bias<L: Launcher>(
        &self,
        device: Device<L>,
        coefficients: View<L::Storage>,
        bias: View<L::Storage>,
    ) -> Result<L::Storage> {
        let wide = coefficients.storage.dtype();
        let shift = Operand::whole(self.row(coefficients, 1, wide)?, self.planes());
        let affine = Affine {
            weight: None,
            bias: Some(device.param(bias, wide)?),
        };
        let form = Form::Columns(self.matrix(device, wide)?);
        normalized(device, form, &shift, &affine, &By::none())
    }
}

impl<L: Launcher> On<Cuda<L>> for ScaleShift {
    /// Numbers near the means of the planes.
    type Saved = Pair<L::Storage>;

    fn forward(
        &self,
        args: Args<View<L::Storage>>,
    ) -> Result<Forward<L::Storage, Pair<L::Storage>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let coefficients = argument(self, args.weight)?;
        let acc = accumulator(x.dtype());
        let narrow = |wide: L::Storage| {
            let narrow = cast(&wide, &Layout::contiguous(self.planes()), acc)?;
            Ok::<_, candle_core::Error>(Operand::whole(narrow, self.planes()))
        };
        let shift = match args.bias {
            Some(bias) => narrow(self.with_bias(device, coefficients, bias)?)?,
            None => Operand::whole(self.row(coefficients, 1, acc)?, self.planes()),
        };
        let affine = Affine {
            weight: Some(Operand::whole(
                self.row(coefficients, 0, acc)?,
                self.planes(),
            )),
            bias: Some(shift),
        };
        let wide = self.row(coefficients, 2, DType::F64)?;
        let saved = Pair::of(&wide, self.planes(), acc)?;
        let form = self.form(device.types(x.dtype(), [])?);
        let by = By::about(&saved.high, saved.low.as_ref());
        let y = normalized(device, form, &x, &affine, &by)?;
        Ok(Forward { y, saved })
    }

    fn backward(
        &self,
        from: Backward<L::Storage, Pair<L::Storage>>,
    ) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (device.input(from.x)?, device.input(from.dy)?);
        let coefficients = argument(self, from.weight)?;
        let acc = accumulator(x.dtype());
        let scale = Operand::whole(self.row(coefficients, 0, acc)?, self.planes());
        let form = self.form(device.types(x.dtype(), [])?);
        let by = By::about(&from.saved.high, from.saved.low.as_ref());
        let wanted = Wanted {
            own: None,
            params: from.params,
        };
        let grads = grads(device, form, [&x, &dy], Some(&scale), &by, wanted)?;
        let (Some(dscale), Some(dshift)) = (grads.dweight, grads.dbias) else {
            return Ok(Gradients {
                dx: grads.dx,
                dweight: None,
                dbias: None,
            });
        };
        // Numbers near the means get no gradient.
        let line = Layout::contiguous(self.planes());
        let mut dweight = device.alloc(acc, 3 * self.planes())?;
        copied(&dscale, &line, &mut dweight, 0)?;
        copied(&dshift, &line, &mut dweight, self.planes())?;
        let none = dshift.affine(&line, 0., 0.)?;
        copied(&none, &line, &mut dweight, 2 * self.planes())?;
        let wide = Operand::whole(cast(&dshift, &line, DType::F64)?, self.planes());
        let dbias = column_sums(device, self.matrix(device, DType::F64)?, &wide)?;
        Ok(Gradients {
            dx: grads.dx,
            dweight: Some(dweight),
            dbias: Some(dbias),
        })
    }
}
