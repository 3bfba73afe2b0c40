//! Layer norm and RMS norm.

use candle_core::{CpuStorage, Result};

use super::normalization::{Following, Normalization, Stats, gradients, weights};
use super::{Arg, Reference, dtype, parameter, stored, values};
use crate::backend::{AddOn, Added, Backward, Forward, On};
use crate::computations::{Args, Cast, Gradients, Rows, composed};

impl Rows {
    /// A row is a group.
    fn plain(
        &self,
        elements: usize,
    ) -> Normalization<impl Fn(usize) -> usize, impl Fn(usize) -> usize> {
        let len = self.len;
        let (num_params, param) = weights(self.along(elements / len));
        Normalization {
            num_groups: elements / len,
            group: move |i| i / len,
            num_params,
            param,
        }
    }

    fn plain_weight(&self, weight: Option<Arg>) -> Result<Option<Vec<f64>>> {
        let weight = parameter(weight)?;
        Ok(weight.map(|w| w.into_iter().map(|w| self.offset + w).collect()))
    }

    fn plain_following<'a>(&self, [weight, bias]: [&'a Option<Vec<f64>>; 2]) -> Following<'a> {
        Following {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
            round: (self.cast == Cast::BeforeWeight).then_some(self.output),
            activation: self.activation,
        }
    }

    fn plain_forward(
        &self,
        x: &[f64],
        weight: Option<Arg>,
        bias: Option<Arg>,
    ) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (weight, bias) = (self.plain_weight(weight)?, parameter(bias)?);
        let plain = self.plain(x.len());
        let saved = plain.stats(x, self.center, self.eps);
        let following = self.plain_following([&weight, &bias]);
        let y = plain.forward(x, &saved, following);
        Ok(Forward {
            y: stored(y, self.output)?,
            saved,
        })
    }
}

impl On<Reference> for Rows {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        self.plain_forward(&values(args.x)?, args.weight, args.bias)
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let (weight, bias) = (self.plain_weight(from.weight)?, parameter(from.bias)?);
        let (own, following) = (Some(self.center), self.plain_following([&weight, &bias]));
        let plain = self.plain(x.len());
        let grads = plain.backward([&x, &dy], from.saved, following, own);
        gradients(grads, dtype(from.x))
    }
}

impl AddOn<Reference> for Rows {
    fn add_forward(&self, args: Args<Arg>, residual: Arg) -> Result<Added<CpuStorage, Vec<Stats>>> {
        let input = dtype(args.x);
        let pairs = values(args.x)?.into_iter().zip(values(residual)?);
        let sum: Vec<f64> = pairs.map(|(x, residual)| x + residual).collect();
        // Rounded to the accumulator, in which the graph keeps it.
        let acc = composed::accumulator(input);
        let sum: Vec<f64> = sum.into_iter().map(|v| super::rounded(v, acc)).collect();
        Ok(Added {
            normalized: self.plain_forward(&sum, args.weight, args.bias)?,
            rounded: match acc == input {
                true => None,
                false => Some(stored(sum.clone(), input)?),
            },
            sum: stored(sum, acc)?,
        })
    }
}
