//! Gated RMS norm.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry::channels::Columns;
use candle_norm_cuda_kernels::geometry::slots::{BEFORE, Gated, ROUND_FIRST};

use super::launches::column_sums;
use super::operands::dtype;
use super::pointwise::function;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Cast, Gate, GatedRows, Gradients};

/// The arguments of a call.
struct Operands<'a, S> {
    x: Operand<'a, S>,
    gate: Option<Operand<'a, S>>,
    /// In the accumulator's dtype.
    weight: Option<Operand<'a, S>>,
    shape: Gated,
}

impl GatedRows {
    fn operands<'a, L: Launcher>(
        &self,
        device: Device<'a, L>,
        args: Args<View<'a, L::Storage>>,
    ) -> Result<Operands<'a, L::Storage>> {
        let x = device.input(args.x)?;
        let types = device.types(x.dtype(), [args.weight])?;
        Ok(Operands {
            gate: device.maybe_param(args.weight, dtype(types.param()))?,
            weight: device.maybe_param(args.bias, accumulator(x.dtype()))?,
            shape: Gated {
                types,
                groups: (x.len() / self.group) as u64,
                group: self.group as u64,
            },
            x,
        })
    }

    fn flags(&self) -> i32 {
        let rounds = match self.cast {
            Cast::BeforeWeight => ROUND_FIRST,
            Cast::AfterWeight => 0,
        };
        let is_before = match self.gate {
            Gate::Before => BEFORE,
            Gate::After => 0,
        };
        rounds | is_before
    }
}

impl<L: Launcher> On<Cuda<L>> for GatedRows {
    /// One over the root mean square of each group.
    type Saved = L::Storage;

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, L::Storage>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let Operands {
            x,
            gate,
            weight,
            shape,
        } = self.operands(device, args)?;
        let (function, slope) = function(Some(self.activation));
        let mut y = device.alloc(x.dtype(), x.len())?;
        let mut saved = device.alloc(accumulator(x.dtype()), shape.groups as usize)?;
        device
            .call(&shape.forward())
            .read(&x)
            .maybe_read(gate.as_ref())
            .maybe_read(weight.as_ref())
            .write(&mut y)
            .write(&mut saved)
            .sizes([shape.groups, self.len as u64, shape.group])
            .float(self.eps)
            .int(self.flags())
            .int(function)
            .float(slope)
            .run()?;
        Ok(Forward { y, saved })
    }

    fn backward(&self, from: Backward<L::Storage, L::Storage>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let dy = device.input(from.dy)?;
        let Operands {
            x,
            gate,
            weight,
            shape,
        } = self.operands(
            device,
            Args {
                x: from.x,
                weight: from.weight,
                bias: from.bias,
            },
        )?;
        let (function, slope) = function(Some(self.activation));
        let acc = accumulator(x.dtype());
        let asked = |is_there: bool, dtype| {
            let alloc = || device.alloc(dtype, x.len());
            (is_there && from.params).then(alloc).transpose()
        };
        let mut dx = device.alloc(x.dtype(), x.len())?;
        let mut dgate = asked(gate.is_some(), dtype(shape.types.param()))?;
        let mut products = asked(weight.is_some(), acc)?;
        device
            .call(&shape.backward())
            .read(&x)
            .maybe_read(gate.as_ref())
            .maybe_read(weight.as_ref())
            .read(&dy)
            .read_all(from.saved)
            .write(&mut dx)
            .maybe_write(dgate.as_mut())
            .maybe_write(products.as_mut())
            .sizes([shape.groups, self.len as u64, shape.group])
            .int(self.flags())
            .int(function)
            .float(slope)
            .run()?;
        let summed = |products| {
            let (rows, len) = ((x.len() / self.len) as u64, self.len as u64);
            let columns = Columns::new(device.types(acc, [])?, rows, len, 1);
            column_sums(device, columns, &Operand::whole(products, x.len()))
        };
        Ok(Gradients {
            dx,
            dweight: dgate,
            dbias: products.map(summed).transpose()?,
        })
    }
}
