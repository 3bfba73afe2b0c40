//! Operations beside the norms of rows, groups and channels.

use candle_core::{ModuleT, Tensor};
use candle_norm::ops::{self, GateOptions, L2Form};
use candle_norm::{
    GlobalResponseNormOptions, L2Normalize, L2NormalizeOptions, LayerScale, LayerScaleOptions,
};

use crate::case::{Case, Outcome, required};
use crate::layers::{Op, Plan, RESIDUAL, builder, without_state};

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
];

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
