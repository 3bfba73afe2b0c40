//! A gradient reaches every variable of a model that a norm stands in the middle of: its own
//! parameters, the layers on both sides, and the input. The same model with candle-nn's norms shows
//! which of them cut it.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap, func_t, linear};
use candle_norm::{NormConfig, WeightNormOptions, weight_norm};
use std::collections::BTreeMap;
use testkit::data::uniform;
use testkit::faults;
use testkit::table;

const BATCH: usize = 3;
const CHANNELS: usize = 4;
const WIDTH: usize = 6;
const DIMS: [usize; 3] = [BATCH, CHANNELS, WIDTH];

/// How the norm sees its input, of shape `[BATCH, CHANNELS, WIDTH]`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    Contiguous,
    Strided,
}

/// Whether the norm runs in training or in inference.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Train,
    Infer,
}

type Build = fn(VarBuilder) -> Result<Box<dyn ModuleT>>;
type Layer = Box<dyn Fn(VarBuilder) -> Result<Box<dyn ModuleT>>>;

/// The gradients of linear → norm → linear by the names of the variables; none where backward has
/// none.
fn gradients(
    build: &dyn Fn(VarBuilder) -> Result<Box<dyn ModuleT>>,
    dtype: DType,
    input: Input,
    mode: Mode,
) -> Result<BTreeMap<String, Option<Tensor>>> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let before = linear(WIDTH, WIDTH, vb.pp("before"))?;
    let norm = build(vb.pp("norm"))?;
    let after = linear(WIDTH, 2, vb.pp("after"))?;

    let x = Var::from_tensor(&uniform((BATCH, CHANNELS, WIDTH), 1).to_dtype(dtype)?)?;
    let mut h = before.forward(&x)?;
    if input == Input::Strided {
        h = h.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    }
    assert_eq!(h.is_contiguous(), input == Input::Contiguous);
    let h = norm.forward_t(&h, mode == Mode::Train)?;
    let y = after.forward(&h.contiguous()?)?;
    let cotangent = uniform(y.dims(), 2).to_dtype(dtype)?;
    let gradients = (y * cotangent)?.sum_all()?.backward()?;

    let mut found = BTreeMap::from([("input".to_string(), gradients.get(&x).cloned())]);
    for (name, var) in vars.data().lock().expect("no other thread").iter() {
        found.insert(name.clone(), gradients.get(var).cloned());
    }
    Ok(found)
}

fn is_statistic(name: &str) -> bool {
    ["running_mean", "running_var", "num_batches_tracked"]
        .iter()
        .any(|statistic| name.ends_with(statistic))
}

/// The variables, statistics aside, that no gradient reaches.
fn missing(build: Build, input: Input, mode: Mode) -> Result<Vec<String>> {
    let found = gradients(&build, DType::F32, input, mode)?;
    let missing = found.into_iter().filter(|(_, gradient)| gradient.is_none());
    Ok(missing
        .map(|(name, _)| name)
        .filter(|name| !is_statistic(name))
        .collect())
}

fn of_config(config: &str, vb: VarBuilder) -> Result<Box<dyn ModuleT>> {
    Ok(Box::new(
        config.parse::<NormConfig>()?.channels(CHANNELS, vb)?,
    ))
}

#[test]
fn every_layer_lets_every_gradient_through() -> Result<()> {
    let mut layers: Vec<(&str, Layer)> = vec![];
    for (_, form) in table::forms() {
        let build = |vb: VarBuilder| Ok((form.build)(&DIMS, vb)? as Box<dyn ModuleT>);
        layers.push((form.name, Box::new(build)));
    }
    let others: [(&str, Build); 7] = [
        ("batch_norm, frozen", |vb| {
            Ok(Box::new(
                candle_norm::batch_norm(CHANNELS, 1e-5, vb)?.frozen()?,
            ))
        }),
        ("weight_norm::linear", |vb| {
            let options = WeightNormOptions::default();
            Ok(Box::new(weight_norm::linear(WIDTH, WIDTH, options, vb)?))
        }),
        ("weight_norm::linear, one magnitude", |vb| {
            Ok(Box::new(weight_norm::linear_no_bias(
                WIDTH,
                WIDTH,
                None.into(),
                vb,
            )?))
        }),
        ("a norm by its name, on axis 1", |vb| of_config("batch", vb)),
        ("a layer norm by its name, on axis 1", |vb| {
            of_config("layer", vb)
        }),
        ("a norm by its name, on the last axis", |vb| {
            Ok(Box::new(
                "instance".parse::<NormConfig>()?.features(WIDTH, vb)?,
            ))
        }),
        ("a linear layer with its norm", |vb| {
            Ok(Box::new(
                "rms".parse::<NormConfig>()?.linear(WIDTH, WIDTH, vb)?,
            ))
        }),
    ];
    layers.extend(others.map(|(name, build)| (name, Box::new(build) as Layer)));
    for (name, build) in layers {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            for input in [Input::Contiguous, Input::Strided] {
                for mode in [Mode::Train, Mode::Infer] {
                    let what = format!("{name}, {dtype:?}, {input:?}, {mode:?}");
                    for (variable, gradient) in gradients(&build, dtype, input, mode)? {
                        if is_statistic(&variable) {
                            assert!(gradient.is_none(), "{what}: {variable} has a gradient");
                            continue;
                        }
                        let Some(gradient) = gradient else {
                            panic!("{what}: no gradient reaches {variable}")
                        };
                        assert_eq!(gradient.dtype(), dtype, "{what}: {variable}");
                        let largest = gradient.to_dtype(DType::F64)?.abs()?.max_all()?;
                        let largest = largest.to_scalar::<f64>()?;
                        assert!(largest > 0.0 && largest.is_finite(), "{what}: {variable}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Weight-normalized convolutions in the middle: what they keep of the shape depends on their
/// padding.
#[test]
fn convolutions_under_weight_norm_let_every_gradient_through() -> Result<()> {
    let layers: [(&str, Build); 2] = [
        ("weight_norm::conv1d", |vb| {
            let config = candle_nn::Conv1dConfig {
                padding: 1,
                ..Default::default()
            };
            let options = WeightNormOptions::default();
            Ok(Box::new(weight_norm::conv1d(
                CHANNELS, 5, 3, config, options, vb,
            )?))
        }),
        ("weight_norm::conv_transpose1d", |vb| {
            let config = candle_nn::ConvTranspose1dConfig {
                padding: 1,
                ..Default::default()
            };
            let options = WeightNormOptions::default();
            Ok(Box::new(weight_norm::conv_transpose1d(
                CHANNELS, 5, 3, config, options, vb,
            )?))
        }),
    ];
    for (name, build) in layers {
        for input in [Input::Contiguous, Input::Strided] {
            let found = missing(build, input, Mode::Train)?;
            assert!(found.is_empty(), "{name}, {input:?}: none for {found:?}");
        }
    }
    Ok(())
}

/// candle-nn 0.11: the fused layers cut the graph on contiguous input. Where an update of candle
/// mends one, take it out of the list, and of the reasons in the README.
#[test]
fn which_of_candles_layers_cut_the_gradient() -> Result<()> {
    const UPSTREAM: [&str; 3] = ["before.bias", "before.weight", "input"];
    let with = |own: &[&'static str]| [&UPSTREAM[..], own].concat();
    let layers: [(&str, Build, Vec<&str>); 6] = [
        (
            "batch_norm",
            |vb| Ok(Box::new(candle_nn::batch_norm(CHANNELS, 1e-5, vb)?)),
            vec![],
        ),
        (
            "layer_norm",
            |vb| Ok(Box::new(candle_nn::layer_norm(WIDTH, 1e-5, vb)?)),
            with(&["norm.bias", "norm.weight"]),
        ),
        (
            "layer_norm_no_bias",
            |vb| Ok(Box::new(candle_nn::layer_norm_no_bias(WIDTH, 1e-5, vb)?)),
            vec![],
        ),
        (
            "rms_norm",
            |vb| Ok(Box::new(candle_nn::rms_norm(WIDTH, 1e-6, vb)?)),
            with(&["norm.weight"]),
        ),
        (
            "RmsNorm::forward_diff",
            |vb| {
                let norm = candle_nn::rms_norm(WIDTH, 1e-6, vb)?;
                Ok(Box::new(func_t(move |xs, _| norm.forward_diff(xs))))
            },
            vec![],
        ),
        (
            "group_norm",
            |vb| Ok(Box::new(candle_nn::group_norm(2, CHANNELS, 1e-5, vb)?)),
            vec![],
        ),
    ];
    for (name, build, cut) in layers {
        for mode in [Mode::Train, Mode::Infer] {
            let found = missing(build, Input::Contiguous, mode)?;
            let what = format!("gradients through {name} on contiguous input, {mode:?}");
            if !cut.is_empty() {
                let then = "the README has a reason less";
                faults::report(&what, !found.is_empty(), then);
            }
            assert!(
                found == cut || found.is_empty(),
                "{what}: none for {found:?}"
            );
            let found = missing(build, Input::Strided, mode)?;
            assert!(
                found.is_empty(),
                "candle_nn {name} on strided input: none for {found:?}"
            );
        }
    }
    Ok(())
}
