//! Gated RMS norm.

use candle_core::{CpuStorage, Result};

use super::normalization::{Following, Normalization, Stats};
use super::{Arg, Reference, dtype, parameter, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Cast, Gate, GatedRows, Gradients};

/// Values to normalize, and the function of the gate.
struct Gated {
    h: Vec<f64>,
    opened: Vec<f64>,
}

impl GatedRows {
    /// A group of columns of a row is a group, and a column has a weight.
    fn plain(
        &self,
        elements: usize,
    ) -> Normalization<impl Fn(usize) -> usize, impl Fn(usize) -> usize> {
        let (len, group) = (self.len, self.group);
        Normalization {
            num_groups: elements / group,
            group: move |i| i / group,
            num_params: len,
            param: move |i| i % len,
        }
    }

    fn gated(&self, x: &[f64], gate: Option<&[f64]>) -> Gated {
        let opened: Vec<f64> = match gate {
            Some(gate) => gate.iter().map(|z| self.activation.of(*z)).collect(),
            None => vec![1.; x.len()],
        };
        let h = match self.gate {
            Gate::Before => x.iter().zip(&opened).map(|(x, a)| x * a).collect(),
            Gate::After => x.to_vec(),
        };
        Gated { h, opened }
    }

    fn weighted<'a>(&self, weight: Option<&'a [f64]>, x: Arg) -> Following<'a> {
        Following {
            weight,
            bias: None,
            round: (self.cast == Cast::BeforeWeight).then_some(dtype(x)),
            activation: None,
        }
    }
}

impl On<Reference> for GatedRows {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (x, weight) = (values(args.x)?, parameter(args.bias)?);
        let Gated { h, opened } = self.gated(&x, parameter(args.weight)?.as_deref());
        let plain = self.plain(x.len());
        let saved = plain.stats(&h, false, self.eps);
        let mut y = plain.forward(&h, &saved, self.weighted(weight.as_deref(), args.x));
        if self.gate == Gate::After {
            for (y, a) in y.iter_mut().zip(opened) {
                *y *= a;
            }
        }
        Ok(Forward {
            y: stored(y, dtype(args.x))?,
            saved,
        })
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let (gate, weight) = (parameter(from.weight)?, parameter(from.bias)?);
        let Gated { h, opened } = self.gated(&x, gate.as_deref());
        let is_after = self.gate == Gate::After;
        let g: Vec<f64> = match is_after {
            true => dy.iter().zip(&opened).map(|(dy, a)| dy * a).collect(),
            false => dy.clone(),
        };
        let plain = self.plain(x.len());
        let following = self.weighted(weight.as_deref(), from.x);
        let (dh, [dweight, _]) = plain.backward([&h, &g], from.saved, following, Some(false));
        let y = plain.forward(&h, from.saved, following);
        let dx = match is_after {
            true => dh.clone(),
            false => dh.iter().zip(&opened).map(|(dh, a)| dh * a).collect(),
        };
        let dgate = gate.map(|gate| {
            let slopes = gate.iter().map(|z| self.activation.slope_at(*z));
            let dgate = slopes.enumerate().map(|(i, slope)| match is_after {
                true => dy[i] * y[i] * slope,
                false => dh[i] * x[i] * slope,
            });
            CpuStorage::F64(dgate.collect())
        });
        Ok(Gradients {
            dx: stored(dx, dtype(from.x))?,
            dweight: dgate,
            dbias: Some(CpuStorage::F64(dweight)),
        })
    }
}
