//! Group and instance norm.

use candle_core::{CpuStorage, Result};

use super::normalization::{Following, Normalization, Stats, gradients, weights};
use super::{Arg, Reference, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Gradients, Groups};

impl Groups {
    /// Neighboring channels of a sample are a group.
    fn plain(&self) -> Normalization<impl Fn(usize) -> usize, impl Fn(usize) -> usize> {
        let (axes, num_groups) = (self.axes, self.num_groups);
        let len = axes.channels / num_groups * axes.inner;
        let (num_params, param) = weights(self.spread.along(axes));
        Normalization {
            num_groups: axes.outer * num_groups,
            group: move |i| i / len,
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

impl On<Reference> for Groups {
    type Saved = Vec<Stats>;

    fn statistics(saved: &Vec<Stats>) -> Option<&dyn Statistics> {
        Some(saved)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let x = values(args.x)?;
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let saved = self.plain().stats(&x, true, self.eps);
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
        let (plain, following) = (self.plain(), self.plain_following([&weight, &bias]));
        let grads = plain.backward([&x, &dy], from.saved, following, Some(true));
        gradients(grads, dtype(from.x))
    }
}
