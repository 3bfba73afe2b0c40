//! Weight norm.

use candle_core::{CpuStorage, Result};

use super::{Arg, Reference, Sum, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, WeightRows, argument};

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = Sum::default();
    for (a, b) in a.iter().zip(b) {
        sum.add(a * b);
    }
    sum.value()
}

/// The largest absolute value of a row, by which its squares neither over- nor underflow; 1 for a
/// row that is zero or not finite.
fn scale(v: &[f64]) -> f64 {
    let largest = v.iter().fold(0f64, |largest, v| largest.max(v.abs()));
    match largest > 0. && largest.is_finite() {
        true => largest,
        false => 1.,
    }
}

/// `v / ‖v‖`, and `1 / ‖v‖`; zero for a row of zeros, which has no direction.
fn direction(v: &[f64]) -> (Vec<f64>, f64) {
    let scale = scale(v);
    let scaled: Vec<f64> = v.iter().map(|v| v / scale).collect();
    let norm = dot(&scaled, &scaled).sqrt();
    let inverse = if norm == 0. { 0. } else { 1. / norm };
    let unit = scaled.into_iter().map(|v| v * inverse).collect();
    (unit, inverse / scale)
}

impl On<Reference> for WeightRows {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (v, g) = (values(args.x)?, values(argument(self, args.weight)?)?);
        let rows = v.chunks(self.len).zip(g);
        let w = rows.flat_map(|(v, g)| direction(v).0.into_iter().map(move |u| g * u));
        Ok(Forward {
            y: stored(w.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (v, dw) = (values(from.x)?, values(from.dy)?);
        let g = values(argument(self, from.weight)?)?;
        let (mut dv, mut dg) = (vec![], vec![]);
        for ((v, dw), g) in v.chunks(self.len).zip(dw.chunks(self.len)).zip(g) {
            let (unit, inv_norm) = direction(v);
            let along = dot(dw, &unit);
            dg.push(along);
            let across = dw.iter().zip(&unit).map(|(dw, u)| dw - u * along);
            dv.extend(across.map(|d| d * (g * inv_norm)));
        }
        Ok(Gradients {
            dx: stored(dv, dtype(from.x))?,
            dweight: Some(CpuStorage::F64(dg)),
            dbias: None,
        })
    }
}
