//! Normalization of each group of channels of a sample by its own statistics.

use candle_core::{Result, Tensor};

use super::check;
use crate::computations::Groups;
use crate::graph;

/// Group normalization of `x` over `num_groups` groups of channels on axis 1.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken for each sample over the
/// `C / num_groups` channels of a group and all of space, the variance biased; `weight` and `bias`
/// are per channel (Wu and He, 2018, <https://arxiv.org/abs/1803.08494>).
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// An input of rank below 2, `num_groups` that does not divide `C`, parameters that do not fit,
/// `eps` that is not positive and finite.
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
    let c = x.dims()[1];
    check::groups(layer, num_groups, c)?;
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &[weight, bias]);
    }
    graph::apply(Groups::of(layer, x, num_groups, eps), x, weight, bias)
}
