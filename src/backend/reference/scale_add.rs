//! A scaled branch that joins a residual.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, ChannelAxes, Gradients, Places, ScaleAdd, Third, argument};

impl ScaleAdd {
    /// Index of the weight of element `i`.
    fn slot(&self, i: usize) -> usize {
        let ChannelAxes {
            channels, inner, ..
        } = self.axes;
        match self.places {
            Places::Column => i % inner,
            Places::SampleAndColumn => i / (channels * inner) * inner + i % inner,
            Places::Channel => i / inner % channels,
            Places::SampleAndChannel => i / inner,
        }
    }

    fn sums(&self, count: usize, terms: impl Iterator<Item = f64>) -> CpuStorage {
        let mut sums = vec![Sum::default(); count];
        for (i, term) in terms.enumerate() {
            sums[self.slot(i)].add(term);
        }
        CpuStorage::F64(sums.into_iter().map(Sum::value).collect())
    }
}

impl On<Reference> for ScaleAdd {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (x, weight) = (values(args.x)?, values(argument(self, args.weight)?)?);
        let third = parameter(args.bias)?;
        let y = x.iter().enumerate().map(|(i, x)| {
            let slot = self.slot(i);
            let added = match self.third {
                Third::Shift => slot,
                Third::Residual => i,
            };
            third.as_ref().map_or(0., |t| t[added]) + x * weight[slot]
        });
        Ok(Forward {
            y: stored(y.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let weight = values(argument(self, from.weight)?)?;
        let dx = dy
            .iter()
            .enumerate()
            .map(|(i, dy)| dy * weight[self.slot(i)]);
        let dx = stored(dx.collect(), dtype(from.x))?;
        let dweight = self.sums(weight.len(), x.iter().zip(&dy).map(|(x, dy)| x * dy));
        let dthird = match self.third {
            Third::Shift => self.sums(weight.len(), dy.iter().copied()),
            Third::Residual => CpuStorage::F64(dy),
        };
        Ok(Gradients {
            dx,
            dweight: Some(dweight),
            dbias: Some(dthird),
        })
    }
}
