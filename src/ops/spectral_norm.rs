//! Weights over their largest singular value.

use candle_core::{DType, Result, Tensor, Var};

use super::check;
use crate::computations::composed;
use crate::graph;

const LAYER: &str = "SpectralNorm";

/// A weight over its spectral norm, by the singular vectors `u` and `v`.
///
/// `w̄ = w / σ` with `σ = uᵀ · W · v`, where `W` is the weight as a matrix: axis `dim` first, the
/// others flattened in order (Miyato et al., 2018, <https://arxiv.org/abs/1802.05957>). The vectors
/// are constants: `dw = (dw̄ − Σ(dw̄ · w̄) · u vᵀ) / σ`. A weight with `σ = 0`, such as zeros,
/// gives zeros, and gradients of zero. [`power_iteration`] finds the vectors.
///
/// # Shapes
/// `weight`: any of rank 2 or more, with `O` elements on axis `dim`; `u`: `[O]`; `v`: the number of
/// all others. The result has the shape and dtype of `weight` and is contiguous.
///
/// # Errors
/// A `dim` that the weight does not have, vectors that do not fit it.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let w = Tensor::new(&[[1f64, 2., 0.], [0., 1., -1.]], &Device::Cpu)?;
/// let u = Tensor::new(&[0.6f64, 0.8], &Device::Cpu)?;
/// let v = Tensor::new(&[0f64, 1., 0.], &Device::Cpu)?;
/// let y = candle_norm::ops::spectral_norm(&w, &u, &v, 0)?;
/// assert!((y.to_vec2::<f64>()?[0][1] - 1.).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn spectral_norm(weight: &Tensor, u: &Tensor, v: &Tensor, dim: usize) -> Result<Tensor> {
    let weight = &composed::kept(weight)?;
    let matrix = checked(weight, u, v, dim)?;
    let (acc, dims) = (composed::accumulator(weight.dtype()), weight.dims());
    if weight.elem_count() == 0 {
        return graph::empty(LAYER, weight, &[]);
    }
    let wide = matrix.to_dtype(acc)?;
    let (outputs, rest) = wide.dims2()?;
    let outer = outer(u, v, acc)?;
    let products = (&wide * outer)?.reshape((1, outputs * rest))?;
    let sigma = composed::Rows::new(&products)?.sum()?;
    // Zero has no inverse: it divides by one, and is cut off from weight and gradient.
    let zero = sigma.detach().eq(0.)?.to_dtype(acc)?;
    let inverse = ((sigma + &zero)?.recip()? * (1. - zero)?)?;
    let line = composed::Rows::new(&wide.reshape((1, outputs * rest))?)?;
    let y = line.times(&inverse)?.join()?;
    restored(&y, dims, dim)?.to_dtype(weight.dtype())
}

/// `count` steps of the power iteration of [`spectral_norm`]: `u ← W v / ‖W v‖`, then
/// `v ← Wᵀ u / ‖Wᵀ u‖`, outside of the graph.
///
/// The order is that of `torch.nn.utils.parametrizations.spectral_norm`. Lengths below `eps`, 1e-12
/// there, count as `eps`. The vectors keep their dtype.
///
/// # Errors
/// Those of [`spectral_norm`].
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let w = Tensor::new(&[[1f64, 2., 0.], [0., 1., -1.]], &Device::Cpu)?;
/// let u = Tensor::new(&[0.6f64, 0.8], &Device::Cpu)?;
/// let v = Tensor::new(&[0f64, 1., 0.], &Device::Cpu)?;
/// let [u, _] = candle_norm::ops::power_iteration(&w, [&u, &v], 0, 1, 1e-12)?;
/// assert!((u.to_vec1::<f64>()?[0] - 0.894427191).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn power_iteration(
    weight: &Tensor,
    [u, v]: [&Tensor; 2],
    dim: usize,
    count: usize,
    eps: f64,
) -> Result<[Tensor; 2]> {
    check::eps(LAYER, eps)?;
    let matrix = checked(weight, u, v, dim)?.detach();
    let (mut u, mut v) = (u.detach(), v.detach());
    if weight.elem_count() == 0 {
        return Ok([u, v]);
    }
    let acc = composed::accumulator(u.dtype());
    let rows = matrix.to_dtype(acc)?;
    let columns = rows.t()?.contiguous()?;
    for _ in 0..count {
        u = image(&rows, &v, acc, eps)?.to_dtype(u.dtype())?;
        v = image(&columns, &u, acc, eps)?.to_dtype(v.dtype())?;
    }
    Ok([u, v])
}

/// `v ← Wᵀ u / ‖Wᵀ u‖`, then `u ← W v / ‖W v‖`, from `u` alone, as BigGAN keeps it.
pub(crate) fn vectors_of_u(
    weight: &Tensor,
    u: &Tensor,
    dim: usize,
    eps: f64,
) -> Result<[Tensor; 2]> {
    let matrix = matrix(&weight.detach(), dim)?;
    let acc = composed::accumulator(u.dtype());
    let rows = matrix.to_dtype(acc)?;
    let v = image(&rows.t()?.contiguous()?, &u.detach(), acc, eps)?;
    let u = image(&rows, &v, acc, eps)?;
    Ok([u, v])
}

/// Vectors for a weight: drawn at random, and 15 steps of the iteration.
pub(crate) fn fresh_vectors(
    weight: &Tensor,
    dim: usize,
    dtype: DType,
    eps: f64,
) -> Result<[Tensor; 2]> {
    let (outputs, rest) = sizes(weight.dims(), dim);
    let draw = |count: usize| -> Result<Tensor> {
        let drawn = Var::randn(0f32, 1., count, weight.device())?;
        drawn.as_detached_tensor().to_dtype(dtype)
    };
    if outputs * rest == 0 {
        return Ok([draw(outputs)?, draw(rest)?]);
    }
    let (u, v) = (unit(&draw(outputs)?, eps)?, unit(&draw(rest)?, eps)?);
    power_iteration(weight, [&u, &v], dim, 15, eps)
}

/// The number of outputs, and of what each has.
pub(crate) fn sizes(dims: &[usize], dim: usize) -> (usize, usize) {
    let rest = dims.iter().enumerate().filter(|(axis, _)| *axis != dim);
    (dims[dim], rest.map(|(_, size)| size).product())
}

fn checked(weight: &Tensor, u: &Tensor, v: &Tensor, dim: usize) -> Result<Tensor> {
    check::rank_at_least(LAYER, weight, 2, "[O, ...]")?;
    check::dim(LAYER, Some(dim), weight.dims())?;
    check::input(LAYER, weight, &[])?;
    let (outputs, rest) = sizes(weight.dims(), dim);
    for (name, value, size) in [("u", u, outputs), ("v", v, rest)] {
        check::float(LAYER, name, value)?;
        check::shape(LAYER, name, value, &[size])?;
        check::same_device(LAYER, name, value, weight.device())?;
    }
    matrix(weight, dim)
}

/// Axis `dim` first, the others flattened in their order.
fn matrix(weight: &Tensor, dim: usize) -> Result<Tensor> {
    let (outputs, rest) = sizes(weight.dims(), dim);
    let mut axes: Vec<usize> = (0..weight.rank()).filter(|axis| *axis != dim).collect();
    axes.insert(0, dim);
    weight.permute(axes)?.contiguous()?.reshape((outputs, rest))
}

/// The elements of a [`matrix`] as a weight of shape `dims`.
fn restored(matrix: &Tensor, dims: &[usize], dim: usize) -> Result<Tensor> {
    let mut permuted = dims.to_vec();
    let outputs = permuted.remove(dim);
    permuted.insert(0, outputs);
    let mut axes: Vec<usize> = (1..dims.len()).collect();
    axes.insert(dim, 0);
    matrix.reshape(permuted)?.permute(axes)?.contiguous()
}

/// `u vᵀ`, outside of the graph.
fn outer(u: &Tensor, v: &Tensor, dtype: DType) -> Result<Tensor> {
    let wide = |t: &Tensor| t.detach().contiguous()?.to_dtype(dtype);
    wide(u)?
        .unsqueeze(1)?
        .broadcast_mul(&wide(v)?.unsqueeze(0)?)
}

/// `rows · v` at length one.
fn image(rows: &Tensor, v: &Tensor, dtype: DType, eps: f64) -> Result<Tensor> {
    let products = rows.broadcast_mul(&v.to_dtype(dtype)?.unsqueeze(0)?)?;
    unit(&composed::Rows::new(&products)?.sum()?, eps)
}

fn unit(v: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = composed::Rows::new(&v.unsqueeze(0)?)?
        .sqr()?
        .sum()?
        .sqrt()?;
    v.broadcast_div(&norm.maximum(eps)?)
}
