//! The table of operations: what a case of each may hold, and how the public layer is built from
//! it.

use std::collections::HashMap;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{Activation, Conv1dConfig, Conv2dConfig, VarBuilder};
use candle_norm::{
    Affine, BatchNormOptions, Cast, Gate, GatedRmsNormOptions, GroupNormOptions,
    InstanceNormOptions, LayerNormOptions, RmsNormOptions, RunningStats, ScaleNormOptions,
    SwitchNormOptions, WeightNormOptions,
    ops::{self, Modulation},
    weight_norm,
};

use crate::case::{Case, Config, Outcome, device, one_line, required};
use crate::ranks::Ranks;

/// One operation. To add one, write its plan and list it in [`OPS`].
pub(crate) struct Op {
    pub(crate) name: &'static str,
    /// The input that strided views are made of; no case can do without it.
    pub(crate) input: &'static str,
    /// Further tensors that no case can do without.
    pub(crate) required: &'static [&'static str],
    /// Tensors that a case may leave out.
    pub(crate) optional: &'static [&'static str],
    /// Whether the layer keeps running statistics.
    pub(crate) stateful: bool,
    /// Whether it adds [`RESIDUAL`] first, and returns the sum too.
    pub(crate) adds: bool,
    /// Whether the fused path serves it. Where it does not, forcing it must be an error.
    pub(crate) fused: bool,
    /// Reads the configuration once, and returns what runs the case.
    pub(crate) plan: fn(&Case) -> Outcome<Plan>,
}

/// Builds the layer from tensors by name, fresh for every run since layers keep state, and calls
/// it.
pub(crate) type Plan = Box<dyn Fn(Inputs) -> Result<Outputs>>;

/// The tensors of a case, those with a gradient tracked.
pub(crate) type Inputs = HashMap<String, Tensor>;

pub(crate) struct Outputs {
    pub(crate) y: Tensor,
    /// The tensor that was normalized, of a layer that adds first.
    pub(crate) sum: Option<Tensor>,
    /// Running statistics by name, after the call.
    pub(crate) state: Vec<(&'static str, Tensor)>,
}

/// The running statistics, in the order of [`Outputs::state`], with the dtype that they are stored
/// in.
pub(crate) const STATE: [(&str, DType); 3] = [
    ("running_mean", DType::F32),
    ("running_var", DType::F32),
    (COUNT, DType::I64),
];

/// The one of them that is a whole number.
pub(crate) const COUNT: &str = "num_batches_tracked";

/// The tensor that is added to the input, and lies in memory as it does.
pub(crate) const RESIDUAL: &str = "residual";

const AFFINE: &[&str] = &["weight", "bias"];

/// Scale and shift from outside.
const OUTSIDE: [&str; 2] = ["scale", "shift"];

pub(crate) const OPS: &[Op] = &[
    Op {
        name: "layer_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: false,
        adds: false,
        fused: true,
        plan: layer_norm,
    },
    Op {
        name: "rms_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: false,
        adds: false,
        fused: true,
        plan: rms_norm,
    },
    Op {
        name: "scale_norm",
        input: "x",
        required: &["weight"],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: scale_norm,
    },
    Op {
        name: "add_layer_norm",
        input: "x",
        required: &[RESIDUAL],
        optional: AFFINE,
        stateful: false,
        adds: true,
        fused: true,
        plan: layer_norm,
    },
    Op {
        name: "add_rms_norm",
        input: "x",
        required: &[RESIDUAL],
        optional: AFFINE,
        stateful: false,
        adds: true,
        fused: true,
        plan: rms_norm,
    },
    Op {
        name: "group_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: false,
        adds: false,
        fused: true,
        plan: group_norm,
    },
    Op {
        name: "instance_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: true,
        adds: false,
        fused: true,
        plan: instance_norm,
    },
    Op {
        name: "batch_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: true,
        adds: false,
        fused: true,
        plan: batch_norm,
    },
    Op {
        name: "modulated",
        input: "x",
        required: &[],
        optional: &["weight", "bias", "scale", "shift"],
        stateful: true,
        adds: false,
        fused: true,
        plan: modulated,
    },
    Op {
        name: "sync_batch_norm",
        input: "x",
        required: &[],
        optional: AFFINE,
        stateful: true,
        adds: false,
        fused: true,
        plan: sync_batch_norm,
    },
    Op {
        name: "gated_rms_norm",
        input: "x",
        required: &[],
        optional: &["weight", "gate"],
        stateful: false,
        adds: false,
        fused: true,
        plan: gated_rms_norm,
    },
    Op {
        name: "switch_norm",
        input: "x",
        required: &["mean_weight", "var_weight"],
        optional: AFFINE,
        stateful: true,
        adds: false,
        fused: true,
        plan: switch_norm,
    },
    Op {
        name: "weight_norm",
        input: "v",
        required: &["g"],
        optional: &[],
        stateful: false,
        adds: false,
        fused: true,
        plan: weight_norm_plan,
    },
];

/// The plan of the norm that is modulated.
fn modulated(case: &Case) -> Outcome<Plan> {
    let name = required("norm", case.config().word("norm")?)?;
    match name.as_str() {
        "layer_norm" => layer_norm(case),
        "rms_norm" => rms_norm(case),
        "group_norm" => group_norm(case),
        "instance_norm" => instance_norm(case),
        "batch_norm" => batch_norm(case),
        _ => Err(format!(
            "`norm` is `{name}`, which is no norm that is modulated"
        )),
    }
}

/// Modulation and activation of a norm.
#[derive(Clone, Copy)]
struct Outside {
    /// The offset of its scale, if the norm is modulated.
    offset: Option<f64>,
    activation: Option<Activation>,
}

/// The activation of a name.
fn activation(c: &mut Config) -> Outcome<Option<Activation>> {
    let Some(name) = c.word("activation")? else {
        return Ok(None);
    };
    let slope = name.strip_prefix("leaky_relu:").map(str::parse::<f64>);
    Ok(Some(match (name.as_str(), slope) {
        (_, Some(Ok(slope))) => Activation::LeakyRelu(slope),
        ("relu", _) => Activation::Relu,
        ("relu6", _) => Activation::Relu6,
        ("silu", _) => Activation::Silu,
        ("gelu", _) => Activation::Gelu,
        ("gelu_tanh", _) => Activation::GeluPytorchTanh,
        ("hardswish", _) => Activation::HardSwish,
        ("sigmoid", _) => Activation::Sigmoid,
        ("mish", _) => Activation::Mish,
        _ => return Err(format!("unknown activation `{name}`")),
    }))
}

/// Scale and shift of one run.
struct Values {
    offset: f64,
    tensors: [Option<Tensor>; 2],
}

impl Outside {
    fn read(case: &Case, c: &mut Config) -> Outcome<Self> {
        let offset = match case.op == "modulated" {
            true => {
                c.word("norm")?;
                Some(required("offset", c.number("offset")?)?)
            }
            false => None,
        };
        let activation = activation(c)?;
        Ok(Self { offset, activation })
    }

    /// Takes its tensors from the inputs, where a layer would find a `scale` of its own.
    fn take(self, inputs: &mut Inputs) -> Option<Values> {
        let offset = self.offset?;
        let tensors = OUTSIDE.map(|name| inputs.remove(name));
        Some(Values { offset, tensors })
    }
}

impl Values {
    fn modulation(&self) -> Modulation<'_> {
        let [scale, shift] = self.tensors.each_ref().map(Option::as_ref);
        Modulation::new(scale, shift).with_offset(self.offset)
    }
}

fn layer_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let outside = Outside::read(case, &mut c)?;
    let eps = required("eps", c.number("eps")?)?;
    let channels_first = c.flag("channels_first")?.unwrap_or(false);
    let shape = match (c.sizes("normalized_shape")?, channels_first) {
        (Some(shape), false) => shape,
        (None, true) => vec![channels(case)?],
        (None, false) => return Err("no config key `normalized_shape`".to_string()),
        (Some(_), true) => {
            return Err("`normalized_shape` with `channels_first`, which takes axis 1".to_string());
        }
    };
    c.finish()?;
    let options = LayerNormOptions {
        eps,
        affine: affine(case),
        channels_first,
        activation: outside.activation,
        ..Default::default()
    };
    let dtype = case.dtype;
    Ok(Box::new(move |mut inputs| {
        let values = outside.take(&mut inputs);
        let (x, residual) = (inputs["x"].clone(), inputs.get(RESIDUAL).cloned());
        let norm = candle_norm::layer_norm(shape.clone(), options, builder(inputs, dtype))?;
        match (residual, values) {
            (Some(residual), _) => with_sum(norm.forward_add(&x, &residual)?),
            (None, Some(values)) => {
                without_state(norm.forward_modulated_by(&x, &values.modulation())?)
            }
            (None, None) => without_state(norm.forward_t(&x, true)?),
        }
    }))
}

fn rms_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let outside = Outside::read(case, &mut c)?;
    let eps = required("eps", c.number_or_null("eps")?)?;
    let shape = required("normalized_shape", c.sizes("normalized_shape")?)?;
    let offset = c.number("offset")?.unwrap_or(0.);
    let cast = match c.word("cast")?.as_deref() {
        None | Some("after_weight") => Cast::AfterWeight,
        Some("before_weight") => Cast::BeforeWeight,
        Some(other) => return Err(format!("unknown cast `{other}`")),
    };
    c.finish()?;
    let options = RmsNormOptions {
        eps,
        affine: affine(case),
        offset,
        cast,
        activation: outside.activation,
        ..Default::default()
    };
    let dtype = case.dtype;
    Ok(Box::new(move |mut inputs| {
        let values = outside.take(&mut inputs);
        let (x, residual) = (inputs["x"].clone(), inputs.get(RESIDUAL).cloned());
        let norm = candle_norm::rms_norm(shape.clone(), options, builder(inputs, dtype))?;
        match (residual, values) {
            (Some(residual), _) => with_sum(norm.forward_add(&x, &residual)?),
            (None, Some(values)) => {
                without_state(norm.forward_modulated_by(&x, &values.modulation())?)
            }
            (None, None) => without_state(norm.forward_t(&x, true)?),
        }
    }))
}

fn gated_rms_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let gate = match required("gate", c.word("gate")?)?.as_str() {
        "before" => Gate::Before,
        "after" => Gate::After,
        other => return Err(format!("unknown place of the gate `{other}`")),
    };
    let activation = required("activation", activation(&mut c)?)?;
    let group_size = required("group_size", c.size_or_null("group_size")?)?;
    let cast = match required("cast", c.word("cast")?)?.as_str() {
        "after_weight" => Cast::AfterWeight,
        "before_weight" => Cast::BeforeWeight,
        other => return Err(format!("unknown cast `{other}`")),
    };
    c.finish()?;
    let x = case.tensor("x")?;
    let len = x.dims()[x.rank() - 1];
    let options = GatedRmsNormOptions {
        eps,
        gate,
        activation,
        group_size,
        cast,
    };
    let dtype = case.dtype;
    Ok(Box::new(move |mut inputs| {
        let (x, gate) = (inputs["x"].clone(), inputs.remove("gate"));
        if !inputs.contains_key("weight") {
            let gate = gate.as_ref();
            return without_state(ops::gated_rms_norm(&x, gate, None, options)?);
        }
        let norm = candle_norm::gated_rms_norm(len, options, builder(inputs, dtype))?;
        without_state(norm.forward(&x, gate.as_ref())?)
    }))
}

fn scale_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let channels_first = c.flag("channels_first")?.unwrap_or(false);
    let shape = match channels_first {
        true => vec![channels(case)?],
        false => required("normalized_shape", c.sizes("normalized_shape")?)?,
    };
    c.finish()?;
    let options = ScaleNormOptions {
        eps,
        channels_first,
    };
    let dtype = case.dtype;
    Ok(Box::new(move |inputs| {
        let x = inputs["x"].clone();
        let norm = candle_norm::scale_norm(shape.clone(), options, builder(inputs, dtype))?;
        without_state(norm.forward_t(&x, true)?)
    }))
}

fn group_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let outside = Outside::read(case, &mut c)?;
    let num_groups = required("num_groups", c.size("num_groups")?)?;
    let eps = required("eps", c.number("eps")?)?;
    c.finish()?;
    let options = GroupNormOptions {
        eps,
        affine: affine(case),
        activation: outside.activation,
    };
    let (channels, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |mut inputs| {
        let values = outside.take(&mut inputs);
        let x = inputs["x"].clone();
        let norm = candle_norm::group_norm(num_groups, channels, options, builder(inputs, dtype))?;
        without_state(match values {
            Some(values) => norm.forward_modulated_by(&x, &values.modulation())?,
            None => norm.forward_t(&x, true)?,
        })
    }))
}

fn instance_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let outside = Outside::read(case, &mut c)?;
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let tracks = required("track_running_stats", c.flag("track_running_stats")?)?;
    let momentum = momentum(&mut c, train && tracks)?;
    c.finish()?;
    let state = stored_state(case, train, tracks)?;
    let options = InstanceNormOptions {
        eps,
        momentum,
        affine: affine(case),
        track_running_stats: tracks,
        activation: outside.activation,
        ..Default::default()
    };
    let (channels, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |mut inputs| {
        let x = inputs["x"].clone();
        let values = outside.take(&mut inputs);
        inputs.extend(state.clone());
        let norm = candle_norm::instance_norm(channels, options, builder(inputs, dtype))?;
        let y = match values {
            Some(values) => norm.forward_modulated_by_t(&x, &values.modulation(), train)?,
            None => norm.forward_t(&x, train)?,
        };
        with_state(y, norm.running_stats())
    }))
}

fn batch_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let outside = Outside::read(case, &mut c)?;
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let tracks = c.flag("track_running_stats")?.unwrap_or(true);
    let momentum = momentum(&mut c, train && tracks)?;
    c.finish()?;
    let state = stored_state(case, train, tracks)?;
    let options = BatchNormOptions {
        eps,
        momentum,
        affine: affine(case),
        track_running_stats: tracks,
        activation: outside.activation,
        ..Default::default()
    };
    let (channels, dtype) = (channels(case)?, case.dtype);
    Ok(Box::new(move |mut inputs| {
        let x = inputs["x"].clone();
        let values = outside.take(&mut inputs);
        inputs.extend(state.clone());
        let norm = candle_norm::batch_norm(channels, options, builder(inputs, dtype))?;
        let y = match values {
            Some(values) => norm.forward_modulated_by_t(&x, &values.modulation(), train)?,
            None => norm.forward_t(&x, train)?,
        };
        with_state(y, norm.running_stats())
    }))
}

/// The samples of `x` in shares of several ranks, as `counts` says.
fn sync_batch_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let counts = required("counts", c.sizes("counts")?)?;
    let eps = required("eps", c.number("eps")?)?;
    if !required("train", c.flag("train")?)? {
        return Err(
            "`train` is false: inference sends nothing, and is that of `batch_norm`".into(),
        );
    }
    let tracks = c.flag("track_running_stats")?.unwrap_or(true);
    let momentum = momentum(&mut c, tracks)?;
    c.finish()?;
    let samples = case.tensor("x")?.dims().first().copied();
    if counts.is_empty() || Some(counts.iter().sum()) != samples {
        return Err(format!("`counts` are {counts:?}, of {samples:?} samples"));
    }
    let options = BatchNormOptions {
        eps,
        momentum,
        affine: affine(case),
        track_running_stats: tracks,
        ..Default::default()
    };
    let ranks = Ranks {
        counts,
        channels: channels(case)?,
        options,
        dtype: case.dtype,
        state: stored_state(case, true, tracks)?,
    };
    Ok(Box::new(move |inputs| ranks.clone().train(&inputs)))
}

fn switch_norm(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let eps = required("eps", c.number("eps")?)?;
    let train = required("train", c.flag("train")?)?;
    let unbiased = required("unbiased", c.flag("unbiased")?)?;
    let using_bn = required("using_bn", c.flag("using_bn")?)?;
    let instance = required("instance", c.flag("instance")?)?;
    let momentum = momentum(&mut c, train && using_bn)?;
    c.finish()?;
    let state = stored_state(case, train, using_bn)?;
    let rank = case.tensor("x")?.rank();
    let options = SwitchNormOptions {
        eps,
        momentum,
        affine: affine(case),
        using_bn,
        spatial_dims: if instance { rank - 2 } else { 0 },
        unbiased,
        ..Default::default()
    };
    let (channels, dtype) = (channels(case)?, case.dtype);
    let mut dims = vec![1; options.spatial_dims + 2];
    dims[1] = channels;
    Ok(Box::new(move |mut inputs| {
        let x = inputs["x"].clone();
        inputs.extend(state.clone());
        // The reference implementation gives them axes of size one.
        for (name, axes) in [
            ("weight", rank),
            ("bias", rank),
            ("running_mean", 3),
            ("running_var", 3),
        ] {
            if let Some(value) = inputs.get_mut(name) {
                *value = value.reshape(&dims[..axes.min(dims.len())])?;
            }
        }
        let norm = candle_norm::switch_norm(channels, options, builder(inputs, dtype))?;
        let mut outputs = with_state(norm.forward_t(&x, train)?, norm.running_stats())?;
        for (name, value) in &mut outputs.state {
            if *name != COUNT {
                *value = value.flatten_all()?;
            }
        }
        Ok(outputs)
    }))
}

fn weight_norm_plan(case: &Case) -> Outcome<Plan> {
    let mut c = case.config();
    let dim = required("dim", c.size_or_null("dim")?)?;
    c.finish()?;
    let (v, g) = (case.tensor("v")?, case.tensor("g")?);
    let dims = v.dims().to_vec();
    let g_dims = match dim {
        None => vec![],
        Some(dim) if dim < dims.len() => {
            let mut g_dims = vec![1; dims.len()];
            g_dims[dim] = dims[dim];
            g_dims
        }
        Some(dim) => return Err(format!("config key `dim` is {dim}, `v` has shape {dims:?}")),
    };
    // A norm is one number for each index along `dim`; PyTorch's shape, a vector and [1] all say
    // so.
    if g.elem_count() != g_dims.iter().product::<usize>() {
        return Err(format!(
            "`g` has shape {:?}, must hold {g_dims:?}",
            g.dims()
        ));
    }
    let options = WeightNormOptions { dim };
    let dtype = case.dtype;
    Ok(Box::new(move |inputs| {
        let (v, g) = (inputs["v"].clone(), inputs["g"].reshape(g_dims.clone())?);
        let named = HashMap::from([
            ("parametrizations.weight.original0".to_string(), g.clone()),
            ("parametrizations.weight.original1".to_string(), v.clone()),
        ]);
        let vb = builder(named, dtype);
        // The layers take square kernels only; for other weights there is the function.
        let y = match dims[..] {
            [o, i] => weight_norm::linear_no_bias(i, o, options, vb)?.weight()?,
            [o, i, k] => {
                weight_norm::conv1d_no_bias(i, o, k, Conv1dConfig::default(), options, vb)?
                    .weight()?
            }
            [o, i, k, l] if k == l => {
                weight_norm::conv2d_no_bias(i, o, k, Conv2dConfig::default(), options, vb)?
                    .weight()?
            }
            _ => ops::weight_norm(&v, &g, dim)?,
        };
        without_state(y)
    }))
}

pub(crate) fn builder(inputs: Inputs, dtype: DType) -> VarBuilder<'static> {
    let device = inputs
        .values()
        .next()
        .map_or(Device::Cpu, |t| t.device().clone());
    VarBuilder::from_tensors(inputs, dtype, &device)
}

pub(crate) fn without_state(y: Tensor) -> Result<Outputs> {
    Ok(Outputs {
        y,
        sum: None,
        state: vec![],
    })
}

fn with_sum((y, sum): (Tensor, Tensor)) -> Result<Outputs> {
    Ok(Outputs {
        sum: Some(sum),
        ..without_state(y)?
    })
}

pub(crate) fn with_state(y: Tensor, stats: Option<&RunningStats>) -> Result<Outputs> {
    let Some(stats) = stats else {
        return without_state(y);
    };
    let after = stats.snapshot()?;
    let count = Tensor::new(after.num_batches_tracked, y.device())?;
    let values = [after.mean, after.var, count];
    let state = STATE.iter().map(|(name, _)| *name).zip(values).collect();
    Ok(Outputs {
        state,
        ..without_state(y)?
    })
}

/// The number of channels, axis 1 of the input.
pub(crate) fn channels(case: &Case) -> Outcome<usize> {
    let x = case.tensor("x")?;
    match x.dims() {
        [_, channels, ..] => Ok(*channels),
        dims => Err(format!("`x` has no axis 1: shape {dims:?}")),
    }
}

/// Parameters that a case does not hold are parameters that the layer does not have.
pub(crate) fn affine(case: &Case) -> Affine {
    match (case.has("weight"), case.has("bias")) {
        (false, false) => Affine::None,
        (true, false) => Affine::Weight,
        (false, true) => Affine::Bias,
        (true, true) => Affine::WeightAndBias,
    }
}

pub(crate) fn momentum(config: &mut Config<'_>, updates: bool) -> Outcome<Option<f64>> {
    match config.number_or_null("momentum")? {
        Some(momentum) => Ok(momentum),
        None if updates => Err("no config key `momentum`".to_string()),
        None => Ok(Some(0.1)),
    }
}

/// The running statistics before the call. A training case that stores none starts from those of a
/// new layer.
pub(crate) fn stored_state(
    case: &Case,
    train: bool,
    tracks: bool,
) -> Outcome<HashMap<String, Tensor>> {
    let mut state: HashMap<String, Tensor> = STATE
        .iter()
        .filter_map(|(name, _)| Some((name.to_string(), case.tensors.get(*name)?.clone())))
        .collect();
    for value in state.values_mut() {
        *value = value.to_device(device()?).map_err(one_line)?;
    }
    if let Some(count) = state.get_mut(COUNT) {
        // A scalar, whether it was stored as one or as a vector of one.
        *count = count.reshape(()).map_err(one_line)?;
    }
    let start = [("running_mean", 0f32), ("running_var", 1.)];
    if tracks && train && state.is_empty() {
        for (name, value) in start {
            let values = Tensor::full(value, channels(case)?, device()?).map_err(one_line)?;
            state.insert(name.to_string(), values);
        }
    } else if tracks {
        for (name, _) in start {
            case.tensor(name)?;
        }
    }
    Ok(state)
}
