//! Softmax of rows.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, Softmax};

fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let mut sum = Sum::default();
    values.for_each(|v| sum.add(v));
    sum.value()
}

/// The logarithm of the softmax of a row.
fn log_softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total = sum(x.iter().map(|x| (x - largest).exp())).ln();
    x.iter().map(|x| (x - largest) - total).collect()
}

impl On<Reference> for Softmax {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let x = values(args.x)?;
        let logs = x.chunks(self.len).flat_map(log_softmax);
        let y = match self.log {
            true => logs.collect(),
            false => logs.map(f64::exp).collect(),
        };
        Ok(Forward {
            y: stored(y, dtype(args.x))?,
            saved: (),
        })
    }

    /// `dx = y · (dy − Σ dy · y)`, and of the logarithm `dx = dy − y · Σ dy`.
    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let mut dx = vec![];
        for (x, dy) in x.chunks(self.len).zip(dy.chunks(self.len)) {
            let y: Vec<f64> = log_softmax(x).into_iter().map(f64::exp).collect();
            let pairs = || y.iter().zip(dy);
            match self.log {
                true => {
                    let total = sum(dy.iter().copied());
                    dx.extend(pairs().map(|(y, dy)| dy - y * total));
                }
                false => {
                    let along = sum(pairs().map(|(y, dy)| y * dy));
                    dx.extend(pairs().map(|(y, dy)| y * (dy - along)));
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
