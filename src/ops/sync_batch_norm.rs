//! Batch normalization by the statistics of all ranks of a group.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::batch_norm::BatchStatistics;
use super::check;
use super::joint_statistics::JointStatistics;
use super::modulation::{Features, Modulation, Scaling, modulate_in};
use crate::collective::Collective;
use crate::computations::{Channels, Synchronized, activated, composed};
use crate::graph;

/// [`batch_norm_with`](super::batch_norm_with) by the statistics of all ranks of `group`, weighted
/// by the number of values on each; none if no rank has a value. The input of a rank may be empty.
///
/// A rank on which `checked` or another check failed says so to the others, which wait for it, and
/// all return an error.
pub(crate) fn sync_batch_norm_with(
    group: &Arc<dyn Collective>,
    checked: Result<()>,
    x: &Tensor,
    scaling: Scaling,
    num_features: usize,
    eps: f64,
    center: bool,
) -> Result<(Tensor, Option<JointStatistics>)> {
    let layer = "BatchNorm";
    let (weight, bias) = (scaling.weight, scaling.bias);
    let nodes = graph::SUMS_OVER_RANKS;
    let by = Arc::new(Synchronized::new(layer, group.clone(), center, nodes));
    let checked = checked.and_then(|()| {
        check::eps(layer, eps)?;
        let shape = [num_features];
        check::input(layer, x, &check::Param::affine(weight, bias, &shape))?;
        scaling.check(layer, x, Features::First)?;
        graph::route(layer, x).map(drop)
    });
    if let Err(e) = checked {
        // Its own error says more than that of the sum.
        let _ = by.fail(x, num_features);
        return Err(e);
    }
    // What follows is computed in the accumulator's dtype, and all of it rounded once.
    let is_followed = scaling.modulation.is_some() || scaling.activation.is_some();
    let input = match is_followed {
        true => &x.to_dtype(composed::accumulator(x.dtype()))?,
        false => x,
    };
    let channels = Channels::synchronized(layer, input, by.clone(), eps);
    let (y, statistics) = graph::apply_with_statistics(channels, input, weight, bias)?;
    let y = followed(layer, y, &scaling)?.to_dtype(x.dtype())?;
    let count = by.count();
    if count == 0. {
        return Ok((y, None));
    }
    check::more_than_one_value(layer, count as usize, x)?;
    let statistics = BatchStatistics {
        mean: statistics.mean()?,
        var: (statistics.var()? * (count / (count - 1.)))?,
    };
    Ok((y, Some(JointStatistics { statistics, count })))
}

/// `y` with the scale and shift, and the activation, that follow a norm and its affine pair.
fn followed(layer: &'static str, y: Tensor, scaling: &Scaling) -> Result<Tensor> {
    if y.elem_count() == 0 {
        return Ok(y);
    }
    let y = match &scaling.modulation {
        Some(modulation) => {
            let wide = |t: Option<&Tensor>| t.map(|t| t.to_dtype(y.dtype())).transpose();
            let (scale, shift) = (wide(modulation.scale)?, wide(modulation.shift)?);
            let modulation = Modulation {
                scale: scale.as_ref(),
                shift: shift.as_ref(),
                ..*modulation
            };
            modulate_in(layer, &y, &modulation, None)?
        }
        None => y,
    };
    activated(scaling.activation, y)
}
