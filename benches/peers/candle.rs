//! candle-nn's layers, and what its users write where it has none.

use candle_core::{Result, Tensor};
use candle_nn::{BatchNorm, GroupNorm, LayerNorm, Module, ModuleT, RmsNorm, ops};

use super::case::{Case, EPS, GROUPS, Inputs, Op};
use super::step::Layer;

/// The layer as it is called, fused where candle-nn has a kernel.
pub(crate) fn layer(case: &Case, inputs: &Inputs) -> Result<Layer> {
    let weight = inputs.weight.clone();
    // Only layers with a bias look at this one.
    let bias = inputs.bias.clone().unwrap_or_else(|| weight.clone());
    let channels = weight.elem_count();
    Ok(match case.op {
        Op::LayerNorm => {
            let norm = LayerNorm::new(weight, bias, EPS);
            Box::new(move |x| norm.forward(x))
        }
        Op::RmsNorm => {
            let norm = RmsNorm::new(weight, EPS);
            Box::new(move |x| norm.forward(x))
        }
        Op::BatchNorm | Op::BatchNormInference => {
            let train = case.op == Op::BatchNorm;
            // In half precision it trains with f32 statistics only, and infers with half ones only.
            let dtype = match case.dtype.size_in_bytes() {
                2 if train => candle_core::DType::F32,
                _ => case.dtype,
            };
            let (mean, var) = (inputs.mean.to_dtype(dtype)?, inputs.var.to_dtype(dtype)?);
            let norm = BatchNorm::new(channels, mean, var, weight, bias, EPS)?;
            Box::new(move |x| norm.forward_t(x, train))
        }
        Op::GroupNorm | Op::InstanceNorm => {
            let groups = if case.op == Op::GroupNorm {
                GROUPS
            } else {
                channels
            };
            let norm = GroupNorm::new(weight, bias, channels, groups, EPS)?;
            Box::new(move |x| norm.forward(x))
        }
        Op::WeightNorm => Box::new(move |v| weight_norm(v, &weight)),
    })
}

/// The layer in the form that gradients pass through: the fused kernels drop them.
pub(crate) fn differentiable(case: &Case, inputs: &Inputs) -> Result<Layer> {
    let weight = inputs.weight.clone();
    match (case.op, inputs.bias.clone()) {
        (Op::LayerNorm, Some(bias)) => Ok(Box::new(move |x| {
            ops::layer_norm_slow(x, &weight, &bias, EPS as f32)
        })),
        (Op::RmsNorm, _) => Ok(Box::new(move |x| {
            ops::rms_norm_slow(x, &weight, EPS as f32)
        })),
        _ => layer(case, inputs),
    }
}

fn weight_norm(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let but_first: Vec<usize> = (1..v.rank()).collect();
    let norm = v.sqr()?.sum_keepdim(but_first)?.sqrt()?;
    v.broadcast_div(&norm)?.broadcast_mul(g)
}
