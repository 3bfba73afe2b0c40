//! candle-nn's layers, and what its users write where it has none.

use candle_core::{Result, Tensor};
use candle_nn::{BatchNorm, GroupNorm, LayerNorm, Module, ModuleT, RmsNorm, ops};

use super::case::{Case, EPS, GROUPS, Inputs, Op, lengths};
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
        Op::SwitchNorm => {
            let (weight, bias) = (weight.reshape((channels, 1))?, bias.reshape((channels, 1))?);
            Box::new(move |x| switch_norm(x, &weight, &bias))
        }
        Op::WeightNorm => Box::new(move |v| weight_norm(v, &weight)),
        Op::ModulatedLayerNorm => Box::new(move |x| modulated(x, &weight, &bias)),
        Op::LayerNormGelu => {
            let norm = LayerNorm::new(weight, bias, EPS);
            Box::new(move |x| norm.forward(x)?.gelu_erf())
        }
        Op::GroupNormSilu => {
            let norm = GroupNorm::new(weight, bias, channels, GROUPS, EPS)?;
            Box::new(move |x| norm.forward(x)?.silu())
        }
        Op::BatchNormRelu => {
            let dtype = match case.dtype.size_in_bytes() {
                2 => candle_core::DType::F32,
                _ => case.dtype,
            };
            let (mean, var) = (inputs.mean.to_dtype(dtype)?, inputs.var.to_dtype(dtype)?);
            let norm = BatchNorm::new(channels, mean, var, weight, bias, EPS)?;
            Box::new(move |x| norm.forward_t(x, true)?.relu())
        }
        Op::GatedRmsNorm => {
            let norm = RmsNorm::new(weight, EPS);
            Box::new(move |x| norm.forward(x)? * bias.silu()?)
        }
        Op::MaskedBatchNorm => masked_batch_norm(case, inputs)?,
        Op::GlobalResponseNorm => {
            let (weight, bias) = (weight.reshape((1, (), 1, 1))?, bias.reshape((1, (), 1, 1))?);
            Box::new(move |x| {
                let lengths = x.sqr()?.sum_keepdim((2, 3))?.sqrt()?;
                let shares = lengths.broadcast_div(&(lengths.mean_keepdim(1)? + EPS)?)?;
                let scaled = x.broadcast_mul(&shares)?.broadcast_mul(&weight)?;
                (x + scaled)?.broadcast_add(&bias)
            })
        }
        Op::GatedResidual => Box::new(move |x| &bias + x.broadcast_mul(&weight)?),
        Op::Softmax => Box::new(ops::softmax_last_dim),
        Op::L2Normalize => Box::new(|x| {
            let last = x.rank() - 1;
            x.broadcast_div(&x.sqr()?.sum_keepdim(last)?.sqrt()?)
        }),
    })
}

/// AdaLN: a layer norm without parameters, then a product and a sum.
fn modulated(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let last = x.dims()[x.rank() - 1];
    let ones = Tensor::ones(last, x.dtype(), x.device())?;
    let y = ops::layer_norm_slow(x, &ones, &ones.zeros_like()?, EPS as f32)?;
    y.broadcast_mul(&(scale.unsqueeze(1)? + 1.)?)?
        .broadcast_add(&shift.unsqueeze(1)?)
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
        (Op::LayerNormGelu, Some(bias)) => Ok(Box::new(move |x| {
            ops::layer_norm_slow(x, &weight, &bias, EPS as f32)?.gelu_erf()
        })),
        (Op::GatedRmsNorm, Some(gate)) => Ok(Box::new(move |x| {
            ops::rms_norm_slow(x, &weight, EPS as f32)? * gate.silu()?
        })),
        (Op::Softmax, _) => Ok(Box::new(|x| ops::softmax(x, x.rank() - 1))),
        _ => layer(case, inputs),
    }
}

/// Batch norm of the valid positions, gathered and scattered.
fn masked_batch_norm(case: &Case, inputs: &Inputs) -> Result<Layer> {
    let (n, c, size) = (case.shape[0], case.shape[1], case.shape[2]);
    let valid: Vec<u32> = lengths(n, size)
        .into_iter()
        .enumerate()
        .flat_map(|(i, length)| (0..length).map(move |t| (i * size) as u32 + t))
        .collect();
    let index = Tensor::new(valid, inputs.x.device())?;
    let half = case.dtype.size_in_bytes() == 2;
    let dtype = if half {
        candle_core::DType::F32
    } else {
        case.dtype
    };
    let (mean, var) = (inputs.mean.to_dtype(dtype)?, inputs.var.to_dtype(dtype)?);
    let (weight, bias) = (inputs.weight.clone(), inputs.bias.clone());
    let bias = bias.unwrap_or_else(|| weight.clone());
    let norm = BatchNorm::new(c, mean, var, weight, bias, EPS)?;
    Ok(Box::new(move |x| {
        let rows = x.transpose(1, 2)?.reshape((n * size, c))?;
        let y = norm.forward_t(&rows.index_select(&index, 0)?, true)?;
        let zeros = Tensor::zeros((n * size, c), y.dtype(), y.device())?;
        let y = zeros.index_add(&index, &y, 0)?;
        y.reshape((n, size, c))?.transpose(1, 2)?.contiguous()
    }))
}

/// In equal shares of instance, layer and batch; means and variances first, so that no large tensor
/// is formed twice.
fn switch_norm(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (n, c) = (x.dims()[0], x.dims()[1]);
    let planes = x.reshape((n, c, ()))?;
    let values = planes.dims()[2] as f64;
    let mean = planes.mean_keepdim(2)?;
    let squares = planes.broadcast_sub(&mean)?.sqr()?.sum_keepdim(2)?;
    let var = (squares / (values - 1.))?;
    let union = |axis: usize| {
        let whole = mean.mean_keepdim(axis)?;
        let inner = (&var + mean.broadcast_sub(&whole)?.sqr()?)?;
        Result::Ok((whole, inner.mean_keepdim(axis)?))
    };
    let ((layer_mean, layer_var), (batch_mean, batch_var)) = (union(1)?, union(0)?);
    let third = |a: &Tensor, b: &Tensor, c: &Tensor| a.broadcast_add(b)?.broadcast_add(c)? / 3.;
    let mean = third(&mean, &layer_mean, &batch_mean)?;
    let std = (third(&var, &layer_var, &batch_var)? + EPS)?.sqrt()?;
    planes
        .broadcast_sub(&mean)?
        .broadcast_div(&std)?
        .broadcast_mul(weight)?
        .broadcast_add(bias)?
        .reshape(x.shape())
}

fn weight_norm(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let but_first: Vec<usize> = (1..v.rank()).collect();
    let norm = v.sqr()?.sum_keepdim(but_first)?.sqrt()?;
    v.broadcast_div(&norm)?.broadcast_mul(g)
}
