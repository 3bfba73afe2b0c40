//! RMS norm with a gate.

use candle_core::{Result, Tensor, bail};
use candle_nn::Activation;

use super::activation::fused;
use super::check;
pub use crate::computations::Gate;
use crate::computations::{Cast, GatedRows, composed};
use crate::graph;

const LAYER: &str = "GatedRmsNorm";

/// Configuration of [`gated_rms_norm`] and of [`GatedRmsNorm`](crate::GatedRmsNorm). A number is
/// taken as `eps`.
///
/// | model | gate | activation | group size |
/// | --- | --- | --- | --- |
/// | Mamba 2, Bamba, Zamba 2, Nemotron-H | `Before` | `Silu` | features / groups |
/// | Qwen 3 Next, Qwen 3.5, OLMo hybrid | `After` | `Silu` | a head |
/// | Kimi Linear, Bailing hybrid | `After` | `Sigmoid` | a head |
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct GatedRmsNormOptions {
    /// Added to the mean square, inside the root. Default: 1e-6.
    pub eps: f64,
    /// Place of the gate. Default: [`Gate::After`].
    pub gate: Gate,
    /// Function of the gate: one of those that follow a norm. Default: `Silu`.
    pub activation: Activation,
    /// The number of neighboring features that have a mean square in common, which divides that of
    /// all; `None` is all of them. Default: `None`.
    pub group_size: Option<usize>,
    /// Place where half precision is rounded. Default: [`Cast::AfterWeight`], once, as the kernels
    /// of GPUs do; models of transformers that run without these round before the weight too.
    pub cast: Cast,
}

impl Default for GatedRmsNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            gate: Gate::After,
            activation: Activation::Silu,
            group_size: None,
            cast: Cast::AfterWeight,
        }
    }
}

impl From<f64> for GatedRmsNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl GatedRmsNormOptions {
    /// Checks the options for rows of `features` elements, and returns the length of a group.
    pub(crate) fn checked(&self, features: usize) -> Result<usize> {
        check::eps(LAYER, self.eps)?;
        fused(LAYER, Some(self.activation))?;
        let size = self.group_size.unwrap_or(features);
        if self.group_size.is_some() && (size == 0 || !features.is_multiple_of(size)) {
            let layer = LAYER;
            bail!(
                "{layer}: expected a group_size that divides the number of features {features}, \
                got {size}"
            )
        }
        Ok(size)
    }
}

/// Root-mean-square normalization over the last axis with a gate, in one pass.
///
/// `y = rms(x · act(gate)) · weight` with [`Gate::Before`], `y = rms(x) · weight · act(gate)` with
/// [`Gate::After`], and `rms(h) = h / √(mean(h²) + eps)`, the mean taken over each group of
/// `group_size` neighboring features (Mamba 2: Dao and Gu, 2024,
/// <https://arxiv.org/abs/2405.21060>; gated DeltaNet: Yang et al., 2024,
/// <https://arxiv.org/abs/2412.06464>). Without a gate it is a grouped RMS norm.
///
/// # Shapes
/// `x`, `gate`: `[*, C]`, the same; `weight`: `[C]`; the result has the shape and dtype of `x` and
/// is contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take an `f32` gate and
/// weight. A row that the gate closes gives zeros.
///
/// # Errors
/// A gate of another shape, a weight that does not fit, a `group_size` that does not divide `C`,
/// `eps` that is not positive and finite, an activation that is not fused with a norm.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Gate, GatedRmsNormOptions};
///
/// let x = Tensor::new(&[[1f64, -2., 3., 0.5]], &Device::Cpu)?;
/// let gate = Tensor::new(&[[2f64, -1., 0., 1.]], &Device::Cpu)?;
/// let options = GatedRmsNormOptions { gate: Gate::Before, group_size: Some(2), ..1e-5.into() };
/// let y = ops::gated_rms_norm(&x, Some(&gate), None, options)?.to_vec2::<f64>()?;
/// assert!((y[0][0] - 1.352563324).abs() < 1e-9 && y[0][2] == 0.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gated_rms_norm(
    x: &Tensor,
    gate: Option<&Tensor>,
    weight: Option<&Tensor>,
    options: impl Into<GatedRmsNormOptions>,
) -> Result<Tensor> {
    let options = options.into();
    check::rank_at_least(LAYER, x, 1, "[*, C]")?;
    let len = x.dims()[x.rank() - 1];
    let group = options.checked(len)?;
    let (dims, features) = (x.dims(), [len]);
    let named = [("gate", gate, dims), ("weight", weight, &features[..])];
    let params = named.into_iter().filter_map(|(name, value, shape)| {
        let value = value?;
        Some(check::Param { name, value, shape })
    });
    check::input(LAYER, x, &params.collect::<Vec<_>>())?;
    if x.elem_count() == 0 {
        return graph::empty(LAYER, x, &[gate, weight]);
    }
    let Some(activation) = fused(LAYER, Some(options.activation))? else {
        return candle_norm_support::messages::internal(LAYER, "an activation");
    };
    let computation = GatedRows {
        layer: LAYER,
        len,
        group,
        eps: composed::eps_in(composed::accumulator(x.dtype()), options.eps),
        gate: options.gate,
        activation,
        cast: options.cast,
    };
    graph::apply(computation, &x.contiguous()?, gate, weight)
}
