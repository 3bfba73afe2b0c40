//! Gradients of all ranks, summed, and their length.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var, bail};

use super::agree;
use super::digest::{Digest, same_digest};
use crate::collective::{Call, Collective};
use crate::graph;
use candle_norm_support::messages;

const LAYER: &str = "sum_gradients";

/// Values that are summed in one call, unless one gradient has more: four mebibytes of `f32`.
const BUCKET: usize = 1 << 20;

/// Replaces the gradient of each of `vars` by the sum of those of all ranks.
///
/// `vars` are the same on every rank and in the same order, as
/// [`trainable_vars`](crate::trainable_vars) returns them. A rank without a gradient counts as
/// zero, and gets the sum; where no rank has one, there is none afterwards either. The sums are
/// formed in `f32`, for `f64` in `f64`, and have the dtype of the variable and the same bits on
/// every rank. Small gradients share a call.
///
/// Summed, not averaged: the loss of a rank is the sum over its samples, divided by the number of
/// samples of all ranks. Then ranks may have any number of samples, and layers that are
/// [synchronized](crate::BatchNorm::synchronized) pass the gradients of the loss of all.
///
/// # Errors
/// Variables of other shapes or dtypes on another rank, a gradient of another shape than its
/// variable, and what [`Collective`] returns; on every rank, and no gradient is changed.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_norm::distributed::{Threads, sum_gradients};
///
/// let gradients = Threads::run(3, |group| {
///     let w = Var::new(&[1f32, 1.], &Device::Cpu)?;
///     let x = Tensor::full(group.rank() as f32, 2, &Device::Cpu)?;
///     let mut grads = (w.as_tensor() * x)?.sum_all()?.backward()?;
///     sum_gradients(&*group, &[w.clone()], &mut grads)?;
///     grads.get(&w).unwrap().to_vec1::<f32>()
/// })?;
/// assert_eq!(gradients, [[3., 3.]; 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn sum_gradients(group: &dyn Collective, vars: &[Var], grads: &mut GradStore) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let checked = vars.iter().try_for_each(|var| fits(var, grads.get(var)));
    agree(group, LAYER, checked)?;
    let mut digest = Digest::default();
    for var in vars {
        digest.text(&format!("{:?} {:?}", var.dtype(), var.dims()));
    }
    same_digest(group, LAYER, "variables", digest)?;
    let mut there: Vec<f64> = vars
        .iter()
        .map(|var| f64::from(u8::from(grads.get(var).is_some())))
        .collect();
    group.all_reduce_sum(&Call::new("sum_gradients.there"), &mut there)?;
    let given: Vec<&Var> = vars
        .iter()
        .zip(&there)
        .filter_map(|(var, there)| (*there > 0.).then_some(var))
        .collect();
    let (double, single): (Vec<&Var>, Vec<&Var>) =
        given.iter().partition(|var| var.dtype() == DType::F64);
    let is_in_place = |var: &Var| {
        let device_sums = group.device_sums();
        device_sums.is_some_and(|sums| sums.serves(var.device().location()))
    };
    let in_place = given.iter().all(|var| is_in_place(var));
    let mut sums = vec![];
    for bucket in buckets(&single) {
        if in_place {
            sums.extend(summed_in_place(group, bucket, grads, DType::F32)?);
            continue;
        }
        let mut values = packed::<f32>(bucket, grads, DType::F32)?;
        group.all_reduce_sum_f32(&Call::new(LAYER), &mut values)?;
        sums.extend(unpacked(bucket, values)?);
    }
    for bucket in buckets(&double) {
        if in_place {
            sums.extend(summed_in_place(group, bucket, grads, DType::F64)?);
            continue;
        }
        let mut values = packed::<f64>(bucket, grads, DType::F64)?;
        group.all_reduce_sum(&Call::new(LAYER), &mut values)?;
        sums.extend(unpacked(bucket, values)?);
    }
    for (var, sum) in sums {
        grads.insert(var, sum);
    }
    Ok(())
}

fn fits(var: &Var, grad: Option<&Tensor>) -> Result<()> {
    messages::float(LAYER, "a variable", var)?;
    match grad {
        Some(grad) => messages::shape(LAYER, "a gradient", grad, var.dims()),
        None => Ok(()),
    }
}

/// Neighbors that are summed in one call.
fn buckets<'a>(vars: &'a [&'a Var]) -> impl Iterator<Item = &'a [&'a Var]> {
    let mut rest = vars;
    std::iter::from_fn(move || {
        let mut values = 0;
        let fitting = rest.iter().take_while(|var| {
            values += var.elem_count();
            values <= BUCKET
        });
        let count = fitting.count().max(1).min(rest.len());
        let (bucket, after) = rest.split_at(count);
        rest = after;
        (!bucket.is_empty()).then_some(bucket)
    })
}

/// The sums of the gradients of `bucket`, formed on its device, in the dtypes of the variables.
fn summed_in_place<'a>(
    group: &dyn Collective,
    bucket: &[&'a Var],
    grads: &GradStore,
    dtype: DType,
) -> Result<Vec<(&'a Var, Tensor)>> {
    let flat = |var: &&Var| match grads.get(var) {
        Some(grad) => grad.flatten_all()?.to_dtype(dtype),
        None => Tensor::zeros(var.elem_count(), dtype, var.device()),
    };
    let flat: Vec<Tensor> = bucket.iter().map(flat).collect::<Result<_>>()?;
    // In memory of its own, also where there is one.
    let all = Tensor::cat(&flat, 0)?.copy()?;
    graph::sum_in_place(group, LAYER, &all)?;
    let mut start = 0;
    let sums = bucket.iter().map(|var| {
        let sum = all.narrow(0, start, var.elem_count())?;
        start += var.elem_count();
        Ok((*var, sum.to_dtype(var.dtype())?.reshape(var.dims())?))
    });
    sums.collect()
}

/// The gradients of `bucket`, one after the other.
fn packed<T: candle_core::WithDType>(
    bucket: &[&Var],
    grads: &GradStore,
    dtype: DType,
) -> Result<Vec<T>> {
    let mut values = vec![];
    for var in bucket {
        match grads.get(var) {
            Some(grad) => values.extend(grad.flatten_all()?.to_dtype(dtype)?.to_vec1::<T>()?),
            None => values.resize(values.len() + var.elem_count(), T::from_f64(0.)),
        }
    }
    Ok(values)
}

/// The gradients of each variable of `bucket`, in its dtype and on its device.
fn unpacked<'a, T: candle_core::WithDType>(
    bucket: &[&'a Var],
    values: Vec<T>,
) -> Result<Vec<(&'a Var, Tensor)>> {
    let mut rest = values.as_slice();
    let mut gradients = vec![];
    for var in bucket {
        let (values, after) = rest.split_at(var.elem_count());
        rest = after;
        let gradient = Tensor::from_slice(values, var.dims(), var.device())?;
        gradients.push((*var, gradient.to_dtype(var.dtype())?));
    }
    Ok(gradients)
}

/// Scales the gradients of `vars` down to a common length (L2 norm) of at most `max_norm`, and
/// returns the length that they had.
///
/// Call it after [`sum_gradients`], when all ranks have the same gradients: the length is then the
/// same on all of them, and nothing is sent. With one rank it serves as it is.
///
/// # Errors
/// A `max_norm` that is not positive and finite; a length that is not finite, whose gradients are
/// left as they are.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_norm::distributed::clip_gradients;
///
/// let w = Var::new(&[3f64, 4.], &Device::Cpu)?;
/// let mut grads = (w.sqr()? * 0.5)?.sum_all()?.backward()?;
/// assert_eq!(clip_gradients(&[w.clone()], &mut grads, 1.)?, 5.);
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f64>()?, [0.6000000000000001, 0.8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn clip_gradients(vars: &[Var], grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    let layer = "clip_gradients";
    if !(max_norm.is_finite() && max_norm > 0.) {
        bail!("{layer}: expected max_norm > 0 and finite, got {max_norm}")
    }
    let mut squares = 0.;
    for grad in vars.iter().filter_map(|var| grads.get(var)) {
        let values = grad.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        squares += values.into_iter().map(|v| v * v).sum::<f64>();
    }
    let norm = squares.sqrt();
    if !norm.is_finite() {
        bail!(
            "{layer}: expected gradients of finite length, got {norm}; the gradients are \
            unchanged: leave out this step, or look for the batch that caused it"
        )
    }
    if norm > max_norm {
        for var in vars {
            if let Some(grad) = grads.get(var) {
                let scaled = (grad * (max_norm / norm))?;
                grads.insert(var, scaled);
            }
        }
    }
    Ok(norm)
}
