//! Batch norm by the statistics of all ranks: between the passes of the kernels, sums over ranks.

use candle_core::{CpuStorage, Result};

use super::Native;
use crate::backend::Forward;
use crate::computations::{Channels, JointMoments, LocalMoments, Synchronized};
use candle_norm_kernels::{Gradients, Mean, Order, Stats};

/// Statistics that all ranks normalize by, where this one has `x`, which may be empty.
pub(super) fn stats<T: Native>(
    channels: &Channels,
    by: &Synchronized,
    x: &[T],
    order: Order,
) -> Result<Vec<Stats>> {
    let none = LocalMoments {
        mean: 0.,
        mean_error: 0.,
        m2: 0.,
    };
    let local = match x.is_empty() {
        true => vec![none; channels.axes.channels],
        false => {
            let moments = T::channel_moments(x, order, channels.axes.into(), by.center);
            let local = moments.into_iter().map(|m| LocalMoments {
                mean: m.mean(),
                mean_error: m.mean_error(),
                m2: m.m2(),
            });
            local.collect()
        }
    };
    let joint = by.joint(channels.values_per_channel(), &local)?;
    let stats = joint.into_iter().map(|m: JointMoments| {
        let mean = Mean {
            high: m.mean,
            low: m.mean_error,
        };
        Stats::new(mean, m.var, channels.eps)
    });
    Ok(stats.collect())
}

/// The output of a rank without values.
pub(super) fn nothing<T: Native>(
    x: &[T],
    stats: &[Stats],
) -> Result<Forward<CpuStorage, Vec<Stats>>> {
    Ok(Forward {
        y: T::to_cpu_storage_owned(x.to_vec()),
        saved: stats.to_vec(),
    })
}

/// The gradients, those of weight and bias of this rank alone.
pub(super) fn gradients<T: Native>(
    channels: &Channels,
    by: &Synchronized,
    (x, order): (&[T], Order),
    dy: &[T],
    weight: Option<&[T::Acc]>,
    stats: &[Stats],
) -> Result<Gradients<T>> {
    let shape = channels.axes.into();
    let [dweight, dbias] = match x.is_empty() {
        true => [vec![0.; stats.len()], vec![0.; stats.len()]],
        false => T::channel_grad_sums(x, order, dy, shape, stats),
    };
    let means = by.means(&dweight, &dbias)?;
    let dx = match x.is_empty() {
        true => vec![],
        false => T::channel_grad_input(x, order, dy, shape, weight, stats, &means),
    };
    Ok(Gradients { dx, dweight, dbias })
}
