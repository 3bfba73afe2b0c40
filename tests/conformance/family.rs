//! Operations beside the norms of rows, groups and channels.

use candle_core::{DType, ModuleT, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig};
use candle_norm::ops::{self, GateOptions, L2Form};
use candle_norm::{
    BatchNormOptions, BatchRenormOptions, CumulativeLayerNormOptions, DyTOptions,
    GlobalResponseNormOptions, GroupNormOptions, InstanceNormOptions, L2Normalize,
    L2NormalizeOptions, LayerScale, LayerScaleOptions, SpectralNormOptions, Squash,
    WeightStandardizationOptions, spectral_norm, weight_standardization,
};

use crate::case::{Case, Outcome, required};
use crate::layers::{
    Op, Outputs, Plan, RESIDUAL, affine, builder, channels, momentum, stored_state, with_state,
    without_state,
};

pub(crate) const OPS: &[Op] = &[
    Op {
        name: "l2_normalize",
        input: "x",
        required: &[],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: l2_normalize,
    },
    Op {
        name: "softmax",
        input: "x",
        required: &[],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: softmax,
    },
    Op {
        name: "layer_scale",
        input: "x",
        required: &["weight"],
        optional: &["bias", RESIDUAL],
        stateful: false,
        adds: false,
        fused: true,
        plan: layer_scale,
    },
    Op {
        name: "grn",
        input: "x",
        required: &["weight", "bias"],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: grn,
    },
    Op {
        name: "weight_standardization",
        input: "weight",
        required: &[],
        optional: &["gain"],
        stateful: false,
        adds: false,
        fused: true,
        plan: weight_standardization_plan,
    },
    Op {
        name: "spectral_norm",
        input: "weight",
        required: &[],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: spectral_norm_plan,
    },
    Op {
        name: "masked",
        input: "x",
        required: &[],
        optional: &["weight", "bias"],
        stateful: true,
        adds: false,
        fused: true,
        plan: masked,
    },
    Op {
        name: "dyt",
        input: "x",
        required: &["alpha"],
        optional: &["weight", "bias"],
        stateful: false,
        adds: false,
        fused: true,
        plan: dyt,
    },
    Op {
        name: "derf",
        input: "x",
        required: &["alpha", "s"],
        optional: &["weight", "bias"],
        stateful: false,
        adds: false,
        fused: true,
        plan: derf,
    },
    Op {
        name: "ghost_batch_norm",
        input: "x",
        required: &[],
        optional: &["weight", "bias"],
        stateful: true,
        adds: false,
        fused: true,
        plan: ghost_batch_norm,
    },
    Op {
        name: "batch_renorm",
        input: "x",
        required: &[],
        optional: &["weight", "bias"],
        stateful: true,
        adds: false,
        fused: true,
        plan: batch_renorm,
    },
    Op {
        name: "cumulative_layer_norm",
        input: "x",
        required: &[],
        optional: &["weight", "bias"],
        stateful: false,
        adds: false,
        fused: true,
        plan: cumulative_layer_norm,
    },
];

/// Tensors of an operation that no case can do without, which get no gradient and have any dtype.
pub(crate) fn fixed(op: &Op) -> &'static [&'static str] {
    match op.name {
        "spectral_norm" => VECTORS,
        "masked" => &["mask"],
        _ => &[],
    }
}

/// State of an operation beside running statistics.
pub(crate) fn state(op: &Op) -> &'static [&'static str] {
    match op.name {
        "spectral_norm" => VECTORS,
        _ => &[],
    }
}

const VECTORS: &[&str] = &["u", "v"];

fn l2_normalize(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let dim = required("dim", c.number("dim")?)?;
    let eps = required("eps", c.number("eps")?)?;
    let form = match required("form", c.word("form")?)?.as_str() {
        "max" => L2Form::Max,
        "inside" => L2Form::Inside,
        other => return Err(format!("unknown form `{other}`")),
    };
    c.finish()?;
    let rank = case.tensor("x")?.rank() as f64;
    let from_start = if dim < 0. { dim + rank } else { dim };
    if from_start.fract() != 0. || !(0. ..rank).contains(&from_start) {
        return Err(format!("config key `dim` is {dim}, `x` has rank {rank}"));
    }
    let norm = L2Normalize::new(L2NormalizeOptions {
        dim: Some(from_start as usize),
        eps,
        form,
    });
    Ok(Box::new(move |inputs| {
        without_state(norm.forward_t(&inputs["x"], true)?)
    }))
}

fn softmax(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let log = required("log", c.flag("log")?)?;
    c.finish()?;
    Ok(Box::new(move |inputs| {
        let x = &inputs["x"];
        without_state(match log {
            true => ops::log_softmax_last_dim(x)?,
            false => candle_norm::nn::ops::softmax_last_dim(x)?,
        })
    }))
}

fn layer_scale(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let channels_first = required("channels_first", c.flag("channels_first")?)?;
    let tanh = required("tanh", c.flag("tanh")?)?;
    c.finish()?;
    let options = LayerScaleOptions {
        channels_first,
        tanh,
        ..Default::default()
    };
    let gate = GateOptions::default()
        .with_channels_first(channels_first)
        .with_tanh(tanh);
    Ok(Box::new(move |inputs| {
        let (x, weight) = (&inputs["x"], &inputs["weight"]);
        let (residual, bias) = (inputs.get(RESIDUAL), inputs.get("bias"));
        let is_layers = |t: &Tensor| t.rank() == 1;
        // One for each sample comes from outside of a layer.
        let y = match is_layers(weight) && bias.is_none_or(is_layers) {
            true => {
                let layer = LayerScale::new(weight.clone(), bias.cloned(), options);
                match residual {
                    Some(residual) => layer.forward_add(x, residual)?,
                    None => layer.forward_t(x, true)?,
                }
            }
            false => match residual {
                Some(residual) => ops::gated_residual(residual, x, weight, bias, gate)?,
                None => ops::layer_scale(x, weight, bias, gate)?,
            },
        };
        without_state(y)
    }))
}

fn grn(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let channels_first = required("channels_first", c.flag("channels_first")?)?;
    c.finish()?;
    let options = GlobalResponseNormOptions {
        eps,
        channels_first,
    };
    let (channels, dtype) = (case.tensor("weight")?.elem_count(), case.dtype);
    Ok(Box::new(move |inputs| {
        let x = inputs["x"].clone();
        let norm = candle_norm::global_response_norm(channels, options, builder(inputs, dtype))?;
        without_state(norm.forward_t(&x, true)?)
    }))
}

fn weight_standardization_plan(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let gamma = required("gamma", c.number_or_null("gamma")?)?;
    c.finish()?;
    if gamma.is_some() != case.has("gain") {
        return Err("`gamma` and `gain` are there together, or neither".to_string());
    }
    let options = WeightStandardizationOptions { eps, gamma };
    let (dims, dtype) = (case.tensor("weight")?.dims().to_vec(), case.dtype);
    Ok(Box::new(move |inputs| {
        let (weight, gain) = (inputs["weight"].clone(), inputs.get("gain").cloned());
        let vb = builder(inputs, dtype);
        // The layers take square kernels only; for other weights there is the function.
        let y = match dims[..] {
            [o, i, k] => {
                let config = Conv1dConfig::default();
                weight_standardization::conv1d_no_bias(i, o, k, config, options, vb)?.weight()?
            }
            [o, i, k, l] if k == l => {
                let config = Conv2dConfig::default();
                weight_standardization::conv2d_no_bias(i, o, k, config, options, vb)?.weight()?
            }
            _ => ops::weight_standardization(&weight, gain.as_ref().zip(gamma), eps)?,
        };
        without_state(y)
    }))
}

fn spectral_norm_plan(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let dim = required("dim", c.size("dim")?)?;
    let eps = required("eps", c.number("eps")?)?;
    let n_power_iterations = required("n_power_iterations", c.size("n_power_iterations")?)?;
    let train = required("train", c.flag("train")?)?;
    c.finish()?;
    let options = SpectralNormOptions {
        n_power_iterations,
        eps,
        dim: Some(dim),
    };
    let (dims, dtype) = (case.tensor("weight")?.dims().to_vec(), case.dtype);
    Ok(Box::new(move |mut inputs| {
        let prefix = "parametrizations.weight.";
        let names = [("weight", "original"), ("u", "0._u"), ("v", "0._v")];
        let weight = inputs["weight"].clone();
        for (name, end) in names {
            if let Some(value) = inputs.remove(name) {
                inputs.insert(format!("{prefix}{end}"), value);
            }
        }
        let device = weight.device().clone();
        let like = |dims: &[usize]| Tensor::zeros(dims, dtype, &device);
        let vb = builder(inputs, dtype);
        // A forward makes the steps; the weight is then that of the vectors that it left.
        macro_rules! ran {
            ($layer:expr, $x:expr) => {{
                let layer = $layer?;
                layer.forward_t(&$x?, train)?;
                (layer.weight()?, layer.vectors()?)
            }};
        }
        let (y, [u, v]) = match dims[..] {
            [o, i] => ran!(
                spectral_norm::linear_no_bias(i, o, options, vb),
                like(&[1, i])
            ),
            [o, i, k] => ran!(
                spectral_norm::conv1d_no_bias(i, o, k, Conv1dConfig::default(), options, vb),
                like(&[1, i, k])
            ),
            [o, i, k, l] if k == l => ran!(
                spectral_norm::conv2d_no_bias(i, o, k, Conv2dConfig::default(), options, vb),
                like(&[1, i, k, k])
            ),
            _ => candle_core::bail!("no layer has a weight of shape {dims:?}"),
        };
        Ok(Outputs {
            state: vec![("u", u), ("v", v)],
            ..without_state(y)?
        })
    }))
}

fn dyt(case: &Case) -> Outcome<Plan> {
    dynamic(case, Squash::Tanh)
}

fn derf(case: &Case) -> Outcome<Plan> {
    dynamic(case, Squash::Erf)
}

fn dynamic(case: &Case, function: Squash) -> Outcome<Plan> {
    let mut c = case.config();
    let channels_first = required("channels_first", c.flag("channels_first")?)?;
    c.finish()?;
    let options = DyTOptions {
        function,
        affine: affine(case),
        channels_first,
        ..Default::default()
    };
    let x = case.tensor("x")?;
    let axis = if channels_first {
        Some(1)
    } else {
        x.rank().checked_sub(1)
    };
    let Some(channels) = axis.and_then(|axis| x.dims().get(axis).copied()) else {
        return Err(format!("`x` has no axis of channels: shape {:?}", x.dims()));
    };
    let dtype = case.dtype;
    Ok(Box::new(move |inputs| {
        let x = inputs["x"].clone();
        let layer = candle_norm::dyt(channels, options, builder(inputs, dtype))?;
        without_state(layer.forward_t(&x, true)?)
    }))
}

fn ghost_batch_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let size = required("virtual_batch_size", c.size("virtual_batch_size")?)?;
    let momentum = momentum(&mut c, train)?;
    c.finish()?;
    let state = stored_state(case, train, true)?;
    let options = BatchNormOptions {
        eps,
        momentum,
        affine: affine(case),
        virtual_batch_size: Some(size),
        ..Default::default()
    };
    let (features, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |mut inputs| {
        let x = inputs["x"].clone();
        inputs.extend(state.clone());
        let norm = candle_norm::batch_norm(features, options, builder(inputs, dtype))?;
        with_state(norm.forward_t(&x, train)?, norm.running_stats())
    }))
}

fn batch_renorm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let rmax = required("rmax", c.number("rmax")?)?;
    let dmax = required("dmax", c.number("dmax")?)?;
    let warmup_steps = required("warmup_steps", c.size("warmup_steps")?)?;
    let momentum = momentum(&mut c, train)?;
    c.finish()?;
    let state = stored_state(case, train, true)?;
    let options = BatchRenormOptions {
        eps,
        momentum,
        rmax,
        dmax,
        warmup_steps: warmup_steps as u64,
        affine: affine(case),
        ..Default::default()
    };
    let (features, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |mut inputs| {
        let x = inputs["x"].clone();
        inputs.extend(state.clone());
        let norm = candle_norm::batch_renorm(features, options, builder(inputs, dtype))?;
        with_state(norm.forward_t(&x, train)?, Some(norm.running_stats()))
    }))
}

fn cumulative_layer_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    c.finish()?;
    let options = CumulativeLayerNormOptions {
        eps,
        affine: affine(case),
    };
    let (features, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |inputs| {
        let x = inputs["x"].clone();
        let norm = candle_norm::cumulative_layer_norm(features, options, builder(inputs, dtype))?;
        without_state(norm.forward_t(&x, true)?)
    }))
}

fn masked(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let norm = required("norm", c.word("norm")?)?;
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let (features, dtype, affine) = (channels(case)?, case.dtype, affine(case));
    match norm.as_str() {
        "batch_norm" => {
            let tracks = c.flag("track_running_stats")?.unwrap_or(true);
            let momentum = momentum(&mut c, train && tracks)?;
            c.finish()?;
            let state = stored_state(case, train, tracks)?;
            let options = BatchNormOptions {
                eps,
                momentum,
                affine,
                track_running_stats: tracks,
                ..Default::default()
            };
            Ok(Box::new(move |mut inputs| {
                let (x, mask) = (inputs["x"].clone(), inputs["mask"].clone());
                inputs.extend(state.clone());
                let norm = candle_norm::batch_norm(features, options, builder(inputs, dtype))?;
                with_state(
                    norm.forward_masked_t(&x, &mask, train)?,
                    norm.running_stats(),
                )
            }))
        }
        "instance_norm" => {
            let tracks = required("track_running_stats", c.flag("track_running_stats")?)?;
            let momentum = momentum(&mut c, train && tracks)?;
            c.finish()?;
            let state = stored_state(case, train, tracks)?;
            let options = InstanceNormOptions {
                eps,
                momentum,
                affine,
                track_running_stats: tracks,
                ..Default::default()
            };
            Ok(Box::new(move |mut inputs| {
                let (x, mask) = (inputs["x"].clone(), inputs["mask"].clone());
                inputs.extend(state.clone());
                let norm = candle_norm::instance_norm(features, options, builder(inputs, dtype))?;
                with_state(
                    norm.forward_masked_t(&x, &mask, train)?,
                    norm.running_stats(),
                )
            }))
        }
        "group_norm" => {
            let groups = required("num_groups", c.size("num_groups")?)?;
            c.finish()?;
            let options = GroupNormOptions {
                eps,
                affine,
                ..Default::default()
            };
            Ok(Box::new(move |inputs| {
                let (x, mask) = (inputs["x"].clone(), inputs["mask"].to_dtype(DType::U8)?);
                let vb = builder(inputs, dtype);
                let norm = candle_norm::group_norm(groups, features, options, vb)?;
                without_state(norm.forward_masked(&x, &mask)?)
            }))
        }
        other => Err(format!("unknown norm `{other}`")),
    }
}
