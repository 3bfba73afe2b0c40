//! Computations as nodes of candle's graph, and the one place that chooses who carries them out.
//!
//! A call of [`apply`] picks a [`Route`]. On the composed route the tensor operations of the
//! computation make up the graph. On the fused route [`node`] makes one node, whose forward and
//! backward a backend carries out.

mod fingerprint;
mod node;
mod path;
mod rank_sum;
#[cfg(feature = "internals")]
pub(crate) mod recorder;

use std::sync::Arc;

use candle_core::{Result, Tensor};

pub(crate) use node::{Served, ServedAdded};
#[cfg(feature = "internals")]
pub(crate) use path::forced;
pub use path::{Path, with_path};
pub(crate) use path::{Route, route};
pub(crate) use rank_sum::{SUMS_OVER_RANKS, sum_in_place};

use crate::computations::{Args, Transpose, composed};
use candle_norm_support::messages;

/// The route of `computation`: composed also where its backend has no kernels for it.
fn route_of<C: Served>(computation: &C, x: &Tensor) -> Result<Route> {
    Ok(match route(computation.layer(), x)? {
        Route::Fused(kernels) if !node::is_carried_out(computation, kernels) => Route::Composed,
        route => route,
    })
}

/// `computation` of `x`, which is not empty, and the parameters that there are.
pub(crate) fn apply<C: Served>(
    computation: C,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let args = Args { x, weight, bias };
    match route_of(&computation, x)? {
        Route::Composed => Ok(computation.composed(args)?.y),
        Route::Fused(kernels) => Ok(node::fused(computation, kernels, args, false)?.0),
    }
}

/// [`apply`], and the statistics that `x` was normalized by.
pub(crate) fn apply_with_statistics<C: Served>(
    computation: C,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<(Tensor, Statistics)> {
    let args = Args { x, weight, bias };
    match route_of(&computation, x)? {
        Route::Composed => {
            let result = computation.composed(args)?;
            match result.statistics {
                Some(statistics) => Ok((result.y, Statistics::Connected(statistics))),
                None => messages::internal(computation.layer(), "statistics"),
            }
        }
        Route::Fused(kernels) => {
            let (y, node) = node::fused(computation, kernels, args, true)?;
            Ok((y, Statistics::Saved(node)))
        }
    }
}

/// `computation` of the sum `x + residual`, and the sum in the dtype of `x`. Neither input is
/// empty.
pub(crate) fn apply_added<C: ServedAdded>(
    computation: C,
    x: &Tensor,
    residual: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let args = Args { x, weight, bias };
    match route(computation.layer(), x)? {
        Route::Fused(kernels) if node::is_carried_out_added(&computation, kernels) => {
            node::fused_added(computation, kernels, args, residual)
        }
        Route::Fused(_) | Route::Composed => {
            let acc = composed::accumulator(x.dtype());
            let sum = (x.to_dtype(acc)? + residual.to_dtype(acc)?)?;
            let y = computation.composed(Args { x: &sum, ..args })?.y;
            Ok((y, sum.to_dtype(x.dtype())?.contiguous()?))
        }
    }
}

/// The result of any layer for an input without elements: as empty as the input.
pub(crate) fn empty(layer: &str, x: &Tensor, params: &[Option<&Tensor>]) -> Result<Tensor> {
    route(layer, x)?;
    composed::empty(x, params)
}

/// `[mean, var, counter]` of running statistics after a batch with a mean and an unbiased variance,
/// which nothing else locks; none where tensor operations are to form them. Without a momentum, a
/// batch weighs one over the number of batches.
pub(crate) fn updated(
    layer: &'static str,
    running: [&Tensor; 3],
    batch: [&Tensor; 2],
    momentum: Option<f64>,
) -> Result<Option<[Tensor; 3]>> {
    match route(layer, running[0])? {
        Route::Fused(kernels) if running[0].elem_count() > 0 => {
            node::updated(layer, kernels, running, batch, momentum)
        }
        _ => Ok(None),
    }
}

/// `x` `[a, b, c]` as `[a, c, b]`, contiguous.
pub(crate) fn transposed(x: &Tensor) -> Result<Tensor> {
    apply(Transpose, &x.contiguous()?, None, None)
}

/// The statistics that a call formed.
pub(crate) enum Statistics {
    /// Tensors of the graph.
    Connected(composed::Statistics),
    /// Kept by a node, out of reach of gradients.
    Saved(Arc<dyn node::KeepsStatistics>),
}

impl Statistics {
    /// The mean of each group, outside of the graph.
    pub(crate) fn mean(&self) -> Result<Tensor> {
        match self {
            Self::Connected(s) => Ok(s.mean.detach()),
            Self::Saved(node) => node.statistics()?.mean(),
        }
    }

    /// The biased variance of each group, outside of the graph.
    pub(crate) fn var(&self) -> Result<Tensor> {
        match self {
            Self::Connected(s) => Ok(s.var.detach()),
            Self::Saved(node) => node.statistics()?.var(),
        }
    }

    /// The mean and the biased variance of each channel, averaged over the samples, outside of the
    /// graph.
    pub(crate) fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]> {
        match self {
            Self::Connected(s) => {
                let average = |t: &Tensor| {
                    let by_channel = t.detach().reshape(((), channels))?.t()?.contiguous()?;
                    composed::Rows::new(&by_channel)?.mean()
                };
                Ok([average(&s.mean)?, average(&s.var)?])
            }
            Self::Saved(node) => node.statistics()?.over_samples(channels),
        }
    }
}
