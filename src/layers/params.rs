//! Parameters: which of them a layer has, and under which names a checkpoint may hold them.

use candle_core::{Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

/// Which affine parameters a layer learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Affine {
    /// None: the output is the normalized input.
    None,
    /// A scale.
    Weight,
    /// A scale and a shift.
    WeightAndBias,
}

impl Affine {
    /// Whether there is a scale.
    pub fn has_weight(self) -> bool {
        self != Affine::None
    }

    /// Whether there is a shift.
    pub fn has_bias(self) -> bool {
        self == Affine::WeightAndBias
    }
}

// The names of a tensor: PyTorch's first, which is also the one that is written; then those of an old LayerNorm (`gamma`,
// `beta`), Flax (`scale`, `mean`, `var`) and Keras (`gamma`, `beta`, `moving_mean`, `moving_variance`).
pub(crate) const WEIGHT: &[&str] = &["weight", "gamma", "scale"];
pub(crate) const BIAS: &[&str] = &["bias", "beta"];
pub(crate) const RUNNING_MEAN: &[&str] = &["running_mean", "mean", "moving_mean"];
pub(crate) const RUNNING_VAR: &[&str] = &["running_var", "var", "moving_variance"];
pub(crate) const NUM_BATCHES_TRACKED: &str = "num_batches_tracked";
/// Of weight norm: `g`, and PyTorch's older name for it.
pub(crate) const MAGNITUDE: &[&str] = &["parametrizations.weight.original0", "weight_g"];
/// Of weight norm: `v`, and PyTorch's older name for it.
pub(crate) const DIRECTION: &[&str] = &["parametrizations.weight.original1", "weight_v"];

/// All tensors that may have other names.
pub(crate) const ALIASES: [&[&str]; 6] = [
    WEIGHT,
    BIAS,
    RUNNING_MEAN,
    RUNNING_VAR,
    MAGNITUDE,
    DIRECTION,
];

/// The name of `names` under which the file behind `vb` has a tensor, else the one that is written.
///
/// Names but the first are those of files. Variables of a `VarMap` are made under any name for any purpose: a `gamma` beside a norm is
/// no weight of it.
pub(crate) fn name_in<'a>(vb: &VarBuilder, names: &[&'a str]) -> &'a str {
    let found = names.iter().find(|name| vb.contains_tensor(name));
    match found {
        Some(name) if *name == names[0] || is_of_a_file(vb, name) => name,
        _ => names[0],
    }
}

/// Whether `vb` reads the tensor `name`, which it has, from a file or from memory. candle tells a `VarMap` by this alone: it makes what
/// it lacks, and so hands out no tensor without being told a shape.
fn is_of_a_file(vb: &VarBuilder, name: &str) -> bool {
    vb.get_unchecked_dtype(name, vb.dtype()).is_ok()
}

pub(crate) fn get(
    vb: &VarBuilder,
    shape: impl Into<Shape>,
    names: &[&str],
    init: f64,
) -> Result<Tensor> {
    vb.get_with_hints(shape, name_in(vb, names), Init::Const(init))
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

    pub(crate) fn new(
        vb: &VarBuilder,
        shape: impl Into<Shape>,
        affine: Affine,
        initial_weight: f64,
    ) -> Result<Self> {
        let shape = shape.into();
        let weight = affine
            .has_weight()
            .then(|| get(vb, &shape, WEIGHT, initial_weight))
            .transpose()?;
        let bias = affine
            .has_bias()
            .then(|| get(vb, &shape, BIAS, 0.))
            .transpose()?;
        Ok(Self { weight, bias })
    }

    pub(crate) fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// By the names that are written.
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
