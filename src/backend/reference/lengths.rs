//! The lengths of rows as outputs.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, Lengths, composed};

fn length(x: &[f64]) -> f64 {
    let largest = x.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    let scale = match largest > 0. && largest.is_finite() {
        true => largest,
        false => 1.,
    };
    let mut sum = Sum::default();
    x.iter().for_each(|x| sum.add((x / scale).powi(2)));
    sum.value().sqrt() * scale
}

impl On<Reference> for Lengths {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let x = values(args.x)?;
        let lengths = x.chunks(self.len).map(length).collect();
        Ok(Forward {
            y: stored(lengths, composed::accumulator(dtype(args.x)))?,
            saved: (),
        })
    }

    /// `dx = x / ‖x‖ · d‖x‖`, and zero for a row of zeros.
    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (x, dlengths) = (values(from.x)?, values(from.dy)?);
        let dx = x.chunks(self.len).zip(dlengths).flat_map(|(x, d)| {
            let length = length(x);
            let divisor = if length == 0. { 1. } else { length };
            x.iter().map(move |x| x / divisor * d)
        });
        Ok(Gradients {
            dx: stored(dx.collect(), dtype(from.x))?,
            dweight: None,
            dbias: None,
        })
    }
}
