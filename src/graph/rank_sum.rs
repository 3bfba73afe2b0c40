//! Sums over the ranks of a group as nodes of candle's graph.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::computations::RankSum;
use candle_norm_support::host;

/// A node of sums that were formed before.
struct Summed {
    sums: Vec<f64>,
    by: RankSum,
}

/// `sums` of what the ranks `contributed`, `[n]` in `f64` on the CPU. The gradient of the
/// contribution is the sum over all ranks of their gradients.
pub(crate) fn sums_over_ranks(
    contributed: &Tensor,
    sums: Vec<f64>,
    by: &RankSum,
) -> Result<Tensor> {
    let by = by.clone();
    contributed.apply_op1(Summed { sums, by })
}

impl CustomOp1 for Summed {
    fn name(&self) -> &'static str {
        self.by.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F64(self.sums.clone()), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let sums = self.by.of(host::vector(&dy.detach())?)?;
        Ok(Some(sums_over_ranks(dy, sums, &self.by)?))
    }
}
