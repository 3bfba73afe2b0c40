//! The layers of this crate, on the path that they choose themselves and on candle's tensor
//! operations.

use candle_core::{Result, Tensor, bail};
use candle_nn::{Activation, Module, ModuleT};
use candle_norm::internals;
use candle_norm::ops::{self, GateOptions, L2Form, Modulation, SwitchBatch, SwitchOptions};
use candle_norm::{BatchNorm, GroupNorm, LayerNorm, Path, RmsNorm, with_path};

use super::case::{Case, EPS, GROUPS, Inputs, Op, lengths};
use super::step::{Layer, Step};

/// The layer as a user calls it.
pub(crate) fn layer(case: &Case, inputs: &Inputs) -> Result<Layer> {
    let (weight, bias) = (inputs.weight.clone(), inputs.bias.clone());
    // Only layers with a bias look at this one.
    let shift = bias.clone().unwrap_or_else(|| weight.clone());
    let channels = weight.elem_count();
    Ok(match case.op {
        Op::LayerNorm => {
            let norm = LayerNorm::new(weight, shift, EPS);
            Box::new(move |x| norm.forward(x))
        }
        Op::RmsNorm => {
            let norm = RmsNorm::new(weight, EPS);
            Box::new(move |x| norm.forward(x))
        }
        Op::BatchNorm | Op::BatchNormInference => {
            let (mean, var) = (inputs.mean.clone(), inputs.var.clone());
            let norm = BatchNorm::new(channels, mean, var, weight, shift, EPS)?;
            let train = case.op == Op::BatchNorm;
            Box::new(move |x| norm.forward_t(x, train))
        }
        Op::GroupNorm => {
            let norm = GroupNorm::new(weight, shift, channels, GROUPS, EPS)?;
            Box::new(move |x| norm.forward(x))
        }
        Op::InstanceNorm => Box::new(move |x| {
            let (y, _) = ops::instance_norm(x, Some(&weight), bias.as_ref(), EPS)?;
            Ok(y)
        }),
        Op::SwitchNorm => {
            let shares = Tensor::ones(3, weight.dtype(), weight.device())?;
            let options = SwitchOptions {
                instance: true,
                batch: SwitchBatch::Own,
                unbiased: true,
                eps: EPS,
            };
            Box::new(move |x| {
                let shares = [&shares, &shares];
                let (weight, bias) = (Some(&weight), bias.as_ref());
                Ok(ops::switch_norm(x, weight, bias, shares, options)?.0)
            })
        }
        Op::WeightNorm => Box::new(move |v| ops::weight_norm(v, &weight, Some(0))),
        Op::MaskedBatchNorm => {
            let (mean, var) = (inputs.mean.clone(), inputs.var.clone());
            let norm = BatchNorm::new(channels, mean, var, weight, shift, EPS)?;
            let (n, size) = (case.shape[0], case.shape[2]);
            let lengths = Tensor::new(lengths(n, size), inputs.x.device())?;
            let mask = ops::mask_of_lengths(&lengths, size)?;
            Box::new(move |x| norm.forward_masked_t(x, &mask, true))
        }
        Op::ModulatedLayerNorm
        | Op::LayerNormGelu
        | Op::GroupNormSilu
        | Op::BatchNormRelu
        | Op::GatedRmsNorm
        | Op::GlobalResponseNorm
        | Op::GatedResidual
        | Op::Softmax
        | Op::L2Normalize => {
            let op = case.op;
            Box::new(move |x| extended(op, x, &weight, &shift))
        }
    })
}

/// Norms with more than an affine pair.
fn extended(op: Op, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (last, w, b) = (x.dims()[x.rank() - 1], Some(weight), Some(bias));
    match op {
        Op::ModulatedLayerNorm => {
            let modulation = Modulation::new(w, b);
            ops::modulated_layer_norm(x, last, [None, None], EPS, &modulation)
        }
        Op::LayerNormGelu => ops::layer_norm_act(x, last, [w, b], EPS, Activation::Gelu),
        Op::GroupNormSilu => ops::group_norm_act(x, GROUPS, [w, b], EPS, Activation::Silu),
        Op::BatchNormRelu => Ok(ops::batch_norm_act(x, w, b, EPS, Activation::Relu)?.0),
        Op::GatedRmsNorm => ops::gated_rms_norm(x, b, w, EPS),
        Op::GlobalResponseNorm => ops::global_response_norm(x, weight, bias, EPS, true),
        Op::GatedResidual => ops::gated_residual(bias, x, weight, None, GateOptions::default()),
        Op::Softmax => ops::softmax_last_dim(x),
        Op::L2Normalize => ops::l2_normalize(x, x.rank() - 1, EPS, L2Form::Max),
        _ => bail!("{} has a layer of its own", op.name()),
    }
}

/// The same on candle's tensor operations: what the kernels are worth.
pub(crate) fn composed(case: &Case, inputs: &Inputs) -> Result<Layer> {
    let layer = layer(case, inputs)?;
    Ok(Box::new(move |x| with_path(Path::Composed, || layer(x))))
}

/// The backward of the layer by itself.
pub(crate) fn backward(case: &Case, inputs: &Inputs) -> Result<Step> {
    if let Op::ModulatedLayerNorm
    | Op::LayerNormGelu
    | Op::GroupNormSilu
    | Op::BatchNormRelu
    | Op::GatedRmsNorm
    | Op::GatedResidual
    | Op::Softmax = case.op
    {
        return extended_backward(case, inputs);
    }
    let op = match case.op {
        Op::LayerNorm => internals::Op::LayerNorm,
        Op::RmsNorm => internals::Op::RmsNorm,
        Op::BatchNorm => internals::Op::BatchNorm,
        Op::BatchNormInference => internals::Op::BatchNormInference {
            mean: inputs.mean.clone(),
            var: inputs.var.clone(),
        },
        Op::GroupNorm => internals::Op::GroupNorm { num_groups: GROUPS },
        Op::InstanceNorm => internals::Op::InstanceNorm,
        Op::WeightNorm => internals::Op::WeightNorm { dim: Some(0) },
        op => bail!("{} has no backward without the engine", op.name()),
    };
    // An op computes the gradients that somebody tracks, and here that is all of them.
    let inputs = inputs.tracked()?;
    let (weight, bias) = (Some(&inputs.weight), inputs.bias.as_ref());
    let saved = internals::saved(op, &inputs.x, weight, bias, EPS)?;
    let dy = inputs.dy.clone();
    Ok(Box::new(move || {
        let (dx, dweight, dbias) = saved.backward(&dy)?;
        Ok([Some(dx), dweight, dbias].into_iter().flatten().collect())
    }))
}

/// The backward of the one node that [`extended`] makes.
fn extended_backward(case: &Case, inputs: &Inputs) -> Result<Step> {
    let (inputs, op) = (inputs.tracked()?, case.op);
    let bias = inputs.bias.as_ref().unwrap_or(&inputs.weight);
    let saved = internals::recorded(|| extended(op, &inputs.x, &inputs.weight, bias))?;
    let dy = inputs.dy.clone();
    Ok(Box::new(move || {
        let (dx, first, second) = saved.backward(&dy)?;
        // The gate comes before the weight.
        let params = match op {
            Op::GatedRmsNorm => [second, first],
            _ => [first, second],
        };
        let grads = [Some(dx)].into_iter().chain(params);
        Ok(grads.flatten().collect())
    }))
}

/// The layer with nothing added to its norm, and its backward.
pub(crate) fn norm_alone(case: &Case, inputs: &Inputs) -> Option<(Case, Inputs)> {
    let (op, _) = case.op.norm_alone()?;
    let alone = Case::new(op, &case.shape, case.dtype);
    let params = Inputs::new(&alone).ok()?;
    let inputs = Inputs {
        x: inputs.x.clone(),
        dy: inputs.dy.clone(),
        ..params
    };
    Some((alone, inputs))
}
