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

/// A row over its length.
struct Direction {
    unit: Vec<f64>,
    inv_norm: f64,
    /// Whether the length is that of the row, and changes with it.
    own: bool,
}

/// `v / max(‖v‖, least)`; without a least length, zero for a row of zeros, which has no direction.
fn direction(v: &[f64], least: f64) -> Direction {
    let scale = scale(v);
    let scaled: Vec<f64> = v.iter().map(|v| v / scale).collect();
    let norm = dot(&scaled, &scaled).sqrt();
    if norm * scale < least {
        return Direction {
            unit: v.iter().map(|v| v / least).collect(),
            inv_norm: 1. / least,
            own: false,
        };
    }
    let inverse = if norm == 0. { 0. } else { 1. / norm };
    Direction {
        unit: scaled.into_iter().map(|v| v * inverse).collect(),
        inv_norm: inverse / scale,
        own: true,
    }
}

/// `g` of each row, if they have one each, or one that is common to all.
fn of_rows(g: Vec<f64>, num_rows: usize) -> Vec<f64> {
    match g.as_slice() {
        [g] => vec![*g; num_rows],
        _ => g,
    }
}

impl On<Reference> for WeightRows {
    type Saved = ();

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, ()>> {
        let (v, g) = (values(args.x)?, values(argument(self, args.weight)?)?);
        let rows = v.chunks(self.len).zip(of_rows(g, v.len() / self.len));
        let w = rows.flat_map(|(v, g)| {
            let units = direction(v, self.least).unit.into_iter();
            units.map(move |u| g * u)
        });
        Ok(Forward {
            y: stored(w.collect(), dtype(args.x))?,
            saved: (),
        })
    }

    fn backward(&self, from: Backward<CpuStorage, ()>) -> Result<Gradients<CpuStorage>> {
        let (v, dw) = (values(from.x)?, values(from.dy)?);
        let g = values(argument(self, from.weight)?)?;
        let common = g.len() == 1;
        let (mut dv, mut dg) = (vec![], vec![]);
        let rows = v.chunks(self.len).zip(dw.chunks(self.len));
        for ((v, dw), g) in rows.zip(of_rows(g, v.len() / self.len)) {
            let Direction {
                unit,
                inv_norm,
                own,
            } = direction(v, self.least);
            let along = dot(dw, &unit);
            dg.push(along);
            let along = if own { along } else { 0. };
            let across = dw.iter().zip(&unit).map(|(dw, u)| dw - u * along);
            dv.extend(across.map(|d| d * (g * inv_norm)));
        }
        if common {
            let mut sum = Sum::default();
            dg.iter().for_each(|dg| sum.add(*dg));
            dg = vec![sum.value()];
        }
        Ok(Gradients {
            dx: stored(dv, dtype(from.x))?,
            dweight: Some(CpuStorage::F64(dg)),
            dbias: None,
        })
    }
}
