//! Batch normalization of the parts of a batch, each by its own statistics.

use candle_core::{Result, Tensor, bail};

use super::batch_norm::{BatchStatistics, batch_norm_with};
use super::check;
use super::masked::wide_params;
use super::modulation::{Scaling, modulate_in};
use crate::computations::{activated, composed};
use crate::graph;

const LAYER: &str = "BatchNorm";

/// Statistics of one of the parts of a batch.
#[derive(Debug, Clone)]
pub(crate) struct GhostStatistics {
    /// The number of values of a channel.
    pub(crate) count: usize,
    pub(crate) statistics: BatchStatistics,
}

/// Ghost batch normalization: the samples of a batch in parts of about `virtual_batch_size`, each
/// normalized by the statistics of its own.
///
/// `y = (x − mean) / √(var + eps) · weight + bias` with the mean and the biased variance of each
/// channel over the samples of a part and space (Hoffer et al., 2017,
/// <https://arxiv.org/abs/1705.08741>). For N samples and a size v there are `k = ⌈N / v⌉` parts of
/// `⌈N / k⌉` samples, of which the last may have fewer, as those of `torch.chunk`; a last part of
/// one value per channel joins the one before it. Also returns the mean and the unbiased variance
/// of each part, in their order; none for an empty input.
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// A size of 0; parts, or an input, with one value per channel; those of
/// [`batch_norm`](super::batch_norm()).
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64], [3.], [-2.], [0.]], &Device::Cpu)?;
/// let (y, statistics) = candle_norm::ops::ghost_batch_norm(&x, 2, None, None, 1e-9)?;
/// let y = y.flatten_all()?.to_vec1::<f64>()?;
/// assert!(y.iter().zip([-1., 1., -1., 1.]).all(|(y, want)| (y - want).abs() < 1e-8));
/// assert_eq!(statistics[1].mean.to_vec1::<f64>()?, [-1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn ghost_batch_norm(
    x: &Tensor,
    virtual_batch_size: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Vec<BatchStatistics>)> {
    let scaling = Scaling::new(weight, bias);
    let (y, parts) = ghost_batch_norm_with(x, virtual_batch_size, scaling, eps, true)?;
    let acc = composed::accumulator(x.dtype());
    let parts = parts.into_iter().map(|part| part.statistics.to_dtype(acc));
    Ok((y, parts.collect::<Result<_>>()?))
}

/// The samples of all parts but the last, how many such parts there are, and the samples of the
/// last one, if that is another size.
fn parts(samples: usize, virtual_batch_size: usize, space: usize) -> (usize, usize, usize) {
    let count = samples.div_ceil(virtual_batch_size);
    let size = samples.div_ceil(count);
    match (samples / size, samples % size) {
        (equal, rest) if rest * space == 1 => (size, equal - 1, size + rest),
        (equal, rest) => (size, equal, rest),
    }
}

/// [`ghost_batch_norm`], with the options of [`batch_norm_with`].
pub(crate) fn ghost_batch_norm_with(
    x: &Tensor,
    virtual_batch_size: usize,
    scaling: Scaling,
    eps: f64,
    center: bool,
) -> Result<(Tensor, Vec<GhostStatistics>)> {
    check::at_least_one(LAYER, "sample of virtual_batch_size", virtual_batch_size)?;
    check::eps(LAYER, eps)?;
    check::rank_at_least(LAYER, x, 2, "[N, C, ...]")?;
    let c = x.dims()[1];
    let (weight, bias) = (scaling.weight, scaling.bias);
    check::input(LAYER, x, &check::Param::affine(weight, bias, &[c]))?;
    scaling.check(LAYER, x, super::modulation::Features::First)?;
    if x.elem_count() == 0 {
        return Ok((graph::empty(LAYER, x, &scaling.tensors())?, vec![]));
    }
    let (samples, space) = (x.dims()[0], x.elem_count() / x.dims()[0] / c);
    check::more_than_one_value(LAYER, samples * space, x)?;
    let (size, equal, rest) = parts(samples, virtual_batch_size, space);
    if equal > 0 && size * space == 1 {
        bail!(
            "{LAYER}: expected more than 1 value per channel when training, got \
            virtual_batch_size {virtual_batch_size} for input size {:?}, whose parts have 1; use \
            a larger virtual_batch_size",
            x.dims()
        )
    }
    if let Some(modulation) = scaling.modulation {
        // In the accumulator's dtype up to the end, so that the result is rounded once.
        let acc = composed::accumulator(x.dtype());
        let plain = Scaling {
            modulation: None,
            activation: None,
            ..scaling
        };
        let wide = wide_params(x, [weight, bias])?;
        let plain = Scaling {
            weight: wide[0].as_ref(),
            bias: wide[1].as_ref(),
            ..plain
        };
        let x_wide = x.to_dtype(acc)?;
        let (y, parts) = ghost_batch_norm_with(&x_wide, virtual_batch_size, plain, eps, center)?;
        let outside = |t: Option<&Tensor>| t.map(|t| t.to_dtype(acc)).transpose();
        let (scale, shift) = (outside(modulation.scale)?, outside(modulation.shift)?);
        let modulation = super::Modulation {
            scale: scale.as_ref(),
            shift: shift.as_ref(),
            ..modulation
        };
        let y = activated(
            scaling.activation,
            modulate_in(LAYER, &y, &modulation, None)?,
        )?;
        return Ok((y.to_dtype(x.dtype())?.contiguous()?, parts));
    }
    if equal + usize::from(rest > 0) == 1 {
        let (y, statistics) = batch_norm_with(x, scaling, eps, center)?;
        let count = samples * space;
        let statistics = statistics.map(|statistics| GhostStatistics { count, statistics });
        return Ok((y, statistics.into_iter().collect()));
    }
    // The gradients that the parts leave are rounded once.
    let wide = wide_params(x, [weight, bias])?;
    let scaling = Scaling {
        weight: wide[0].as_ref(),
        bias: wide[1].as_ref(),
        ..scaling
    };
    let (mut ys, mut found) = (vec![], vec![]);
    if equal > 0 {
        let head = x.narrow(0, 0, equal * size)?;
        let (y, statistics) = equal_parts(&head, equal, scaling, eps, center)?;
        ys.push(y);
        found.extend(statistics);
    }
    if rest > 0 {
        let tail = x.narrow(0, equal * size, rest)?;
        let (y, statistics) = batch_norm_with(&tail, scaling, eps, center)?;
        ys.push(y);
        let count = rest * space;
        found.extend(statistics.map(|statistics| GhostStatistics { count, statistics }));
    }
    let y = match ys.as_slice() {
        [y] => y.clone(),
        _ => Tensor::cat(&ys, 0)?,
    };
    Ok((y.contiguous()?, found))
}

/// Parts of one size, whose channels are channels of their own.
fn equal_parts(
    x: &Tensor,
    parts: usize,
    scaling: Scaling,
    eps: f64,
    center: bool,
) -> Result<(Tensor, Vec<GhostStatistics>)> {
    let (dims, c) = (x.dims(), x.dims()[1]);
    let (size, space) = (dims[0] / parts, x.elem_count() / dims[0] / c);
    let swapped = |t: &Tensor, a: usize, b: usize| {
        let blocks = t.contiguous()?.reshape((a, b, c, space))?;
        blocks.transpose(0, 1)?.contiguous()
    };
    let side_by_side = swapped(x, parts, size)?.reshape((size, parts * c, space))?;
    let repeated = |p: Option<&Tensor>| -> Result<Option<Tensor>> {
        let Some(p) = p else { return Ok(None) };
        let ones = Tensor::ones((parts, c, 1), p.dtype(), p.device())?;
        let all = composed::scale_shift(&ones, Some(&composed::kept(p)?), None)?;
        Ok(Some(all.flatten_all()?))
    };
    let (weight, bias) = (repeated(scaling.weight)?, repeated(scaling.bias)?);
    let scaling = Scaling {
        weight: weight.as_ref(),
        bias: bias.as_ref(),
        ..scaling
    };
    let (y, statistics) = batch_norm_with(&side_by_side, scaling, eps, center)?;
    let y = swapped(&y, size, parts)?.reshape(dims)?;
    let Some(BatchStatistics { mean, var }) = statistics else {
        return Ok((y, vec![]));
    };
    let each = (0..parts).map(|part| {
        let of = |t: &Tensor| t.narrow(0, part * c, c)?.contiguous();
        Ok(GhostStatistics {
            count: size * space,
            statistics: BatchStatistics {
                mean: of(&mean)?,
                var: of(&var)?,
            },
        })
    });
    Ok((y, each.collect::<Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn parts_are_those_of_torch_chunk_and_none_is_a_single_value() {
        for samples in 1..40 {
            for size in 1..50 {
                for space in [1, 2] {
                    let (of, equal, rest) = parts(samples, size, space);
                    assert_eq!(of * equal + rest, samples);
                    assert!(of <= size && rest <= of + 1);
                    assert!(rest * space != 1 || samples == 1, "{samples} {size}");
                }
            }
        }
        assert_eq!(parts(6, 3, 1), (3, 2, 0));
        assert_eq!(parts(10, 4, 1), (4, 2, 2));
        assert_eq!(parts(5, 2, 1), (2, 1, 3));
        assert_eq!(parts(5, 2, 7), (2, 2, 1));
        assert_eq!(parts(5, 8, 1), (5, 1, 0));
    }
}
