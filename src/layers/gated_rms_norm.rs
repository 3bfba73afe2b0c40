//! Gated root-mean-square normalization.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::params::{Affine, AffineParams};
use crate::ops::{self, GatedRmsNormOptions, check};

const LAYER: &str = "GatedRmsNorm";

/// Gated root-mean-square normalization: each row by its own scale, and times a function of a gate.
///
/// `y = rms(x · act(z)) · w` with [`Gate::Before`](crate::Gate::Before),
/// `y = rms(x) · w · act(z)` with [`Gate::After`](crate::Gate::After)
///
/// Where:
/// - `rms(h) = h / √(mean(h²) + ε)`, the mean square taken over each group of `group_size`
///   neighboring features of a row, or all of them;
/// - `z` is the gate, a second input of the shape of `x`; `act` is `activation`;
/// - `w` is `weight`, one value a feature; ε is `eps`.
///
/// Mamba 2: Dao and Gu, 2024, <https://arxiv.org/abs/2405.21060>; gated DeltaNet: Yang et al.,
/// 2024, <https://arxiv.org/abs/2412.06464>; Kimi Linear: <https://arxiv.org/abs/2510.26692>. The
/// dtype is `f16`, `bf16`, `f32` or `f64`; half precision is computed in `f32` and rounded once, or
/// where `cast` says. It has two inputs, so that it is no `Module`.
#[derive(Debug, Clone)]
pub struct GatedRmsNorm {
    params: AffineParams,
    num_features: usize,
    options: GatedRmsNormOptions,
}

/// A [`GatedRmsNorm`] of the `num_features` features on the last axis, its parameter taken from
/// `vb`.
///
/// Parameter: `weight` (also found as `gamma` or `scale`).
///
/// # Errors
/// Options out of range, a `group_size` that does not divide `num_features`, a parameter of another
/// shape, a checkpoint with a shift.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{Gate, GatedRmsNormOptions, gated_rms_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// // Mamba 2 with 8 groups.
/// let options = GatedRmsNormOptions { gate: Gate::Before, group_size: Some(8), ..1e-5.into() };
/// let norm = gated_rms_norm(64, options, vb)?;
/// let x = Tensor::randn(0f32, 1., (2, 3, 64), &Device::Cpu)?;
/// assert_eq!(norm.forward(&x, Some(&x))?.dims(), [2, 3, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gated_rms_norm(
    num_features: usize,
    options: impl Into<GatedRmsNormOptions>,
    vb: VarBuilder,
) -> Result<GatedRmsNorm> {
    let options = options.into();
    check::countable(LAYER, "a feature axis", &[num_features])?;
    options.checked(num_features)?;
    Ok(GatedRmsNorm {
        params: AffineParams::new(LAYER, &vb, num_features, Affine::Weight, 1.)?,
        num_features,
        options,
    })
}

impl GatedRmsNorm {
    /// A layer of a given weight, of shape `[C]`.
    ///
    /// # Errors
    /// Options out of range, a weight of another rank.
    pub fn new(weight: Tensor, options: impl Into<GatedRmsNormOptions>) -> Result<Self> {
        let options = options.into();
        let num_features = weight.elem_count();
        check::shape(LAYER, "weight", &weight, &[num_features])?;
        options.checked(num_features)?;
        Ok(Self {
            params: AffineParams {
                weight: Some(weight),
                bias: None,
            },
            num_features,
            options,
        })
    }

    /// The scale of each feature.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// ε, added to the mean square.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &GatedRmsNormOptions {
        &self.options
    }

    /// The number of features on the last axis.
    pub fn num_features(&self) -> usize {
        self.num_features
    }

    /// The parameters that training changes, by the names that a checkpoint holds them under.
    pub fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params.named()
    }

    /// Parameters that are variables back to what they start from.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn reset(&self) -> Result<()> {
        self.params.reset(1.)
    }

    /// Normalizes each row of `xs` with a gate; without, it is a grouped RMS norm.
    ///
    /// # Shapes
    /// `xs`, `gate`: `[*, num_features]`, the same; the output is contiguous, of the shape and
    /// dtype of `xs`. A gate of half-precision `xs` may be `f32`.
    ///
    /// # Errors
    /// An input of another number of features, dtype or device; a gate of another shape.
    pub fn forward(&self, xs: &Tensor, gate: Option<&Tensor>) -> Result<Tensor> {
        check::rank_at_least(LAYER, xs, 1, "[*, C]")?;
        check::features(LAYER, xs, self.num_features)?;
        ops::gated_rms_norm(xs, gate, self.weight(), self.options)
    }
}
