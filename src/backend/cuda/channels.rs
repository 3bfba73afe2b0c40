//! Batch norm, by the statistics of the batch or by given ones.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result};
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::channels::Planes;
use candle_norm_cuda_kernels::geometry::pointwise::Pointwise;

use super::launches::{
    Affine, By, Form, Wanted, grads, grads_by_sample, normalized, own, own_and_normalized,
};
use super::operands::{Pair, dtype, in_dtype};
use super::pointwise::Elements;
use super::statistics::Moments;
use super::synchronized;
use super::transpose::from_channels_last;
use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On, Statistics, is_channels_last};
use crate::computations::composed::accumulator;
use crate::computations::{self, Args, Channels, FixedStatistics, Gradients, Source};

/// Given statistics in the accumulator's dtype.
pub(crate) struct Given<L: Launcher> {
    mean: Pair<L::Storage>,
    var: L::Storage,
}

/// The statistics that a forward normalized by.
pub(crate) enum Saved<L: Launcher> {
    Own(Moments<L>),
    Given(Arc<Given<L>>),
}

impl<L: Launcher> Given<L> {
    fn new(layer: &str, fixed: &FixedStatistics, acc: DType) -> Result<Self> {
        let mean = match fixed.mean().dtype() == acc {
            true => Pair::exact(in_dtype(layer, fixed.mean(), acc)?),
            false => {
                let wide: L::Storage = in_dtype(layer, fixed.mean(), DType::F64)?;
                Pair::of(&wide, fixed.mean().elem_count(), acc)?
            }
        };
        let var = in_dtype(layer, fixed.var(), acc)?;
        Ok(Self { mean, var })
    }
}

impl Channels {
    fn planes(&self, types: Types) -> Planes {
        Planes {
            types,
            outer: self.axes.outer as u64,
            channels: self.axes.channels as u64,
            inner: self.axes.inner as u64,
        }
    }

    /// The elements in logical order.
    fn input<'a, L: Launcher>(
        &self,
        device: Device<L>,
        x: View<'a, L::Storage>,
    ) -> Result<Operand<'a, L::Storage>> {
        match is_channels_last(x.layout) && x.layout.shape().elem_count() > 0 {
            true => from_channels_last(device, x, self.axes),
            false => device.input(x),
        }
    }

    fn given<L: Launcher>(&self, fixed: &FixedStatistics, acc: DType) -> Result<Arc<Given<L>>> {
        let form = || Given::<L>::new(self.layer, fixed, acc);
        let given = fixed.prepared(self.eps, form)?;
        match given.var.dtype() == acc {
            true => Ok(given),
            false => Ok(Arc::new(form()?)),
        }
    }

    /// Whether the kernels of channels do all of the forward.
    fn is_plain(&self) -> bool {
        self.spread == computations::Spread::Channel && self.activation.is_none()
    }

    /// The elements of normalized channels.
    fn elements<'a, L: Launcher>(
        &self,
        types: Types,
        affine: Affine<'a, L::Storage>,
        saved: &'a Saved<L>,
    ) -> Elements<'a, L::Storage> {
        let axes = self.axes;
        Elements {
            shape: Pointwise {
                types,
                dims: [axes.outer, axes.channels, axes.inner].map(|n| n as u64),
                weights: self.spread.places(axes),
                stats: [0, 1, 1],
            },
            affine,
            by: self.by(saved),
            offset: 0.,
            flags: 0,
            activation: self.activation,
        }
    }

    /// The gradients without an activation.
    fn gradients<L: Launcher>(
        &self,
        device: Device<L>,
        types: Types,
        both: [&Operand<L::Storage>; 2],
        weight: Option<&Operand<L::Storage>>,
        saved: &Saved<L>,
        params: bool,
    ) -> Result<Gradients<L::Storage>> {
        let by = self.by(saved);
        let wanted = Wanted {
            own: match self.source {
                Source::Own { center } => Some(center),
                Source::Given(_) | Source::Synchronized(_) => None,
            },
            params,
        };
        if self.spread == computations::Spread::SampleAndChannel {
            return grads_by_sample(device, self.planes(types), both, weight, &by, wanted);
        }
        let form = Form::of(self.planes(types));
        grads(device, form, both, weight, &by, wanted)
    }

    fn by<'a, L: Launcher>(&self, saved: &'a Saved<L>) -> By<'a, L::Storage> {
        match saved {
            Saved::Own(moments) => By::own(moments),
            Saved::Given(given) => By {
                mean: Some(Operand::from(&given.mean.high, 0)),
                rest: given.mean.low.as_ref().map(|low| Operand::from(low, 0)),
                third: Some(Operand::from(&given.var, 0)),
                of_var: true,
                eps: self.eps,
            },
        }
    }
}

impl<L: Launcher> On<Cuda<L>> for Channels {
    type Saved = Saved<L>;

    /// Between the kernels, the host sends the sums. A group that sums on devices takes the
    /// composed form, which copies nothing.
    fn is_carried_out(&self) -> bool {
        !matches!(&self.source, Source::Synchronized(by) if by.sums_on_devices())
    }

    fn takes(&self, x: &Layout) -> bool {
        x.is_contiguous() || is_channels_last(x)
    }

    fn statistics(saved: &Saved<L>) -> Option<&dyn Statistics> {
        match saved {
            Saved::Own(moments) => Some(moments),
            Saved::Given(_) => None,
        }
    }

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, Saved<L>>> {
        let device = Device::<L>::of(self.layer, args.x.storage);
        let x = self.input(device, args.x)?;
        let types = device.types(x.dtype(), [args.weight, args.bias])?;
        let affine = Affine {
            weight: device.maybe_param(args.weight, dtype(types.param()))?,
            bias: device.maybe_param(args.bias, dtype(types.param()))?,
        };
        let form = Form::of(self.planes(types));
        let saved = match &self.source {
            Source::Own { center } if self.is_plain() => {
                let (y, moments) =
                    own_and_normalized(device, form, &x, &affine, *center, self.eps)?;
                let saved = Saved::Own(moments);
                return Ok(Forward { y, saved });
            }
            Source::Own { center } => Saved::Own(own(device, form, &x, *center, self.eps)?),
            Source::Given(fixed) => Saved::Given(self.given(fixed, accumulator(x.dtype()))?),
            Source::Synchronized(by) => {
                let saved = Saved::Own(synchronized::moments(device, self, by, form, &x)?);
                if x.is_empty() {
                    let y = device.alloc(x.dtype(), 0)?;
                    return Ok(Forward { y, saved });
                }
                saved
            }
        };
        let y = match self.is_plain() {
            true => normalized(device, form, &x, &affine, &self.by(&saved))?,
            false => self
                .elements(types, affine, &saved)
                .forward(device, &x, None)?,
        };
        Ok(Forward { y, saved })
    }

    fn backward(&self, from: Backward<L::Storage, Saved<L>>) -> Result<Gradients<L::Storage>> {
        let device = Device::<L>::of(self.layer, from.x.storage);
        let (x, dy) = (self.input(device, from.x)?, device.input(from.dy)?);
        if let (Source::Synchronized(by), Saved::Own(moments)) = (&self.source, from.saved) {
            let types = device.types(x.dtype(), [])?;
            let form = Form::of(self.planes(types));
            let weight = device.maybe_param(from.weight, dtype(types.param()))?;
            let (both, weight) = ([&x, &dy], weight.as_ref());
            return synchronized::gradients(device, by, form, both, weight, moments);
        }
        let types = device.types(x.dtype(), [from.weight, from.bias])?;
        let saved = from.saved;
        let weight = device.maybe_param(from.weight, dtype(types.param()))?;
        let by_element = self.spread == computations::Spread::Element;
        if self.activation.is_none() && !by_element {
            let both = [&x, &dy];
            return self.gradients(device, types, both, weight.as_ref(), saved, from.params);
        }
        let bias = device.maybe_param(from.bias, dtype(types.param()))?;
        let affine = Affine { weight, bias };
        let elements = self.elements(types, affine, saved);
        let (both, params) = ([&x, &dy], from.params);
        elements.gradients(device, both, from.weight, by_element, params, |wide| {
            let weight = wide.weight.as_ref();
            self.gradients(
                device,
                wide.types,
                [&wide.x, &wide.grad],
                weight,
                saved,
                wide.params,
            )
        })
    }
}
