//! Weight norm.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result};
use candle_norm_cuda_kernels::geometry::channels::Columns;
use candle_norm_cuda_kernels::geometry::weight::{Floor, Weight};

use super::launches::{Affine, By, Form, column_sums, normalized};
use super::operands::{cast, dtype};
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Gradients, WeightRows, argument};

/// The length of each row times a power of two, and that power; −1 where the length does not change
/// with the row.
pub(crate) struct Norms<S> {
    norm: S,
    scale: S,
}

/// Outputs of a forward of rows and lengths.
pub(super) struct Lengthened<'a, S> {
    pub(super) shape: Weight,
    /// One where there is none.
    pub(super) g: Option<&'a Operand<'a, S>>,
    pub(super) floor: Floor,
    pub(super) least: f64,
}

impl<S: BackendStorage> Lengthened<'_, S> {
    /// The rows at their lengths `w`, and the lengths that they had, as far as they are asked for.
    pub(super) fn forward<L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        v: &Operand<S>,
        w: Option<&mut S>,
        lengths: Option<&mut S>,
    ) -> Result<Norms<S>> {
        let (acc, rows) = (accumulator(v.dtype()), self.shape.rows as usize);
        let mut norms = Norms {
            norm: device.alloc(acc, rows)?,
            scale: device.alloc(acc, rows)?,
        };
        device
            .call(&self.shape.forward())
            .read(v)
            .maybe_read(self.g)
            .maybe_write(w)
            .write(&mut norms.norm)
            .write(&mut norms.scale)
            .sizes([self.shape.rows, self.shape.len])
            .int(self.floor as i32)
            .float(self.least)
            .maybe_write(lengths)
            .run()?;
        Ok(norms)
    }

    /// The gradient of the rows, and that of their lengths, if it is asked for.
    pub(super) fn backward<L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        [v, dw]: [&Operand<S>; 2],
        norms: &Norms<S>,
        dg: Option<&mut S>,
    ) -> Result<S> {
        let mut dv = device.alloc(v.dtype(), v.len())?;
        device
            .call(&self.shape.backward())
            .read(v)
            .read(dw)
            .maybe_read(self.g)
            .read_all(&norms.norm)
            .read_all(&norms.scale)
            .write(&mut dv)
            .maybe_write(dg)
            .sizes([self.shape.rows, self.shape.len])
            .run()?;
        Ok(dv)
    }
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

    fn lengthened<'a, S>(&self, shape: Weight, g: &'a Operand<'a, S>) -> Lengthened<'a, S> {
        Lengthened {
            shape,
            g: Some(g),
            floor: Floor::Below,
            least: self.least,
        }
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
        let g = normalized(device, Form::Columns(columns), &zeros, &affine, &By::none())?;
        Ok(Operand::whole(g, rows))
    }
}

impl<L: Launcher> On<Cuda<L>> for WeightRows {
    type Saved = Norms<L::Storage>;

    fn forward(
        &self,
        args: Args<View<L::Storage>>,
    ) -> Result<Forward<L::Storage, Norms<L::Storage>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let v = device.input(args.x)?;
        let g = argument(self, args.weight)?;
        let shape = self.geometry(device, &v, g)?;
        let g = self.of_rows(device, shape, g)?;
        let mut w = device.alloc(v.dtype(), v.len())?;
        let saved = self
            .lengthened(shape, &g)
            .forward(device, &v, Some(&mut w), None)?;
        Ok(Forward { y: w, saved })
    }

    fn backward(
        &self,
        from: Backward<L::Storage, Norms<L::Storage>>,
    ) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (v, dw) = (device.input(from.x)?, device.input(from.dy)?);
        let g = argument(self, from.weight)?;
        let is_common = g.layout.shape().elem_count() == 1;
        let shape = self.geometry(device, &v, g)?;
        let g = self.of_rows(device, shape, g)?;
        let dg = || device.alloc(dtype(shape.types.param()), g.len());
        let mut dg = from.params.then(dg).transpose()?;
        let rows = self.lengthened(shape, &g);
        let dv = rows.backward(device, [&v, &dw], from.saved, dg.as_mut())?;
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
