//! Positions normalized by those up to them.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, ChannelAxes, Cumulative, Gradients};

/// Statistics of a position and those up to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpTo {
    count: f64,
    /// About the origin of the sample.
    mean: f64,
    inv_std: f64,
}

impl Cumulative {
    /// Index of an element.
    fn at(&self, sample: usize, channel: usize, position: usize) -> usize {
        let ChannelAxes {
            channels, inner, ..
        } = self.axes;
        (sample * channels + channel) * inner + position
    }

    /// A number near the values of a sample.
    fn near(&self, x: &[f64], sample: usize) -> f64 {
        match &self.before {
            Some(before) => before[sample].mean,
            None => x[self.at(sample, 0, 0)],
        }
    }

    /// The statistics of each position of a sample, one value after the other (Welford, 1962).
    fn scan(&self, x: &[f64], sample: usize) -> Vec<UpTo> {
        let origin = self.near(x, sample);
        let before = self.before.as_ref().map(|before| before[sample]);
        let mut count = before.map_or(0., |m| m.count);
        let (mut mean, mut m2) = (Sum::default(), Sum::default());
        m2.add(before.map_or(0., |m| m.m2));
        let positions = (0..self.axes.inner).map(|t| {
            for c in 0..self.axes.channels {
                let v = x[self.at(sample, c, t)] - origin;
                count += 1.;
                let distance = v - mean.value();
                mean.add(distance / count);
                m2.add(distance * (v - mean.value()));
            }
            UpTo {
                count,
                mean: mean.value(),
                inv_std: 1. / (m2.value() / count + self.eps).sqrt(),
            }
        });
        positions.collect()
    }
}

impl On<Reference> for Cumulative {
    type Saved = Vec<Vec<UpTo>>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Vec<UpTo>>>> {
        let x = values(args.x)?;
        let mut y = vec![0.; x.len()];
        let mut saved = vec![];
        for sample in 0..self.axes.outer {
            let (stats, origin) = (self.scan(&x, sample), self.near(&x, sample));
            for (t, up_to) in stats.iter().enumerate() {
                for c in 0..self.axes.channels {
                    let i = self.at(sample, c, t);
                    y[i] = ((x[i] - origin) - up_to.mean) * up_to.inv_std;
                }
            }
            saved.push(stats);
        }
        Ok(Forward {
            y: stored(y, dtype(args.x))?,
            saved,
        })
    }

    /// The sum over the positions after each is formed anew for each.
    fn backward(
        &self,
        from: Backward<CpuStorage, Vec<Vec<UpTo>>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let mut dx = vec![0.; x.len()];
        for (sample, stats) in from.saved.iter().enumerate() {
            let origin = self.near(&x, sample);
            let sums: Vec<[f64; 2]> = (stats.iter().enumerate())
                .map(|(t, up_to)| {
                    let (mut plain, mut along) = (Sum::default(), Sum::default());
                    for c in 0..self.axes.channels {
                        let i = self.at(sample, c, t);
                        plain.add(dy[i]);
                        along.add(dy[i] * ((x[i] - origin) - up_to.mean) * up_to.inv_std);
                    }
                    [plain.value(), along.value()]
                })
                .collect();
            for (s, here) in stats.iter().enumerate() {
                let (mut a, mut b, mut e) = (Sum::default(), Sum::default(), Sum::default());
                for (up_to, [plain, along]) in stats.iter().zip(&sums).skip(s) {
                    let k = up_to.inv_std * up_to.inv_std * along / up_to.count;
                    a.add(up_to.inv_std * plain / up_to.count);
                    b.add(k);
                    e.add(k * (up_to.mean - here.mean));
                }
                for c in 0..self.axes.channels {
                    let i = self.at(sample, c, s);
                    let centered = (x[i] - origin) - here.mean;
                    dx[i] = here.inv_std * dy[i] - centered * b.value() + (e.value() - a.value());
                }
            }
        }
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: None,
            dbias: None,
        })
    }
}
