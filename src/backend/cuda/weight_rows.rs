//! Weight norm.

use candle_core::{DType, Layout, Result};
use candle_norm_cuda_kernels::geometry::channels::Columns;
use candle_norm_cuda_kernels::geometry::weight::{Floor, Weight};

use super::launches::{Affine, By, column_sums, normalized_columns};
use super::operands::{cast, dtype};
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, WeightRows, argument};

/// The length of each row times a power of two, and that power.
pub(crate) struct Lengths<S> {
    norm: S,
    scale: S,
}

impl WeightRows {
    fn geometry<L: Launcher>(
        &self,
        device: Device<L>,
        v: &Operand<L::Storage>,
        g: View<L::Storage>,
    ) -> Result<Weight> {
        let rows = v.len() / self.len;
        // The gradient of a common length is a sum, which is rounded once.
        let is_common = g.layout.shape().elem_count() < rows;
        let own = (!is_common).then_some(g);
        Ok(Weight {
            types: device.types(v.dtype(), [own])?,
            rows: rows as u64,
            len: self.len as u64,
        })
    }

    /// `g` of each row, if they have one each, or one that is common to all.
    fn of_rows<'a, L: Launcher>(
        &self,
        device: Device<L>,
        shape: Weight,
        g: View<'a, L::Storage>,
    ) -> Result<Operand<'a, L::Storage>> {
        let (rows, of_param) = (shape.rows as usize, dtype(shape.types.param()));
        let g = device.param(g, of_param)?;
        if g.len() == rows {
            return Ok(g);
        }
        let zeros = device.zeros(of_param, rows)?;
        let affine = Affine {
            weight: None,
            bias: Some(g),
        };
        let columns = Columns::new(device.types(of_param, [])?, shape.rows, 1, 1);
        let g = normalized_columns(device, columns, &zeros, &affine, &By::none())?;
        Ok(Operand::whole(g, rows))
    }
}

impl<L: Launcher> On<Cuda<L>> for WeightRows {
    type Saved = Lengths<L::Storage>;

    fn forward(
        &self,
        args: Args<View<L::Storage>>,
    ) -> Result<Forward<L::Storage, Lengths<L::Storage>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let v = device.input(args.x)?;
        let g = argument(self, args.weight)?;
        let shape = self.geometry(device, &v, g)?;
        let g = self.of_rows(device, shape, g)?;
        let acc = accumulator(v.dtype());
        let mut w = device.alloc(v.dtype(), v.len())?;
        let mut saved = Lengths {
            norm: device.alloc(acc, g.len())?,
            scale: device.alloc(acc, g.len())?,
        };
        device
            .call(&shape.forward())
            .read(&v)
            .read(&g)
            .write(&mut w)
            .write(&mut saved.norm)
            .write(&mut saved.scale)
            .sizes([shape.rows, shape.len])
            .int(Floor::Below as i32)
            .float(self.least)
            .null()
            .run()?;
        Ok(Forward { y: w, saved })
    }

    fn backward(
        &self,
        from: Backward<L::Storage, Lengths<L::Storage>>,
    ) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (v, dw) = (device.input(from.x)?, device.input(from.dy)?);
        let g = argument(self, from.weight)?;
        let is_common = g.layout.shape().elem_count() == 1;
        let shape = self.geometry(device, &v, g)?;
        let g = self.of_rows(device, shape, g)?;
        let mut dv = device.alloc(v.dtype(), v.len())?;
        let dg = || device.alloc(dtype(shape.types.param()), g.len());
        let mut dg = from.params.then(dg).transpose()?;
        device
            .call(&shape.backward())
            .read(&v)
            .read(&dw)
            .read(&g)
            .read_all(&from.saved.norm)
            .read_all(&from.saved.scale)
            .write(&mut dv)
            .maybe_write(dg.as_mut())
            .sizes([shape.rows, shape.len])
            .run()?;
        if let Some(of_rows) = &dg
            && is_common
        {
            let rows = Layout::contiguous(g.len());
            let of_rows = Operand::whole(cast(of_rows, &rows, DType::F64)?, g.len());
            let columns = Columns::new(device.types(DType::F64, [])?, shape.rows, 1, 1);
            dg = Some(column_sums(device, columns, &of_rows)?);
        }
        Ok(Gradients {
            dx: dv,
            dweight: dg,
            dbias: None,
        })
    }
}
