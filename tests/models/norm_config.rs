//! `NormConfig`: norms that come from a name or a file, and that run along the right axes with the
//! right layer before them.

use std::collections::HashMap;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, ModuleT, VarBuilder, VarMap,
};
use candle_norm::{
    Affine, BatchNormOptions, BatchRenormOptions, DyTOptions, GroupNormOptions,
    InstanceNormOptions, LayerNormOptions, Norm, NormConfig, NormedLayer, RmsNormOptions,
    ScaleNormOptions, SwitchNormOptions, WeightNormOptions, batch_norm, trainable_vars,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use testkit::data::values;
use testkit::errors::message;
use testkit::vars::{names, var, vb};

const CPU: Device = Device::Cpu;
const NAMES: [&str; 11] = [
    "none",
    "batch",
    "layer",
    "group:2",
    "instance",
    "rms",
    "scale",
    "switch",
    "weight",
    "batch_renorm",
    "dyt",
];
/// Those that follow a layer.
const ALONE: [&str; 10] = [
    "none",
    "batch",
    "layer",
    "group:2",
    "instance",
    "rms",
    "scale",
    "switch",
    "batch_renorm",
    "dyt",
];

type Build = fn(&NormConfig, usize, VarBuilder) -> Result<Box<dyn Norm>>;
/// The two ways to build a norm by itself.
const AXES: [Build; 2] = [NormConfig::channels, NormConfig::features];

fn config(name: &str) -> NormConfig {
    name.parse().expect("a name that NormConfig knows")
}

fn random(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = (0..dims.iter().product()).map(|_| rng.random_range(-2f64..3.));
    Tensor::from_vec(values.collect(), dims, &CPU)
}

/// Gives every trainable variable values of its own, so that none stands for another and no scale
/// is 1.
fn scatter(vars: &VarMap) -> Result<()> {
    for (seed, var) in (100..).zip(trainable_vars(vars)) {
        var.set(&(random(var.dims(), seed)? * 0.4)?)?;
    }
    Ok(())
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, what: &str) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    for (i, (g, w)) in values(got)?.into_iter().zip(values(want)?).enumerate() {
        let close = (g - w).abs() <= 1e-10 * w.abs().max(1.);
        assert!(close, "{what}: element {i} is {g}, expected {w}");
    }
    Ok(())
}

// Names.

#[test]
fn names_round_trip_and_stand_for_the_default_options() {
    let defaults = [
        NormConfig::None,
        NormConfig::Batch(BatchNormOptions::default()),
        NormConfig::Layer(LayerNormOptions::default()),
        NormConfig::Group {
            num_groups: 2,
            options: GroupNormOptions::default(),
        },
        NormConfig::Instance(InstanceNormOptions::default()),
        NormConfig::Rms(RmsNormOptions::default()),
        NormConfig::Scale(ScaleNormOptions::default()),
        NormConfig::Switch(SwitchNormOptions::default()),
        NormConfig::Weight(WeightNormOptions::default()),
        NormConfig::BatchRenorm(BatchRenormOptions::default()),
        NormConfig::Dyt(DyTOptions::default()),
    ];
    for (name, default) in NAMES.into_iter().zip(defaults) {
        assert_eq!(config(name), default);
        assert_eq!(default.to_string(), name);
    }
    assert_eq!(config("group:32").to_string(), "group:32");
}

#[test]
fn display_names_the_kind_whatever_its_options() {
    let options = BatchNormOptions {
        momentum: None,
        ..Default::default()
    };
    assert_eq!(NormConfig::Batch(options).to_string(), "batch");
    let options = SwitchNormOptions {
        affine: Affine::Bias,
        ..Default::default()
    };
    assert_eq!(NormConfig::Switch(options).to_string(), "switch");
    let num_groups = 4;
    let options = GroupNormOptions::from(1e-3);
    let group = NormConfig::Group {
        num_groups,
        options,
    };
    assert_eq!(group.to_string(), "group:4");
}

#[test]
fn the_names_of_the_field_are_known() {
    let known: [(&str, &[&str]); 11] = [
        ("none", &["None", "NONE", " none\n", "Identity", "identity"]),
        (
            "batch",
            &[
                "Batch",
                "batch ",
                "BatchNorm",
                "batchnorm",
                "batch_norm",
                "batch-norm",
                "Batch Norm",
                "BatchNorm1d",
                "BatchNorm2d",
                "BatchNorm3d",
                "BATCHNORM2D",
                "batch_norm_2d",
                "BatchNormalization",
                "batch normalization",
                "bn",
                "BN",
            ],
        ),
        (
            "layer",
            &[
                "LayerNorm",
                "layer_norm",
                "layernorm2d",
                "LayerNorm2d",
                "LayerNormalization",
                "ln",
            ],
        ),
        (
            "group:8",
            &[
                "GroupNorm:8",
                "group: 8",
                " group : 8 ",
                "group_norm:8",
                "Group Normalization: 8",
                "gn:8",
                "group:08",
            ],
        ),
        (
            "instance",
            &["InstanceNorm", "InstanceNorm1d", "instance_norm", "in"],
        ),
        (
            "rms",
            &["RMS", "RMSNorm", "RmsNorm", "rms_norm", "rms norm"],
        ),
        ("scale", &["ScaleNorm", "scalenorm", "scale_norm"]),
        (
            "switch",
            &[
                "SwitchNorm",
                "SwitchNorm2d",
                "SwitchableNorm",
                "switchable normalization",
            ],
        ),
        ("weight", &["WeightNorm", "weight_norm", "wn"]),
        (
            "batch_renorm",
            &[
                "BatchRenorm",
                "BatchRenorm2d",
                "batch renormalization",
                "brn",
            ],
        ),
        ("dyt", &["DyT", "DynamicTanh", "dynamic_tanh"]),
    ];
    for (name, others) in known {
        for other in others {
            assert_eq!(
                other.parse::<NormConfig>().ok(),
                Some(config(name)),
                "{other:?}"
            );
        }
    }
}

/// Start of the message, before the name that was given.
const EXPECTED: &str = "NormConfig: expected none, batch, layer, group:N (N groups, at least 1), \
    instance, rms, scale, switch, weight, batch_renorm or dyt, got ";

#[test]
fn a_bad_name_is_quoted_next_to_the_good_ones() {
    let long = "layer".repeat(1000);
    // `sn` is spectral norm, or switchable norm; the others are no norm of this crate, or no name
    // of anything.
    for name in [
        "",
        " ",
        ":",
        ":8",
        "norm",
        "normalization",
        "2d",
        "sn",
        "bn2d",
        "bnnorm",
        "lrn",
        "no",
        "false",
        "SpectralNorm",
        "SyncBatchNorm",
        "dropout",
        "1e-5",
        "ланорм",
        &long,
    ] {
        assert_eq!(
            message(name.parse::<NormConfig>()).lines().next(),
            Some(format!("{EXPECTED}{name:?}").as_str())
        );
    }
}

#[test]
fn a_name_that_is_nearly_right_is_set_right() {
    for (name, meant) in [
        ("grup:8", "group:8"),
        ("groups:16", "group:16"),
        ("group8", "group:8"),
        ("group=32", "group:32"),
        ("GroupNorm(4)", "group:4"),
        ("gruop", "group:8"),
        ("GroupNorm2d:4", "group:4"),
        ("bacth", "batch"),
        ("batchnrom", "batch"),
        ("BatchNom2d", "batch"),
        ("batch2d", "batch"),
        ("layr", "layer"),
        ("LayerNrom", "layer"),
        ("instace", "instance"),
        ("instnce_norm", "instance"),
        ("rmss", "rms"),
        ("RMSNrom", "rms"),
        ("swich", "switch"),
        ("ScaleNrom", "scale"),
        ("wieght", "weight"),
        ("non", "none"),
    ] {
        assert_eq!(
            message(name.parse::<NormConfig>()).lines().next(),
            Some(format!("{EXPECTED}{name:?}; did you mean {meant:?}?").as_str())
        );
        meant
            .parse::<NormConfig>()
            .expect("what is proposed is a name");
    }
}

#[test]
fn a_number_is_asked_for_where_it_belongs_and_nowhere_else() {
    for name in [
        "group",
        "GroupNorm",
        "gn",
        "group:",
        "group: ",
        "group:0",
        "group:-1",
        "group:1.5",
        "group:two",
        "group:1e-5",
        "group:8:2",
        "group:99999999999999999999999",
    ] {
        assert_eq!(
            message(name.parse::<NormConfig>()).lines().next(),
            Some(format!(
                "NormConfig: expected a number of groups of at least 1 after \"group:\", such as \
                \"group:32\", got {name:?}"
            ).as_str())
        );
    }
    for (name, kind) in [
        ("batch:1", "batch"),
        ("LayerNorm:1e-5", "layer"),
        ("in:", "instance"),
    ] {
        let text = message(name.parse::<NormConfig>());
        let says = format!(
            "NormConfig: expected nothing after {kind:?}, since only group norm takes a number, \
            got {name:?}"
        );
        assert!(text.starts_with(&says), "{text}");
    }
}

#[test]
fn layers_say_their_kind_and_name_their_tensors() -> Result<()> {
    let batch = ["running_mean", "running_var", "num_batches_tracked"];
    let switch = ["weight", "bias", "mean_weight", "var_weight"];
    let expected: [(&str, &[&str], &[&str]); 10] = [
        ("none", &[], &[]),
        ("batch", &["weight", "bias"], &batch),
        ("layer", &["weight", "bias"], &[]),
        ("group", &["weight", "bias"], &[]),
        ("instance", &[], &[]),
        ("rms", &["weight"], &[]),
        ("scale", &["weight"], &[]),
        ("switch", &switch, &batch),
        ("batch_renorm", &["weight", "bias"], &batch),
        ("dyt", &["alpha", "weight", "bias"], &[]),
    ];
    for (name, (kind, parameters, buffers)) in ALONE.into_iter().zip(expected) {
        for build in AXES {
            let vars = VarMap::new();
            let norm = build(&config(name), 4, vb(&vars, DType::F64))?;
            assert_eq!(norm.kind(), kind);
            let of = |tensors: Vec<(&'static str, Tensor)>| -> Vec<_> {
                tensors.into_iter().map(|(name, _)| name).collect()
            };
            assert_eq!(of(norm.parameters()), parameters, "{name}");
            assert_eq!(of(norm.buffers()), buffers, "{name}");
            assert_eq!(
                norm.running_stats().is_some(),
                !buffers.is_empty(),
                "{name}"
            );
            let mut all: Vec<_> = [parameters, buffers].concat();
            all.sort_unstable();
            assert_eq!(names(&vars), all, "{name}");
        }
    }
    Ok(())
}

/// The options of a layer do not make another of it.
#[test]
fn a_layer_norm_that_keeps_the_mean_is_still_called_layer() -> Result<()> {
    let options = LayerNormOptions {
        remove_mean: false,
        ..Default::default()
    };
    let config = NormConfig::Layer(options);
    for build in AXES {
        let norm = build(&config, 4, vb(&VarMap::new(), DType::F64))?;
        assert_eq!(norm.kind(), config.to_string());
    }
    let rms = candle_norm::rms_norm(4, 1e-6, vb(&VarMap::new(), DType::F64))?;
    assert_eq!(rms.kind(), "rms");
    assert_eq!(rms.into_inner().kind(), "rms");
    Ok(())
}

// Axes.

/// Right result of the norm `name` for `x` whose channels lie on `axis`: every element by the mean
/// and the variance of those that share its statistics, found by their indices one by one.
fn expected(name: &str, x: &Tensor, axis: usize, vars: &VarMap) -> Result<Tensor> {
    if name == "none" {
        return Ok(x.clone());
    }
    let dims = x.dims();
    let indices: Vec<Vec<usize>> = (0..x.elem_count())
        .map(|mut flat| {
            let index = dims.iter().rev().map(|n| {
                let i = flat % n;
                flat /= n;
                i
            });
            let mut index: Vec<_> = index.collect();
            index.reverse();
            index
        })
        .collect();
    let together = |index: &Vec<usize>| -> Vec<usize> {
        let (sample, channel) = (index[0], index[axis]);
        match name {
            "batch" | "batch_renorm" => vec![channel],
            "instance" => vec![sample, channel],
            "group:2" => vec![sample, channel / (dims[axis] / 2)],
            // All but the channel.
            _ => {
                let mut position = index.clone();
                position.remove(axis);
                position
            }
        }
    };
    let x = values(x)?;
    let mut groups: HashMap<Vec<usize>, Vec<f64>> = HashMap::new();
    for (index, x) in indices.iter().zip(&x) {
        groups.entry(together(index)).or_default().push(*x);
    }
    let has = names(vars);
    let parameter = |name: &str| match has.iter().any(|n| n == name) {
        true => values(&var(vars, name)).map(Some),
        false => Ok(None),
    };
    let (weight, bias) = (parameter("weight")?, parameter("bias")?);
    if let (Some(alpha), Some(w), Some(b)) = (parameter("alpha")?, &weight, &bias) {
        let y = indices.iter().zip(&x).map(|(index, x)| {
            let channel = index[axis];
            (alpha[0] * x).tanh() * w[channel] + b[channel]
        });
        return Tensor::from_vec(y.collect(), dims, &CPU);
    }
    let y = indices.iter().zip(&x).map(|(index, x)| {
        let group = &groups[&together(index)];
        let count = group.len() as f64;
        let (mean, eps) = match name {
            "rms" => (0., 1e-6),
            "scale" => (0., 0.),
            "batch_renorm" => (group.iter().sum::<f64>() / count, 1e-3),
            _ => (group.iter().sum::<f64>() / count, 1e-5),
        };
        let var = group.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        // Of `scale`, one parameter serves all channels.
        let of = |p: &Option<Vec<f64>>, without| {
            p.as_ref().map_or(without, |p| p[index[axis] % p.len()])
        };
        let square = if name == "scale" {
            var * count
        } else {
            var + eps
        };
        (x - mean) / square.sqrt() * of(&weight, 1.) + of(&bias, 0.)
    });
    Tensor::from_vec(y.collect(), dims, &CPU)
}

#[test]
fn channels_are_those_of_axis_1_and_features_those_of_the_last() -> Result<()> {
    let shapes: [&[usize]; 4] = [&[5, 4], &[3, 4, 6], &[3, 4, 2, 5], &[2, 4, 3, 2, 2]];
    for (seed, shape) in (0..).zip(shapes) {
        let channels = random(shape, seed)?;
        let last = shape.len() - 1;
        // The same sizes with 4 at the end; no other axis has this size, so that a wrong axis is an
        // error too.
        let mut shape = shape.to_vec();
        shape.swap(1, last);
        let features = random(&shape, 10 + seed)?;
        // The mixture of `switch` has a test of its own.
        for name in ALONE.into_iter().filter(|name| *name != "switch") {
            let vars = VarMap::new();
            let by_channel = config(name).channels(4, vb(&vars, DType::F64))?;
            let by_feature = config(name).features(4, vb(&vars, DType::F64))?;
            scatter(&vars)?;
            if name == "instance" && last == 1 {
                for norm in [by_channel, by_feature] {
                    let text = message(norm.forward_t(&channels, true));
                    assert!(text.contains("rank at least 3"), "{text}");
                }
                continue;
            }
            for (norm, x, axis) in [(by_channel, &channels, 1), (by_feature, &features, last)] {
                let y = norm.forward_t(x, true)?;
                let what = format!("{name} of {:?}, axis {axis}", x.dims());
                assert_close(&y, &expected(name, x, axis, &vars)?, &what)?;
                assert!(y.is_contiguous(), "{what}");
                if !name.starts_with("batch") {
                    assert_eq!(values(&norm.forward_t(x, false)?)?, values(&y)?, "{what}");
                }
                if last > 1 && name != "none" {
                    let wrong = x.transpose(1, last)?;
                    let error = norm.forward_t(&wrong, true).is_err();
                    assert!(error, "{what}: {:?} has 4 of something else", wrong.dims());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn features_of_batch_are_the_batch_norm_of_the_transposed() -> Result<()> {
    let (mine, its) = (VarMap::new(), VarMap::new());
    let features = config("batch").features(4, vb(&mine, DType::F64))?;
    let channels = batch_norm(4, 1e-5, vb(&its, DType::F64))?;
    scatter(&mine)?;
    scatter(&its)?;
    for (seed, train) in [(0, true), (1, true), (2, false)] {
        let x = random(&[3, 5, 4], seed)?;
        let y = features.forward_t(&x, train)?;
        let want = channels.forward_t(&x.transpose(1, 2)?, train)?;
        assert_close(&y, &want.transpose(1, 2)?, &format!("train {train}"))?;
    }
    let stats = features.running_stats().expect("a tracking layer");
    let (got, want) = (
        stats.snapshot()?,
        channels.running_stats().expect("one").snapshot()?,
    );
    assert_close(&got.mean, &want.mean, "mean")?;
    assert_close(&got.var, &want.var, "variance")?;
    assert_eq!((got.num_batches_tracked, want.num_batches_tracked), (2, 2));
    Ok(())
}

#[test]
fn features_of_switch_are_the_switch_norm_of_the_transposed_without_instances() -> Result<()> {
    let (mine, its) = (VarMap::new(), VarMap::new());
    let features = config("switch").features(4, vb(&mine, DType::F64))?;
    let options = SwitchNormOptions {
        spatial_dims: 0,
        ..Default::default()
    };
    let channels = candle_norm::switch_norm(4, options, vb(&its, DType::F64))?;
    scatter(&mine)?;
    scatter(&its)?;
    for (seed, train) in [(0, true), (1, true), (2, false)] {
        let x = random(&[3, 5, 4], seed)?;
        let y = features.forward_t(&x, train)?;
        let want = channels.forward_t(&x.transpose(1, 2)?, train)?;
        assert_close(&y, &want.transpose(1, 2)?, &format!("train {train}"))?;
    }
    Ok(())
}

/// The message has the shape that came, not the transposed one.
#[test]
fn features_of_another_number_are_refused_in_the_shape_that_came() -> Result<()> {
    for name in ["batch", "group:2", "instance", "switch"] {
        let norm = config(name).features(4, vb(&VarMap::new(), DType::F64))?;
        let text = message(norm.forward_t(&random(&[2, 4, 3], 0)?, true));
        let parts = [
            "expected 4 features on the last axis",
            "got input size [2, 4, 3]; axis 1 has 4: if channels come first",
            "build a layer for channels",
        ];
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
    Ok(())
}

#[test]
fn features_pass_gradients_through_the_transposition() -> Result<()> {
    let cotangent = random(&[3, 5, 4], 1)?;
    for name in ALONE {
        let vars = VarMap::new();
        let norm = config(name).features(4, vb(&vars, DType::F64))?;
        scatter(&vars)?;
        let x = Var::from_tensor(&random(&[3, 5, 4], 0)?)?;
        let loss = || (norm.forward_t(&x, true)? * &cotangent)?.sum_all();
        assert_gradients(&[("x".to_string(), x.clone())], loss, name)?;
    }
    Ok(())
}

#[test]
fn the_method_says_the_axis_whatever_the_options_say() -> Result<()> {
    let x = random(&[3, 4, 4], 0)?;
    for channels_first in [false, true] {
        let configs = [
            NormConfig::Layer(LayerNormOptions {
                channels_first,
                ..Default::default()
            }),
            NormConfig::Rms(RmsNormOptions {
                channels_first,
                ..Default::default()
            }),
        ];
        for config in configs {
            for (axis, build) in [1, 2].into_iter().zip(AXES) {
                let vars = VarMap::new();
                let norm = build(&config, 4, vb(&vars, DType::F64))?;
                scatter(&vars)?;
                let want = expected(&config.to_string(), &x, axis, &vars)?;
                assert_close(&norm.forward_t(&x, true)?, &want, &format!("{config:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn options_reach_the_layer() -> Result<()> {
    let x = random(&[4, 5, 6], 0)?;
    let eps = 0.5;
    let configs = [
        NormConfig::Batch(eps.into()),
        NormConfig::Layer(eps.into()),
        NormConfig::Group {
            num_groups: 2,
            options: eps.into(),
        },
        NormConfig::Instance(eps.into()),
        NormConfig::Rms(eps.into()),
    ];
    for config in configs {
        let plain: NormConfig = config.to_string().parse()?;
        for (build, x) in AXES.into_iter().zip([x.transpose(1, 2)?, x.clone()]) {
            let of = |config: &NormConfig| {
                build(config, 6, vb(&VarMap::new(), DType::F64))?.forward_t(&x, true)
            };
            let (y, default) = (values(&of(&config)?)?, values(&of(&plain)?)?);
            let smaller = y.iter().zip(&default).all(|(a, b)| a.abs() < b.abs());
            assert!(smaller, "{config}: a larger eps shrinks the output");
        }
    }
    let vars = VarMap::new();
    NormConfig::Weight(None.into()).linear(4, 6, vb(&vars, DType::F64))?;
    let g = var(&vars, "layer.parametrizations.weight.original0");
    assert!(g.dims().is_empty(), "one magnitude for the whole weight");
    let bad = NormConfig::Layer((-1.).into());
    let text = message(bad.channels(4, vb(&VarMap::new(), DType::F64)));
    assert!(text.contains("LayerNorm: expected eps > 0"), "{text}");
    let text = message(config("group:3").channels(4, vb(&VarMap::new(), DType::F64)));
    assert!(
        text.contains("num_groups (3) to divide num_channels (4)"),
        "{text}"
    );
    Ok(())
}

#[test]
fn weight_alone_names_the_helper() {
    for alone in AXES {
        let vars = VarMap::new();
        let text = message(alone(&config("weight"), 4, vb(&vars, DType::F64)));
        for part in [
            "\"weight\"",
            "NormConfig::linear",
            "conv2d",
            "conv_transpose2d",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(names(&vars).is_empty());
    }
}

// A layer and its norm.

/// A layer that `NormConfig` builds together with its norm, from 4 inputs to 6 outputs.
struct Block {
    name: &'static str,
    build: fn(&NormConfig, VarBuilder) -> Result<NormedLayer>,
    /// candle's own layer of the same configuration.
    plain: fn(Tensor, Option<Tensor>) -> Box<dyn Module>,
    weight: &'static [usize],
    input: &'static [usize],
}

const CONV1D: Conv1dConfig = Conv1dConfig {
    padding: 2,
    stride: 2,
    dilation: 1,
    groups: 2,
    cudnn_fwd_algo: None,
};
const CONV2D: Conv2dConfig = Conv2dConfig {
    padding: 1,
    stride: 2,
    dilation: 1,
    groups: 2,
    cudnn_fwd_algo: None,
};
// candle's own one-dimensional one is right with padding only.
const CONV_TRANSPOSE1D: ConvTranspose1dConfig = ConvTranspose1dConfig {
    padding: 1,
    output_padding: 1,
    stride: 2,
    dilation: 1,
    groups: 1,
};
const CONV_TRANSPOSE2D: ConvTranspose2dConfig = ConvTranspose2dConfig {
    padding: 1,
    output_padding: 0,
    stride: 2,
    dilation: 1,
};

const BLOCKS: [Block; 6] = [
    Block {
        name: "linear of rows",
        build: |norm, vb| norm.linear(4, 6, vb),
        plain: |w, b| Box::new(Linear::new(w, b)),
        weight: &[6, 4],
        input: &[5, 4],
    },
    Block {
        name: "linear of sequences",
        build: |norm, vb| norm.linear(4, 6, vb),
        plain: |w, b| Box::new(Linear::new(w, b)),
        weight: &[6, 4],
        input: &[3, 5, 4],
    },
    Block {
        name: "conv1d",
        build: |norm, vb| norm.conv1d(4, 6, 3, CONV1D, vb),
        plain: |w, b| Box::new(Conv1d::new(w, b, CONV1D)),
        weight: &[6, 2, 3],
        input: &[3, 4, 8],
    },
    Block {
        name: "conv2d",
        build: |norm, vb| norm.conv2d(4, 6, 3, CONV2D, vb),
        plain: |w, b| Box::new(Conv2d::new(w, b, CONV2D)),
        weight: &[6, 2, 3, 3],
        input: &[3, 4, 7, 4],
    },
    Block {
        name: "conv_transpose1d",
        build: |norm, vb| norm.conv_transpose1d(4, 6, 3, CONV_TRANSPOSE1D, vb),
        plain: |w, b| Box::new(ConvTranspose1d::new(w, b, CONV_TRANSPOSE1D)),
        weight: &[4, 6, 3],
        input: &[3, 4, 5],
    },
    Block {
        name: "conv_transpose2d",
        build: |norm, vb| norm.conv_transpose2d(4, 6, 3, CONV_TRANSPOSE2D, vb),
        plain: |w, b| Box::new(ConvTranspose2d::new(w, b, CONV_TRANSPOSE2D)),
        weight: &[4, 6, 3, 3],
        input: &[3, 4, 3, 4],
    },
];

impl Block {
    /// Whether the norm `name` has statistics for the outputs: those over space need space.
    fn serves(&self, name: &str) -> bool {
        name != "instance" || self.input.len() > 2
    }
}

#[test]
fn a_block_has_the_names_and_shapes_that_a_checkpoint_has() -> Result<()> {
    for block in BLOCKS {
        for name in NAMES {
            let vars = VarMap::new();
            let built = (block.build)(&config(name), vb(&vars, DType::F64))?;
            let mut want = match name {
                "weight" => vec![
                    "layer.bias",
                    "layer.parametrizations.weight.original0",
                    "layer.parametrizations.weight.original1",
                ],
                _ => vec!["layer.weight"],
            };
            match name {
                "none" | "instance" => want.push("layer.bias"),
                "rms" | "scale" => want.extend(["layer.bias", "norm.weight"]),
                "dyt" => want.extend(["norm.alpha", "norm.bias", "norm.weight"]),
                "batch" | "batch_renorm" => want.extend([
                    "norm.bias",
                    "norm.num_batches_tracked",
                    "norm.running_mean",
                    "norm.running_var",
                    "norm.weight",
                ]),
                "switch" => want.extend([
                    "norm.bias",
                    "norm.mean_weight",
                    "norm.num_batches_tracked",
                    "norm.running_mean",
                    "norm.running_var",
                    "norm.var_weight",
                    "norm.weight",
                ]),
                "layer" | "group:2" => want.extend(["norm.bias", "norm.weight"]),
                _ => {}
            }
            want.sort_unstable();
            let what = format!("{name} {}", block.name);
            assert_eq!(names(&vars), want, "{what}");
            let weight = match name {
                "weight" => "layer.parametrizations.weight.original1",
                _ => "layer.weight",
            };
            assert_eq!(var(&vars, weight).dims(), block.weight, "{what}");
            let kind = name.split(':').next().expect("the part before the colon");
            for name in want {
                let dims = var(&vars, name).dims().to_vec();
                match name {
                    "norm.num_batches_tracked" => assert!(dims.is_empty()),
                    _ if name.contains("weight") && name.starts_with("layer.") => {}
                    // Those of the reference implementation have axes of size one, and a share for
                    // each source.
                    "norm.mean_weight" | "norm.var_weight" => {
                        assert!(dims.len() == 1 && dims[0] <= 3)
                    }
                    _ if kind == "switch" => assert!(dims.len() >= 2 && dims[..2] == [1, 6]),
                    "norm.weight" if kind == "scale" => assert_eq!(dims, [1]),
                    "norm.alpha" => assert_eq!(dims, [1]),
                    _ => assert_eq!(dims, [6], "{what}: {name}"),
                }
            }
            assert_eq!(built.norm().kind(), kind, "{what}");
            assert_eq!(built.weight().is_some(), name != "weight", "{what}");
            let has_bias = matches!(name, "none" | "instance" | "rms" | "scale");
            assert_eq!(built.bias().is_some(), has_bias, "{what}");
        }
    }
    Ok(())
}

#[test]
fn the_bias_goes_exactly_where_the_norm_has_one() -> Result<()> {
    let configs = |affine| {
        [
            NormConfig::Batch(BatchNormOptions {
                affine,
                ..Default::default()
            }),
            NormConfig::Layer(LayerNormOptions {
                affine,
                ..Default::default()
            }),
            NormConfig::Group {
                num_groups: 2,
                options: GroupNormOptions {
                    affine,
                    ..Default::default()
                },
            },
            NormConfig::Instance(InstanceNormOptions {
                affine,
                ..Default::default()
            }),
            NormConfig::Rms(RmsNormOptions {
                affine,
                ..Default::default()
            }),
            NormConfig::Switch(SwitchNormOptions {
                affine,
                ..Default::default()
            }),
        ]
    };
    for affine in [
        Affine::None,
        Affine::Weight,
        Affine::Bias,
        Affine::WeightAndBias,
    ] {
        for config in configs(affine) {
            let vars = VarMap::new();
            let block = config.linear(4, 6, vb(&vars, DType::F64))?;
            let names = names(&vars);
            let has = |name: &str| names.iter().any(|n| n == name);
            let shifts = affine.has_bias();
            assert_eq!(has("norm.bias"), shifts, "{config:?}");
            assert_eq!(has("layer.bias"), !shifts, "{config:?}");
            assert_eq!(block.bias().is_some(), !shifts, "{config:?}");
            assert_eq!(has("norm.weight"), affine.has_weight(), "{config:?}");
        }
    }
    Ok(())
}

#[test]
fn a_block_computes_its_two_parts_one_after_the_other() -> Result<()> {
    for block in BLOCKS {
        for name in NAMES {
            if !block.serves(name) {
                continue;
            }
            let vars = VarMap::new();
            let built = (block.build)(&config(name), vb(&vars, DType::F64))?;
            scatter(&vars)?;
            let has_bias = names(&vars).iter().any(|n| n == "layer.bias");
            let bias = has_bias.then(|| var(&vars, "layer.bias"));
            for (seed, train) in [(0, true), (1, true), (2, false)] {
                let x = random(block.input, seed)?;
                let what = format!("{name} {}, train {train}", block.name);
                let want = if name == "weight" {
                    let g = var(&vars, "layer.parametrizations.weight.original0");
                    let v = var(&vars, "layer.parametrizations.weight.original1");
                    let others: Vec<_> = (1..v.rank()).collect();
                    let length = v.sqr()?.sum_keepdim(others)?.sqrt()?;
                    let w = v.broadcast_mul(&(g / length)?)?;
                    (block.plain)(w, bias.clone()).forward(&x)?
                } else {
                    let layer = (block.plain)(var(&vars, "layer.weight"), bias.clone());
                    let y = layer.forward(&x)?;
                    // A copy, so that this batch does not go into the block's statistics twice.
                    let copy = copy(&vars)?;
                    let norm = match block.weight.len() {
                        2 => config(name).features(6, vb(&copy, DType::F64).pp("norm"))?,
                        _ => config(name).channels(6, vb(&copy, DType::F64).pp("norm"))?,
                    };
                    norm.forward_t(&y, train)?
                };
                assert_close(&built.forward_t(&x, train)?, &want, &what)?;
            }
        }
    }
    Ok(())
}

fn copy(vars: &VarMap) -> Result<VarMap> {
    let copied = VarMap::new();
    for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
        let var = Var::from_tensor(&var.as_detached_tensor().copy()?)?;
        let mut copied = copied.data().lock().expect("no thread panicked");
        copied.insert(name.clone(), var);
    }
    Ok(copied)
}

#[test]
fn gradients_reach_every_parameter_of_a_block_and_its_input() -> Result<()> {
    for block in BLOCKS {
        for name in NAMES {
            if !block.serves(name) {
                continue;
            }
            let vars = VarMap::new();
            let built = (block.build)(&config(name), vb(&vars, DType::F64))?;
            scatter(&vars)?;
            let x = Var::from_tensor(&random(block.input, 0)?)?;
            let cotangent = random(built.forward_t(&x, true)?.dims(), 1)?;
            let loss = || (built.forward_t(&x, true)? * &cotangent)?.sum_all();
            let what = format!("{name} {}", block.name);
            let mut named = vec![("x".to_string(), x.clone())];
            for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
                let statistic = name.contains("running") || name.contains("tracked");
                if statistic {
                    let grads = loss()?.backward()?;
                    assert!(grads.get(var).is_none(), "{what}: {name} is no parameter");
                } else {
                    named.push((name.clone(), var.clone()));
                }
            }
            assert_gradients(&named, loss, &what)?;
        }
    }
    Ok(())
}

/// Compares the gradient of `loss` with central differences in the first, the middle and the last
/// element of each variable.
fn assert_gradients(
    vars: &[(String, Var)],
    loss: impl Fn() -> Result<Tensor>,
    what: &str,
) -> Result<()> {
    let grads = loss()?.backward()?;
    for (name, var) in vars {
        let Some(grad) = grads.get(var) else {
            panic!("{what}: no gradient for {name}")
        };
        assert_eq!(grad.dims(), var.dims(), "{what}: {name}");
        let (grad, start) = (values(grad)?, values(var)?);
        for i in [0, start.len() / 2, start.len() - 1] {
            let at = |step: f64| {
                let mut moved = start.clone();
                moved[i] += step;
                var.set(&Tensor::from_vec(moved, var.dims(), &CPU)?)?;
                loss()?.to_scalar::<f64>()
            };
            let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            at(0.)?;
            let close = (grad[i] - numeric).abs() <= 1e-6 * numeric.abs().max(1.);
            assert!(
                close,
                "{what}: {name} at {i} is {}, expected {numeric}",
                grad[i]
            );
        }
    }
    Ok(())
}

#[test]
fn a_block_from_another_checkpoint_keeps_its_values() -> Result<()> {
    let vars = VarMap::new();
    let first = config("batch").linear(4, 6, vb(&vars, DType::F64))?;
    scatter(&vars)?;
    let x = random(&[5, 4], 0)?;
    first.forward_t(&x, true)?;
    let tensors = vars.data().lock().expect("no thread panicked");
    let tensors: HashMap<_, _> = tensors
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let fixed = VarBuilder::from_tensors(tensors, DType::F64, &CPU);
    let second = config("batch").linear(4, 6, fixed)?;
    let (y, want) = (second.forward_t(&x, false)?, first.forward_t(&x, false)?);
    assert_eq!(values(&y)?, values(&want)?);
    Ok(())
}

#[test]
fn a_block_refuses_what_its_layer_cannot_be() {
    let none = config("none");
    let refused = |text: String, part: &str| assert!(text.contains(part), "{text}");
    let stride = Conv2dConfig {
        stride: 0,
        ..Default::default()
    };
    let text = message(none.conv2d(4, 6, 3, stride, vb(&VarMap::new(), DType::F64)));
    refused(text, "stride of at least 1");
    let groups = Conv1dConfig {
        groups: 3,
        ..Default::default()
    };
    let text = message(none.conv1d(4, 6, 3, groups, vb(&VarMap::new(), DType::F64)));
    refused(
        text,
        "groups (3) to divide the channels, got 4 in and 6 out",
    );
    let text = message(config("group:4").linear(4, 6, vb(&VarMap::new(), DType::F64)));
    refused(text, "num_groups (4) to divide num_channels (6)");
}

// Boxes and resets.

fn forward(model: &impl ModuleT, x: &Tensor) -> Result<Tensor> {
    model.forward_t(x, true)
}

#[test]
fn a_boxed_norm_is_a_module_that_moves_between_threads() -> Result<()> {
    let x = random(&[3, 4, 5], 0)?;
    for name in ALONE {
        let vars = VarMap::new();
        let norm: Box<dyn Norm> = config(name).channels(4, vb(&vars, DType::F64))?;
        let want = values(&forward(&norm, &x)?)?;
        assert!(!format!("{norm:?}").is_empty());
        let (there, input) = (norm, x.clone());
        let elsewhere = std::thread::spawn(move || {
            let layers: Vec<Box<dyn ModuleT + Send>> = vec![Box::new(there)];
            values(&layers[0].forward_t(&input, true)?)
        });
        assert_eq!(elsewhere.join().expect("no panic")?, want, "{name}");
    }
    Ok(())
}

#[test]
fn reset_brings_a_layer_back_to_where_it_starts() -> Result<()> {
    let tracked = NormConfig::Instance(InstanceNormOptions {
        affine: Affine::WeightAndBias,
        track_running_stats: true,
        ..Default::default()
    });
    let around_zero = NormConfig::Rms(RmsNormOptions {
        offset: 1.,
        ..Default::default()
    });
    let x = random(&[3, 4, 4], 0)?;
    let configs: Vec<_> = ALONE
        .map(config)
        .into_iter()
        .chain([tracked, around_zero])
        .collect();
    for (config, build) in configs.iter().flat_map(|c| AXES.map(|build| (c, build))) {
        let vars = VarMap::new();
        let norm = build(config, 4, vb(&vars, DType::F64))?;
        let state = || -> Result<Vec<_>> {
            let all = norm.parameters().into_iter().chain(norm.buffers());
            all.map(|(name, t)| Ok((name, values(&t.to_dtype(DType::F64)?)?)))
                .collect()
        };
        let (fresh, y) = (state()?, values(&norm.forward_t(&x, false)?)?);
        scatter(&vars)?;
        norm.forward_t(&x, true)?;
        for ((name, now), (_, fresh)) in state()?.iter().zip(&fresh) {
            assert_ne!(now, fresh, "{config:?}: {name}");
        }
        norm.reset()?;
        assert_eq!(state()?, fresh, "{config:?}");
        assert_eq!(values(&norm.forward_t(&x, false)?)?, y, "{config:?}");
    }
    Ok(())
}

#[test]
fn reset_of_weight_norm_makes_the_weight_its_direction() -> Result<()> {
    let vars = VarMap::new();
    let block = config("weight").linear(4, 6, vb(&vars, DType::F64))?;
    scatter(&vars)?;
    let parameters: HashMap<_, _> = block.norm().parameters().into_iter().collect();
    let bias = values(&parameters["bias"])?;
    let direction = &parameters["parametrizations.weight.original1"];
    let v = values(direction)?;
    block.norm().reset()?;
    assert_eq!(values(direction)?, v);
    assert_eq!(values(&parameters["bias"])?, bias);
    let plain = Linear::new(direction.clone(), Some(parameters["bias"].clone()));
    let x = random(&[5, 4], 0)?;
    assert_close(&block.forward_t(&x, true)?, &plain.forward(&x)?, "weight")
}

#[test]
fn reset_leaves_plain_tensors_alone() -> Result<()> {
    let weight = random(&[4], 0)?;
    let tensors = HashMap::from([("weight".to_string(), weight.clone())]);
    let norm = config("rms").features(4, VarBuilder::from_tensors(tensors, DType::F64, &CPU))?;
    norm.reset()?;
    assert_eq!(values(&norm.parameters()[0].1)?, values(&weight)?);
    Ok(())
}

#[cfg(feature = "serde")]
mod json {
    use super::*;
    use serde_json::{Value, from_value, json, to_value};

    fn read(value: Value) -> std::result::Result<NormConfig, String> {
        from_value(value).map_err(|e| e.to_string())
    }

    /// Every kind with options that are not the default.
    fn unusual() -> [NormConfig; 11] {
        [
            NormConfig::Batch(BatchNormOptions {
                momentum: None,
                affine: Affine::Weight,
                ..Default::default()
            }),
            NormConfig::Layer(LayerNormOptions {
                eps: 1e-12,
                channels_first: true,
                ..Default::default()
            }),
            NormConfig::Group {
                num_groups: 8,
                options: GroupNormOptions::from(1e-6),
            },
            NormConfig::Instance(InstanceNormOptions {
                track_running_stats: true,
                affine: Affine::WeightAndBias,
                ..Default::default()
            }),
            NormConfig::Rms(RmsNormOptions {
                eps: None,
                offset: 1.,
                cast: candle_norm::Cast::BeforeWeight,
                ..Default::default()
            }),
            NormConfig::Scale(1e-3.into()),
            NormConfig::Switch(SwitchNormOptions {
                affine: Affine::Bias,
                ..Default::default()
            }),
            NormConfig::Weight(None.into()),
            NormConfig::BatchRenorm(BatchRenormOptions {
                warmup_steps: 0,
                ..Default::default()
            }),
            NormConfig::Dyt(DyTOptions::derf()),
            NormConfig::Batch(BatchNormOptions {
                virtual_batch_size: Some(128),
                ..Default::default()
            }),
        ]
    }

    #[test]
    fn default_options_are_a_name() {
        for name in NAMES.into_iter().chain(["group:8"]) {
            assert_eq!(to_value(config(name)).expect("a name"), json!(name));
            assert_eq!(read(json!(name)), Ok(config(name)));
        }
    }

    #[test]
    fn other_options_are_a_map_and_round_trip() {
        for config in unusual() {
            let value = to_value(config).expect("a map");
            assert!(value.is_object(), "{value}");
            assert_eq!(read(value), Ok(config));
        }
    }

    #[test]
    fn a_map_gives_the_options_that_differ() {
        let batch = NormConfig::Batch(BatchNormOptions {
            momentum: None,
            ..Default::default()
        });
        assert_eq!(read(json!({"batch": {"momentum": null}})), Ok(batch));
        assert_eq!(read(json!({"batch": {}})), Ok(config("batch")));
        assert_eq!(
            read(json!({"group": {"num_groups": 8}})),
            Ok(config("group:8"))
        );
        let group = NormConfig::Group {
            num_groups: 8,
            options: GroupNormOptions {
                eps: 1e-6,
                affine: Affine::Weight,
                ..Default::default()
            },
        };
        let options = json!({"eps": 1e-6, "affine": "weight"});
        let value = json!({"group": {"num_groups": 8, "options": options}});
        assert_eq!(read(value), Ok(group));
        let llama = NormConfig::Rms(RmsNormOptions {
            cast: candle_norm::Cast::BeforeWeight,
            ..Default::default()
        });
        assert_eq!(read(json!({"rms": {"cast": "before_weight"}})), Ok(llama));
        let shifted = NormConfig::Batch(BatchNormOptions {
            affine: Affine::Bias,
            ..Default::default()
        });
        let value = json!({"batch": {"affine": "bias"}});
        assert_eq!(read(value), Ok(shifted));
        assert_eq!(shifted.to_string(), "batch");
        let written = to_value(shifted).expect("a map");
        assert_eq!(written["batch"]["affine"], json!("bias"));
        assert_eq!(
            read(json!({"dyt": {"function": "erf"}})),
            Ok(NormConfig::Dyt(DyTOptions::derf()))
        );
        assert_eq!(
            read(json!({"weight": {"dim": null}})),
            Ok(NormConfig::Weight(None.into()))
        );
    }

    #[test]
    fn the_names_of_the_field_are_read_from_a_file_too() {
        for (value, name) in [
            (json!("BatchNorm2d"), "batch"),
            (json!("layer_norm"), "layer"),
            (json!(" gn: 8 "), "group:8"),
            (json!({"RMSNorm": {}}), "rms"),
            (json!({"ScaleNorm": {"eps": 1e-5}}), "scale"),
            (json!({"GroupNorm": {"num_groups": 8}}), "group:8"),
            (json!({"weight_norm": {"dim": 0}}), "weight"),
        ] {
            assert_eq!(read(value.clone()), Ok(config(name)), "{value}");
        }
        let slow = NormConfig::Batch(BatchNormOptions {
            momentum: Some(0.01),
            ..Default::default()
        });
        assert_eq!(read(json!({"BatchNorm2d": {"momentum": 0.01}})), Ok(slow));
    }

    #[test]
    fn what_is_no_norm_is_refused() {
        for value in [
            json!("batchnor:2"),
            json!("group"),
            json!("group:0"),
            json!(""),
            json!(null),
            json!(1),
            json!([]),
            json!({}),
            json!({"batch": {"momentun": 0.1}}),
            json!({"batch": {"eps": "small"}}),
            json!({"layer": {"momentum": 0.1}}),
            json!({"group": {}}),
            json!({"group": {"num_groups": 8, "eps": 1e-6}}),
            json!({"group": {"num_groups": -8}}),
            json!({"group": {"num_groups": 0}}),
            json!({"instance": {"affine": "shift"}}),
            json!({"rms": {"cast": "never"}}),
            json!({"weight": {"dims": 0}}),
            json!({"bath": {}}),
            json!({"none": {}}),
            json!({"group:8": {}}),
            json!({"group": 8}),
            json!({"batch": {}, "layer": {}}),
        ] {
            let read = read(value.clone());
            assert!(read.is_err(), "{value} gave {read:?}");
        }
    }

    #[test]
    fn a_mistake_in_a_file_is_named() {
        for (value, says) in [
            (
                json!("bathnorm"),
                "got \"bathnorm\"; did you mean \"batch\"?",
            ),
            (json!({}), "expected one norm, got none"),
            (json!({"none": {}}), "none, which has no options"),
            (
                json!({"group:8": {}}),
                "as in {\"group\": {\"num_groups\": 8}}, got \"group:8\"",
            ),
            (json!(1), "the name of a norm, or a map"),
            (json!({"bath": {}}), "got \"bath\"; did you mean \"batch\"?"),
            (
                json!({"batch": {"momentun": 0.1}}),
                "unknown field `momentun`",
            ),
            (
                json!({"batch": {"eps": "small"}}),
                "\"small\", expected f64",
            ),
            (json!({"group": {}}), "missing field `num_groups`"),
            (json!({"group": {"num_groups": 0}}), "at least 1"),
            (json!({"batch": {}, "layer": {}}), "expected one norm"),
        ] {
            let text = read(value).expect_err("a refusal");
            assert!(text.contains(says), "{text:?} should say {says:?}");
        }
    }
}

/// A norm for features stays one when it is frozen, also where axis 1 is as long as the last.
#[test]
fn frozen_norms_of_features_keep_their_axis() -> Result<()> {
    let vars = VarMap::new();
    let norm = config("batch").features(3, vb(&vars, DType::F64))?;
    for (seed, dims) in [(1, vec![4, 3]), (2, vec![4, 3, 3]), (3, vec![2, 5, 4, 3])] {
        let x = (random(&dims, seed)?.broadcast_mul(&random(&[3], 4)?)? + 2.)?;
        norm.forward_t(&x, true)?;
        scatter(&vars)?;
        let want = norm.forward_t(&x, false)?;
        let got = norm.frozen()?.forward(&x)?;
        assert_eq!(got.dims(), want.dims());
        let largest = (got - want)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(largest < 1e-12, "{dims:?}: {largest}");
    }
    let text = norm.frozen()?.forward(&random(&[2, 3, 4], 5)?).unwrap_err();
    assert!(text.to_string().contains("on the last axis"), "{text}");
    Ok(())
}
