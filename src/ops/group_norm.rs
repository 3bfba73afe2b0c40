//! Normalization of each group of channels of a sample by its own statistics.

use candle_core::{Result, Tensor};

use super::{check, composed, route};

/// Group normalization of `x` over `num_groups` groups of channels on axis 1.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken for each sample over the `C / num_groups`
/// channels of a group and all of space, the variance biased; `weight` and `bias` are per channel (Wu and He,
/// 2018, <https://arxiv.org/abs/1803.08494>).
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 2, `num_groups` that does not divide `C`, parameters that do not fit, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3., 10., 30.]], &Device::Cpu)?;
/// let y = candle_norm::ops::group_norm(&x, 2, None, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[0][3] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn group_norm(
    x: &Tensor,
    num_groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let layer = "GroupNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::groups(layer, num_groups, c)?;
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    let _route = route(layer, x)?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[weight, bias]);
    }
    let acc = composed::accumulator(x.dtype());
    let groups = x
        .contiguous()?
        .to_dtype(acc)?
        .reshape((n * num_groups, ()))?;
    let y = composed::standardize(&groups, true, eps)?.y;
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    composed::scale_shift(&y.reshape((n, c, ()))?, weight.as_ref(), bias.as_ref())?
        .to_dtype(x.dtype())?
        .reshape(x.shape())
}
