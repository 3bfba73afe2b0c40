//! Batch norm by the statistics of all ranks: between the launches, sums over ranks, for which the
//! group takes numbers of the host.

use candle_core::backend::BackendStorage;
use candle_core::op::Mul;
use candle_core::{DType, Layout, Result};

use super::launches::{Backs, By, Form, Merged, Wanted, grad_input, merged_sums, own};
use super::operands::{Pair, in_dtype};
use super::statistics::{Moments, tensor};
use super::{Device, Launcher, Operand};
use crate::computations::composed::accumulator;
use crate::computations::{Channels, Gradients, Synchronized};

/// Statistics that all ranks normalize by, where this one has `x`, which may be empty.
pub(super) fn moments<L: Launcher>(
    device: Device<L>,
    channels: &Channels,
    by: &Synchronized,
    form: Form,
    x: &Operand<L::Storage>,
) -> Result<Moments<L>> {
    let (acc, len) = (accumulator(x.dtype()), channels.axes.channels);
    let local = match x.is_empty() {
        true => {
            let zeros = || device.copied(&device.zeros(acc, len)?);
            let zeros = || Ok([zeros()?, zeros()?, zeros()?, zeros()?]);
            zeros().map(|parts| Moments::of(device, len, parts))
        }
        false => own(device, form, x, by.center, channels.eps),
    };
    let local = match local.and_then(|local| local.tensors()) {
        Ok(local) => local,
        Err(why) => {
            // The other ranks are in their first sum. This error says more than that of the sum.
            let _ = by.fail_on_host(len);
            return Err(why);
        }
    };
    let [mean, error, var] = &local;
    let count = channels.values_per_channel();
    let joint = by.joint_tensors(count, [mean, error, var], channels.eps)?;
    let [mean, error, var, inv_std] = &joint;
    let layer = device.layer();
    let pair = match acc {
        DType::F64 => Pair {
            high: in_dtype(layer, mean, acc)?,
            low: Some(in_dtype(layer, error, acc)?),
        },
        _ => {
            let wide: L::Storage = in_dtype(layer, mean, DType::F64)?;
            Pair::of(&wide, len, acc)?
        }
    };
    let parts = [
        pair.high,
        device.launch(pair.low)?,
        in_dtype(layer, inv_std, acc)?,
        in_dtype(layer, var, acc)?,
    ];
    Ok(Moments::of(device, len, parts))
}

/// The gradients, those of weight and bias of this rank alone.
pub(super) fn gradients<L: Launcher>(
    device: Device<L>,
    by: &Synchronized,
    form: Form,
    both: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    saved: &Moments<L>,
) -> Result<Gradients<L::Storage>> {
    let (x, acc, len) = (both[0], accumulator(both[0].dtype()), saved.count());
    let statistics = By::own(saved);
    let (dweight, dbias) = match x.is_empty() {
        true => {
            let zeros = || device.copied(&device.zeros(acc, len)?);
            (zeros()?, zeros()?)
        }
        false => {
            let wanted = Wanted {
                own: None,
                params: true,
            };
            let Merged { dweight, dbias, .. } =
                merged_sums(device, form, both, None, &statistics, wanted)?;
            (device.launch(dweight)?, device.launch(dbias)?)
        }
    };
    let line = Layout::contiguous(len);
    let wide = |values: &L::Storage| {
        let values = values.to_dtype(&line, DType::F64)?;
        Ok::<_, candle_core::Error>(tensor(values, len))
    };
    let [along, mean] = by.mean_tensors(&wide(&dweight)?, &wide(&dbias)?)?;
    let dx = match x.is_empty() {
        true => device.alloc(x.dtype(), 0)?,
        false => {
            let times = |a: L::Storage, b: &L::Storage| a.binary_impl::<Mul>(b, &line, &line);
            let along = in_dtype::<L::Storage>(device.layer(), &along, acc)?;
            let mut backs = Backs {
                mean: in_dtype(device.layer(), &mean, acc)?,
                along: times(along, &saved.inv_std)?,
            };
            if let Some(weight) = weight {
                let weight = device.copied(weight)?;
                backs = Backs {
                    mean: times(backs.mean, &weight)?,
                    along: times(backs.along, &weight)?,
                };
            }
            grad_input(device, form, both, weight, &statistics, Some(&backs))?
        }
    };
    Ok(Gradients {
        dx,
        dweight: Some(dweight),
        dbias: Some(dbias),
    })
}
