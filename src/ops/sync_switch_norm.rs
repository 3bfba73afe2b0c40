//! Switchable normalization that mixes in the statistics of the batches of all ranks of a group.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::batch_norm::BatchStatistics;
use super::check;
use super::joint_statistics::JointStatistics;
use super::switch_norm::{
    LAYER, SwitchOptions, check_arguments, check_counts_of_samples, joined_logits, mixture,
    moments_of_planes, planes, rows_of_planes, scaled_and_shifted,
};
use crate::collective::Collective;
use crate::computations::{Batch, First, Local, LocalTensors, Synchronized, composed};
use crate::graph::{self, Route, route};

/// [`switch_norm_with`](super::switch_norm_with), where the batch of `options` is that of all
/// ranks; no statistics if no rank has a value.
///
/// A rank on which `checked` or another check failed says so to the others, and all return an
/// error.
pub(crate) fn sync_switch_norm_with(
    group: &Arc<dyn Collective>,
    checked: Result<()>,
    x: &Tensor,
    [weight, bias]: [Option<&Tensor>; 2],
    [mean_weight, var_weight]: [&Tensor; 2],
    options: SwitchOptions,
    num_features: usize,
) -> Result<(Tensor, Option<JointStatistics>)> {
    let by = Synchronized::new(LAYER, group.clone(), true, graph::SUMS_OVER_RANKS);
    let space = |x: &Tensor| x.dims()[2..].iter().product::<usize>();
    let checked = checked.and_then(|()| {
        check_arguments(x, weight, bias, [mean_weight, var_weight], &options)?;
        if x.elem_count() > 0 {
            check_counts_of_samples(x, &options, space(x))?;
        }
        route(LAYER, x)
    });
    let route = match checked {
        Ok(route) => route,
        Err(e) => {
            // Its own error says more than that of the sum.
            let _ = by.fail_on_host(num_features);
            return Err(e);
        }
    };
    let (n, c, space) = (x.dims()[0], x.dims()[1], space(x));
    let shape = Local {
        count: (n * space) as f64,
        channels: c,
        x,
        // The mixture forms its statistics on the CPU.
        in_place: false,
    };
    let params = [weight, bias, Some(mean_weight), Some(var_weight)];
    if x.elem_count() == 0 {
        let joint = by.over_ranks(shape, None, First::Forward)?;
        let here = |t: &Tensor| t.to_device(x.device());
        let (mean, var) = (here(&joint.mean)?, here(&joint.var)?);
        let y = composed::empty(x, &[&params[..], &[Some(&mean), Some(&var)]].concat())?;
        let var = unbiased(&joint.var, &by, &options, x)?;
        return Ok((y, statistics(&joint.mean, &var, &by)));
    }
    let rows = rows_of_planes(route, x, (n, c, space), &params)?;
    let mut mixture = mixture(x, &options)?;
    let weight = weight.map(composed::kept).transpose()?;
    let logits = joined_logits([mean_weight, var_weight], x)?;
    let (values, planes) = match route {
        Route::Fused(_) => {
            let moments = moments_of_planes(&rows)?;
            let planes = mixture.planes(&moments)?;
            (rows, planes)
        }
        Route::Composed => planes(&rows, &mixture)?,
    };
    let [mean, var] = mixture.whole(&planes)?;
    let by_channel = |t: &Tensor| t.t()?.contiguous();
    let (away, mean) = composed::centered(&by_channel(&mean)?, true)?;
    let squares = (away.sqr()?.join()? + by_channel(&var)?)?;
    let local = LocalTensors {
        mean: mean.try_into().ok(),
        m2: (composed::Rows::new(&squares)?.sum()? * space as f64)?,
    };
    let joint = by.over_ranks(shape, Some(local), First::Forward)?;
    let var = unbiased(&joint.var, &by, &options, x)?;
    let statistics = statistics(&joint.mean, &var, &by);
    mixture.batch = Batch::Joint {
        mean: joint.mean,
        var,
    };
    let (coefficients, _) = mixture.of_planes(&planes, weight.as_ref(), &logits)?;
    let y = scaled_and_shifted(&values, &coefficients, bias, x)?;
    Ok((y, statistics))
}

/// The variance of all ranks, divided by n − 1 where that of the batch is.
fn unbiased(
    var: &Tensor,
    by: &Synchronized,
    options: &SwitchOptions,
    x: &Tensor,
) -> Result<Tensor> {
    let count = by.count();
    if !options.unbiased || options.instance || count == 0. {
        return Ok(var.clone());
    }
    check::more_than_one_value(LAYER, count as usize, x)?;
    var * (count / (count - 1.))
}

fn statistics(mean: &Tensor, var: &Tensor, by: &Synchronized) -> Option<JointStatistics> {
    let count = by.count();
    (count > 0.).then(|| JointStatistics {
        statistics: BatchStatistics {
            mean: mean.detach(),
            var: var.detach(),
        },
        count,
    })
}
