//! Layer norm and RMS norm.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry::rows::{self, Norm, ROUND_FIRST};

use super::operands::dtype;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{AddOn, Added, Backward, Forward, On};
use crate::computations::composed::accumulator;
use crate::computations::{Args, Cast, Gradients, Rows};
use candle_norm_support::messages;

impl Rows {
    fn norm(&self, add: bool) -> Norm {
        Norm {
            center: self.center,
            add,
        }
    }

    fn flags(&self) -> i32 {
        match self.cast {
            Cast::AfterWeight => 0,
            Cast::BeforeWeight => ROUND_FIRST,
        }
    }

    /// One launch, with a sum where there is a residual, and statistics where it `keeps` them.
    fn launched<L: Launcher>(
        &self,
        args: Args<View<L::Storage>>,
        residual: Option<View<L::Storage>>,
        keeps: bool,
    ) -> Result<Ran<L::Storage>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = device.input(args.x)?;
        let residual = residual.map(|r| device.input(r)).transpose()?;
        let types = device.types(x.dtype(), [args.weight, args.bias])?;
        let of_params = dtype(types.param());
        let weight = device.maybe_param(args.weight, of_params)?;
        let bias = device.maybe_param(args.bias, of_params)?;
        let params = [&weight, &bias].into_iter().flatten();
        let spec = rows::Rows {
            norm: self.norm(residual.is_some()),
            types,
            rows: x.len() / self.len,
            cols: self.len,
            aligned: params.into_iter().all(Operand::is_aligned),
        };
        let launch = device.launch(spec.forward())?;
        let mut y = device.alloc(x.dtype(), x.len())?;
        let sum = residual.is_some().then(|| device.alloc(x.dtype(), x.len()));
        let mut sum = sum.transpose()?;
        let acc = accumulator(x.dtype());
        let is_rounded = residual.is_some() && acc != x.dtype();
        let unrounded = is_rounded.then(|| device.alloc(acc, x.len()));
        let mut unrounded = unrounded.transpose()?;
        let stats = keeps.then(|| device.alloc(acc, spec.norm.stats() * spec.rows));
        let mut stats = stats.transpose()?;
        let call = device
            .call(&launch)
            .read(&x)
            .maybe_read(residual.as_ref())
            .maybe_read(weight.as_ref())
            .maybe_read(bias.as_ref())
            .write(&mut y)
            .maybe_write(sum.as_mut())
            .maybe_write(stats.as_mut())
            .sizes([spec.rows, spec.cols].map(|n| n as u64))
            .float(self.eps)
            .float(self.offset)
            .int(self.flags());
        match residual {
            None => call.run()?,
            Some(_) => call.maybe_write(unrounded.as_mut()).run()?,
        }
        Ok(Ran {
            y,
            sum,
            unrounded,
            stats,
        })
    }

    /// The statistics of a launch that keeps them.
    fn kept<S>(&self, stats: Option<S>) -> Result<S> {
        match stats {
            Some(stats) => Ok(stats),
            None => messages::internal(self.layer, "statistics of rows"),
        }
    }
}

/// Outputs of a forward.
struct Ran<S> {
    y: S,
    /// In the dtype of the input.
    sum: Option<S>,
    /// In the accumulator's dtype, where that is another.
    unrounded: Option<S>,
    stats: Option<S>,
}

impl<L: Launcher> On<Cuda<L>> for Rows {
    /// The mean, what it was rounded by, and `1 / √(var + eps)`, each of all rows; the last alone
    /// where rows are not centered.
    type Saved = L::Storage;

    fn is_carried_out(&self) -> bool {
        let is_plain = !self.center || self.offset == 0. && self.cast == Cast::AfterWeight;
        is_plain && self.pairs == 1 && self.activation.is_none()
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, L::Storage>> {
        let ran = self.launched::<L>(args, None, true)?;
        Ok(Forward {
            y: ran.y,
            saved: self.kept(ran.stats)?,
        })
    }

    fn inference(&self, args: Args<View<L::Storage>>) -> Result<L::Storage> {
        Ok(self.launched::<L>(args, None, false)?.y)
    }

    fn backward(&self, from: Backward<L::Storage, L::Storage>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let x = device.input(from.x)?;
        let dy = device.input(from.dy)?;
        let types = device.types(self.output, [from.weight])?;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        let spec = rows::Rows {
            norm: self.norm(false),
            types,
            rows: x.len() / self.len,
            cols: self.len,
            aligned: weight.as_ref().is_none_or(Operand::is_aligned),
        };
        let plan = match x.dtype() == self.output {
            true => spec.backward(),
            false => spec.backward_of_sum(),
        };
        let plan = device.launch(plan)?;
        let stats = Operand::all(from.saved, spec.norm.stats() * spec.rows);
        let sizes = [spec.rows as u64, spec.cols as u64];
        let mut dx = device.alloc(x.dtype(), x.len())?;
        let partial = || device.alloc(accumulator(x.dtype()), plan.parts * 2 * spec.cols);
        let mut partial = from.params.then(partial).transpose()?;
        let call = device
            .call(&plan.dx)
            .read(&x)
            .null()
            .maybe_read(weight.as_ref())
            .read(&dy)
            .null()
            .read(&stats)
            .write(&mut dx);
        match &plan.columns {
            None => call
                .maybe_write(partial.as_mut())
                .sizes(sizes)
                .float(self.offset)
                .int(self.flags())
                .run()?,
            Some(columns) => {
                call.sizes(sizes).float(self.offset).run()?;
                if let Some(partial) = &mut partial {
                    device
                        .call(columns)
                        .read(&x)
                        .null()
                        .read(&dy)
                        .read(&stats)
                        .write(partial)
                        .sizes(sizes)
                        .int(self.flags())
                        .run()?;
                }
            }
        }
        let Some(partial) = partial else {
            return Ok(Gradients {
                dx,
                dweight: None,
                dbias: None,
            });
        };
        let mut dweight = device.alloc(dtype(types.param()), spec.cols)?;
        let mut dbias = device.alloc(dtype(types.param()), spec.cols)?;
        device
            .call(&plan.finish)
            .read_all(&partial)
            .write(&mut dweight)
            .write(&mut dbias)
            .sizes([plan.parts, spec.cols].map(|n| n as u64))
            .run()?;
        Ok(Gradients {
            dx,
            dweight: Some(dweight),
            dbias: Some(dbias),
        })
    }
}

impl<L: Launcher> AddOn<Cuda<L>> for Rows {
    fn add_forward(
        &self,
        args: Args<View<L::Storage>>,
        residual: View<L::Storage>,
    ) -> Result<Added<L::Storage, L::Storage>> {
        let ran = self.launched::<L>(args, Some(residual), true)?;
        let Some(sum) = ran.sum else {
            return messages::internal(self.layer, "a sum");
        };
        let (sum, rounded) = match ran.unrounded {
            Some(unrounded) => (unrounded, Some(sum)),
            None => (sum, None),
        };
        Ok(Added {
            sum,
            rounded,
            normalized: Forward {
                y: ran.y,
                saved: self.kept(ran.stats)?,
            },
        })
    }
}
