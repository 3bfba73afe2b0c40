//! Statistics of the batches of all ranks of a group, which running statistics take.

use candle_core::{Device, Result, Tensor};

use super::batch_norm::BatchStatistics;
use crate::collective::{Call, Collective, agreed, vote};
use candle_norm_support::host;

/// Statistics of all ranks, and the number of values of a channel, or of samples, that they were
/// taken over.
pub(crate) struct JointStatistics {
    pub(crate) statistics: BatchStatistics,
    pub(crate) count: f64,
}

/// The averages over the samples of all ranks of statistics that are averages over those of one:
/// `local` has them for so many samples, and none for an empty batch. None if no rank has samples.
///
/// A rank without `local` statistics because of an error says so to the others, and all return an
/// error.
pub(crate) fn averaged_over_ranks(
    group: &dyn Collective,
    layer: &'static str,
    channels: usize,
    local: Option<Option<(usize, &BatchStatistics)>>,
) -> Result<Option<JointStatistics>> {
    let mut values = vote(group.rank(), local.is_none()).to_vec();
    match local.flatten() {
        None => values.resize(values.len() + 1 + 2 * channels, 0.),
        Some((samples, BatchStatistics { mean, var })) => {
            values.push(samples as f64);
            for statistic in [mean, var] {
                let statistic = crate::computations::wide(&statistic.flatten_all()?)?;
                let weighted = host::vector::<f64>(&statistic)?.into_iter();
                values.extend(weighted.map(|v| v * samples as f64));
            }
        }
    }
    group.all_reduce_sum(&Call::new("norm.averages"), &mut values)?;
    let [failed, rank, count, sums @ ..] = values.as_slice() else {
        return Ok(None);
    };
    agreed(layer, [*failed, *rank])?;
    if *count == 0. {
        return Ok(None);
    }
    let average = |sums: &[f64]| {
        let values: Vec<f64> = sums.iter().map(|sum| sum / count).collect();
        Tensor::from_vec(values, channels, &Device::Cpu)
    };
    let (mean, var) = sums.split_at(channels);
    let statistics = BatchStatistics {
        mean: average(mean)?,
        var: average(var)?,
    };
    Ok(Some(JointStatistics {
        statistics,
        count: *count,
    }))
}
