//! Running statistics after a batch, in one launch.

use candle_core::backend::BackendStorage;
use candle_core::op::Minimum;
use candle_core::scalar::Scalar;
use candle_core::{Layout, Result};
use candle_norm_cuda_kernels::geometry::channels::update_running;

use super::operands::cast;
use super::{Device, Launcher, View};
use crate::backend::{Running, Updated};

/// The kernel's momentum where the weight of a batch is one over the number of batches.
const CUMULATIVE: f64 = -1.;

pub(super) fn updated<L: Launcher>(
    layer: &'static str,
    from: Running<L::Storage>,
) -> Result<Updated<L::Storage>> {
    let device = Device::<L>::of(layer, from.mean.storage);
    let dtype = from.mean.storage.dtype();
    let channels = from.mean.layout.shape().elem_count();
    let (mean, var) = (
        device.param(from.batch_mean, dtype)?,
        device.param(from.batch_var, dtype)?,
    );
    let rest = device.zeros(dtype, channels)?;
    // In storage of its own.
    let copy = |of: View<L::Storage>| cast(of.storage, of.layout, of.storage.dtype());
    // The kernel adds one, and a counter at the end of its range stays there.
    let last = device.filled(Scalar::I64(i64::MAX - 1), 1)?;
    let (counter, layout) = (from.counter.storage, from.counter.layout);
    let at = Layout::contiguous(layout.shape().clone());
    let mut to = Updated {
        mean: copy(from.mean)?,
        var: copy(from.var)?,
        counter: counter.binary_impl::<Minimum>(&last, layout, &at)?,
    };
    device
        .call(&update_running(
            channels as u64,
            true,
            device.element(dtype)?,
        ))
        .read(&mean)
        .read(&rest)
        .read(&var)
        .write(&mut to.mean)
        .write(&mut to.var)
        .write(&mut to.counter)
        .sizes([channels as u64, 1])
        .float(from.momentum.unwrap_or(CUMULATIVE))
        .float(1.)
        .run()?;
    Ok(to)
}
