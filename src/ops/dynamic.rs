//! Functions in place of a normalization: dynamic tanh, and dynamic erf.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::{ChannelAxes, Dynamic, Squash, composed};
use crate::graph;

/// Dynamic tanh: a bounded function of each element, in place of a normalization.
///
/// `y = weight · tanh(alpha · x) + bias` (Zhu et al., 2025, <https://arxiv.org/abs/2503.10622>). No
/// element depends on another, and nothing on the mode.
///
/// # Shapes
/// `x`: `[*, C]`, or `[N, C, *]` with `channels_first`; `alpha`: `[1]`; `weight`, `bias`: `[C]`;
/// the result has the shape and dtype of `x` and is contiguous. `f16`, `bf16`, `f32`, `f64`;
/// half-precision inputs also take `f32` parameters, and are computed in `f32`. The gradient of
/// `alpha` is a sum over all elements, in a fixed order.
///
/// # Errors
/// An input of lower rank, parameters that do not fit it.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[-2f64, 0., 0.5]], &Device::Cpu)?;
/// let alpha = Tensor::new(&[0.5f64], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f64, 2., -1.], &Device::Cpu)?;
/// let y = candle_norm::ops::dyt(&x, &alpha, Some(&weight), None, false)?;
/// assert!((y.to_vec2::<f64>()?[0][0] + 1f64.tanh()).abs() < 1e-15);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn dyt(
    x: &Tensor,
    alpha: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    channels_first: bool,
) -> Result<Tensor> {
    let params = [Some(alpha), None, weight, bias];
    dynamic("DyT", Squash::Tanh, x, params, channels_first)
}

/// Dynamic erf: `y = weight · erf(alpha · x + shift) + bias`, with the error function in place of
/// [`dyt`]'s hyperbolic tangent.
///
/// # Shapes
/// `shift`: `[1]`, zero if there is none; else those of [`dyt`].
///
/// # Errors
/// Those of [`dyt`].
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[-2f64, 0., 0.5]], &Device::Cpu)?;
/// let [alpha, shift] = [0.5f64, 0.1].map(|v| Tensor::new(&[v], &Device::Cpu).unwrap());
/// let y = candle_norm::ops::derf(&x, &alpha, Some(&shift), None, None, false)?;
/// assert!((y.to_vec2::<f64>()?[0][0] + 0.7969082124).abs() < 1e-10);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn derf(
    x: &Tensor,
    alpha: &Tensor,
    shift: Option<&Tensor>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    channels_first: bool,
) -> Result<Tensor> {
    let params = [Some(alpha), shift, weight, bias];
    dynamic("DyT", Squash::Erf, x, params, channels_first)
}

/// Both, with the parameters alpha, shift, weight and bias.
fn dynamic(
    layer: &'static str,
    squash: Squash,
    x: &Tensor,
    params: [Option<&Tensor>; 4],
    channels_first: bool,
) -> Result<Tensor> {
    let (least, form) = match channels_first {
        true => (2, "[N, C, ...]"),
        false => (1, "[..., C]"),
    };
    check::rank_at_least(layer, x, least, form)?;
    let dims = x.dims();
    let c = dims[if channels_first { 1 } else { dims.len() - 1 }];
    let [one, channels] = [[1], [c]];
    let shapes = [&one, &one, &channels, &channels];
    let names = ["alpha", "s", "weight", "bias"];
    let named = names.into_iter().zip(params).zip(shapes);
    let named = named.filter_map(|((name, value), shape)| {
        value.map(|value| check::Param { name, value, shape })
    });
    check::input(layer, x, &named.collect::<Vec<_>>())?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &params);
    }
    let acc = composed::accumulator(x.dtype());
    // What is not there is a constant.
    let defaults = [(1, 0.), (1, 0.), (c, 1.), (c, 0.)];
    let line = params.into_iter().zip(defaults);
    let line = line.map(|(param, (count, default))| match param {
        Some(param) => param.flatten_all()?.to_dtype(acc),
        None => Tensor::full(default, count, x.device())?.to_dtype(acc),
    });
    let line = Tensor::cat(&line.collect::<Result<Vec<_>>>()?, 0)?;
    let axes = match channels_first {
        true => ChannelAxes::of(x),
        false => ChannelAxes {
            outer: x.elem_count() / c,
            channels: 1,
            inner: c,
        },
    };
    let computation = Dynamic {
        layer,
        axes,
        channels_first,
        squash,
    };
    graph::apply(computation, x, Some(&line), None)
}
