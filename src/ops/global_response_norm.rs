//! Channels that compete by their lengths.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::{ChannelAxes, Lengths, ScaleShift, composed};
use crate::graph::{self, Route};

const LAYER: &str = "GlobalResponseNorm";

/// Global response normalization of `[N, *, C]`, or of `[N, C, *]` with `channels_first`.
///
/// `y = x + weight · x · n + bias` with `n = g / (mean(g) + eps)`, where `g` is the length `‖x‖` of
/// each channel of a sample over space, and the mean is that of all channels of the sample (Woo et
/// al., 2023, <https://arxiv.org/abs/2301.00808>). A channel of zeros has `g = 0`, and the gradient
/// of `y` as its own.
///
/// # Shapes
/// `x`: of rank 2 or more, without space in rank 2: `g` is then `|x|`. `weight`, `bias`: `[C]`. The
/// result has the shape and dtype of `x` and is contiguous. `f16`, `bf16`, `f32`, `f64`;
/// half-precision inputs also take `f32` parameters, and are computed in `f32`.
///
/// # Errors
/// An input of lower rank, parameters that do not fit it, `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[[3f64, 4.], [1., 0.]]], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f64, -1.], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f64, 0.5], &Device::Cpu)?;
/// let y = candle_norm::ops::global_response_norm(&x, &weight, &bias, 1e-6, true)?;
/// assert!((y.get(0)?.to_vec2::<f64>()?[0][1] - 10.66666444).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn global_response_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    channels_first: bool,
) -> Result<Tensor> {
    check::eps(LAYER, eps)?;
    let form = if channels_first {
        "[N, C, ...]"
    } else {
        "[N, ..., C]"
    };
    check::rank_at_least(LAYER, x, 2, form)?;
    let axis = if channels_first { 1 } else { x.rank() - 1 };
    let c = x.dims()[axis];
    check::input(
        LAYER,
        x,
        &check::Param::affine(Some(weight), Some(bias), &[c]),
    )?;
    if x.elem_count() == 0 {
        return graph::empty(LAYER, x, &[Some(weight), Some(bias)]);
    }
    let (dims, n) = (x.dims(), x.dims()[0]);
    let space = x.elem_count() / (n * c);
    let planes = match graph::route(LAYER, x)? {
        Route::Fused(_) => x.contiguous()?,
        Route::Composed => composed::unshared(x)?,
    };
    let planes = match channels_first || space == 1 {
        true => planes.reshape((n, c, space))?,
        false => graph::transposed(&planes.reshape((n, space, c))?)?,
    };
    // Two gradients meet here, in the accumulator's dtype, so that their sum is rounded once.
    let acc = composed::accumulator(x.dtype());
    let planes = match x.track_op() {
        true => planes.to_dtype(acc)?,
        false => planes,
    };
    let y = graph::apply(
        ScaleShift {
            layer: LAYER,
            axes: ChannelAxes::of(&planes),
        },
        &planes,
        Some(&coefficients(&planes, weight, eps)?),
        Some(bias),
    )?;
    let y = match channels_first || space == 1 {
        true => y,
        false => graph::transposed(&y)?,
    };
    y.reshape(dims)?.to_dtype(x.dtype())
}

/// `1 + weight · n` for each channel of each sample of `planes` `[N, C, space]`, as the factor of
/// [`ScaleShift`].
fn coefficients(planes: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (n, c, space) = planes.dims3()?;
    let lengths = Lengths {
        layer: LAYER,
        len: space,
    };
    let g = graph::apply(lengths, planes, None, None)?.reshape((n, c))?;
    let rows = composed::Rows::new(&g)?;
    let mean = (rows.mean()? + composed::eps_in(g.dtype(), eps))?;
    let shares = rows.times(&mean.recip()?)?.join()?.reshape((n, c, 1))?;
    let weight = composed::kept(weight)?.to_dtype(g.dtype())?;
    let scale = (composed::scale_shift(&shares, Some(&weight), None)? + 1.)?;
    let scale = scale.reshape((1, n * c))?;
    let none = Tensor::zeros((2, n * c), g.dtype(), g.device())?;
    Tensor::cat(&[&scale, &none], 0)
}
