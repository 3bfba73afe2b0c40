//! Normalization of each group of channels of a sample by its own statistics.

use candle_core::{Result, Tensor};
use candle_nn::Activation;

use super::check;
use super::modulation::{Features, Modulation, Scaling};
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
    group_norm_by(x, num_groups, Scaling::new(weight, bias), eps)
}

/// [`group_norm`] with scale and shift from outside: `y = group_norm(x) · (offset + scale) +
/// shift`, in one pass (AdaGN: Dhariwal and Nichol, 2021, <https://arxiv.org/abs/2105.05233>).
///
/// # Shapes
/// As [`group_norm`]; scale and shift as [`Modulation`] says.
///
/// # Errors
/// Those of [`group_norm`]; a scale or shift of another shape, dtype or device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[[1f64, 3.], [10., 30.]]], &Device::Cpu)?;
/// let scale = Tensor::new(&[[0f64, 2.]], &Device::Cpu)?;
/// let modulation = Modulation::new(Some(&scale), None);
/// let y = ops::modulated_group_norm(&x, 2, [None, None], 1e-9, &modulation)?;
/// assert!((y.to_vec3::<f64>()?[0][1][1] - 3.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulated_group_norm(
    x: &Tensor,
    num_groups: usize,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
    modulation: &Modulation,
) -> Result<Tensor> {
    let scaling = Scaling::new(weight, bias).modulated(modulation);
    group_norm_by(x, num_groups, scaling, eps)
}

/// [`group_norm`] with all that may follow the normalized values.
pub(crate) fn group_norm_by(
    x: &Tensor,
    num_groups: usize,
    scaling: Scaling,
    eps: f64,
) -> Result<Tensor> {
    let layer = "GroupNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    let c = x.dims()[1];
    check::groups(layer, num_groups, c)?;
    let (weight, bias) = (scaling.weight, scaling.bias);
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    scaling.check(layer, x, Features::First)?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &scaling.tensors());
    }
    let merged = scaling.merged(layer, x, Features::First, 0.)?;
    let groups = Groups {
        spread: merged.spread(),
        activation: scaling.activation,
        ..Groups::of(layer, x, num_groups, eps)
    };
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    graph::apply(groups, x, weight, bias)
}

/// [`group_norm`] with an activation after it, fused forward and backward:
/// `y = act(group_norm(x))`.
///
/// The pre-activation is not kept, half precision is rounded once, and the slopes are those of
/// PyTorch: 0 for relu at 0. Diffusion U-Nets have SiLU there.
///
/// # Shapes
/// As [`group_norm`].
///
/// # Errors
/// Those of [`group_norm`]; an activation other than `Relu`, `Relu6`, `LeakyRelu`, `Silu`, `Swish`,
/// `Gelu`, `NewGelu`, `GeluPytorchTanh`, `HardSwish`, `Sigmoid` and `Mish`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let y = candle_norm::ops::group_norm_act(&x, 1, [None, None], 1e-5, Activation::Relu)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[0], 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn group_norm_act(
    x: &Tensor,
    num_groups: usize,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let scaling = Scaling::new(weight, bias).activated("GroupNorm", Some(activation))?;
    group_norm_by(x, num_groups, scaling, eps)
}
