//! Files that do not fit as they are: another head, other names, shards, PyTorch's own format, and
//! what is no checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{Init, VarBuilder, VarMap};
use candle_norm::checkpoint::{self, LoadOptions, LoadReport, Rename};
use candle_norm::scaling::Pipeline;
use candle_norm::{
    BatchNormOptions, WeightNormOptions, batch_norm, layer_norm, scale_norm, weight_norm,
};

use testkit::table;
use testkit::vars::{Stored, state, values_of, vb};

const CPU: Device = Device::Cpu;

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &CPU).expect("a tensor")
}

/// Files in a folder that goes away with it.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn save(&self, name: &str, tensors: &[(&str, Tensor)]) -> PathBuf {
        let tensors: HashMap<_, _> = tensors.iter().cloned().collect();
        let path = self.path(name);
        candle_core::safetensors::save(&tensors, &path).expect("a file");
        path
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/fixtures/checkpoints")
        .join(name)
}

fn load(vars: &VarMap, path: &Path, options: &LoadOptions) -> Result<LoadReport> {
    checkpoint::load_with(vars, [path], options)
}

/// The error of a load, which changes nothing.
#[track_caller]
fn refused(vars: &VarMap, paths: &[&Path], options: &LoadOptions) -> String {
    let before = state(vars);
    let error = checkpoint::load_with(vars, paths, options).expect_err("a refusal");
    assert_eq!(state(vars), before, "all or nothing");
    error.to_string()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

fn names(pairs: &[(String, String)]) -> Vec<&str> {
    pairs.iter().map(|(name, _)| name.as_str()).collect()
}

// Another head.

/// A batch norm and a head of `classes`.
fn with_head(classes: usize) -> Result<VarMap> {
    let vars = VarMap::new();
    batch_norm(2, 1e-5, vb(&vars, DType::F32).pp("bn"))?;
    candle_nn::linear(2, classes, vb(&vars, DType::F32).pp("head"))?;
    Ok(vars)
}

fn file_with_head(files: &Files) -> PathBuf {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &CPU).expect("ones");
    let tensors = [
        ("bn.weight", tensor(&[2., 3.])),
        ("bn.bias", tensor(&[4., 5.])),
        ("bn.running_mean", tensor(&[6., 7.])),
        ("bn.running_var", tensor(&[8., 9.])),
        (
            "bn.num_batches_tracked",
            Tensor::new(10i64, &CPU).expect("a counter"),
        ),
        ("head.weight", ones(&[1000, 2])),
        ("head.bias", ones(&[1000])),
    ];
    files.save("model.safetensors", &tensors)
}

#[test]
fn what_fits_is_loaded_and_another_head_is_left() -> Result<()> {
    let files = Files::new();
    let path = file_with_head(&files);
    let vars = with_head(10)?;
    let before = state(&vars);
    let text = refused(&vars, &[&path], &LoadOptions::default());
    let shapes = [
        "head.bias: expected shape [10], got [1000]",
        "head.weight",
        "skip_mismatched",
    ];
    says(&text, &shapes);

    let options = LoadOptions {
        skip_mismatched: true,
        ..Default::default()
    };
    let report = load(&vars, &path, &options)?;
    let bias = (
        "head.bias".to_string(),
        "expected shape [10], got [1000]".to_string(),
    );
    assert_eq!(report.mismatched[0], bias);
    assert_eq!(names(&report.mismatched), ["head.bias", "head.weight"]);
    assert_eq!(report.loaded.len(), 5);
    assert!(
        report.missing.is_empty() && report.unexpected.is_empty(),
        "{report}"
    );
    says(
        &report.to_string(),
        &[
            "5 variables loaded",
            "mismatched: head.bias expected shape [10], got [1000], head.weight",
        ],
    );
    for (name, want) in [
        ("bn.weight", 2.),
        ("bn.bias", 4.),
        ("bn.running_mean", 6.),
        ("bn.running_var", 8.),
        ("bn.num_batches_tracked", 10.),
    ] {
        assert_eq!(values_of(&vars, name)[0], want, "{name}");
    }
    for name in ["head.weight", "head.bias"] {
        assert_eq!(state(&vars)[name], before[name], "{name}");
    }
    Ok(())
}

#[test]
fn strict_does_not_pass_over_what_does_not_fit() -> Result<()> {
    let files = Files::new();
    let options = LoadOptions {
        strict: true,
        skip_mismatched: true,
        ..Default::default()
    };
    let text = refused(&with_head(10)?, &[&file_with_head(&files)], &options);
    says(&text, &["mismatched: [\"head.bias\", \"head.weight\"]"]);
    let report = load(&with_head(1000)?, &file_with_head(&files), &options)?;
    assert_eq!(report.loaded.len(), 7);
    Ok(())
}

#[test]
fn a_tensor_of_another_kind_does_not_fit_either() -> Result<()> {
    let files = Files::new();
    let vars = VarMap::new();
    layer_norm(2, 1e-5, vb(&vars, DType::F32))?;
    let tensors = [
        ("weight", Tensor::new(&[1u32, 2], &CPU)?),
        ("bias", tensor(&[3., 4.])),
    ];
    let path = files.save("model.safetensors", &tensors);
    says(
        &refused(&vars, &[&path], &LoadOptions::default()),
        &["weight: expected dtype F32, got U32"],
    );
    let options = LoadOptions {
        skip_mismatched: true,
        ..Default::default()
    };
    let report = load(&vars, &path, &options)?;
    assert_eq!(
        (names(&report.mismatched), report.loaded),
        (vec!["weight"], vec!["bias".to_string()])
    );
    Ok(())
}

/// One remedy for each function: what its caller can do.
#[test]
fn remedies_are_those_of_the_function_that_was_called() -> Result<()> {
    let files = Files::new();
    let plain = |vars: &VarMap, path: &Path, strict: bool| {
        let outcome = match strict {
            false => checkpoint::load_into(vars, path),
            true => checkpoint::load_into_strict(vars, path),
        };
        outcome.expect_err("a refusal").to_string()
    };
    let path = file_with_head(&files);
    for strict in [false, true] {
        let text = plain(&with_head(10)?, &path, strict);
        says(
            &text,
            &["call checkpoint::load_with with `skip_mismatched` of LoadOptions"],
        );
    }
    let vars = VarMap::new();
    layer_norm(2, 1e-5, vb(&vars, DType::F32).pp("a"))?;
    let other = files.save("b.safetensors", &[("b.a.weight", tensor(&[1., 2.]))]);
    let remedy = "call checkpoint::load_with with Rename::strip_prefix(\"b.\") in `rename`";
    says(&plain(&vars, &other, false), &[remedy]);
    let half = files.save("a.safetensors", &[("a.weight", tensor(&[1., 2.]))]);
    let remedy = "call checkpoint::load_with without `strict` of LoadOptions";
    says(
        &plain(&vars, &half, true),
        &["missing: [\"a.bias\"]", remedy],
    );
    let text = plain(&fresh()?, &fixture("two_models.pth"), false);
    says(
        &text,
        &["call checkpoint::load_with with `key` of LoadOptions"],
    );

    // A pipeline has no such options.
    let pipeline = files.path("pipeline.safetensors");
    let vars = VarMap::new();
    let linear = candle_nn::linear(2, 3, vb(&vars, DType::F32).pp("l"))?;
    Pipeline::new(linear, vars).save(&pipeline)?;
    for (outputs, name) in [(4, "l"), (3, "m")] {
        let build = |vb: VarBuilder| candle_nn::linear(2, outputs, vb.pp(name));
        let loaded = Pipeline::load(&pipeline, DType::F32, &CPU, build);
        let text = loaded.expect_err("a refusal").to_string();
        says(
            &text,
            &["Pipeline", "let `build` make the model that was saved"],
        );
        assert!(!text.contains("LoadOptions"), "{text}");
    }
    Ok(())
}

/// A mean of the file with a variance of the model would normalize by neither, and the count of the
/// file would weigh both.
#[test]
fn statistics_are_left_together_and_so_is_a_weight_norm() -> Result<()> {
    let files = Files::new();
    let vars = VarMap::new();
    batch_norm(2, 1e-5, vb(&vars, DType::F32).pp("bn"))?;
    weight_norm::linear(
        3,
        2,
        WeightNormOptions::default(),
        vb(&vars, DType::F32).pp("wn"),
    )?;
    let before = state(&vars);
    let (g, v) = (
        "wn.parametrizations.weight.original0",
        "wn.parametrizations.weight.original1",
    );
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &CPU);
    let mut tensors = vec![
        ("bn.weight", tensor(&[2., 2.])),
        ("bn.running_mean", tensor(&[3., 3.])),
        ("bn.running_var", tensor(&[4., 4., 4.])),
        ("bn.num_batches_tracked", Tensor::new(7i64, &CPU)?),
        (g, ones(&[2, 1])?),
        (v, ones(&[2, 5])?),
        ("wn.bias", tensor(&[5., 5.])),
    ];
    let options = LoadOptions {
        skip_mismatched: true,
        ..Default::default()
    };
    let report = load(&vars, &files.save("a.safetensors", &tensors), &options)?;
    let left = [
        "bn.num_batches_tracked",
        "bn.running_mean",
        "bn.running_var",
        g,
        v,
    ];
    assert_eq!(names(&report.mismatched), left);
    assert_eq!(report.loaded, ["bn.weight", "wn.bias"]);
    for name in left {
        assert_eq!(state(&vars)[name], before[name], "{name}");
    }
    says(
        &report.to_string(),
        &["bn.running_mean left beside bn.running_var"],
    );

    // Nor is a count set to 0 whose statistics stay.
    tensors.retain(|(name, _)| !name.ends_with("tracked"));
    let report = load(&vars, &files.save("b.safetensors", &tensors), &options)?;
    assert_eq!(
        (report.counters_reset.len(), report.missing),
        (
            0,
            vec!["bn.bias".to_string(), "bn.num_batches_tracked".to_string()]
        )
    );
    Ok(())
}

/// The tensors of a file, the variables that are left beside others, and some that the file lacks,
/// the last of which breaks them.
type Halves<'a> = (&'a [(&'a str, Tensor)], &'a [&'a str], &'a [&'a str]);

/// Tensors that the file lacks break those that belong to them, as tensors that do not fit do.
#[test]
fn what_lacks_its_other_half_is_left_too() -> Result<()> {
    let files = Files::new();
    let (g, v) = (
        "wn.parametrizations.weight.original0",
        "wn.parametrizations.weight.original1",
    );
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &CPU).expect("ones");
    let counter = || Tensor::new(7i64, &CPU).expect("a counter");
    let (mean, var, count) = (
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    );
    let cases: [Halves; 7] = [
        (&[(mean, ones(&[2]))], &[mean], &[count, var]),
        (&[("bn.moving_mean", ones(&[2]))], &[mean], &[count, var]),
        (
            &[(var, ones(&[2])), (count, counter())],
            &[count, var],
            &[mean],
        ),
        (&[(count, counter())], &[count], &[mean, var]),
        (&[("wn.weight_g", ones(&[2, 1]))], &[g], &[v]),
        (&[(g, ones(&[2, 1]))], &[g], &[v]),
        (&[("wn.weight_v", ones(&[2, 3]))], &[v], &[g]),
    ];
    for (i, (stored, left, missing)) in cases.into_iter().enumerate() {
        let vars = VarMap::new();
        let norm = batch_norm(2, 1e-5, vb(&vars, DType::F32).pp("bn"))?;
        weight_norm::linear(
            3,
            2,
            WeightNormOptions::default(),
            vb(&vars, DType::F32).pp("wn"),
        )?;
        norm.forward_t(&Tensor::new(&[[0f32, 1.], [2., 4.]], &CPU)?, true)?;
        let before = state(&vars);
        let alone = files.save("alone.safetensors", stored);
        let text = refused(&vars, &[&alone], &LoadOptions::default());
        let lacks = format!("{}, which the file lacks", missing[missing.len() - 1]);
        says(&text, &[left[0], &lacks]);

        let mut tensors = stored.to_vec();
        tensors.push(("bn.bias", tensor(&[5., 6.])));
        let path = files.save("model.safetensors", &tensors);
        let report = load(&vars, &path, &LoadOptions::default())?;
        assert_eq!(report.loaded, ["bn.bias"], "case {i}");
        assert_eq!(names(&report.mismatched), left, "case {i}");
        for name in missing {
            assert!(report.missing.contains(&name.to_string()), "case {i}");
        }
        assert!(report.counters_reset.is_empty() && report.unexpected.is_empty());
        says(&report.to_string(), &[&lacks]);
        for (name, value) in before {
            assert!(name == "bn.bias" || state(&vars)[&name] == value, "{name}");
        }
        let text = checkpoint::load_into_strict(&vars, &path).expect_err("a refusal");
        says(&text.to_string(), &["missing", missing[missing.len() - 1]]);
    }
    // A variable of that name that belongs to nothing is loaded alone.
    let vars = VarMap::new();
    vb(&vars, DType::F32).get(2, "running_mean")?;
    let path = files.save("model.safetensors", &[("running_mean", tensor(&[1., 2.]))]);
    let report = checkpoint::load_into_strict(&vars, &path)?;
    assert_eq!(report.loaded, ["running_mean"]);
    Ok(())
}

#[test]
fn a_damaged_statistic_is_an_error_however_much_is_skipped() -> Result<()> {
    let files = Files::new();
    let vars = with_head(10)?;
    let tensors = [
        ("bn.running_var", tensor(&[1., -1.])),
        ("bn.weight", tensor(&[1., 1.])),
    ];
    let options = LoadOptions {
        skip_mismatched: true,
        ..Default::default()
    };
    let text = refused(
        &vars,
        &[&files.save("model.safetensors", &tensors)],
        &options,
    );
    says(
        &text,
        &["bn.running_var", "at least 0, got -1 at channel 1"],
    );
    Ok(())
}

#[test]
fn axes_of_size_1_are_no_difference() -> Result<()> {
    let files = Files::new();
    for shape in [vec![1, 3, 1, 1], vec![3, 1], vec![1, 3], vec![3]] {
        let vars = VarMap::new();
        batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
        let stored = |first: f32| tensor(&[first, 2., 3.]).reshape(shape.as_slice());
        let tensors = [
            ("weight", stored(5.)?),
            ("bias", stored(6.)?),
            ("running_mean", stored(7.)?),
            ("running_var", stored(8.)?),
        ];
        let report = load(
            &vars,
            &files.save("model.safetensors", &tensors),
            &LoadOptions::default(),
        )?;
        let reshaped = if shape.len() == 1 { 0 } else { 4 };
        assert_eq!(report.reshaped.len(), reshaped, "{shape:?}");
        for (name, first) in [
            ("weight", 5.),
            ("bias", 6.),
            ("running_mean", 7.),
            ("running_var", 8.),
        ] {
            let Stored { dims, values, .. } = &state(&vars)[name];
            assert_eq!(
                (dims.as_slice(), values.as_slice()),
                (&[3][..], &[first, 2., 3.][..])
            );
        }
    }
    // As many elements on other axes are another matter.
    let vars = VarMap::new();
    layer_norm((2, 3), 1e-5, vb(&vars, DType::F32))?;
    for shape in [vec![3, 2], vec![6], vec![6, 1], vec![1, 3, 2]] {
        let weight = Tensor::ones(shape.as_slice(), DType::F32, &CPU)?;
        let path = files.save("model.safetensors", &[("weight", weight)]);
        says(
            &refused(&vars, &[&path], &LoadOptions::default()),
            &["[2, 3]", &format!("{shape:?}")],
        );
    }
    Ok(())
}

/// The authors save their `scale` without axes.
#[test]
fn scale_norm_loads_the_number_of_its_authors() -> Result<()> {
    let files = Files::new();
    let number = Tensor::new(7f32, &CPU)?;
    let path = files.save("scale.safetensors", &[("norm.scale", number.clone())]);
    let vars = VarMap::new();
    scale_norm(4, 1e-5, vb(&vars, DType::F32).pp("norm"))?;
    assert_eq!(values_of(&vars, "norm.weight"), [2.]);
    let report = load(&vars, &path, &LoadOptions::default())?;
    assert_eq!(report.reshaped.len(), 1);
    assert_eq!(values_of(&vars, "norm.weight"), [7.]);
    for stored in [number.clone(), number.reshape(1)?] {
        let tensors = HashMap::from([("scale".to_string(), stored)]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
        let norm = scale_norm(4, 1e-5, vb)?;
        assert_eq!(norm.weight().to_vec1::<f32>()?, [7.]);
    }
    let tensors = HashMap::from([("weight".to_string(), tensor(&[1.; 4]))]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let text = scale_norm(4, 1e-5, vb).expect_err("a weight for each element");
    says(&text.to_string(), &["[1]", "[4]"]);
    Ok(())
}

// Names.

#[test]
fn nothing_that_matches_is_an_error_that_knows_the_prefix() -> Result<()> {
    let files = Files::new();
    let tensors = [("weight", tensor(&[1., 2.])), ("bias", tensor(&[3., 4.]))];
    let path = files.save("model.safetensors", &tensors);
    let module = tensors.map(|(name, t)| (format!("module.{name}"), t));
    let module: Vec<_> = module
        .iter()
        .map(|(n, t)| (n.as_str(), t.clone()))
        .collect();
    let prefixed = files.save("module.safetensors", &module);
    let build = |prefix: &str| -> Result<VarMap> {
        let vars = VarMap::new();
        layer_norm(2, 1e-5, vb(&vars, DType::F32).pp(prefix))?;
        Ok(vars)
    };
    let (plain, deep) = (VarMap::new(), build("encoder.norm")?);
    layer_norm(2, 1e-5, vb(&plain, DType::F32))?;
    for (vars, path, rule) in [
        (&plain, &prefixed, Rename::strip_prefix("module.")),
        (&deep, &path, Rename::add_prefix("encoder.norm.")),
    ] {
        let remedy = format!("Rename::{rule:?}");
        says(
            &refused(vars, &[path], &LoadOptions::default()),
            &[&remedy, "weight"],
        );
        for strict in [false, true] {
            let options = LoadOptions {
                strict,
                rename: vec![rule.clone()],
                ..Default::default()
            };
            let report = load(vars, path, &options)?;
            assert_eq!(report.loaded.len(), 2);
            assert_eq!(report.renamed.len(), 2);
        }
    }
    assert_eq!(values_of(&plain, "weight"), [1., 2.]);
    assert_eq!(values_of(&deep, "encoder.norm.bias"), [3., 4.]);

    let other = build("other")?;
    let odd = files.save("odd.safetensors", &[("x", tensor(&[1.]))]);
    says(
        &refused(&other, &[&odd], &LoadOptions::default()),
        &["other.bias", "got none of them but x", "Rename::with"],
    );
    let none = files.save("none.safetensors", &[]);
    says(
        &refused(&other, &[&none], &LoadOptions::default()),
        &["expected tensors for the model, got none"],
    );
    // Loaded before the model is built.
    says(
        &refused(&VarMap::new(), &[&path], &LoadOptions::default()),
        &["build the model before loading"],
    );
    Ok(())
}

#[test]
fn nothing_that_fits_is_an_error_too() -> Result<()> {
    let files = Files::new();
    let vars = VarMap::new();
    layer_norm(2, 1e-5, vb(&vars, DType::F32))?;
    let path = files.save("model.safetensors", &[("weight", tensor(&[1., 2., 3.]))]);
    let options = LoadOptions {
        skip_mismatched: true,
        ..Default::default()
    };
    says(
        &refused(&vars, &[&path], &options),
        &["weight", "[2]", "[3]"],
    );
    Ok(())
}

#[test]
fn rules_apply_in_their_order_and_a_function_may_leave_tensors_out() -> Result<()> {
    let files = Files::new();
    let vars = with_head(10)?;
    let before = state(&vars);
    let ten = Tensor::ones((10, 2), DType::F32, &CPU)?;
    let tensors = [
        ("module.norm1.weight", tensor(&[1., 2.])),
        ("norm1.bias", tensor(&[3., 4.])),
        ("module.head.weight", ten),
    ];
    let path = files.save("model.safetensors", &tensors);
    let options = LoadOptions {
        rename: vec![
            Rename::strip_prefix("module."),
            Rename::with(|name| {
                let kept = !name.starts_with("head.");
                kept.then(|| name.replace("norm1", "bn"))
            }),
        ],
        ..Default::default()
    };
    let report = load(&vars, &path, &options)?;
    let renamed = [
        ("bn.bias".to_string(), "norm1.bias".to_string()),
        ("bn.weight".to_string(), "module.norm1.weight".to_string()),
    ];
    assert_eq!(report.renamed, renamed);
    assert_eq!(report.skipped, ["module.head.weight"]);
    assert!(report.unexpected.is_empty());
    assert_eq!(values_of(&vars, "bn.weight"), [1., 2.]);
    assert_eq!(
        state(&vars)["head.weight"],
        before["head.weight"],
        "left out, though it fits"
    );
    says(
        &report.to_string(),
        &["left out of the file: module.head.weight"],
    );

    // Two names that become one.
    let options = LoadOptions {
        rename: vec![Rename::with(|_| Some("bn.weight".to_string()))],
        ..Default::default()
    };
    says(
        &refused(&vars, &[&path], &options),
        &[
            "two for bn.weight",
            "module.norm1.weight",
            "module.head.weight",
        ],
    );
    Ok(())
}

#[test]
fn a_long_report_has_counts_and_the_first_names() -> Result<()> {
    let files = Files::new();
    let vars = VarMap::new();
    layer_norm(2, 1e-5, vb(&vars, DType::F32))?;
    let mut tensors = vec![("weight".to_string(), tensor(&[1., 2.]))];
    tensors.extend((0..90).map(|i| (format!("other.{i:02}"), tensor(&[0.]))));
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(n, t)| (n.as_str(), t.clone()))
        .collect();
    let path = files.save("model.safetensors", &tensors);
    let report = load(&vars, &path, &LoadOptions::default())?;
    assert_eq!(report.unexpected.len(), 90);
    let text = "1 variable loaded; missing in the file: bias; unexpected in the file (90): \
        other.00, other.01, other.02, other.03, other.04 and 85 more";
    assert_eq!(report.to_string(), text);
    let strict = LoadOptions {
        strict: true,
        ..Default::default()
    };
    let text = refused(&vars, &[&path], &strict);
    says(
        &text,
        &[
            "missing: [\"bias\"]",
            "unexpected (90): [\"other.00\", ",
            "\"other.04\"] and 85 more",
        ],
    );
    assert!(!text.contains("other.05"), "{text}");

    // Nor do 90 names that do not match, or do not fit, fill a line.
    let vars = VarMap::new();
    for i in 0..90 {
        vb(&vars, DType::F32).get(3, &format!("other.{i:02}"))?;
    }
    let text = refused(&vars, &[&path], &LoadOptions::default());
    says(&text, &["other.04", "and 85 more"]);
    assert!(!text.contains("other.05"), "{text}");
    let vars = VarMap::new();
    for i in 0..90 {
        vb(&vars, DType::F32).get(3, &format!("mine.{i:02}"))?;
    }
    let text = refused(&vars, &[&path], &LoadOptions::default());
    says(&text, &["mine.04 and 85 more", "other.04 and 86 more"]);
    Ok(())
}

// Shards.

#[test]
fn shards_are_one_file_in_any_order() -> Result<()> {
    let files = Files::new();
    // What belongs together lies apart: the counter in another shard than its statistics, and other
    // names beside a missing one.
    let shards = [
        files.save(
            "1.safetensors",
            &[("bn.running_mean", tensor(&[1., 2.])), ("x", tensor(&[0.]))],
        ),
        files.save(
            "2.safetensors",
            &[
                ("bn.moving_variance", tensor(&[3., 4.])),
                ("a", tensor(&[0.])),
            ],
        ),
        files.save(
            "3.safetensors",
            &[
                ("bn.num_batches_tracked", Tensor::new(5i64, &CPU)?),
                ("bn.gamma", tensor(&[6., 7.])),
            ],
        ),
        fixture("batch_norm2d.pth"),
    ];
    let mut outcomes = vec![];
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let vars = VarMap::new();
        batch_norm(2, 1e-5, vb(&vars, DType::F32).pp("bn"))?;
        batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
        let paths = order.map(|i| &shards[i]);
        let report = checkpoint::load_with(&vars, paths, &LoadOptions::default())?;
        assert_eq!(report.loaded.len(), 9);
        assert_eq!(
            (report.unexpected.len(), report.missing.len()),
            (2, 1),
            "{report}"
        );
        assert_eq!(values_of(&vars, "bn.num_batches_tracked"), [5.]);
        assert_eq!(values_of(&vars, "num_batches_tracked"), [7.]);
        outcomes.push((report, state(&vars)));
    }
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]));
    Ok(())
}

#[test]
fn shards_with_the_same_name_are_refused_in_any_order() -> Result<()> {
    let files = Files::new();
    let vars = VarMap::new();
    layer_norm(2, 1e-5, vb(&vars, DType::F32))?;
    let a = files.save("a.safetensors", &[("weight", tensor(&[1., 2.]))]);
    let b = files.save("b.safetensors", &[("weight", tensor(&[3., 4.]))]);
    let texts = [[&a, &b], [&b, &a]].map(|[x, y]| refused(&vars, &[x, y], &LoadOptions::default()));
    assert_eq!(texts[0], texts[1]);
    says(
        &texts[0],
        &["two for weight", "a.safetensors", "b.safetensors"],
    );
    says(
        &refused(&vars, &[], &LoadOptions::default()),
        &["at least one file"],
    );
    Ok(())
}

// Who owns a name.

/// Every other name of a norm's tensors, each a variable of the user's own at the same place.
const OTHERS: [&str; 9] = [
    "gamma",
    "scale",
    "beta",
    "mean",
    "moving_mean",
    "var",
    "moving_variance",
    "weight_g",
    "weight_v",
];

fn own(vars: &VarMap) -> Result<()> {
    for name in OTHERS {
        vb(vars, DType::F32).get_with_hints(2, name, Init::Const(5.))?;
    }
    Ok(())
}

type Build = Box<dyn Fn(VarBuilder) -> Result<Box<dyn ModuleT>>>;

const DIMS: [usize; 4] = [2, 2, 1, 2];

/// Every form of every layer, for inputs of [`DIMS`], and a layer around which there is weight
/// norm.
fn layers() -> Vec<(&'static str, Build)> {
    let mut layers: Vec<(&str, Build)> = vec![];
    for (_, form) in table::forms() {
        let build = |vb: VarBuilder| Ok((form.build)(&DIMS, vb)? as Box<dyn ModuleT>);
        layers.push((form.name, Box::new(build)));
    }
    let weight_norm = |vb: VarBuilder| {
        let options = WeightNormOptions::default();
        Ok(Box::new(weight_norm::linear(2, 2, options, vb)?) as Box<dyn ModuleT>)
    };
    layers.push(("weight_norm", Box::new(weight_norm)));
    layers
}

#[test]
fn a_norm_never_takes_a_variable_of_the_users_own_in_either_order() -> Result<()> {
    for (layer, build) in layers() {
        let alone = VarMap::new();
        build(vb(&alone, DType::F32))?;
        let mut maps = vec![];
        for own_first in [true, false] {
            let vars = VarMap::new();
            if own_first {
                own(&vars)?;
            }
            let norm = build(vb(&vars, DType::F32))?;
            if !own_first {
                own(&vars)?;
            }
            for name in state(&alone).keys() {
                assert!(
                    state(&vars).contains_key(name),
                    "{layer}, own first {own_first}: no {name}"
                );
            }
            assert_eq!(
                state(&vars).len(),
                state(&alone).len() + OTHERS.len(),
                "{layer}"
            );
            // Built again it has the same variables, and training moves its statistics alone.
            build(vb(&vars, DType::F32))?;
            assert_eq!(
                state(&vars).len(),
                state(&alone).len() + OTHERS.len(),
                "{layer}"
            );
            let x = Tensor::new(&[1f32, 2., 3., 5., 7., 1., 2., 8.], &CPU)?.reshape(&DIMS)?;
            norm.forward_t(&x, true)?;
            for name in OTHERS {
                assert_eq!(values_of(&vars, name), [5., 5.], "{layer}: {name}");
            }
            maps.push(vars);
        }
        // What one of them saves, the other loads, each tensor by its own name.
        let files = Files::new();
        let path = files.path("model.safetensors");
        maps[0].save(&path)?;
        let report = checkpoint::load_into_strict(&maps[1], &path)?;
        assert!(report.renamed.is_empty(), "{layer}: {report}");
        assert_eq!(state(&maps[0]), state(&maps[1]), "{layer}");
    }
    Ok(())
}

#[test]
fn on_load_a_tensor_belongs_to_the_variable_of_its_name() -> Result<()> {
    let files = Files::new();
    let mut tensors = vec![
        ("gamma", tensor(&[7., 7.])),
        ("mean", tensor(&[8., 8.])),
        ("bias", tensor(&[9., 9.])),
    ];
    let path = files.save("model.safetensors", &tensors);
    for own_first in [true, false] {
        let vars = VarMap::new();
        let own = |vars: &VarMap| -> Result<()> {
            for name in ["gamma", "mean"] {
                vb(vars, DType::F32).get_with_hints(2, name, Init::Const(5.))?;
            }
            Ok(())
        };
        if own_first {
            own(&vars)?;
        }
        batch_norm(2, 1e-5, vb(&vars, DType::F32))?;
        if !own_first {
            own(&vars)?;
        }
        let report = load(&vars, &path, &LoadOptions::default())?;
        assert_eq!(report.loaded, ["bias", "gamma", "mean"]);
        assert_eq!(
            report.missing,
            [
                "num_batches_tracked",
                "running_mean",
                "running_var",
                "weight"
            ]
        );
        assert!(report.renamed.is_empty() && report.counters_reset.is_empty());
        for (name, want) in [
            ("gamma", 7.),
            ("weight", 1.),
            ("mean", 8.),
            ("running_mean", 0.),
            ("bias", 9.),
        ] {
            assert_eq!(values_of(&vars, name), [want, want], "{name}");
        }
    }
    // Without owners, they stand for what is missing.
    let vars = VarMap::new();
    batch_norm(2, 1e-5, vb(&vars, DType::F32))?;
    tensors.push(("var", tensor(&[6., 6.])));
    let path = files.save("whole.safetensors", &tensors);
    let report = load(&vars, &path, &LoadOptions::default())?;
    let taken = ["running_mean", "running_var", "weight"];
    assert_eq!(names(&report.renamed), taken);
    assert_eq!(values_of(&vars, "weight"), [7., 7.]);
    Ok(())
}

/// A builder over a file still finds the other names, of any backend that reads one.
#[test]
fn files_have_their_other_names_still() -> Result<()> {
    let files = Files::new();
    let tensors = [
        ("n.gamma", tensor(&[1., 2.])),
        ("n.beta", tensor(&[3., 4.])),
        ("n.moving_mean", tensor(&[5., 6.])),
        ("n.var", tensor(&[7., 8.])),
    ];
    let path = files.save("model.safetensors", &tensors);
    let buffered = VarBuilder::from_buffered_safetensors(std::fs::read(&path)?, DType::F32, &CPU)?;
    let map = tensors
        .iter()
        .map(|(n, t)| (n.to_string(), t.clone()))
        .collect();
    // Tensors that are variables, but of no map.
    let variables = tensors.iter().map(|(n, t)| {
        let var = candle_core::Var::from_tensor(t)?;
        Ok((n.to_string(), var.as_tensor().clone()))
    });
    let variables = variables.collect::<Result<HashMap<_, _>>>()?;
    for vb in [
        buffered.clone(),
        VarBuilder::from_tensors(map, DType::F32, &CPU),
        VarBuilder::from_tensors(variables, DType::F32, &CPU),
        buffered.rename_f(|name: &str| name.to_string()),
    ] {
        let norm = batch_norm(2, BatchNormOptions::default(), vb.pp("n"))?;
        let (weight, bias) = norm.weight_and_bias().expect("a pair");
        assert_eq!(weight.to_vec1::<f32>()?, [1., 2.]);
        assert_eq!(bias.to_vec1::<f32>()?, [3., 4.]);
        assert_eq!(norm.running_mean().to_vec1::<f32>()?, [5., 6.]);
        assert_eq!(norm.running_var().to_vec1::<f32>()?, [7., 8.]);
    }
    Ok(())
}

// Files of torch.save.

/// A batch norm as PyTorch saved it.
fn trained() -> Result<VarMap> {
    let vars = VarMap::new();
    batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
    let _ = checkpoint::load_into_strict(&vars, fixture("batch_norm2d.safetensors"))?;
    Ok(vars)
}

fn fresh() -> Result<VarMap> {
    let vars = VarMap::new();
    batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
    Ok(vars)
}

#[test]
fn a_state_dict_of_either_format_loads_as_the_safetensors_file_does() -> Result<()> {
    let want = state(&trained()?);
    assert_eq!(want["num_batches_tracked"].values, [7.]);
    for name in ["batch_norm2d.pth", "batch_norm2d_old.pth"] {
        let vars = fresh()?;
        let report = checkpoint::load_into_strict(&vars, fixture(name))?;
        assert_eq!((report.loaded.len(), report.key), (5, None), "{name}");
        assert_eq!(state(&vars), want, "{name}");
    }
    Ok(())
}

#[test]
fn a_state_dict_is_found_under_its_key() -> Result<()> {
    let want = state(&trained()?);
    for name in ["training.pth", "training_old.pth"] {
        for key in [None, Some("model".to_string())] {
            let vars = fresh()?;
            let options = LoadOptions {
                strict: true,
                key,
                ..Default::default()
            };
            let report = load(&vars, &fixture(name), &options)?;
            assert_eq!(report.key.as_deref(), Some("model"), "{name}");
            assert_eq!(state(&vars), want, "{name}");
            says(&report.to_string(), &["5 variables loaded from \"model\""]);
        }
        let options = LoadOptions {
            key: Some("weights".to_string()),
            ..Default::default()
        };
        says(
            &refused(&fresh()?, &[&fixture(name)], &options),
            &[name, "\"weights\"", "\"model\""],
        );
    }
    Ok(())
}

#[test]
fn of_two_state_dicts_one_is_chosen_by_its_key() -> Result<()> {
    let want = state(&trained()?);
    for name in ["two_models.pth", "two_models_old.pth"] {
        let text = refused(&fresh()?, &[&fixture(name)], &LoadOptions::default());
        says(&text, &[name, "\"ema\", \"model\"", "`key` of LoadOptions"]);
        for (key, factor) in [("model", 1.), ("ema", 2.)] {
            let vars = fresh()?;
            let options = LoadOptions {
                strict: true,
                key: Some(key.to_string()),
                ..Default::default()
            };
            let _ = load(&vars, &fixture(name), &options)?;
            let doubled: Vec<f64> = want["running_mean"]
                .values
                .iter()
                .map(|v| v * factor)
                .collect();
            assert_eq!(values_of(&vars, "running_mean"), doubled, "{name}, {key}");
        }
    }
    let options = LoadOptions {
        key: Some("model".to_string()),
        ..Default::default()
    };
    let text = refused(&fresh()?, &[&fixture("batch_norm2d.safetensors")], &options);
    says(&text, &["key \"model\"", "a safetensors file"]);
    Ok(())
}

/// Tensors beside the state dict that was chosen are reported as left out.
#[test]
fn tensors_beside_a_state_dict_are_reported() -> Result<()> {
    let mut moments: Vec<String> = vec![];
    for parameter in ["0", "1"] {
        for name in ["exp_avg", "exp_avg_sq", "step"] {
            moments.push(format!("optimizer.state.{parameter}.{name}"));
        }
    }
    moments.push("rng".to_string());
    for name in ["training.pth", "training_old.pth"] {
        let report = checkpoint::load_into_strict(&fresh()?, fixture(name))?;
        assert_eq!(report.skipped, moments, "{name}");
        says(
            &report.to_string(),
            &["left out of the file: optimizer.state.0"],
        );
    }
    for name in ["two_models.pth", "two_models_old.pth"] {
        let options = LoadOptions {
            key: Some("model".to_string()),
            ..Default::default()
        };
        let report = load(&fresh()?, &fixture(name), &options)?;
        let ema = [
            "ema.bias",
            "ema.num_batches_tracked",
            "ema.running_mean",
            "ema.running_var",
            "ema.weight",
        ];
        assert_eq!(report.skipped, ema, "{name}");
    }
    // What lies deeper than the tensors at the root, in a list too.
    let deeper = [
        &b"}(X\x04\x00\x00\x00bias"[..],
        TENSOR,
        b"X\x04\x00\x00\x00rest](}K\x07",
        TENSOR,
        b"seu",
    ]
    .concat();
    let files = Files::new();
    let path = files.write("net.pth", &with_storage(&deeper));
    let report = checkpoint::load_into(&fresh()?, &path)?;
    assert_eq!(
        (report.loaded, report.key),
        (vec!["bias".to_string()], None)
    );
    assert_eq!(report.skipped, ["rest.0.7"]);
    Ok(())
}

/// A tensor of three elements of the storage "0".
const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage\
    ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQK\x00K\x03\x85K\x01\x85tR";

/// A file of the older format of `object` and the storage of [`TENSOR`].
fn with_storage(object: &[u8]) -> Vec<u8> {
    let mut file = old(object);
    file.truncate(file.len() - 4);
    file.extend(b"\x80\x02]X\x01\x00\x00\x000a.");
    file.extend(3u64.to_le_bytes());
    file.extend([0; 12]);
    file
}

/// torch.save takes other protocols than its own, which candle has no reader for.
#[test]
fn a_later_protocol_of_pickles_has_a_remedy() -> Result<()> {
    let files = Files::new();
    let remedy = |protocol: &str| {
        [
            format!("protocol {protocol}"),
            "torch.save(.., pickle_protocol=2)".to_string(),
        ]
    };
    // In an archive, framed, as Python writes {} and {"a": b""}.
    for (protocol, pickle) in [
        ("4", &b"\x80\x04\x95\x02\0\0\0\0\0\0\0}."[..]),
        ("5", b"\x80\x05}."),
        ("3", b"\x80\x03}X\x01\x00\x00\x00aC\x00s."),
    ] {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(vec![]));
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("net/data.pkl", options).expect("an entry");
        std::io::Write::write_all(&mut zip, pickle)?;
        let bytes = zip.finish().expect("an archive").into_inner();
        let text = refused(
            &fresh()?,
            &[&files.write("net.pth", &bytes)],
            &LoadOptions::default(),
        );
        says(&text, &remedy(protocol).each_ref().map(String::as_str));
    }
    // The magic number of the older format, framed and not.
    let magic = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let framed = [&b"\x80\x04\x95\x0d\0\0\0\0\0\0\0"[..], magic].concat();
    for (protocol, bytes) in [("4", framed), ("3", [&b"\x80\x03"[..], magic].concat())] {
        let text = refused(
            &fresh()?,
            &[&files.write("old.pth", &bytes)],
            &LoadOptions::default(),
        );
        says(&text, &remedy(protocol).each_ref().map(String::as_str));
    }
    Ok(())
}

#[test]
fn a_dict_without_tensors_says_what_it_has() -> Result<()> {
    let files = Files::new();
    // {"epoch": 3, "net": {"model": {"weight": ..}}}
    let nested = [
        &b"}(X\x05\x00\x00\x00epochK\x03X\x03\x00\x00\x00net}X\x05\x00\x00\x00model}\
            X\x06\x00\x00\x00weight"[..],
        TENSOR,
        b"ssu",
    ]
    .concat();
    let remedy = "save the state dict alone: torch.save(model.state_dict(), ..)";
    let text = refused(
        &fresh()?,
        &[&files.write("net.pth", &with_storage(&nested))],
        &LoadOptions::default(),
    );
    says(
        &text,
        &["a dict without tensors", "[\"epoch\", \"net\"]", remedy],
    );
    let text = refused(
        &fresh()?,
        &[&files.write("net.pth", &old(b"}"))],
        &LoadOptions::default(),
    );
    says(&text, &["an empty dict", remedy]);
    let options = LoadOptions {
        key: Some("model".to_string()),
        ..Default::default()
    };
    let path = files.write("net.pth", &with_storage(&nested));
    let text = refused(&fresh()?, &[&path], &options);
    says(&text, &["the key \"model\"", "[\"epoch\", \"net\"]"]);
    Ok(())
}

#[test]
fn tensors_of_every_layout_and_dtype_are_read() -> Result<()> {
    let want = candle_core::safetensors::load(fixture("views.safetensors"), &CPU)?;
    for file in ["views.pth", "views_old.pth"] {
        let vars = VarMap::new();
        for (name, tensor) in &want {
            let shape = tensor.shape();
            vb(&vars, DType::F32).get_with_hints_dtype(
                shape,
                name,
                Init::Const(0.),
                tensor.dtype(),
            )?;
        }
        for (name, dtype) in [
            ("i16", DType::I64),
            ("i32", DType::I64),
            ("u8", DType::U8),
            ("bool", DType::U8),
        ] {
            vb(&vars, DType::F32).get_with_hints_dtype((2, 3, 4), name, Init::Const(0.), dtype)?;
        }
        let report = checkpoint::load_into(&vars, fixture(file))?;
        assert_eq!(report.unexpected, ["complex", "i8", "sparse"], "{file}");
        assert!(report.missing.is_empty(), "{report}");
        for (name, tensor) in &want {
            let values = tensor
                .flatten_all()?
                .to_dtype(DType::F64)?
                .to_vec1::<f64>()?;
            let stored = Stored {
                dtype: tensor.dtype(),
                dims: tensor.dims().to_vec(),
                values,
            };
            assert_eq!(state(&vars)[name], stored, "{file}: {name}");
        }
        let counted: Vec<f64> = (0..24).map(f64::from).collect();
        let lower: Vec<f64> = counted.iter().map(|v| v - 12.).collect();
        assert_eq!(values_of(&vars, "i16"), lower);
        assert_eq!(values_of(&vars, "i32"), lower);
        assert_eq!(values_of(&vars, "u8"), counted);
        let above: Vec<f64> = counted
            .iter()
            .map(|v| f64::from(u8::from(*v > 11.)))
            .collect();
        assert_eq!(values_of(&vars, "bool"), above);

        // What cannot be read matters to who wants it, and is named then.
        for (name, reason) in [
            ("complex", "ComplexFloatStorage"),
            ("i8", "CharStorage"),
            ("sparse", "_rebuild_sparse_tensor"),
        ] {
            vb(&vars, DType::F32).get((2, 3, 4), name)?;
            let text = refused(&vars, &[&fixture(file)], &LoadOptions::default());
            says(&text, &[file, name, reason]);
        }
    }
    Ok(())
}

/// As for a file of torch.save: a tensor that nobody wants is no reason to refuse the others.
#[test]
fn an_unknown_dtype_of_safetensors_matters_to_its_variable_alone() -> Result<()> {
    let files = Files::new();
    let header = concat!(
        r#"{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""mask":{"dtype":"BOOL","shape":[2],"data_offsets":[8,10]}}"#
    );
    let bytes = [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &1f32.to_le_bytes(),
        &2f32.to_le_bytes(),
        &[0, 1],
    ]
    .concat();
    let path = files.write("model.safetensors", &bytes);
    let vars = VarMap::new();
    vb(&vars, DType::F32).get(2, "weight")?;
    let report = load(&vars, &path, &LoadOptions::default())?;
    assert_eq!(
        (report.unexpected, values_of(&vars, "weight")),
        (vec!["mask".to_string()], vec![1., 2.])
    );
    vb(&vars, DType::F32).get(2, "mask")?;
    says(
        &refused(&vars, &[&path], &LoadOptions::default()),
        &["mask", "BOOL"],
    );
    Ok(())
}

#[test]
fn a_pickled_module_is_no_state_dict() -> Result<()> {
    let text = refused(
        &fresh()?,
        &[&fixture("module.pth")],
        &LoadOptions::default(),
    );
    says(&text, &["module.pth", "Linear", "state_dict()"]);
    // The older format names the class, its file and its source.
    let module = b"(X\x06\x00\x00\x00modulec__main__\nNet\nNNtQ)\x81}b";
    let files = Files::new();
    let path = files.write("net.pth", &old(module));
    let text = refused(&fresh()?, &[&path], &LoadOptions::default());
    says(&text, &["net.pth", "Net", "state_dict()"]);
    Ok(())
}

/// Cut off anywhere and with any byte changed, a file is an error or loads; it never panics.
#[test]
fn damaged_files_of_torch_are_errors() -> Result<()> {
    let files = Files::new();
    let vars = fresh()?;
    let mut refusals = 0;
    for name in [
        "batch_norm2d.pth",
        "batch_norm2d_old.pth",
        "training_old.pth",
    ] {
        let bytes = std::fs::read(fixture(name))?;
        for len in (0..bytes.len()).step_by(37) {
            let path = files.write("cut.pth", &bytes[..len]);
            let error = load(&vars, &path, &LoadOptions::default()).expect_err("a refusal");
            says(&error.to_string(), &["cut.pth"]);
        }
        for at in (0..bytes.len()).step_by(2) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            let path = files.write("changed.pth", &bytes);
            refusals += usize::from(load(&vars, &path, &LoadOptions::default()).is_err());
        }
    }
    assert!(refusals > 500, "{refusals}");
    Ok(())
}

/// Files of the older format whose third pickle is `object`.
fn old(object: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    [
        magic,
        &b"\x80\x02M\xe9\x03."[..],
        b"\x80\x02}.",
        b"\x80\x02",
        object,
        b".",
        b"\x80\x02].",
    ]
    .concat()
}

#[test]
fn pickles_without_end_are_errors() -> Result<()> {
    let files = Files::new();
    let vars = fresh()?;
    // Nested so far that dropping it would overflow the stack.
    let deep = [&b"N"[..], &[0x85; 1 << 20]].concat();
    // Doubled 60 times.
    let mut doubled = b"Nq\x00".to_vec();
    for _ in 0..60 {
        doubled.extend(b"h\x00h\x00\x86q\x00");
    }
    for object in [deep, doubled] {
        let path = files.write("hostile.pth", &old(&object));
        says(
            &refused(&vars, &[&path], &LoadOptions::default()),
            &["hostile.pth", "nested"],
        );
    }
    // A text and a whole number that are longer than the file.
    for object in [&b"X\xff\xff\xff\xff"[..], b"\x8a\xff\x00", b"U\xff"] {
        let path = files.write("hostile.pth", &old(object));
        says(
            &refused(&vars, &[&path], &LoadOptions::default()),
            &["hostile.pth"],
        );
    }
    // Views beyond their storage, of a tensor that is wanted.
    let cases: [(&[u8], &[u8]); 4] = [
        (b"K\x09", b"K\x01"),
        (b"J\xff\xff\xff\x7f", b"K\x00"),
        (b"K\x02", b"J\xff\xff\xff\x7f"),
        (b"J\xff\xff\xff\xff", b"K\x01"),
    ];
    for (size, stride) in cases {
        let start = b"}X\x04\x00\x00\x00biasctorch._utils\n_rebuild_tensor_v2\n((\
            X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000\
            X\x03\x00\x00\x00cpuK\x03tQK\x00";
        let mut object = [&start[..], size, b"\x85", stride].concat();
        object.extend(b"\x85tRs");
        let mut file = old(&object);
        file.truncate(file.len() - 4);
        file.extend(b"\x80\x02]X\x01\x00\x00\x000a.");
        file.extend(3u64.to_le_bytes());
        file.extend([0; 12]);
        let path = files.write("hostile.pth", &file);
        says(
            &refused(&vars, &[&path], &LoadOptions::default()),
            &["hostile.pth", "bias"],
        );
    }
    Ok(())
}

// What is no checkpoint.

#[test]
fn what_is_no_checkpoint_is_named() -> Result<()> {
    let files = Files::new();
    let vars = fresh()?;
    let index = concat!(
        r#"{"metadata":{},"weight_map":{"a":"model-2.safetensors","b":"model-1.safetensors","#,
        r#""c":"model-2.safetensors"}}"#
    )
    .as_bytes();
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    let npz = b"PK\x03\x04".to_vec();
    let cases: [(&str, &[u8], &str); 17] = [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
        (
            "model.gguf",
            b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0",
            "gguf_file::Content::read",
        ),
        (
            "model.bin",
            b"tjgg\x03\0\0\0\0\0\0\0\0",
            "ggml_file::Content::read",
        ),
        ("model.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0", "HDF5"),
        (
            "model.npy",
            b"\x93NUMPY\x01\0v\0{'descr'",
            "Tensor::read_npy",
        ),
        (
            "model.safetensors.gz",
            b"\x1f\x8b\x08\0\0\0\0\0\0\0",
            "gunzip",
        ),
        (
            "model.safetensors",
            b"<!DOCTYPE html><html>not found</html>",
            "a web page",
        ),
        (
            "model.pkl",
            b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.",
            "torch.save",
        ),
        (
            "model.safetensors.index.json",
            index,
            "2 shards; pass them to checkpoint::load_with: model-1.safetensors, \
            model-2.safetensors",
        ),
        ("config.json", b"{\"eps\": 1}", "no tensors"),
        ("model.pth", &tar, "before 0.1.10"),
        (
            "model.onnx",
            b"\x08\x07\x12\x07pytorch\x1a\x00",
            "candle_onnx::read_file",
        ),
        ("model.msgpack", b"\x81\xa6params\x80", "Flax"),
        ("model.safetensors", b"", "an empty file"),
        (
            "model.safetensors",
            b"\xff\0\0\0\0\0\0\0{\"weight\":",
            "cut off",
        ),
        ("model.bin", b"what is this", "of another kind"),
        ("model.pth", &npz, "model.pth"),
    ];
    for (name, bytes, says_what) in cases {
        let text = refused(&vars, &[&files.write(name, bytes)], &LoadOptions::default());
        says(&text, &[name, says_what]);
    }
    says(
        &refused(&vars, &[files.0.path()], &LoadOptions::default()),
        &["a folder"],
    );
    says(
        &refused(
            &vars,
            &[&files.path("absent.safetensors")],
            &LoadOptions::default(),
        ),
        &["absent.safetensors"],
    );
    // The name of a file says nothing.
    let renamed = files.write("weights.bin", &std::fs::read(fixture("batch_norm2d.pth"))?);
    let report = load(&vars, &renamed, &LoadOptions::default())?;
    assert_eq!(report.loaded.len(), 5);
    Ok(())
}
