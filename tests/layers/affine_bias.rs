//! Layers with a bias alone, and checkpoints whose affine parameters are not those of the layer.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Linear, Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNormOptions, GroupNormOptions, InstanceNormOptions, LayerNormOptions, Norm,
    NormConfig, Path, RmsNormOptions, SwitchNormOptions, batch_norm, checkpoint, fold, group_norm,
    instance_norm, layer_norm, param_groups, rms_norm, switch_norm, weight_norm, with_path,
};

use testkit::data::{noise_by, values};
use testkit::errors::message;

const CPU: Device = Device::Cpu;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];
const PATHS: [Path; 2] = [Path::Fused, Path::Composed];

fn line(values: &[f64], dtype: DType) -> Result<Tensor> {
    Tensor::new(values, &CPU)?.to_dtype(dtype)
}

/// Numbers about 0.1 that look random, the same on every run.
fn shifted_noise(shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    (noise_by(shape, |i| i * i + 5 * i)? + 0.1)?.to_dtype(dtype)
}

fn stored(tensors: &[(&str, Tensor)], dtype: DType) -> VarBuilder<'static> {
    let named = tensors.iter().map(|(n, t)| (n.to_string(), t.clone()));
    VarBuilder::from_tensors(named.collect(), dtype, &CPU)
}

/// A layer of 4 channels, of any `affine`.
struct Kind {
    name: &'static str,
    build: fn(Affine, VarBuilder) -> Result<Box<dyn Norm>>,
    train: bool,
    /// Of the parameters.
    shape: &'static [usize],
}

const INPUT: [usize; 4] = [3, 4, 2, 3];

const KINDS: [Kind; 11] = [
    Kind {
        name: "batch",
        build: batch,
        train: true,
        shape: &[4],
    },
    Kind {
        name: "batch in inference",
        build: batch,
        train: false,
        shape: &[4],
    },
    Kind {
        name: "batch untracked",
        build: |affine, vb| {
            let options = BatchNormOptions {
                affine,
                track_running_stats: false,
                ..Default::default()
            };
            Ok(Box::new(batch_norm(4, options, vb)?))
        },
        train: false,
        shape: &[4],
    },
    Kind {
        name: "layer",
        build: |affine, vb| {
            let options = LayerNormOptions {
                affine,
                ..Default::default()
            };
            Ok(Box::new(layer_norm((2, 3), options, vb)?))
        },
        train: true,
        shape: &[2, 3],
    },
    Kind {
        name: "layer channels first",
        build: |affine, vb| {
            let options = LayerNormOptions {
                affine,
                channels_first: true,
                ..Default::default()
            };
            Ok(Box::new(layer_norm(4, options, vb)?))
        },
        train: true,
        shape: &[4],
    },
    Kind {
        name: "layer that keeps the mean",
        build: |affine, vb| {
            let options = LayerNormOptions {
                affine,
                remove_mean: false,
                ..Default::default()
            };
            Ok(Box::new(layer_norm(3, options, vb)?))
        },
        train: true,
        shape: &[3],
    },
    Kind {
        name: "rms",
        build: |affine, vb| {
            let options = RmsNormOptions {
                affine,
                ..Default::default()
            };
            Ok(Box::new(rms_norm(3, options, vb)?))
        },
        train: true,
        shape: &[3],
    },
    Kind {
        name: "group",
        build: |affine, vb| {
            let options = GroupNormOptions {
                affine,
                ..Default::default()
            };
            Ok(Box::new(group_norm(2, 4, options, vb)?))
        },
        train: true,
        shape: &[4],
    },
    Kind {
        name: "instance",
        build: |affine, vb| instance(affine, false, vb),
        train: true,
        shape: &[4],
    },
    Kind {
        name: "instance tracked, in inference",
        build: |affine, vb| instance(affine, true, vb),
        train: false,
        shape: &[4],
    },
    Kind {
        name: "switch",
        build: |affine, vb| {
            let options = SwitchNormOptions {
                affine,
                ..Default::default()
            };
            Ok(Box::new(switch_norm(4, options, vb)?))
        },
        train: true,
        shape: &[1, 4, 1, 1],
    },
];

fn batch(affine: Affine, vb: VarBuilder) -> Result<Box<dyn Norm>> {
    let options = BatchNormOptions {
        affine,
        ..Default::default()
    };
    Ok(Box::new(batch_norm(4, options, vb)?))
}

fn instance(affine: Affine, track: bool, vb: VarBuilder) -> Result<Box<dyn Norm>> {
    let options = InstanceNormOptions {
        affine,
        track_running_stats: track,
        ..Default::default()
    };
    Ok(Box::new(instance_norm(4, options, vb)?))
}

impl Kind {
    /// Tensors that a checkpoint of this layer holds beside its affine parameters.
    fn others(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let dims = if self.shape.len() == 4 {
            &[1, 4, 1][..]
        } else {
            &[4]
        };
        let mut others = vec![
            ("mean_weight", shifted_noise(3, DType::F64)?),
            ("var_weight", shifted_noise(3, DType::F64)?),
            ("running_mean", shifted_noise(dims, DType::F64)?),
            (
                "running_var",
                (shifted_noise(dims, DType::F64)?.abs()? + 0.5)?,
            ),
        ];
        if self.name != "switch" {
            others.drain(..2);
        }
        Ok(others)
    }
}

/// As Keras (`scale=False`), Flax (`use_scale=False`) and PyTorch would name them.
const NAMES: [[&str; 3]; 3] = [
    ["beta", "moving_mean", "moving_variance"],
    ["bias", "mean", "var"],
    ["bias", "running_mean", "running_var"],
];

fn shifted() -> BatchNormOptions {
    BatchNormOptions {
        eps: 1e-3,
        affine: Affine::Bias,
        ..Default::default()
    }
}

/// y = (4 − 2)/√4.001 + 0.5 = 1.499875.
#[test]
fn a_file_with_beta_alone_loads_and_gives_its_value() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for dtype in DTYPES {
        let (y, tolerance) = match dtype {
            DType::F64 => (2. / 4.001f64.sqrt() + 0.5, 1e-15),
            DType::F32 => (1.499875, 1e-6),
            DType::F16 => (1.499875, 1e-3),
            _ => (1.499875, 8e-3),
        };
        let x = Tensor::new(&[[4f64]], &CPU)?.to_dtype(dtype)?;
        let check = |what: &str, got: Tensor| -> Result<()> {
            let got = values(&got)?[0];
            assert!((got - y).abs() <= tolerance, "{what}, {dtype:?}: {got}");
            Ok(())
        };
        for names in NAMES {
            let numbers = [0.5, 2., 4.].map(|v| line(&[v], DType::F64).unwrap());
            let tensors: Vec<_> = names.into_iter().zip(numbers).collect();
            for path in PATHS {
                with_path(path, || {
                    let norm = batch_norm(1, shifted(), stored(&tensors, dtype))?;
                    check("builder", norm.forward_t(&x, false)?)?;
                    check("frozen", norm.frozen()?.forward(&x)?)
                })?;
            }
            let norm = batch_norm(1, shifted(), stored(&tensors, dtype))?;
            if matches!(dtype, DType::F32 | DType::F64) {
                let one = Linear::new(Tensor::ones((1, 1), dtype, &CPU)?, None);
                check("folded", norm.fold_into(&one)?.forward(&x)?)?;
                check("fold", fold(&one, &[&norm])?.forward(&x)?)?;
            }

            let file = folder.path().join("norm.safetensors");
            let named = tensors.iter().map(|(n, t)| (format!("bn.{n}"), t.clone()));
            candle_core::safetensors::save(&named.collect(), &file)?;
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
            let norm = batch_norm(1, shifted(), vb.pp("bn"))?;
            let report = checkpoint::load_into_strict(&vars, &file)?;
            assert_eq!(report.loaded.len(), 3, "{report}");
            check("load_into", norm.forward_t(&x, false)?)?;
        }
    }
    Ok(())
}

/// A bias alone is the pair with a scale of ones, to the bit.
#[test]
fn every_layer_takes_a_bias_alone() -> Result<()> {
    for kind in KINDS {
        for dtype in DTYPES {
            for path in PATHS {
                let run = |affine: Affine| -> Result<Vec<Vec<f64>>> {
                    let bias = Var::from_tensor(&shifted_noise(kind.shape, dtype)?)?;
                    let mut tensors = kind.others()?;
                    tensors.push(("bias", bias.as_tensor().clone()));
                    if affine.has_weight() {
                        tensors.push(("weight", Tensor::ones(kind.shape, dtype, &CPU)?));
                    }
                    let norm = (kind.build)(affine, stored(&tensors, dtype))?;
                    let x = Var::from_tensor(&shifted_noise(&INPUT, dtype)?)?;
                    let y = norm.forward_t(&x, kind.train)?;
                    let dy = (shifted_noise(&INPUT, dtype)? * 0.5)?;
                    let grads = (&y * dy)?.sum_all()?.backward()?;
                    let gradient = |t: &Tensor| values(grads.get(t).expect("a gradient"));
                    Ok(vec![values(&y)?, gradient(&x)?, gradient(&bias)?])
                };
                let alone = with_path(path, || run(Affine::Bias))?;
                let pair = with_path(path, || run(Affine::WeightAndBias))?;
                assert_eq!(alone, pair, "{}, {dtype:?}, {path:?}", kind.name);
                let moved = alone[2].iter().any(|g| *g != 0.);
                assert!(moved, "{}: no gradient of the bias", kind.name);
            }
        }
    }
    Ok(())
}

#[test]
fn a_bias_alone_is_one_variable_that_starts_from_zero() -> Result<()> {
    for kind in KINDS {
        let vars = VarMap::new();
        let norm = (kind.build)(
            Affine::Bias,
            VarBuilder::from_varmap(&vars, DType::F32, &CPU),
        )?;
        let affine = |norm: &dyn Norm| -> Vec<_> {
            let all = norm.parameters().into_iter();
            all.filter(|(name, _)| !name.ends_with("_weight")).collect()
        };
        let found = affine(&*norm);
        let [(name, bias)] = &found[..] else {
            panic!("{}: {:?}", kind.name, norm.parameters())
        };
        assert_eq!((*name, bias.dims()), ("bias", kind.shape), "{}", kind.name);
        let held: Vec<String> = vars.data().lock().unwrap().keys().cloned().collect();
        assert!(!held.contains(&"weight".to_string()), "{}", kind.name);
        assert!(values(bias)?.iter().all(|b| *b == 0.), "{}", kind.name);
        Var::from_tensor(bias)?.set(&bias.ones_like()?.detach())?;
        norm.reset()?;
        assert!(values(bias)?.iter().all(|b| *b == 0.), "{}", kind.name);
        // Of whatever rank, a bias does not decay.
        let groups = param_groups(&vars);
        let exempt = groups.no_decay.iter().any(|v| v.id() == bias.id());
        assert!(exempt, "{}: the bias decays", kind.name);
    }
    Ok(())
}

#[test]
fn a_residual_is_added_before_a_bias_alone() -> Result<()> {
    let options = LayerNormOptions {
        affine: Affine::Bias,
        ..Default::default()
    };
    let bias = Var::from_tensor(&shifted_noise(3, DType::F64)?)?;
    let tensors = [("bias", bias.as_tensor().clone())];
    let norm = layer_norm(3, options, stored(&tensors, DType::F64))?;
    let (x, residual) = (
        shifted_noise((2, 3), DType::F64)?,
        shifted_noise((1, 2, 3), DType::F64)?,
    );
    let residual = (residual.squeeze(0)? * 2.)?;
    for path in PATHS {
        with_path(path, || {
            let (y, sum) = norm.forward_add(&x, &residual)?;
            assert_eq!(values(&sum)?, values(&(&x + &residual)?)?);
            let want = norm.forward(&sum)?;
            for (got, want) in values(&y)?.into_iter().zip(values(&want)?) {
                assert!((got - want).abs() < 1e-14, "{path:?}: {got} for {want}");
            }
            let grads = y.sum_all()?.backward()?;
            assert_eq!(values(grads.get(&bias).expect("a gradient"))?, [2.; 3]);
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

/// A parameter of a checkpoint that a layer would leave out changes what it computes: the error
/// says so, and its remedy is one.
#[test]
fn no_parameter_of_a_checkpoint_is_dropped_unseen() -> Result<()> {
    let cases: [(Affine, &[&str], Affine); 8] = [
        (Affine::None, &["beta"], Affine::Bias),
        (Affine::None, &["bias"], Affine::Bias),
        (Affine::None, &["gamma"], Affine::Weight),
        (Affine::None, &["scale", "bias"], Affine::WeightAndBias),
        (Affine::Weight, &["weight", "beta"], Affine::WeightAndBias),
        (Affine::Weight, &["beta"], Affine::Bias),
        (Affine::Bias, &["gamma", "beta"], Affine::WeightAndBias),
        (Affine::Bias, &["weight"], Affine::Weight),
    ];
    for kind in KINDS {
        for (affine, names, fitting) in cases {
            let mut tensors = HashMap::new();
            for (name, value) in kind.others()? {
                tensors.insert(format!("net.norm.{name}"), value);
            }
            for name in names {
                let value = shifted_noise(kind.shape, DType::F64)?;
                tensors.insert(format!("net.norm.{name}"), value);
            }
            let vb = VarBuilder::from_tensors(tensors, DType::F64, &CPU);
            let vb = vb.pp("net").pp("norm");
            let text = message((kind.build)(affine, vb.clone()));
            let last = names[names.len() - 1];
            let parts: [&str; 6] = [
                "Norm: expected no parameters but those of affine",
                &format!("affine {affine:?}, got"),
                &format!("\"net.norm.{last}\""),
                "dropped unseen",
                &format!("set affine to {fitting:?}"),
                "pp",
            ];
            let said = |part: &&str| text.contains(*part);
            // The layer has the last name where it is of its own kind: then it is the first that is
            // dropped.
            let all = match affine {
                Affine::Bias if names.len() == 2 => text.contains("\"net.norm.gamma\""),
                _ => parts.iter().all(said),
            };
            assert!(all, "{}: {text}", kind.name);
            (kind.build)(fitting, vb)?;
        }
    }
    Ok(())
}

/// Axes of size 1 make no tensor another's: some store a scale as they multiply by it.
#[test]
fn a_parameter_with_other_axes_of_size_1_is_not_dropped_either() -> Result<()> {
    for kind in KINDS {
        for name in ["weight", "gamma", "bias"] {
            let mut shape = vec![1];
            shape.extend(kind.shape.iter().filter(|n| **n != 1));
            shape.extend([1, 1]);
            let mut tensors = kind.others()?;
            tensors.push((name, shifted_noise(shape, DType::F64)?));
            let text = message((kind.build)(Affine::None, stored(&tensors, DType::F64)));
            let parts = [&format!("\"{name}\""), "dropped unseen"];
            assert!(
                parts.iter().all(|p| text.contains(*p)),
                "{}: {text}",
                kind.name
            );
        }
        // A weight of another layer does not hide one that is stored under another name.
        let mut tensors = kind.others()?;
        tensors.push(("weight", shifted_noise((7, 4, 3, 3), DType::F64)?));
        tensors.push(("gamma", shifted_noise(kind.shape, DType::F64)?));
        let text = message((kind.build)(Affine::None, stored(&tensors, DType::F64)));
        assert!(text.contains("\"gamma\""), "{}: {text}", kind.name);
    }
    Ok(())
}

/// Which of the two it is, only the user knows.
#[test]
fn two_layers_on_one_path_are_told_to_take_a_prefix_each() -> Result<()> {
    let remedy = "give each layer its own prefix (vb.pp)";
    let tensors = [
        ("weight", shifted_noise(4, DType::F64)?),
        ("bias", shifted_noise(4, DType::F64)?),
    ];
    let vb = stored(&tensors, DType::F64);
    layer_norm(4, 1e-5, vb.clone())?;
    let plain = RmsNormOptions {
        affine: Affine::None,
        ..Default::default()
    };
    let text = message(rms_norm(4, plain, vb.clone()));
    let parts = [remedy, "set affine to WeightAndBias"];
    assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    let text = message(weight_norm::linear_no_bias(3, 4, Some(0).into(), vb));
    assert!(text.contains(remedy), "{text}");
    let alone = stored(&tensors[..1], DType::F64);
    let text = message(layer_norm(4, 1e-5, alone));
    let parts = [remedy, "set affine to Weight"];
    assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    Ok(())
}

/// Tensors in the layer's path that are not its own do not matter.
#[test]
fn tensors_of_others_are_left_alone() -> Result<()> {
    for kind in KINDS {
        // Of another shape.
        let mut tensors = kind.others()?;
        tensors.push(("weight", shifted_noise((7, 4, 3, 3), DType::F64)?));
        tensors.push(("bias", shifted_noise(7, DType::F64)?));
        (kind.build)(Affine::None, stored(&tensors, DType::F64))?;
        // Variables that another layer made under the same path.
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        (kind.build)(Affine::WeightAndBias, vb.clone())?;
        (kind.build)(Affine::None, vb)?;
        // A builder that has whatever one asks for.
        (kind.build)(Affine::None, VarBuilder::zeros(DType::F32, &CPU))?;
    }
    Ok(())
}

#[test]
fn half_an_affine_pair_names_the_affine_that_fits() -> Result<()> {
    for kind in KINDS {
        for (name, missing, fitting) in [
            ("beta", "weight or gamma or scale", Affine::Bias),
            ("gamma", "bias or beta", Affine::Weight),
        ] {
            let mut tensors = kind.others()?;
            tensors.push((name, shifted_noise(kind.shape, DType::F64)?));
            let text = message((kind.build)(
                Affine::WeightAndBias,
                stored(&tensors, DType::F64),
            ));
            let parts = [
                &format!("expected {missing} too, since affine is WeightAndBias"),
                &format!("got \"{name}\" alone"),
                &format!("set affine to {fitting:?}"),
            ];
            assert!(parts.iter().all(|p| text.contains(p.as_str())), "{text}");
        }
        // With nothing of either there is nothing to say but what is missing.
        let text = message((kind.build)(
            Affine::WeightAndBias,
            stored(&kind.others()?, DType::F64),
        ));
        assert!(text.contains("cannot find tensor"), "{text}");
    }
    Ok(())
}

/// Of the layers around and before norms too.
#[test]
fn no_bias_of_a_layer_is_dropped_unseen() -> Result<()> {
    let (weight, bias) = (
        shifted_noise((4, 3), DType::F64)?,
        shifted_noise(4, DType::F64)?,
    );
    let tensors = [("weight", weight.clone()), ("bias", bias.clone())];
    let vb = stored(&tensors, DType::F64);
    let text = message(weight_norm::linear_no_bias(
        3,
        4,
        Some(0).into(),
        vb.clone(),
    ));
    let parts = [
        "WeightNorm: expected",
        "\"bias\"",
        "dropped unseen",
        "with a bias",
    ];
    assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    weight_norm::linear(3, 4, Some(0).into(), vb)?;

    // A batch norm after a layer that was trained with a bias: its mean is that of the sum.
    let tensors = [
        ("layer.weight", weight.clone()),
        ("layer.bias", bias.clone()),
        ("norm.weight", shifted_noise(4, DType::F64)?),
        ("norm.bias", shifted_noise(4, DType::F64)?),
        ("norm.running_mean", shifted_noise(4, DType::F64)?),
        (
            "norm.running_var",
            (shifted_noise(4, DType::F64)?.abs()? + 0.5)?,
        ),
    ];
    let vb = stored(&tensors, DType::F64);
    let config: NormConfig = "batch".parse()?;
    let block = config.linear(3, 4, vb.clone())?;
    let x = shifted_noise((5, 3), DType::F64)?;
    let y = Linear::new(weight, Some(bias)).forward(&x)?;
    let want = config.features(4, vb.pp("norm"))?.forward_t(&y, false)?;
    let got = block.forward_t(&x, false)?;
    for (got, want) in values(&got)?.into_iter().zip(values(&want)?) {
        assert!((got - want).abs() < 1e-12, "{got} for {want}");
    }
    Ok(())
}

/// Into variables, the report says what stayed behind.
#[test]
fn a_load_report_lists_a_bias_that_no_variable_takes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("norm.safetensors");
    let mut tensors = HashMap::new();
    for (name, value) in [("beta", 0.5), ("moving_mean", 2.), ("moving_variance", 4.)] {
        tensors.insert(format!("bn.{name}"), line(&[value], DType::F32)?);
    }
    candle_core::safetensors::save(&tensors, &file)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let options = BatchNormOptions {
        affine: Affine::None,
        ..Default::default()
    };
    batch_norm(1, options, vb.pp("bn"))?;
    let report = checkpoint::load_into(&vars, &file)?;
    assert_eq!(report.unexpected, ["bn.beta"]);
    let text = message(checkpoint::load_into_strict(&vars, &file));
    assert!(text.contains("bn.beta"), "{text}");
    Ok(())
}

#[test]
fn where_a_scale_starts_cannot_be_said_without_one() {
    for affine in [Affine::Bias, Affine::None] {
        let options = SwitchNormOptions {
            affine,
            last_gamma: true,
            ..Default::default()
        };
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
        let text = message(switch_norm(4, options, vb));
        let parts = ["SwitchNorm: expected", "last_gamma", "without"];
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
}
