//! Parameters: which of them a layer has, and under which names a checkpoint may hold them.

use candle_core::{Result, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder};

/// Affine parameters that a layer learns.
///
/// A checkpoint must hold the same: a stored scale or shift that a layer does not take is an error,
/// since what it computes would be another thing.
///
/// ```
/// use std::collections::HashMap;
///
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_norm::{Affine, BatchNormOptions, batch_norm};
///
/// // As Keras saves a BatchNormalization with `scale=False`.
/// let stored = [("beta", 0.5f64), ("moving_mean", 2.), ("moving_variance", 4.)];
/// let mut tensors = HashMap::new();
/// for (name, value) in stored {
///     tensors.insert(name.to_string(), Tensor::new(&[value], &Device::Cpu)?);
/// }
/// let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
/// let options = BatchNormOptions { eps: 1e-3, affine: Affine::Bias, ..Default::default() };
/// let norm = batch_norm(1, options, vb)?;
/// let y = norm.forward_t(&Tensor::new(&[[4f64]], &Device::Cpu)?, false)?;
/// assert!((y.to_vec2::<f64>()?[0][0] - ((4. - 2.) / 4.001f64.sqrt() + 0.5)).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Affine {
    /// None: the output is the normalized input.
    None,
    /// A scale.
    Weight,
    /// A shift, as in models of Keras and Flax that were trained without a scale
    /// (`scale=False`, `use_scale=False`), such as InceptionV3.
    Bias,
    /// A scale and a shift.
    WeightAndBias,
}

impl Affine {
    /// Whether there is a scale.
    pub fn has_weight(self) -> bool {
        matches!(self, Affine::Weight | Affine::WeightAndBias)
    }

    /// Whether there is a shift.
    pub fn has_bias(self) -> bool {
        matches!(self, Affine::Bias | Affine::WeightAndBias)
    }

    fn of(weight: bool, bias: bool) -> Self {
        match (weight, bias) {
            (false, false) => Affine::None,
            (true, false) => Affine::Weight,
            (false, true) => Affine::Bias,
            (true, true) => Affine::WeightAndBias,
        }
    }
}

// The names of a tensor: PyTorch's first, which is also the one that is written; then those of an
// old LayerNorm (`gamma`, `beta`), Flax (`scale`, `mean`, `var`) and Keras (`gamma`, `beta`,
// `moving_mean`, `moving_variance`).
pub(crate) const WEIGHT: &[&str] = &["weight", "gamma", "scale"];
pub(crate) const BIAS: &[&str] = &["bias", "beta"];
pub(crate) const RUNNING_MEAN: &[&str] = &["running_mean", "mean", "moving_mean"];
pub(crate) const RUNNING_VAR: &[&str] = &["running_var", "var", "moving_variance"];
pub(crate) const NUM_BATCHES_TRACKED: &str = "num_batches_tracked";
/// Names of weight norm's `g`: PyTorch's, and its older one.
pub(crate) const MAGNITUDE: &[&str] = &["parametrizations.weight.original0", "weight_g"];
/// Names of weight norm's `v`: PyTorch's, and its older one.
pub(crate) const DIRECTION: &[&str] = &["parametrizations.weight.original1", "weight_v"];

/// Names of LayerScale's factor: timm's, and those of transformers (DINOv2, ConvNeXt, Mimi).
pub(crate) const GAMMA: &[&str] = &["gamma", "lambda1", "layer_scale_parameter", "scale"];
/// Names of LayerScale's shift.
pub(crate) const BETA: &[&str] = &["beta", "bias"];

/// Names of the factor of dynamic tanh: the authors', and that of x-transformers.
pub(crate) const ALPHA: &[&str] = &["alpha", "pre_tanh_scale"];
/// Names of what dynamic erf adds to the product.
pub(crate) const SHIFT: &[&str] = &["s", "shift"];

/// Name of the gains of weight standardization.
pub(crate) const GAIN: &[&str] = &["gain"];
/// Names of spectral norm's weight: PyTorch's, its older one, and that of a plain layer.
pub(crate) const ORIGINAL: &[&str] = &["parametrizations.weight.original", "weight_orig", "weight"];
/// Names of spectral norm's `u`: PyTorch's, and its older one.
pub(crate) const LEFT_VECTOR: &[&str] = &["parametrizations.weight.0._u", "weight_u"];
/// Names of spectral norm's `v`: PyTorch's, and its older one.
pub(crate) const RIGHT_VECTOR: &[&str] = &["parametrizations.weight.0._v", "weight_v"];

/// All tensors that may have other names.
pub(crate) const ALIASES: [&[&str]; 13] = [
    WEIGHT,
    BIAS,
    RUNNING_MEAN,
    RUNNING_VAR,
    MAGNITUDE,
    DIRECTION,
    GAMMA,
    BETA,
    ORIGINAL,
    LEFT_VECTOR,
    RIGHT_VECTOR,
    ALPHA,
    SHIFT,
];

/// The name of `names` under which the file of `vb` has a tensor, else the one that is written.
///
/// Names but the first are those of files. Variables of a `VarMap` are made under any name for any
/// purpose: a `gamma` beside a norm is no weight of it.
pub(crate) fn name_in<'a>(vb: &VarBuilder, names: &[&'a str]) -> &'a str {
    let found = names.iter().find(|name| vb.contains_tensor(name));
    match found {
        Some(name) if *name == names[0] || is_of_a_file(vb, name) => name,
        _ => names[0],
    }
}

/// Whether `vb` reads the tensor `name`, which it has, from a file or from memory. candle tells a
/// `VarMap` by this alone: it makes what
/// it lacks, and so hands out no tensor without being told a shape.
fn is_of_a_file(vb: &VarBuilder, name: &str) -> bool {
    vb.get_unchecked_dtype(name, vb.dtype()).is_ok()
}

/// `name` with the path of `vb` before it.
pub(super) fn path(vb: &VarBuilder, name: &str) -> String {
    match vb.prefix() {
        prefix if prefix.is_empty() => name.to_string(),
        prefix => format!("{prefix}.{name}"),
    }
}

/// The parameter of a shape under one of its names. A file may have it with other axes of size 1.
pub(crate) fn get(
    vb: &VarBuilder,
    shape: impl Into<Shape>,
    names: &[&str],
    init: f64,
) -> Result<Tensor> {
    let (shape, name) = (shape.into(), name_in(vb, names));
    match vb.get_unchecked(name) {
        Ok(stored) if stored.shape() != &shape && same_axes(stored.dims(), shape.dims()) => {
            stored.reshape(shape)
        }
        _ => vb.get_with_hints(shape, name, Init::Const(init)),
    }
}

fn held(vb: &VarBuilder, names: &[&str]) -> bool {
    names.iter().any(|name| vb.contains_tensor(name))
}

/// Whether two shapes differ by axes of size 1 alone.
pub(crate) fn same_axes(a: &[usize], b: &[usize]) -> bool {
    let longer = |dims: &[usize]| dims.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
    longer(a) == longer(b)
}

/// The path of a tensor of `names` that a checkpoint holds in the layer's place and shape, axes of
/// size 1 apart.
///
/// A variable is none: a `VarMap` may have made it for another layer of the same path. Nor is what
/// a builder holds that says yes to every name, such as `VarBuilder::zeros`.
pub(super) fn stored(vb: &VarBuilder, shape: &Shape, names: &[&str]) -> Option<String> {
    const NO_NAME: &str = "no tensor is called this";
    let in_shape = |name: &&&str| -> bool {
        let value = vb.get(shape, name).or_else(|_| vb.get_unchecked(name));
        value.is_ok_and(|v| same_axes(v.dims(), shape.dims()) && !v.is_variable())
    };
    let mut held = names.iter().filter(|name| vb.contains_tensor(name));
    let name = held.find(in_shape)?;
    (!vb.contains_tensor(NO_NAME)).then(|| path(vb, name))
}

/// The affine parameters that a checkpoint holds in the layer's place.
fn fitting(vb: &VarBuilder, shape: &Shape) -> Affine {
    let [weight, bias] = [WEIGHT, BIAS].map(|names| stored(vb, shape, names).is_some());
    Affine::of(weight, bias)
}

/// The affine parameters of a layer that are part of a model.
#[derive(Debug, Clone)]
pub(crate) struct AffineParams {
    pub(crate) weight: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
}

impl AffineParams {
    pub(crate) const NONE: Self = Self {
        weight: None,
        bias: None,
    };

    /// The parameters of `layer` that `affine` has. A checkpoint that holds others is refused: to
    /// drop one would change what the layer computes, and nobody would see it.
    pub(crate) fn new(
        layer: &str,
        vb: &VarBuilder,
        shape: impl Into<Shape>,
        affine: Affine,
        initial_weight: f64,
    ) -> Result<Self> {
        let shape = shape.into();
        let (has_weight, has_bias) = (affine.has_weight(), affine.has_bias());
        let dropped: Vec<String> = [(has_weight, WEIGHT), (has_bias, BIAS)]
            .into_iter()
            .filter(|(has, _)| !has)
            .filter_map(|(_, names)| stored(vb, &shape, names))
            .collect();
        let affines = || (format!("{affine:?}"), format!("{:?}", fitting(vb, &shape)));
        if !dropped.is_empty() {
            return refuse_dropped(layer, &dropped, affines());
        }
        let parameter = |names: &[&str], initial: f64, other: &[&str]| {
            let found = get(vb, &shape, names, initial);
            if found.is_ok() || held(vb, names) {
                return found;
            }
            match stored(vb, &shape, other) {
                Some(other) => stored_alone(layer, names, &other, affines()),
                None => found,
            }
        };
        let weight = has_weight
            .then(|| parameter(WEIGHT, initial_weight, BIAS))
            .transpose()?;
        let bias = has_bias.then(|| parameter(BIAS, 0., WEIGHT)).transpose()?;
        Ok(Self { weight, bias })
    }

    pub(crate) fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The parameters that there are.
    pub(crate) fn affine(&self) -> Affine {
        Affine::of(self.weight.is_some(), self.bias.is_some())
    }

    /// Parameters by the names that are written.
    pub(crate) fn named(&self) -> Vec<(&'static str, Tensor)> {
        [(WEIGHT[0], self.weight()), (BIAS[0], self.bias())]
            .into_iter()
            .filter_map(|(name, value)| value.map(|v| (name, v.clone())))
            .collect()
    }

    /// Sets the parameters that are variables back to what they start from.
    pub(crate) fn reset(&self, initial_weight: f64) -> Result<()> {
        for (param, initial) in [(self.weight(), initial_weight), (self.bias(), 0.)] {
            match param {
                Some(p) if p.is_variable() => {
                    let start =
                        Tensor::full(initial, p.shape(), p.device())?.to_dtype(p.dtype())?;
                    Var::from_tensor(p)?.set(&start)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A checkpoint that holds parameters which a layer would not take. `affines` are its own `affine`,
/// and the one that takes them.
fn refuse_dropped<T>(
    layer: &str,
    stored: &[String],
    (affine, fitting): (String, String),
) -> Result<T> {
    bail!(
        "{layer}: expected no parameters but those of affine {affine}, got {stored:?}, which would \
        be dropped unseen; set affine to {fitting}, or, if they are another layer's, give each \
        layer its own prefix (vb.pp)"
    )
}

/// A checkpoint that holds `other` of an affine pair, and nothing of `names`.
fn stored_alone<T>(
    layer: &str,
    names: &[&str],
    other: &str,
    (affine, fitting): (String, String),
) -> Result<T> {
    let names = names.join(" or ");
    bail!(
        "{layer}: expected {names} too, since affine is {affine}, got {other:?} alone; set affine \
        to {fitting} for a layer that was trained so, or, if it is another layer's, give each \
        layer its own prefix (vb.pp)"
    )
}
