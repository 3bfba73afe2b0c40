//! Softmax along the last axis.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::composed;

const LAYER: &str = "softmax_last_dim";

/// `exp(x − max) / Σ exp(x − max)` along the last axis.
pub(crate) fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    check::float(LAYER, "input", x)?;
    check::rank_at_least(LAYER, x, 1, "[..., N]")?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[]);
    }
    let len = x.dims()[x.rank() - 1];
    let rows = x.contiguous()?.reshape(((), len))?;
    let rows = rows.to_dtype(composed::accumulator(x.dtype()))?;
    composed::softmax(&rows)?
        .to_dtype(x.dtype())?
        .reshape(x.shape())
}
