//! Dynamic tanh and its kin.

use candle_core::cpu::erf::erf_f64 as erf;
use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Dynamic, Gradients, Squash, argument};

impl Dynamic {
    /// The channel of element `i`.
    fn channel(&self, i: usize) -> usize {
        match self.channels_first {
            true => i / self.axes.inner % self.axes.channels,
            false => i % self.axes.inner,
        }
    }
}

impl Squash {
    /// The value at `u`, and the slope there.
    fn at(self, u: f64) -> [f64; 2] {
        match self {
            Squash::Tanh => [u.tanh(), u.cosh().powi(-2)],
            Squash::Erf => [erf(u), std::f64::consts::FRAC_2_SQRT_PI * (-u * u).exp()],
        }
    }
}

impl On<Reference> for Dynamic {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (x, line) = (values(args.x)?, values(argument(self, args.weight)?)?);
        let (alpha, shift) = (line[0], line[1]);
        let (weight, bias) = line[2..].split_at(self.channels());
        let y = x.iter().enumerate().map(|(i, x)| {
            let [value, _] = self.squash.at(alpha * x + shift);
            weight[self.channel(i)] * value + bias[self.channel(i)]
        });
        Ok(Forward {
            y: stored(y.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let line = values(argument(self, from.weight)?)?;
        let channels = self.channels();
        let (alpha, shift, weight) = (line[0], line[1], &line[2..]);
        let mut sums = vec![Sum::default(); line.len()];
        let mut dx = Vec::with_capacity(x.len());
        for (i, (x, dy)) in x.iter().zip(&dy).enumerate() {
            let channel = self.channel(i);
            let [value, slope] = self.squash.at(alpha * x + shift);
            let du = dy * weight[channel] * slope;
            dx.push(du * alpha);
            sums[0].add(du * x);
            sums[1].add(du);
            sums[2 + channel].add(dy * value);
            sums[2 + channels + channel].add(*dy);
        }
        let dline = sums.into_iter().map(Sum::value).collect();
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: Some(CpuStorage::F64(dline)),
            dbias: None,
        })
    }
}
