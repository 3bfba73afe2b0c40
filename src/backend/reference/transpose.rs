//! The copy with two axes transposed.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, Transpose};

fn transposed(x: Arg) -> Result<CpuStorage> {
    let (outer, rows, columns) = x.layout.shape().dims3()?;
    let values = values(x)?;
    let mut result = Vec::with_capacity(values.len());
    for o in 0..outer {
        for c in 0..columns {
            for r in 0..rows {
                result.push(values[(o * rows + r) * columns + c]);
            }
        }
    }
    stored(result, dtype(x))
}

impl On<Reference> for Transpose {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let y = transposed(args.x)?;
        Ok(Forward { y, saved: () })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        Ok(Gradients {
            dx: transposed(from.dy)?,
            dweight: None,
            dbias: None,
        })
    }
}
