//! Cases that are measured: layers, passes, shapes and the values that all peers are given.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The groups of every group norm; Stable Diffusion's number.
pub(crate) const GROUPS: usize = 32;

/// ε of every layer and peer.
pub(crate) const EPS: f64 = 1e-5;

/// A layer, with weight and bias where it can have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    LayerNorm,
    RmsNorm,
    /// By the statistics of the batch; the running ones are updated.
    BatchNorm,
    /// By the running statistics.
    BatchNormInference,
    /// In groups of [`GROUPS`].
    GroupNorm,
    InstanceNorm,
    /// By the statistics of the batch, in equal shares with the others.
    SwitchNorm,
    /// `x` is the direction `v`, `weight` the magnitude `g`, one for each slice of axis 0.
    WeightNorm,
    /// Without an affine pair; `weight` and `bias` are scale and shift of each sample.
    ModulatedLayerNorm,
    LayerNormGelu,
    GroupNormSilu,
    /// In training.
    BatchNormRelu,
    /// `bias` is the gate, of the shape of `x`, after SiLU and after the norm.
    GatedRmsNorm,
    /// In training, by the statistics of the positions that [`lengths`] leaves.
    MaskedBatchNorm,
    /// With the channels on axis 1.
    GlobalResponseNorm,
    /// `weight` scales each feature of `x`, `bias` is the residual, of the shape of `x`.
    GatedResidual,
    /// Of each row, without parameters.
    Softmax,
    /// Of each row, without parameters.
    L2Normalize,
}

/// The valid positions of each of `n` padded sequences of `size`: from half of them to all, three
/// quarters on average.
pub(crate) fn lengths(n: usize, size: usize) -> Vec<u32> {
    (0..n)
        .map(|i| (size - size * (i * 7 % n) / (2 * n)) as u32)
        .collect()
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::LayerNorm => "layer_norm",
            Op::RmsNorm => "rms_norm",
            Op::BatchNorm => "batch_norm",
            Op::BatchNormInference => "batch_norm_inference",
            Op::GroupNorm => "group_norm",
            Op::InstanceNorm => "instance_norm",
            Op::SwitchNorm => "switch_norm",
            Op::WeightNorm => "weight_norm",
            Op::ModulatedLayerNorm => "modulated_layer_norm",
            Op::LayerNormGelu => "layer_norm_gelu",
            Op::GroupNormSilu => "group_norm_silu",
            Op::BatchNormRelu => "batch_norm_relu",
            Op::GatedRmsNorm => "gated_rms_norm",
            Op::MaskedBatchNorm => "masked_batch_norm",
            Op::GlobalResponseNorm => "global_response_norm",
            Op::GatedResidual => "gated_residual",
            Op::Softmax => "softmax",
            Op::L2Normalize => "l2_normalize",
        }
    }

    /// The passes of the layer that can be timed. Only the engine runs the backward of a graph of
    /// several nodes.
    pub(crate) fn passes(self) -> &'static [Pass] {
        match self {
            Op::SwitchNorm | Op::MaskedBatchNorm | Op::GlobalResponseNorm | Op::L2Normalize => {
                &[Pass::Forward, Pass::TrainStep]
            }
            _ => &[Pass::Forward, Pass::Backward, Pass::TrainStep],
        }
    }

    fn has_bias(self) -> bool {
        self.has_weight() && !matches!(self, Op::RmsNorm | Op::WeightNorm)
    }

    /// Whether it has parameters.
    pub(crate) fn has_weight(self) -> bool {
        !matches!(self, Op::Softmax | Op::L2Normalize)
    }

    /// The norm without what this layer adds to it, and the most times its time that this layer may
    /// take on tensors that no cache holds.
    pub(crate) fn norm_alone(self) -> Option<(Op, f64)> {
        match self {
            Op::ModulatedLayerNorm => Some((Op::LayerNorm, 1.2)),
            Op::LayerNormGelu => Some((Op::LayerNorm, 1.15)),
            Op::GroupNormSilu => Some((Op::GroupNorm, 1.15)),
            Op::BatchNormRelu => Some((Op::BatchNorm, 1.15)),
            Op::MaskedBatchNorm => Some((Op::BatchNorm, 1.5)),
            _ => None,
        }
    }

    /// How many times as fast as PyTorch eager it must be, forward and backward.
    pub(crate) fn least_against_pytorch(self) -> Option<f64> {
        match self {
            Op::LayerNormGelu | Op::GroupNormSilu | Op::BatchNormRelu => Some(1.5),
            Op::GatedRmsNorm => Some(2.),
            _ => None,
        }
    }
}

/// The pass of a layer that is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The output, of an input that tracks no gradients.
    Forward,
    /// All gradients for a given gradient of the output, without the engine that calls for them.
    Backward,
    /// Forward and the engine's whole backward.
    TrainStep,
}

impl Pass {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::TrainStep => "train_step",
        }
    }
}

/// One layer on one input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) op: Op,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
}

impl Case {
    pub(crate) fn new(op: Op, shape: &[usize], dtype: DType) -> Self {
        let shape = shape.to_vec();
        Self { op, shape, dtype }
    }

    /// `4096x768`.
    pub(crate) fn shape_name(&self) -> String {
        let dims: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        dims.join("x")
    }

    /// `layer_norm 4096x768 f32`.
    pub(crate) fn name(&self) -> String {
        let (op, shape, dtype) = (self.op.name(), self.shape_name(), self.dtype.as_str());
        format!("{op} {shape} {dtype}")
    }

    /// The shape of the weight, and of the bias where there is one.
    pub(crate) fn param_shape(&self) -> Vec<usize> {
        let first_axis = |i| if i == 0 { self.shape[0] } else { 1 };
        match self.op {
            Op::LayerNorm
            | Op::RmsNorm
            | Op::LayerNormGelu
            | Op::GatedRmsNorm
            | Op::GatedResidual
            | Op::Softmax
            | Op::L2Normalize => {
                vec![self.shape[self.shape.len() - 1]]
            }
            Op::ModulatedLayerNorm => vec![self.shape[0], self.shape[self.shape.len() - 1]],
            Op::WeightNorm => (0..self.shape.len()).map(first_axis).collect(),
            _ => vec![self.shape[1]],
        }
    }

    /// The shape of the bias, if there is one.
    fn bias_shape(&self) -> Vec<usize> {
        match self.op {
            Op::GatedRmsNorm | Op::GatedResidual => self.shape.clone(),
            _ => self.param_shape(),
        }
    }

    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many elements of the input share one element of the weight.
    pub(crate) fn elements_per_param(&self) -> usize {
        self.elements() / self.param_shape().iter().product::<usize>()
    }

    /// The size of `x`.
    pub(crate) fn tensor_bytes(&self) -> usize {
        self.elements() * self.dtype.size_in_bytes()
    }

    /// The least that a pass must read and write.
    pub(crate) fn bytes(&self, pass: Pass) -> usize {
        let bytes = |shape: Vec<usize>| -> usize {
            shape.iter().product::<usize>() * self.dtype.size_in_bytes()
        };
        let bias = if self.op.has_bias() {
            bytes(self.bias_shape())
        } else {
            0
        };
        let weight = if self.op.has_weight() {
            bytes(self.param_shape())
        } else {
            0
        };
        let param = weight + bias;
        let tensor = self.tensor_bytes();
        match pass {
            Pass::Forward => 2 * tensor + param,
            // Reads x, dy and the parameters, writes dx and the gradients of the parameters.
            Pass::Backward => 3 * tensor + 2 * param,
            Pass::TrainStep => 5 * tensor + 3 * param,
        }
    }
}

/// The tensors of a case, the same for all peers.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    pub(crate) x: Tensor,
    /// Only layers without parameters do not look at it.
    pub(crate) weight: Tensor,
    pub(crate) has_weight: bool,
    pub(crate) bias: Option<Tensor>,
    /// The gradient of the output in [`Pass::Backward`].
    pub(crate) dy: Tensor,
    /// Running statistics, one value a channel in the dtype of `x`; only BatchNorm looks at them.
    pub(crate) mean: Tensor,
    pub(crate) var: Tensor,
}

impl Inputs {
    pub(crate) fn new(case: &Case) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut draw = |shape: &[usize], low: f32, high: f32| {
            let shape = Shape::from(shape);
            let values: Vec<f32> = (0..shape.elem_count())
                .map(|_| rng.random_range(low..high))
                .collect();
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(case.dtype)
        };
        let params = case.param_shape();
        Ok(Self {
            x: draw(&case.shape, -1.5, 2.5)?,
            weight: draw(&params, 0.5, 1.5)?,
            has_weight: case.op.has_weight(),
            bias: match case.op.has_bias() {
                true => Some(draw(&case.bias_shape(), -0.5, 0.5)?),
                false => None,
            },
            dy: draw(&case.shape, -1., 1.)?,
            mean: draw(&params, 0.25, 0.75)?,
            var: draw(&params, 0.5, 1.5)?,
        })
    }

    /// The same as variables, whose gradients are asked for.
    pub(crate) fn tracked(&self) -> Result<Self> {
        let variable = |t: &Tensor| Var::from_tensor(t).map(Var::into_inner);
        Ok(Self {
            x: variable(&self.x)?,
            weight: variable(&self.weight)?,
            bias: self.bias.as_ref().map(variable).transpose()?,
            ..self.clone()
        })
    }
}
