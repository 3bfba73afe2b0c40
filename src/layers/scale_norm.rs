//! Scale normalization.

use candle_core::{Result, Shape, Tensor};
use candle_nn::{Module, VarBuilder};

use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{self, AffineParams, WEIGHT};
use crate::ops::{Modulation, check, modulate_in, scale_norm_by};

const LAYER: &str = "ScaleNorm";

/// Configuration of [`ScaleNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ScaleNormOptions {
    /// Least length that a row is divided by. Default: 1e-5.
    pub eps: f64,
    /// Normalize axis 1 of `[N, C, *]` maps at each position. Default: false.
    pub channels_first: bool,
}

impl Default for ScaleNormOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            channels_first: false,
        }
    }
}

impl From<f64> for ScaleNormOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl NormOptions for ScaleNormOptions {
    const NAMES: Names = Names::new(&["scale"], &[], false);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        false
    }

    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: true,
            ..*self
        };
        Ok(Box::new(scale_norm(num_channels, options, vb)?))
    }

    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        let options = Self {
            channels_first: false,
            ..*self
        };
        Ok(Box::new(scale_norm(num_features, options, vb)?))
    }
}

/// Scale normalization: every row at one learned length.
///
/// `y = w · x / max(‖x‖, ε)`
///
/// Where:
/// - `‖x‖` is the root of the sum of squares over the trailing `normalized_shape`, for each row by
///   itself;
/// - `w` is `weight`, one number, of shape `[1]`; it starts from `√d` for rows of `d` elements;
/// - ε is `eps`: a shorter row is divided by ε instead of its length.
///
/// Nguyen and Salazar, 2019, <https://arxiv.org/abs/1910.05895>. At its start it is an
/// [`RmsNorm`](crate::RmsNorm) without parameters, but for ε. Training and inference are the same,
/// so the layer is a [`Module`]. The dtype is `f16`, `bf16`, `f32` or `f64`; half precision is
/// computed in `f32`.
///
/// A row of zeros gives zeros, and its gradient is finite: `w / ε` times that of the output.
#[derive(Debug, Clone)]
pub struct ScaleNorm {
    weight: Tensor,
    options: ScaleNormOptions,
    normalized_shape: Shape,
}

/// A [`ScaleNorm`] over the trailing `normalized_shape`, its parameter taken from `vb`.
///
/// Parameter: `weight` (also found as `gamma` or `scale`), of shape `[1]`, or without axes in a
/// file, as the authors' code saves it. Other code divides by `‖x‖ / √d` and calls its number `g`:
/// multiply that by `√d`.
///
/// # Errors
/// Options out of range, a parameter of another shape; a checkpoint with a shift.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::scale_norm(4, 1e-5, vb)?;
/// assert_eq!(norm.weight().to_vec1::<f32>()?, [2.]);
/// let y = norm.forward(&Tensor::new(&[[0f32, 0., 3., 4.]], &Device::Cpu)?)?;
/// assert!((y.get(0)?.get(3)?.to_scalar::<f32>()? - 1.6).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn scale_norm(
    normalized_shape: impl Into<Shape>,
    options: impl Into<ScaleNormOptions>,
    vb: VarBuilder,
) -> Result<ScaleNorm> {
    let (shape, options) = (normalized_shape.into(), options.into());
    check::eps(LAYER, options.eps)?;
    check::normalized_shape(LAYER, shape.dims())?;
    check::countable(LAYER, "a normalized_shape", shape.dims())?;
    if options.channels_first {
        check::one_axis(LAYER, shape.dims())?;
    }
    let initial = initial_weight(&shape);
    let weight = match number_of_a_file(&vb) {
        Some(number) => number,
        None => params::get(&vb, 1, WEIGHT, initial)?,
    };
    Ok(ScaleNorm {
        weight,
        options,
        normalized_shape: shape,
    })
}

/// The length that makes the mean square of each row 1.
fn initial_weight(normalized_shape: &Shape) -> f64 {
    (normalized_shape.elem_count() as f64).sqrt()
}

/// The weight, where a file has it as a number without axes.
fn number_of_a_file(vb: &VarBuilder) -> Option<Tensor> {
    let stored = vb.get_unchecked(params::name_in(vb, WEIGHT)).ok()?;
    match stored.rank() {
        0 => stored.reshape(1).ok(),
        _ => None,
    }
}

impl ScaleNorm {
    /// A layer of a given weight, of shape `[1]`, over the trailing `normalized_shape`.
    pub fn new(normalized_shape: impl Into<Shape>, weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            options: eps.into(),
            normalized_shape: normalized_shape.into(),
        }
    }

    /// The length of the rows, of shape `[1]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// ε, the least length that a row is divided by.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The configuration.
    pub fn options(&self) -> &ScaleNormOptions {
        &self.options
    }

    /// The trailing shape that the length is taken over.
    pub fn normalized_shape(&self) -> &[usize] {
        self.normalized_shape.dims()
    }

    /// The norm with scale and shift from outside: `y = norm(x) · (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `xs` as in `forward`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward`; a scale or shift of another shape, dtype or device.
    pub fn forward_modulated(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.forward_modulated_by(xs, &Modulation::new(scale, shift))
    }

    /// [`forward_modulated`](Self::forward_modulated) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated`](Self::forward_modulated).
    pub fn forward_modulated_by(&self, xs: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        let y = self.forward(xs)?;
        let shape = self.normalized_shape.dims();
        let trailing = (!self.options.channels_first).then_some(shape);
        modulate_in(LAYER, &y, modulation, trailing)
    }

    fn params(&self) -> AffineParams {
        AffineParams {
            weight: Some(self.weight.clone()),
            bias: None,
        }
    }
}

impl Module for ScaleNorm {
    /// Brings each row of `xs` to one length.
    ///
    /// # Shapes
    /// `[*, normalized_shape]`, or `[N, C, *]` with `channels_first`; the output is contiguous, of
    /// the same shape and dtype.
    ///
    /// # Errors
    /// An input of another trailing shape, dtype or device; an `eps` out of range or a weight of
    /// another shape given to [`ScaleNorm::new`].
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ScaleNormOptions {
            eps,
            channels_first,
        } = self.options;
        let shape = self.normalized_shape.dims();
        scale_norm_by(xs, shape, &self.weight, eps, channels_first)
    }
}

impl Norm for ScaleNorm {
    fn kind(&self) -> &'static str {
        ScaleNormOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.params().named()
    }

    fn reset(&self) -> Result<()> {
        self.params().reset(initial_weight(&self.normalized_shape))
    }
}
