//! Layer norm and RMS norm.

use candle_core::Result;
use candle_core::backend::BackendStorage;
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::pointwise::Pointwise;
use candle_norm_cuda_kernels::geometry::rows::{self, Norm, ROUND_FIRST};

use super::launches::{Affine, By, sums_by_sample};
use super::operands::dtype;
use super::pointwise::{Behind, Elements, Through};
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
        let launch = device.launch(spec.forward_by_sample(self.pairs))?;
        // What an activation follows is not to be rounded before.
        let y = || device.alloc(x.dtype(), x.len());
        let mut y = self.activation.is_none().then(y).transpose()?;
        let sum = residual.is_some().then(|| device.alloc(x.dtype(), x.len()));
        let mut sum = sum.transpose()?;
        let acc = accumulator(x.dtype());
        let is_rounded = residual.is_some() && acc != x.dtype();
        let unrounded = is_rounded.then(|| device.alloc(acc, x.len()));
        let mut unrounded = unrounded.transpose()?;
        let keeps = keeps || self.activation.is_some();
        let stats = keeps.then(|| device.alloc(acc, spec.norm.stats() * spec.rows));
        let mut stats = stats.transpose()?;
        let call = device
            .call(&launch)
            .read(&x)
            .maybe_read(residual.as_ref())
            .maybe_read(weight.as_ref())
            .maybe_read(bias.as_ref())
            .maybe_write(y.as_mut())
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
        let y = match (y, &stats) {
            (Some(y), _) => y,
            (None, stats) => {
                let stats = device.launch(stats.as_ref())?;
                let affine = Affine { weight, bias };
                let elements = self.elements(types, spec.rows, affine, stats);
                elements.forward(device, &x, None)?
            }
        };
        Ok(Ran {
            y,
            sum,
            unrounded,
            stats,
        })
    }

    /// The elements of normalized rows.
    fn elements<'a, S: BackendStorage>(
        &self,
        types: Types,
        rows: usize,
        affine: Affine<'a, S>,
        stats: &'a S,
    ) -> Elements<'a, S> {
        let part = |i: usize| Some(Operand::from(stats, i * rows));
        let (len, per_pair) = (self.len as u64, (rows / self.pairs) as u64);
        let by = match self.center {
            true => By {
                mean: part(0),
                rest: part(1),
                third: part(2),
                ..By::none()
            },
            false => By {
                third: part(0),
                ..By::none()
            },
        };
        Elements {
            shape: Pointwise {
                types,
                dims: [self.pairs as u64, per_pair, len],
                weights: if self.pairs == 1 {
                    [0, 0, 1]
                } else {
                    [len, 0, 1]
                },
                stats: [per_pair, 1, 1],
            },
            affine,
            by,
            offset: self.offset,
            flags: self.flags(),
            activation: self.activation,
        }
    }

    /// The gradients behind an activation.
    fn through<L: Launcher>(
        &self,
        device: Device<L>,
        from: Backward<L::Storage, L::Storage>,
        [x, dy]: [&Operand<L::Storage>; 2],
    ) -> Result<Gradients<L::Storage>> {
        // With parameters in the accumulator's dtype.
        let types = device.types(x.dtype(), [])?;
        let of_params = dtype(types.param());
        let rows = x.len() / self.len;
        let affine = Affine {
            weight: device.maybe_param(from.weight, of_params)?,
            bias: device.maybe_param(from.bias, of_params)?,
        };
        // The gradient of the weight has rounded values in it, which the kernels of rows do not see
        // in the accumulator's dtype.
        let rounds = self.cast == Cast::BeforeWeight && of_params != x.dtype();
        let elements = self.elements(types, rows, affine, from.saved);
        let Through { x, grad, params } =
            elements.through(device, [x, dy], Behind::Affine, rounds && from.params)?;
        let acc = device.types(x.dtype(), [])?;
        let weight = elements.affine.weight.as_ref();
        let mut grads =
            self.gradients(device, acc, [&x, &grad], weight, from.saved, from.params)?;
        if let [Some(products), _] = params {
            let products = Operand::whole(products, x.len());
            let dims = [self.pairs, rows / self.pairs, self.len];
            let [_, sums] = sums_by_sample(device, acc, [&products, &products], dims)?;
            grads.dweight = Some(sums);
        }
        Ok(grads)
    }

    /// The gradients without an activation.
    fn gradients<L: Launcher>(
        &self,
        device: Device<L>,
        types: Types,
        [x, dy]: [&Operand<L::Storage>; 2],
        weight: Option<&Operand<L::Storage>>,
        saved: &L::Storage,
        params: bool,
    ) -> Result<Gradients<L::Storage>> {
        let spec = rows::Rows {
            norm: self.norm(false),
            types,
            rows: x.len() / self.len,
            cols: self.len,
            aligned: weight.is_none_or(Operand::is_aligned),
        };
        let plan = match x.dtype() == dtype(types.x()) {
            true => spec.backward_by_sample(self.pairs),
            false => spec.backward_of_sum(),
        };
        let plan = device.launch(plan)?;
        let stats = Operand::all(saved, spec.norm.stats() * spec.rows);
        let sizes = [spec.rows as u64, spec.cols as u64];
        let mut dx = device.alloc(x.dtype(), x.len())?;
        let len = self.pairs * spec.cols;
        let partial = || device.alloc(accumulator(x.dtype()), plan.parts * 2 * len);
        let mut partial = params.then(partial).transpose()?;
        let call = device
            .call(&plan.dx)
            .read(x)
            .null()
            .maybe_read(weight)
            .read(dy)
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
                        .read(x)
                        .null()
                        .read(dy)
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
        let mut dweight = device.alloc(dtype(types.param()), len)?;
        let mut dbias = device.alloc(dtype(types.param()), len)?;
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
        is_plain && self.pairs <= rows::MOST_SAMPLES
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
        if self.activation.is_some() {
            return self.through(device, from, [&x, &dy]);
        }
        let types = device.types(self.output, [from.weight])?;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        let (both, weight) = ([&x, &dy], weight.as_ref());
        self.gradients(device, types, both, weight, from.saved, from.params)
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
