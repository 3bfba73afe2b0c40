//! Batch norm by the statistics of all ranks.

use candle_core::Result;

use super::normalization::{Following, Stats};
use crate::computations::{Channels, JointMoments, LocalMoments, Synchronized};

/// Statistics that all ranks normalize by, where this one has `x`, which may be empty.
pub(super) fn stats(channels: &Channels, by: &Synchronized, x: &[f64]) -> Result<Vec<Stats>> {
    let count = channels.values_per_channel();
    let plain = channels.plain().stats(x, by.center, channels.eps);
    let local = plain.iter().map(|stats| LocalMoments {
        mean: stats.mean,
        mean_error: stats.mean_error,
        m2: stats.var * count,
    });
    let joint = by.joint(count, &local.collect::<Vec<_>>())?;
    let stats = joint.into_iter().map(|m: JointMoments| {
        let JointMoments {
            mean,
            mean_error,
            var,
        } = m;
        Stats::new(mean, mean_error, var, channels.eps)
    });
    Ok(stats.collect())
}

/// The gradients, those of weight and bias of this rank alone:
/// `dx = weight / std · (dy − mean(dy) − x̂ · mean(dy · x̂))`, with means over all ranks.
pub(super) fn gradients(
    channels: &Channels,
    by: &Synchronized,
    [x, dy]: [&[f64]; 2],
    stats: &[Stats],
    weight: Option<&[f64]>,
) -> Result<(Vec<f64>, [Vec<f64>; 2])> {
    let plain = channels.plain();
    let (_, [dweight, dbias]) = plain.backward([x, dy], stats, Following::default(), None);
    let means = by.means(&dweight, &dbias)?;
    let dx = (0..x.len()).map(|i| {
        let channel = (plain.group)(i);
        let [along, mean] = means[channel];
        let through = (dy[i] - mean) - stats[channel].normalized(x[i]) * along;
        weight.map_or(1., |w| w[channel]) * through / stats[channel].std
    });
    Ok((dx.collect(), [dweight, dbias]))
}
