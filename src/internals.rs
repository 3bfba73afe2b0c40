//! For the tests and benches of this crate only: the backward of an op without candle's autograd
//! around it, the instruction set of the kernels, and the emulator of the CUDA kernels.

use candle_core::{Result, Tensor};

use crate::Path;
pub use crate::backend::cuda::asked::{Asked, asked, launches};
pub use crate::backend::cuda::emulated::{Argument, Emulator, Launch, install_emulator};
use crate::graph::forced;
use crate::graph::recorder::{self, Handle};
use crate::ops;
pub use candle_norm_kernels::Level;
use candle_norm_support::messages;

/// An op of [`ops`](crate::ops) with default options.
#[derive(Debug, Clone)]
pub enum Op {
    /// Over the last axis.
    LayerNorm,
    /// Over the last axis.
    RmsNorm,
    /// Over groups of channels.
    GroupNorm {
        /// The number of groups.
        num_groups: usize,
    },
    /// Over space.
    InstanceNorm,
    /// By the statistics of the batch.
    BatchNorm,
    /// By given statistics.
    BatchNormInference {
        /// Of each channel.
        mean: Tensor,
        /// Of each channel.
        var: Tensor,
    },
    /// Of the direction `x` and the magnitude `weight`.
    WeightNorm {
        /// The axis of the magnitudes.
        dim: Option<usize>,
    },
}

/// An op that ran forward.
#[allow(missing_debug_implementations)]
pub struct Saved {
    output: Tensor,
    handle: Handle,
}

/// Runs `op` forward on the fused path.
///
/// # Errors
/// Those of the op.
pub fn saved(
    op: Op,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Saved> {
    recorded(|| match &op {
        Op::LayerNorm => ops::layer_norm(x, x.dims()[x.rank() - 1], weight, bias, eps),
        Op::RmsNorm => {
            let len = x.dims()[x.rank() - 1];
            ops::rms_norm(x, len, weight, eps)
        }
        Op::GroupNorm { num_groups } => ops::group_norm(x, *num_groups, weight, bias, eps),
        Op::InstanceNorm => Ok(ops::instance_norm(x, weight, bias, eps)?.0),
        Op::BatchNorm => Ok(ops::batch_norm(x, weight, bias, eps)?.0),
        Op::BatchNormInference { mean, var } => {
            ops::batch_norm_inference(x, [mean, var], weight, bias, eps)
        }
        Op::WeightNorm { dim } => match weight {
            Some(g) => ops::weight_norm(x, g, *dim),
            None => messages::internal("WeightNorm", "a magnitude"),
        },
    })
}

/// Runs `f`, which calls one op or layer, on the path that is forced, or else the fused one.
///
/// # Errors
/// Those of `f`.
pub fn recorded(f: impl FnOnce() -> Result<Tensor>) -> Result<Saved> {
    let path = match forced() {
        Path::Auto => Path::Fused,
        path => path,
    };
    let (output, handle) = recorder::recording(|| crate::with_path(path, f))?;
    Ok(Saved { output, handle })
}

impl Saved {
    /// The output of the forward.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The gradients of the input and the parameters.
    ///
    /// # Errors
    /// Those of the op.
    pub fn backward(&self, dy: &Tensor) -> Result<(Tensor, Option<Tensor>, Option<Tensor>)> {
        let mut grads = (self.handle)(dy)?.into_iter();
        match grads.next().flatten() {
            Some(dx) => Ok((dx, grads.next().flatten(), grads.next().flatten())),
            None => messages::internal("internals", "a gradient of the input"),
        }
    }
}
