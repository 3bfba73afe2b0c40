//! Planes scaled and shifted, each by coefficients of its own.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, ScaleShift, argument};

impl On<Reference> for ScaleShift {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (x, bias) = (values(args.x)?, parameter(args.bias)?);
        let coefficients = values(argument(self, args.weight)?)?;
        let planes = self.planes();
        let y = x.iter().enumerate().map(|(i, x)| {
            let plane = i / self.axes.inner;
            let [scale, shift, about] = [0, 1, 2].map(|row| coefficients[row * planes + plane]);
            let bias = bias.as_ref().map_or(0., |b| b[plane % self.axes.channels]);
            (x - about) * scale + (shift + bias)
        });
        Ok(Forward {
            y: stored(y.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let coefficients = values(argument(self, from.weight)?)?;
        let planes = self.planes();
        let mut dx = Vec::with_capacity(x.len());
        let mut dcoefficients = vec![Sum::default(); 3 * planes];
        let mut dbias = vec![Sum::default(); self.axes.channels];
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            let plane = i / self.axes.inner;
            dx.push(dy * coefficients[plane]);
            dcoefficients[plane].add(dy * (x - coefficients[2 * planes + plane]));
            dcoefficients[planes + plane].add(*dy);
            dbias[plane % self.axes.channels].add(*dy);
        }
        let sums = |sums: Vec<Sum>| CpuStorage::F64(sums.into_iter().map(Sum::value).collect());
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: Some(sums(dcoefficients)),
            dbias: Some(sums(dbias)),
        })
    }
}
