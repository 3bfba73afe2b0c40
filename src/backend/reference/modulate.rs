//! Scale and shift alone, of any spread.

use candle_core::{CpuStorage, Result};

use super::normalization::weights;
use super::{Arg, Reference, Sum, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, Modulate};

impl On<Reference> for Modulate {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (weight, bias) = (parameter(args.weight)?, parameter(args.bias)?);
        let (_, param) = weights((self.dims, self.along));
        let x = values(args.x)?.into_iter().enumerate();
        let y = x.map(|(i, x)| {
            let scaled = x * weight.as_ref().map_or(1., |w| w[param(i)]);
            bias.as_ref().map_or(scaled, |b| scaled + b[param(i)])
        });
        Ok(Forward {
            y: stored(y.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let weight = parameter(from.weight)?;
        let (count, param) = weights((self.dims, self.along));
        let mut dweight = vec![Sum::default(); count];
        let mut dbias = dweight.clone();
        let mut dx = Vec::with_capacity(x.len());
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            dx.push(dy * weight.as_ref().map_or(1., |w| w[param(i)]));
            dweight[param(i)].add(dy * x);
            dbias[param(i)].add(*dy);
        }
        let sums = |sums: Vec<Sum>| CpuStorage::F64(sums.into_iter().map(Sum::value).collect());
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: Some(sums(dweight)),
            dbias: Some(sums(dbias)),
        })
    }
}
