//! Batch norm, by the statistics of the batch or by given ones.

use candle_core::{CpuStorage, DType, Result};

use super::normalization::{Normalization, Stats, gradients, weights};
use super::synchronized;
use super::{Arg, Reference, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Channels, Gradients, Source};

impl Channels {
    /// A channel is a group.
    pub(super) fn plain(&self) -> Normalization<impl Fn(usize) -> usize, impl Fn(usize) -> usize> {
        let axes = self.axes;
        let (num_params, param) = weights(self.spread.along(axes));
        Normalization {
            num_groups: axes.channels,
            group: move |i| i / axes.inner % axes.channels,
            num_params,
            param,
        }
    }
}

impl On<Reference> for Channels {
    type Saved = Vec<Stats>;

    fn statistics(saved: &Vec<Stats>) -> Option<&dyn Statistics> {
        Some(saved)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let x = values(args.x)?;
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let saved = match &self.source {
            Source::Own { center } => self.plain().stats(&x, *center, self.eps),
            Source::Given(fixed) => {
                let [mean, var] =
                    [fixed.mean(), fixed.var()].map(|s| s.to_dtype(DType::F64)?.to_vec1::<f64>());
                let channels = mean?.into_iter().zip(var?);
                channels
                    .map(|(mean, var)| Stats::new(mean, 0., var, self.eps))
                    .collect()
            }
            Source::Synchronized(by) => synchronized::stats(self, by, &x)?,
        };
        let affine = [weight.as_deref(), bias.as_deref()];
        let y = self.plain().forward(&x, &saved, affine, None);
        Ok(Forward {
            y: stored(y, dtype(args.x))?,
            saved,
        })
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let weight = parameter(from.weight)?;
        let weight = weight.as_deref();
        let own = match &self.source {
            Source::Own { center } => Some(*center),
            Source::Given(_) => None,
            Source::Synchronized(by) => {
                let grads = synchronized::gradients(self, by, [&x, &dy], from.saved, weight)?;
                return gradients(grads, dtype(from.x));
            }
        };
        let grads = self
            .plain()
            .backward([&x, &dy], from.saved, weight, own, None);
        gradients(grads, dtype(from.x))
    }
}
