//! Weights whose rows have mean 0 and variance 1.

use candle_core::{Result, Tensor, bail};

use super::check;
use super::modulation::Scaling;
use super::row_norm::{RowNorm, row_norm};
use crate::computations::{ChannelAxes, Places, ScaleAdd, Third, composed};
use crate::graph;

const LAYER: &str = "WeightStandardization";

/// A weight with the part of each output at mean 0 and variance 1, or at a learned length.
///
/// `ŵ = (w − mean) / √(var + eps) · s` over all of each index of axis 0, the variance biased (Qiao
/// et al., 2019, <https://arxiv.org/abs/1903.10520>). Without `gain`, s is 1; with `(gain, γ)` it
/// is `gain · γ / √fan_in`, as in networks without norms (Brock et al., 2021,
/// <https://arxiv.org/abs/2101.08692>). A constant part gives zeros.
///
/// # Shapes
/// `weight`: `[O, *]`; the gain: `O` elements on axis 0, all other axes of size 1. The result has
/// the shape and dtype of `weight` and is contiguous.
///
/// # Errors
/// A weight of one element for each output, a gain that does not fit, an `eps` that is not positive
/// and finite, a γ that is not finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let w = Tensor::new(&[[1f64, 2., 3., 6.], [2., 2., 2., 2.]], &Device::Cpu)?;
/// let y = candle_norm::ops::weight_standardization(&w, None, 1e-6)?;
/// assert!((y.to_vec2::<f64>()?[0][3] - 1.603567222).abs() < 1e-9);
/// assert_eq!(y.to_vec2::<f64>()?[1], [0.; 4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn weight_standardization(
    weight: &Tensor,
    gain: Option<(&Tensor, f64)>,
    eps: f64,
) -> Result<Tensor> {
    check::eps(LAYER, eps)?;
    check::rank_at_least(LAYER, weight, 2, "[O, ...]")?;
    let (dims, outputs) = (weight.dims(), weight.dims()[0]);
    let shape = super::magnitude_shape(dims, Some(0));
    let named = gain.map(|(value, _)| check::Param {
        name: "gain",
        value,
        shape: &shape,
    });
    check::input(LAYER, weight, named.as_slice())?;
    if let Some((_, gamma)) = gain {
        check::finite(LAYER, "gamma", gamma)?;
    }
    if weight.elem_count() == 0 {
        return graph::empty(LAYER, weight, &[gain.map(|(gain, _)| gain)]);
    }
    let len = weight.elem_count() / outputs;
    check_standardized(dims)?;
    let norm = RowNorm {
        layer: LAYER,
        ..RowNorm::layer_norm(eps)
    };
    let rows = weight.contiguous()?.reshape((outputs, len))?;
    let Some((gain, gamma)) = gain else {
        return row_norm(&rows, &[len], Scaling::default(), &norm)?.reshape(dims);
    };
    // Two steps, rounded once.
    let acc = composed::accumulator(weight.dtype());
    let standard = row_norm(&rows.to_dtype(acc)?, &[len], Scaling::default(), &norm)?;
    let gain = composed::kept(gain)?.to_dtype(acc)?.flatten_all()?;
    let scale = (gain * (gamma / (len as f64).sqrt()))?;
    let computation = ScaleAdd {
        layer: LAYER,
        axes: ChannelAxes {
            outer: 1,
            channels: outputs,
            inner: len,
        },
        places: Places::Channel,
        third: Third::Shift,
    };
    let y = graph::apply(computation, &standard, Some(&scale), None)?;
    y.to_dtype(weight.dtype())?.reshape(dims)
}

/// Checks that each output of a weight has more than one element.
pub(crate) fn check_standardized(weight: &[usize]) -> Result<()> {
    let layer = LAYER;
    if weight[1..].iter().product::<usize>() == 1 {
        bail!(
            "{layer}: expected more than 1 element of the weight for each output, got weight shape \
            {weight:?}; a convolution of one input at one position has nothing to standardize"
        )
    }
    Ok(())
}
