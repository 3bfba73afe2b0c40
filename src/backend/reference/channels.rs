//! Batch norm, by the statistics of the batch or by given ones.

use candle_core::{CpuStorage, DType, Result};

use super::normalization::{Following, Normalization, Stats, gradients, weights};
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

    fn plain_following<'a>(&self, [weight, bias]: [&'a Option<Vec<f64>>; 2]) -> Following<'a> {
        Following {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
            round: None,
            activation: self.activation,
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
        let following = self.plain_following([&weight, &bias]);
        let y = self.plain().forward(&x, &saved, following);
        Ok(Forward {
            y: stored(y, dtype(args.x))?,
            saved,
        })
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let (weight, bias) = (parameter(from.weight)?, parameter(from.bias)?);
        let own = match &self.source {
            Source::Own { center } => Some(*center),
            Source::Given(_) => None,
            Source::Synchronized(by) => {
                let weight = weight.as_deref();
                let grads = synchronized::gradients(self, by, [&x, &dy], from.saved, weight)?;
                return gradients(grads, dtype(from.x));
            }
        };
        let (plain, following) = (self.plain(), self.plain_following([&weight, &bias]));
        let grads = plain.backward([&x, &dy], from.saved, following, own);
        gradients(grads, dtype(from.x))
    }
}
