//! Stands in for `candle_norm::ops::hook` until the crate has it: the backward through candle's engine.

use candle_core::{Result, Tensor};
use candle_norm::ops::{self, Cast};

#[derive(Debug, Clone)]
pub(crate) enum Op {
    LayerNorm,
    RmsNorm,
    GroupNorm { num_groups: usize },
    InstanceNorm,
    BatchNorm,
    BatchNormInference { mean: Tensor, var: Tensor },
    WeightNorm { dim: Option<usize> },
}

#[derive(Debug)]
pub(crate) struct Saved {
    y: Tensor,
    x: Tensor,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

pub(crate) fn saved(
    op: Op,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Saved> {
    let (w, b) = (weight, bias);
    let y = match op {
        Op::LayerNorm => ops::layer_norm(x, x.dims()[x.rank() - 1], w, b, eps)?,
        Op::RmsNorm => {
            let len = x.dims()[x.rank() - 1];
            ops::rms_norm(x, len, w, Some(eps), 0., Cast::AfterWeight)?
        }
        Op::GroupNorm { num_groups } => ops::group_norm(x, num_groups, w, b, eps)?,
        Op::InstanceNorm => ops::instance_norm(x, w, b, eps)?.0,
        Op::BatchNorm => ops::batch_norm(x, w, b, eps)?.0,
        Op::BatchNormInference { mean, var } => {
            ops::batch_norm_inference(x, &mean, &var, w, b, eps)?
        }
        Op::WeightNorm { dim } => match w {
            Some(g) => ops::weight_norm(x, g, dim)?,
            None => candle_core::bail!("no g"),
        },
    };
    Ok(Saved {
        y,
        x: x.clone(),
        weight: weight.cloned(),
        bias: bias.cloned(),
    })
}

impl Saved {
    pub(crate) fn backward(&self, dy: &Tensor) -> Result<(Tensor, Option<Tensor>, Option<Tensor>)> {
        let gradients = (&self.y * dy)?.backward()?;
        let of = |t: &Option<Tensor>| t.as_ref().and_then(|t| gradients.get(t).cloned());
        match gradients.get(&self.x) {
            Some(dx) => Ok((dx.clone(), of(&self.weight), of(&self.bias))),
            None => candle_core::bail!("a gradient is missing"),
        }
    }
}
