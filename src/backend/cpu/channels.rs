//! Batch norm, by the statistics of the batch or by given ones.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Layout, Result, Tensor};

use super::synchronized;
use super::{Arg, Cpu, Native, elements, parameter, stored, with_native};
use crate::backend::{Backward, Forward, On, Statistics, is_channels_last};
use crate::computations::{Args, ChannelAxes, Channels, Gradients, Source, Spread};
use candle_norm_kernels::{AffinePair, Following, Order, Shape, Stats, Wanted};

impl From<ChannelAxes> for Shape {
    fn from(axes: ChannelAxes) -> Self {
        Self {
            outer: axes.outer,
            channels: axes.channels,
            inner: axes.inner,
        }
    }
}

/// The elements of the input, and how they lie in memory.
fn input<T: Native>(x: Arg<'_>) -> Result<(&[T], Order)> {
    if !is_channels_last(x.layout) {
        return Ok((elements(x)?, Order::ChannelsFirst));
    }
    let (start, len) = (x.layout.start_offset(), x.layout.shape().elem_count());
    let all = T::cpu_storage_as_slice(x.storage)?;
    Ok((&all[start..start + len], Order::ChannelsLast))
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.to_vec1()
}

impl Channels {
    /// Steps after the normalization, if there is more than one weight and bias for each channel.
    fn following<'a, T>(&self, affine: AffinePair<'a, T>) -> Option<Following<'a, T>> {
        let spread = match self.spread {
            Spread::Channel => candle_norm_kernels::Spread::Channel,
            Spread::SampleAndChannel => candle_norm_kernels::Spread::SampleAndChannel,
            Spread::Element => candle_norm_kernels::Spread::SampleAndElement,
        };
        let is_plain = self.spread == Spread::Channel && self.activation.is_none();
        (!is_plain).then(|| Following {
            affine,
            spread,
            activation: self.activation.map(Into::into),
        })
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (x, order) = input::<T>(args.x)?;
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let given: Arc<Vec<Stats>>;
        let statistics = match &self.source {
            Source::Own { center } => candle_norm_kernels::Statistics::Own {
                center: *center,
                eps: self.eps,
            },
            Source::Given(fixed) => {
                given = fixed.prepared(self.eps, || {
                    let channels = values(fixed.mean())?.into_iter().zip(values(fixed.var())?);
                    let stats = channels.map(|(mean, var)| Stats::new(mean.into(), var, self.eps));
                    Ok(stats.collect::<Vec<_>>())
                })?;
                candle_norm_kernels::Statistics::Given(&given)
            }
            Source::Synchronized(by) => {
                given = Arc::new(synchronized::stats(self, by, x, order)?);
                if x.is_empty() {
                    return synchronized::nothing(x, &given);
                }
                candle_norm_kernels::Statistics::Given(&given)
            }
        };
        let shape = self.axes.into();
        let (y, saved) = match self.following(affine) {
            None => T::channels_forward(x, order, shape, affine, statistics),
            Some(following) => T::spread_channels_forward(x, order, shape, following, statistics),
        };
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (weight, bias) = (parameter(from.weight)?, parameter(from.bias)?);
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let ((x, order), dy) = (input::<T>(from.x)?, elements(from.dy)?);
        if let Source::Synchronized(by) = &self.source {
            let grads =
                synchronized::gradients(self, by, (x, order), dy, weight.as_deref(), from.saved)?;
            return Ok(stored(grads, from.params));
        }
        let wanted = Wanted {
            own: match self.source {
                Source::Own { center } => Some(center),
                Source::Given(_) | Source::Synchronized(_) => None,
            },
            params: from.params,
        };
        let (shape, weight) = (self.axes.into(), affine.weight);
        let saved = from.saved;
        let grads = match self.following(affine) {
            None => T::channels_backward(x, order, dy, shape, weight, saved, wanted),
            Some(following) => {
                T::spread_channels_backward(x, order, dy, shape, following, saved, wanted)
            }
        };
        Ok(stored(grads, from.params))
    }
}

impl On<Cpu> for Channels {
    type Saved = Vec<Stats>;

    fn takes(&self, x: &Layout) -> bool {
        x.is_contiguous() || Shape::from(self.axes).has_planes() && is_channels_last(x)
    }

    fn statistics(saved: &Vec<Stats>) -> Option<&dyn Statistics> {
        Some(saved)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
