//! The moments of planes as outputs.

use candle_core::{CpuStorage, Result};

use super::normalization::{Normalization, Stats};
use super::{Arg, Reference, dtype, stored, values};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Gradients, PlaneMoments};

impl On<Reference> for PlaneMoments {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let x = values(args.x)?;
        let planes = Normalization {
            num_groups: x.len() / self.len,
            group: |i| i / self.len,
            num_params: 0,
            param: |_| 0,
        };
        let saved = planes.stats(&x, true, 0.);
        let means = saved.iter().map(|s| s.mean);
        let y = means.chain(saved.iter().map(|s| s.var)).collect();
        Ok(Forward {
            y: CpuStorage::F64(y),
            saved,
        })
    }

    /// With n values in a plane, `dx = (x − mean) · 2 dvar / n + dmean / n`.
    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (values(from.x)?, values(from.dy)?);
        let (dmean, dvar) = dy.split_at(from.saved.len());
        let n = self.len as f64;
        let dx = x.iter().enumerate().map(|(i, x)| {
            let plane = i / self.len;
            let Stats {
                mean, mean_error, ..
            } = from.saved[plane];
            ((x - mean) - mean_error) * (2. * dvar[plane] / n) + dmean[plane] / n
        });
        Ok(Gradients {
            dx: stored(dx.collect(), dtype(from.x))?,
            dweight: None,
            dbias: None,
        })
    }
}
