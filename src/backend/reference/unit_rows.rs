//! Rows over their lengths.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, L2Form, UnitRows};

fn dot(a: impl Iterator<Item = f64>, b: &[f64]) -> f64 {
    let mut sum = Sum::default();
    for (a, b) in a.zip(b) {
        sum.add(a * b);
    }
    sum.value()
}

impl UnitRows {
    /// The length that `x` is divided by, and whether it changes with `x`.
    fn length(&self, x: &[f64]) -> (f64, bool) {
        let largest = x.iter().fold(0f64, |largest, x| largest.max(x.abs()));
        let scale = match largest > 0. && largest.is_finite() {
            true => largest,
            false => 1.,
        };
        let scaled: Vec<f64> = x.iter().map(|x| x / scale).collect();
        let norm = dot(scaled.iter().copied(), &scaled).sqrt() * scale;
        match self.form {
            L2Form::Max if norm <= self.eps => (self.eps, false),
            L2Form::Max => (norm, true),
            L2Form::Inside => (norm.hypot(self.eps.sqrt()), true),
        }
    }
}

impl On<Reference> for UnitRows {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let x = values(args.x)?;
        let rows = x.chunks(self.len).flat_map(|x| {
            let (length, _) = self.length(x);
            x.iter().map(move |x| x / length)
        });
        Ok(Forward {
            y: stored(rows.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    /// With the length l, `dx = (dy − y · Σ dy · y) / l`, without the sum where l is fixed.
    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let mut dx = vec![];
        for (x, dy) in x.chunks(self.len).zip(dy.chunks(self.len)) {
            let (length, own) = self.length(x);
            let along = match own {
                true => dot(x.iter().map(|x| x / length), dy),
                false => 0.,
            };
            let pairs = x.iter().zip(dy);
            dx.extend(pairs.map(|(x, dy)| (dy - x / length * along) / length));
        }
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: None,
            dbias: None,
        })
    }
}
