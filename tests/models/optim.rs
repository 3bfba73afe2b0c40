//! Variables that an optimizer should have of a model, and that a checkpoint may put into it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Init, ModuleT, Optimizer, ParamsAdamW, VarMap};
use candle_norm::checkpoint::{self, LoadReport};
use candle_norm::{
    Affine, InstanceNormOptions, NormConfig, ParamGroups, RmsNormOptions, WeightNormOptions,
    batch_norm, group_norm, instance_norm, layer_norm, layer_norm_no_bias, param_groups, rms_norm,
    trainable_vars, weight_norm,
};

use testkit::data::values;
use testkit::vars::{state, var, vb};

const CPU: Device = Device::Cpu;

/// The names of `of` among `vars`, in the order of `of`.
fn names(vars: &VarMap, of: &[Var]) -> Vec<String> {
    let vars = vars.data().lock().expect("no thread panicked");
    of.iter()
        .map(|var| {
            let found = vars.iter().find(|(_, v)| v.id() == var.id());
            found.expect("a variable of the map").0.clone()
        })
        .collect()
}

// Optimizers.

/// One of everything: what is trained with weight decay, without, and not at all.
const DECAY: [&str; 6] = [
    "conv.layer.weight",
    "embedding.weight",
    "linear.weight",
    "maps_no_bias.weight",
    "wn.parametrizations.weight.original1",
    "wn_whole.parametrizations.weight.original1",
];
const NO_DECAY: [&str; 19] = [
    "bn.bias",
    "bn.weight",
    "conv.norm.bias",
    "conv.norm.weight",
    "gn.bias",
    "gn.weight",
    "in.bias",
    "in.weight",
    "linear.bias",
    "ln.bias",
    "ln.weight",
    "ln_no_bias.weight",
    "maps.bias",
    "maps.weight",
    "rms.weight",
    "wn.bias",
    "wn.parametrizations.weight.original0",
    "wn_whole.bias",
    "wn_whole.parametrizations.weight.original0",
];
const STATISTICS: [&str; 9] = [
    "bn.num_batches_tracked",
    "bn.running_mean",
    "bn.running_var",
    "conv.norm.num_batches_tracked",
    "conv.norm.running_mean",
    "conv.norm.running_var",
    "in.num_batches_tracked",
    "in.running_mean",
    "in.running_var",
];

fn model(vars: &VarMap) -> Result<()> {
    let vb = vb(vars, DType::F32);
    let tracked = InstanceNormOptions {
        affine: Affine::WeightAndBias,
        track_running_stats: true,
        ..Default::default()
    };
    batch_norm(4, 1e-5, vb.pp("bn"))?;
    instance_norm(4, tracked, vb.pp("in"))?;
    group_norm(2, 4, 1e-5, vb.pp("gn"))?;
    layer_norm(4, 1e-5, vb.pp("ln"))?;
    layer_norm_no_bias(4, 1e-5, vb.pp("ln_no_bias"))?;
    layer_norm((3, 5), 1e-5, vb.pp("maps"))?;
    layer_norm_no_bias((3, 5), 1e-5, vb.pp("maps_no_bias"))?;
    rms_norm(4, 1e-6, vb.pp("rms"))?;
    weight_norm::linear(5, 4, WeightNormOptions::default(), vb.pp("wn"))?;
    weight_norm::linear(5, 4, None.into(), vb.pp("wn_whole"))?;
    "batch"
        .parse::<NormConfig>()?
        .conv2d(3, 4, 3, Default::default(), vb.pp("conv"))?;
    candle_nn::linear(4, 4, vb.pp("linear"))?;
    candle_nn::embedding(7, 4, vb.pp("embedding"))?;
    Ok(())
}

#[test]
fn trainable_vars_are_all_but_statistics_in_the_order_of_their_names() -> Result<()> {
    let vars = VarMap::new();
    model(&vars)?;
    let mut want = [&DECAY[..], &NO_DECAY[..]].concat();
    want.sort_unstable();
    assert_eq!(names(&vars, &trainable_vars(&vars)), want);
    assert_eq!(vars.all_vars().len(), want.len() + STATISTICS.len());
    assert!(trainable_vars(&VarMap::new()).is_empty());
    Ok(())
}

#[test]
fn statistics_are_told_by_the_last_part_of_their_name() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    for name in ["running_mean", "a.running_var", "a.b.num_batches_tracked"] {
        vb.get(2, name)?;
    }
    let others = [
        "a.my_running_mean",
        "a.running_mean.weight",
        "num_batches_tracked_too",
        "running_vars",
    ];
    for name in others {
        vb.get(2, name)?;
    }
    assert_eq!(names(&vars, &trainable_vars(&vars)), others);
    let groups = param_groups(&vars);
    let statistics = ["a.b.num_batches_tracked", "a.running_var", "running_mean"];
    assert_eq!(names(&vars, &groups.statistics), statistics);
    Ok(())
}

#[test]
fn param_groups_split_a_model_by_how_it_decays() -> Result<()> {
    let vars = VarMap::new();
    model(&vars)?;
    let groups = param_groups(&vars);
    assert_eq!(names(&vars, &groups.decay), DECAY);
    assert_eq!(names(&vars, &groups.no_decay), NO_DECAY);
    assert_eq!(names(&vars, &groups.statistics), STATISTICS);
    Ok(())
}

#[test]
fn older_names_of_weight_norm_decay_alike() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    vb.get((4, 1), "wn.weight_g")?;
    vb.get((4, 5), "wn.weight_v")?;
    vb.get((4, 5), "other.last_weight_g")?;
    let groups = param_groups(&vars);
    assert_eq!(names(&vars, &groups.no_decay), ["wn.weight_g"]);
    let decay = ["other.last_weight_g", "wn.weight_v"];
    assert_eq!(names(&vars, &groups.decay), decay);
    Ok(())
}

#[test]
fn a_norm_that_looks_like_a_linear_layer_can_be_exempted() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let maps = layer_norm_no_bias((3, 5), 1e-5, vb.pp("maps"))?;
    let rms = rms_norm((3, 5), RmsNormOptions::default(), vb.pp("rms"))?;
    let bn = batch_norm(3, 1e-5, vb.pp("bn"))?;
    candle_nn::linear_no_bias(5, 3, vb.pp("linear"))?;

    let mut groups = param_groups(&vars);
    let decay = ["linear.weight", "maps.weight", "rms.weight"];
    assert_eq!(names(&vars, &groups.decay), decay);
    groups.exempt(&bn);
    assert_eq!(names(&vars, &groups.decay), decay);
    assert_eq!(names(&vars, &groups.no_decay), ["bn.bias", "bn.weight"]);
    groups.exempt(&maps);
    groups.exempt(&maps);
    groups.exempt(&rms);
    assert_eq!(names(&vars, &groups.decay), ["linear.weight"]);
    let no_decay = ["bn.bias", "bn.weight", "maps.weight", "rms.weight"];
    assert_eq!(names(&vars, &groups.no_decay), no_decay);
    assert_eq!(groups.statistics.len(), 3);
    Ok(())
}

#[test]
fn a_step_of_zero_gradients_shrinks_what_decays_and_nothing_else() -> Result<()> {
    let vars = VarMap::new();
    model(&vars)?;
    let before = state(&vars);
    // A factor of the number 0 would not be a part of the graph.
    let zero = Tensor::zeros((), DType::F32, &CPU)?;
    let mut loss = zero.clone();
    for var in vars.all_vars() {
        if var.dtype().is_float() {
            loss = (loss + (var.sum_all()? * &zero)?)?;
        }
    }
    let grads = loss.backward()?;
    let ParamGroups {
        decay, no_decay, ..
    } = param_groups(&vars);
    let params = |weight_decay| ParamsAdamW {
        lr: 0.5,
        weight_decay,
        ..Default::default()
    };
    AdamW::new(decay, params(0.5))?.step(&grads)?;
    AdamW::new(no_decay, params(0.))?.step(&grads)?;
    for (name, after) in state(&vars) {
        let factor = if DECAY.contains(&name.as_str()) {
            0.75
        } else {
            1.
        };
        for (after, before) in after.values.iter().zip(&before[&name].values) {
            assert_eq!(*after, f64::from((factor * before) as f32), "{name}");
        }
    }
    Ok(())
}

#[test]
fn training_moves_statistics_by_batches_only() -> Result<()> {
    let vars = VarMap::new();
    let block = "batch"
        .parse::<NormConfig>()?
        .linear(2, 3, vb(&vars, DType::F32))?;
    let x = Tensor::new(&[[1f32, 2.], [-3., 0.5], [0.25, -1.]], &CPU)?;
    let cotangent = Tensor::new(&[[1f32, -2., 0.5], [3., 1., 1.], [-1., 0., 2.]], &CPU)?;
    let params = ParamsAdamW {
        lr: 0.1,
        weight_decay: 0.9,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(trainable_vars(&vars), params)?;
    for _ in 0..3 {
        let y = block.forward_t(&x, true)?;
        let before = state(&vars);
        optimizer.backward_step(&(y * &cotangent)?.sum_all()?)?;
        for (name, after) in state(&vars) {
            let statistic = name.contains("running") || name.contains("tracked");
            assert_eq!(after == before[&name], statistic, "{name}");
        }
    }
    assert_eq!(values(&var(&vars, "norm.num_batches_tracked"))?, [3.]);
    Ok(())
}

// Checkpoints.

type Load = fn(&VarMap, &Path) -> Result<LoadReport>;
const LOAD: Load = |vars, path| checkpoint::load_into(vars, path);
const STRICT: Load = |vars, path| checkpoint::load_into_strict(vars, path);

/// A safetensors file in a folder that goes away with it.
struct File {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn file<N: AsRef<str>>(tensors: &[(N, Tensor)]) -> Result<File> {
    let _folder = tempfile::tempdir()?;
    let path = _folder.path().join("model.safetensors");
    let tensors = tensors.iter();
    let tensors: HashMap<_, _> = tensors.map(|(n, t)| (n.as_ref(), t.clone())).collect();
    candle_core::safetensors::save(&tensors, &path)?;
    Ok(File { path, _folder })
}

fn tensor(values: &[f32]) -> Result<Tensor> {
    Tensor::new(values, &CPU)
}

/// The tensors that a batch norm of two channels saves.
fn saved() -> Result<Vec<(&'static str, Tensor)>> {
    Ok(vec![
        ("bn.bias", tensor(&[-1., 1.])?),
        ("bn.num_batches_tracked", Tensor::new(7i64, &CPU)?),
        ("bn.running_mean", tensor(&[0.5, -0.5])?),
        ("bn.running_var", tensor(&[4., 9.])?),
        ("bn.weight", tensor(&[2., 3.])?),
    ])
}

/// [`saved`] with another tensor under one of its names.
fn saved_but(name: &str, tensor: Tensor) -> Result<Vec<(&'static str, Tensor)>> {
    let mut saved = saved()?;
    let entry = saved.iter_mut().find(|(n, _)| *n == name);
    entry.expect("a name of a batch norm").1 = tensor;
    Ok(saved)
}

fn new_batch_norm(dtype: DType) -> Result<(VarMap, candle_norm::BatchNorm)> {
    let vars = VarMap::new();
    let norm = batch_norm(2, 1e-5, vb(&vars, dtype).pp("bn"))?;
    Ok((vars, norm))
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

#[test]
fn a_file_with_everything_loads_and_the_layer_computes_with_it() -> Result<()> {
    for load in [LOAD, STRICT] {
        let (vars, norm) = new_batch_norm(DType::F32)?;
        let report = load(&vars, &file(&saved()?)?.path)?;
        let loaded: Vec<_> = saved()?.into_iter().map(|(name, _)| name).collect();
        let mut want = LoadReport::default();
        want.loaded = owned(&loaded);
        assert_eq!(report, want);
        assert_eq!(report.to_string(), "5 variables loaded");
        for (name, tensor) in saved()? {
            assert_eq!(values(&var(&vars, name))?, values(&tensor)?, "{name}");
        }
        // (4.5 − 0.5) / √4 · 2 − 1 and (2.5 + 0.5) / √9 · 3 + 1
        let y = norm.forward_t(&Tensor::new(&[[4.5f32, 2.5]], &CPU)?, false)?;
        for (y, want) in values(&y)?.into_iter().zip([3., 4.]) {
            assert!((y - want).abs() < 1e-4, "{y}, expected {want}");
        }
        let stats = norm.running_stats().expect("a layer that tracks");
        assert_eq!(stats.snapshot()?.num_batches_tracked, 7);
    }
    Ok(())
}

#[test]
fn a_report_says_what_was_there_under_which_name() -> Result<()> {
    let (vars, _norm) = new_batch_norm(DType::F32)?;
    vb(&vars, DType::F32).get_with_hints(2, "head.bias", Init::Const(5.))?;
    let path = file(&[
        ("bn.gamma", tensor(&[2., 3.])?),
        ("bn.moving_mean", tensor(&[0.5, -0.5])?),
        ("bn.var", tensor(&[4., 9.])?),
        ("bn.bias", tensor(&[-1., 1.])?),
        ("head.b", tensor(&[1., 1.])?),
        ("step", Tensor::new(9i64, &CPU)?),
    ])?;
    let report = checkpoint::load_into(&vars, &path.path)?;
    let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
    let mut want = LoadReport::default();
    want.loaded = owned(&["bn.bias", "bn.running_mean", "bn.running_var", "bn.weight"]);
    want.renamed = vec![
        pair("bn.running_mean", "bn.moving_mean"),
        pair("bn.running_var", "bn.var"),
        pair("bn.weight", "bn.gamma"),
    ];
    want.counters_reset = owned(&["bn.num_batches_tracked"]);
    want.missing = owned(&["head.bias"]);
    want.unexpected = owned(&["head.b", "step"]);
    assert_eq!(report, want);
    assert_eq!(
        report.to_string(),
        "4 variables loaded; renamed: bn.running_mean from bn.moving_mean, bn.running_var from \
        bn.var, bn.weight from bn.gamma; counters set to 0: bn.num_batches_tracked; missing in the \
        file: head.bias; unexpected in the file: head.b, step"
    );
    assert_eq!(values(&var(&vars, "bn.running_var"))?, [4., 9.]);
    assert_eq!(
        values(&var(&vars, "head.bias"))?,
        [5., 5.],
        "left as it was"
    );
    Ok(())
}

#[test]
fn every_other_name_of_a_tensor_is_known() -> Result<()> {
    let aliases: [(&str, &[&str]); 6] = [
        ("weight", &["gamma", "scale"]),
        ("bias", &["beta"]),
        ("running_mean", &["mean", "moving_mean"]),
        ("running_var", &["var", "moving_variance"]),
        ("parametrizations.weight.original0", &["weight_g"]),
        ("parametrizations.weight.original1", &["weight_v"]),
    ];
    for (name, aliases) in aliases {
        for alias in aliases {
            for prefix in ["", "encoder.3."] {
                let vars = VarMap::new();
                vb(&vars, DType::F32).get(2, &format!("{prefix}{name}"))?;
                let found = format!("{prefix}{alias}");
                let file = file(&[(&found, tensor(&[3., 4.])?)])?;
                let report = checkpoint::load_into_strict(&vars, &file.path)?;
                assert_eq!(report.renamed, [(format!("{prefix}{name}"), found)]);
                let loaded = values(&var(&vars, &format!("{prefix}{name}")))?;
                assert_eq!(loaded, [3., 4.], "{prefix}{alias}");
            }
        }
    }
    Ok(())
}

#[test]
fn another_name_is_that_of_a_whole_tensor_in_the_same_place() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    vb.get(2, "a.out_weight")?;
    vb.get(2, "b.weight")?;
    vb.get(2, "d")?;
    let names = ["a.out_gamma", "b.gamma.weight", "c.gamma", "d", "gamma"];
    let tensors = names.map(|name| (name, Tensor::ones(2, DType::F32, &CPU)));
    let tensors = tensors.into_iter().map(|(n, t)| Ok((n, t?)));
    let file = file(&tensors.collect::<Result<Vec<_>>>()?)?;
    let report = checkpoint::load_into(&vars, &file.path)?;
    assert_eq!(report.missing, ["a.out_weight", "b.weight"]);
    assert_eq!(
        report.unexpected,
        ["a.out_gamma", "b.gamma.weight", "c.gamma", "gamma"]
    );
    Ok(())
}

#[test]
fn a_tensor_under_its_own_name_goes_before_one_under_another() -> Result<()> {
    let (vars, _norm) = new_batch_norm(DType::F32)?;
    let mut tensors = saved()?;
    tensors.push(("bn.gamma", tensor(&[8., 8.])?));
    let report = checkpoint::load_into(&vars, &file(&tensors)?.path)?;
    assert_eq!(report.unexpected, ["bn.gamma"]);
    assert!(report.renamed.is_empty());
    assert_eq!(values(&var(&vars, "bn.weight"))?, [2., 3.]);
    Ok(())
}

#[test]
fn the_counter_of_a_file_without_one_is_zero_even_if_batches_were_seen() -> Result<()> {
    for load in [LOAD, STRICT] {
        let (vars, norm) = new_batch_norm(DType::F32)?;
        norm.forward_t(&Tensor::new(&[[1f32, 2.], [3., 5.]], &CPU)?, true)?;
        let mut tensors = saved()?;
        tensors.retain(|(name, _)| !name.ends_with("tracked"));
        let report = load(&vars, &file(&tensors)?.path)?;
        assert_eq!(report.counters_reset, ["bn.num_batches_tracked"]);
        let stats = norm.running_stats().expect("a layer that tracks");
        assert_eq!(stats.snapshot()?.num_batches_tracked, 0);
    }
    Ok(())
}

#[test]
fn a_counter_may_be_a_vector_of_one() -> Result<()> {
    let (vars, norm) = new_batch_norm(DType::F32)?;
    let vector = saved_but("bn.num_batches_tracked", Tensor::new(&[12i64], &CPU)?)?;
    let _ = checkpoint::load_into(&vars, &file(&vector)?.path)?;
    let stats = norm.running_stats().expect("a layer that tracks");
    assert_eq!(stats.snapshot()?.num_batches_tracked, 12);
    Ok(())
}

#[test]
fn values_take_the_dtype_of_their_variable() -> Result<()> {
    let all = [DType::F16, DType::BF16, DType::F32, DType::F64];
    for stored in all {
        // A third has other digits in every dtype.
        let third = |n: f64| (Tensor::new(&[n, 2. * n], &CPU)? / 3.)?.to_dtype(stored);
        let tensors = [
            ("bn.bias", third(-1.)?),
            ("bn.running_mean", third(1.)?),
            ("bn.running_var", third(5.)?),
            ("bn.weight", third(7.)?),
        ];
        let file = file(&tensors)?;
        for model in all {
            let (vars, norm) = new_batch_norm(model)?;
            let _ = checkpoint::load_into(&vars, &file.path)?;
            let statistics = match model {
                DType::F64 => DType::F64,
                _ => DType::F32,
            };
            for (name, tensor) in &tensors {
                let dtype = match name.contains("running") {
                    true => statistics,
                    false => model,
                };
                let got = var(&vars, name);
                let what = format!("{name}, {stored:?} into {model:?}");
                assert_eq!(got.dtype(), dtype, "{what}");
                assert_eq!(values(&got)?, values(&tensor.to_dtype(dtype)?)?, "{what}");
            }
            let y = norm.forward_t(&Tensor::ones((2, 2), model, &CPU)?, false)?;
            assert!(values(&y)?.iter().all(|y| y.is_finite()));
        }
    }
    Ok(())
}

/// Asserts that neither function takes `tensors`, that both say `parts`, and that they change
/// nothing.
#[track_caller]
fn refused(tensors: &[(&str, Tensor)], parts: &[&str]) -> Result<()> {
    let file = file(tensors)?;
    for load in [LOAD, STRICT] {
        let (vars, _norm) = new_batch_norm(DType::F32)?;
        let before = state(&vars);
        let text = load(&vars, &file.path).expect_err("a refusal").to_string();
        for part in parts {
            assert!(text.contains(part), "{text:?} should say {part:?}");
        }
        assert_eq!(state(&vars), before, "all or nothing");
    }
    Ok(())
}

#[test]
fn a_tensor_of_another_shape_is_refused() -> Result<()> {
    let three = saved_but("bn.weight", tensor(&[1., 2., 3.])?)?;
    refused(&three, &["bn.weight", "[2]", "[3]"])?;
    let scalar = saved_but("bn.running_mean", tensor(&[1.])?.reshape(())?)?;
    refused(&scalar, &["bn.running_mean", "[2]", "[]"])?;
    let counters = saved_but("bn.num_batches_tracked", Tensor::new(&[1i64, 2], &CPU)?)?;
    refused(&counters, &["bn.num_batches_tracked", "[]", "[2]"])
}

#[test]
fn a_statistic_that_is_none_is_refused_by_channel() -> Result<()> {
    let inf = f32::INFINITY;
    for (name, bad, says) in [
        (
            "bn.running_var",
            -0.25,
            "at least 0, got -0.25 at channel 1",
        ),
        ("bn.running_var", f32::NAN, "finite, got NaN at channel 1"),
        ("bn.running_var", inf, "finite, got inf at channel 1"),
        ("bn.running_mean", f32::NAN, "finite, got NaN at channel 1"),
        ("bn.running_mean", -inf, "finite, got -inf at channel 1"),
    ] {
        let bad = tensor(&[1., bad])?;
        refused(&saved_but(name, bad.clone())?, &[name, says])?;
        // In half precision, and under another name, no less.
        let other = match name {
            "bn.running_var" => "bn.moving_variance",
            _ => "bn.moving_mean",
        };
        let mut renamed = saved_but(name, bad.to_dtype(DType::F16)?)?;
        for (n, _) in &mut renamed {
            if *n == name {
                *n = other;
            }
        }
        refused(&renamed, &[other, says])?;
    }
    Ok(())
}

#[test]
fn a_statistic_that_the_variable_cannot_hold_is_refused() -> Result<()> {
    for name in ["bn.running_mean", "bn.running_var"] {
        let large = Tensor::new(&[1f64, 1e300], &CPU)?;
        let says = [name, "finite, got inf at channel 1"];
        refused(&saved_but(name, large)?, &says)?;
    }
    Ok(())
}

#[test]
fn a_counter_is_a_whole_number_from_0_on_of_any_dtype() -> Result<()> {
    let name = "bn.num_batches_tracked";
    let negative = Tensor::new(-5i64, &CPU)?;
    refused(&saved_but(name, negative)?, &[name, "at least 0, got -5"])?;
    for float in [3.5f32, f32::NAN, f32::INFINITY] {
        let says = format!("whole number of at least 0, got {float}");
        let float = Tensor::new(float, &CPU)?;
        refused(&saved_but(name, float)?, &[name, &says])?;
    }
    for dtype in [DType::U32, DType::F16] {
        let (vars, _norm) = new_batch_norm(DType::F32)?;
        let three = saved_but(name, Tensor::new(3i64, &CPU)?.to_dtype(dtype)?)?;
        let _ = checkpoint::load_into(&vars, &file(&three)?.path)?;
        assert_eq!(values(&var(&vars, name))?, [3.], "{dtype:?}");
    }
    Ok(())
}

#[test]
fn negative_means_and_parameters_that_are_not_finite_are_taken() -> Result<()> {
    let (vars, _norm) = new_batch_norm(DType::F32)?;
    let mut tensors = saved_but("bn.weight", tensor(&[f32::INFINITY, -1.])?)?;
    tensors.retain(|(name, _)| *name != "bn.running_mean");
    tensors.push(("bn.running_mean", tensor(&[-3., -4.])?));
    let _ = checkpoint::load_into_strict(&vars, &file(&tensors)?.path)?;
    assert_eq!(values(&var(&vars, "bn.running_mean"))?, [-3., -4.]);
    assert_eq!(values(&var(&vars, "bn.weight"))?, [f64::INFINITY, -1.]);
    Ok(())
}

#[test]
fn integers_are_no_floats() -> Result<()> {
    for name in ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"] {
        for dtype in [DType::U8, DType::U32, DType::I64] {
            let integers = saved_but(name, tensor(&[1., 2.])?.to_dtype(dtype)?)?;
            refused(&integers, &[name, &format!("{dtype:?}")])?;
        }
    }
    Ok(())
}

#[test]
fn strict_names_all_that_is_missing_or_unexpected() -> Result<()> {
    let (vars, _norm) = new_batch_norm(DType::F32)?;
    let before = state(&vars);
    let mut tensors = saved()?;
    tensors.retain(|(name, _)| !matches!(*name, "bn.bias" | "bn.running_var"));
    tensors.push(("head.weight", tensor(&[1.])?));
    tensors.push(("head.bias", tensor(&[1.])?));
    let file = file(&tensors)?;
    let text = STRICT(&vars, &file.path)
        .expect_err("a refusal")
        .to_string();
    for part in [
        "model.safetensors",
        "missing: [\"bn.bias\", \"bn.running_var\"]",
        "unexpected: [\"head.bias\", \"head.weight\"]",
    ] {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
    assert_eq!(state(&vars), before);

    // Without the variance, mean and counter mean nothing.
    let report = LOAD(&vars, &file.path)?;
    assert_eq!(report.loaded, ["bn.weight"]);
    assert_eq!(values(&var(&vars, "bn.bias"))?, [0., 0.]);
    Ok(())
}

#[test]
fn strict_refuses_a_file_for_more_and_a_file_for_less() -> Result<()> {
    for (extra, missing) in [(true, false), (false, true)] {
        let (vars, _norm) = new_batch_norm(DType::F32)?;
        let mut tensors = saved()?;
        if extra {
            tensors.push(("extra", tensor(&[1.])?));
        }
        if missing {
            tensors.retain(|(name, _)| *name != "bn.weight");
        }
        let before = state(&vars);
        assert!(STRICT(&vars, &file(&tensors)?.path).is_err());
        assert_eq!(state(&vars), before);
    }
    Ok(())
}

#[test]
fn a_file_that_cannot_be_read_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let absent = folder.path().join("absent.safetensors");
    let broken = folder.path().join("broken.safetensors");
    std::fs::write(&broken, b"not a checkpoint")?;
    for path in [absent, broken] {
        let (vars, _norm) = new_batch_norm(DType::F32)?;
        let before = state(&vars);
        for load in [LOAD, STRICT] {
            let text = load(&vars, &path).expect_err("a refusal").to_string();
            assert!(text.contains(&path.display().to_string()), "{text}");
        }
        assert_eq!(state(&vars), before);
    }
    Ok(())
}

#[test]
fn a_model_without_variables_takes_nothing() -> Result<()> {
    let file = file(&saved()?)?;
    for load in [LOAD, STRICT] {
        let text = load(&VarMap::new(), &file.path)
            .expect_err("a refusal")
            .to_string();
        assert!(text.contains("build the model before loading"), "{text}");
    }
    Ok(())
}

#[test]
fn layers_built_before_and_after_loading_compute_the_same() -> Result<()> {
    let (vars, before) = new_batch_norm(DType::F32)?;
    let _ = checkpoint::load_into_strict(&vars, &file(&saved()?)?.path)?;
    let after = batch_norm(2, 1e-5, vb(&vars, DType::F32).pp("bn"))?;
    let x = Tensor::new(&[[1f32, 2.], [-3., 0.5]], &CPU)?;
    let y = |norm: &candle_norm::BatchNorm| values(&norm.forward_t(&x, false)?);
    assert_eq!(y(&before)?, y(&after)?);
    before.forward_t(&x, true)?;
    assert_eq!(y(&before)?, y(&after)?, "they share their statistics");
    Ok(())
}
