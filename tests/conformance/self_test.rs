//! The runner itself: cases that are wrong must fail, and say what is wrong.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use crate::own_cases;
use crate::runner::{Report, run_folder};

/// A stored case that can be changed and written again.
#[derive(Clone)]
struct Draft {
    metadata: HashMap<String, String>,
    tensors: HashMap<String, Tensor>,
}

impl Draft {
    /// One of the cases of this repository, which pass.
    fn of(name: &str) -> Self {
        let bytes = std::fs::read(own_cases().join(name).with_extension("safetensors")).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        Self {
            metadata: header.metadata().clone().unwrap(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap(),
        }
    }

    fn meta(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.to_string(), value.to_string());
        self
    }

    fn without_meta(mut self, key: &str) -> Self {
        self.metadata.remove(key).unwrap();
        self
    }

    fn tensor(mut self, name: &str, value: Tensor) -> Self {
        self.tensors.insert(name.to_string(), value);
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.remove(name).unwrap();
        self
    }

    /// Replaces one element of a tensor.
    fn element(self, name: &str, index: usize, change: impl Fn(f64) -> f64) -> Self {
        let old = &self.tensors[name];
        let wide = old.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        let mut values = wide.to_vec1::<f64>().unwrap();
        values[index] = change(values[index]);
        let new = Tensor::from_vec(values, old.shape(), &Device::Cpu)
            .and_then(|t| t.to_dtype(old.dtype()))
            .unwrap();
        self.tensor(name, new)
    }

    fn write(&self, folder: &Path, file: &str) {
        let metadata = Some(self.metadata.clone());
        safetensors::serialize_to_file(&self.tensors, metadata, &folder.join(file)).unwrap();
    }

    /// Runs the case in a folder of its own.
    fn run(&self) -> Report {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path(), "case.safetensors");
        run_folder(folder.path())
    }

    /// Asserts that the case passes.
    fn passes(&self) {
        let report = self.run();
        assert_eq!((report.passed, &report.failures[..]), (1, &[][..]));
        assert_eq!(report.closing_line(), "1 passed, 0 failed");
    }

    /// Asserts that the case fails in one line that holds every word of `words`.
    fn fails(&self, words: &[&str]) {
        let report = self.run();
        assert!(!report.passes());
        assert_eq!(report.closing_line(), "0 passed, 1 failed", "{words:?}");
        assert_eq!(report.failures.len(), 1, "{:?}", report.failures);
        let line = &report.failures[0];
        assert!(!line.contains('\n'), "{line}");
        for word in ["case: "].iter().chain(words) {
            assert!(line.contains(word), "no {word:?} in {line:?}");
        }
    }
}

fn f64s(values: &[f64]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

const LAYER: &str = "layer_norm-width3-f32";
const BATCH: &str = "batch_norm-rank4_train-f32";
const INSTANCE: &str = "instance_norm-tracking_train-f32";
const WEIGHT: &str = "weight_norm-linear_last-f32";

/// One case of each op, with all the outputs that it can have.
const CASES: [&str; 8] = [
    LAYER,
    "rms_norm-bias-f32",
    "add_layer_norm-3x19-f32",
    "add_rms_norm-3x19-f32",
    "group_norm-rank3_g3-f32",
    INSTANCE,
    BATCH,
    WEIGHT,
];

#[test]
fn a_wrong_expected_value_fails_whatever_tensor_it_is_in() {
    let mut outputs = BTreeSet::new();
    for case in CASES {
        let draft = Draft::of(case);
        draft.passes();
        for name in draft.tensors.keys() {
            let Some(output) = name.strip_prefix("expected.") else {
                continue;
            };
            outputs.insert(output.to_string());
            let size = draft.tensors[name].elem_count();
            // 20 tolerances off; a count, which is compared exactly, by one.
            let step = if output == "num_batches_tracked" {
                1.
            } else {
                1e-4
            };
            let wrong = draft.clone().element(name, size - 1, |v| v + step);
            wrong.fails(&[
                &format!("{output}["),
                "contiguous",
                "every other",
                "composed",
                "got",
                "want",
            ]);
            // NaN would pass every comparison that is written the wrong way round.
            draft
                .clone()
                .element(name, 0, |_| f64::NAN)
                .fails(&[output, "inf tolerances"]);
            let flat = Tensor::zeros(size + 1, DType::F64, &Device::Cpu).unwrap();
            draft.clone().tensor(name, flat).fails(&[output, "shape"]);
        }
    }
    let all = "dbias dg dresidual dv dweight dx num_batches_tracked running_mean running_var sum y";
    assert_eq!(outputs.into_iter().collect::<Vec<_>>().join(" "), all);
}

#[test]
fn a_wrong_input_fails() {
    for (case, input) in [
        (LAYER, "x"),
        (LAYER, "dy"),
        (BATCH, "running_var"),
        (WEIGHT, "g"),
    ] {
        let tenth_more = Draft::of(case).element(input, 0, |v| v * 1.1 + 0.1);
        tenth_more.fails(&["tolerances"]);
    }
}

#[test]
fn the_worst_element_is_named() {
    let draft = Draft::of(LAYER).element("expected.y", 4, |v| v + 1e-3);
    draft
        .element("expected.y", 7, |v| v - 1e-2)
        .fails(&["y[2, 1] got"]);
}

#[test]
fn an_unknown_op_fails() {
    for op in ["layernorm", "add_group_norm", ""] {
        Draft::of(LAYER)
            .meta("op", op)
            .fails(&["unknown op", &format!("`{op}`")]);
    }
}

#[test]
fn configuration_keys_are_read_strictly() {
    let layer = |config: &str| Draft::of(LAYER).meta("config", config);
    let batch = |config: &str| Draft::of(BATCH).meta("config", config);
    let shape = r#""normalized_shape": [3]"#;
    layer(&format!(r#"{{{shape}, "eps": 1e-5, "epsilon": 1e-5}}"#))
        .fails(&["unknown config key `epsilon`"]);
    layer(&format!("{{{shape}}}")).fails(&["no config key `eps`"]);
    layer(r#"{"eps": 1e-5}"#).fails(&["no config key `normalized_shape`"]);
    layer(&format!(r#"{{{shape}, "eps": null}}"#)).fails(&["`eps`", "a number", "null"]);
    layer(&format!(r#"{{{shape}, "eps": "1e-5"}}"#)).fails(&["`eps`", "a number"]);
    layer(&format!(r#"{{{shape}, "eps": 0.001}}"#)).fails(&["tolerances"]);
    layer(&format!(r#"{{{shape}, "eps": -1}}"#)).fails(&["eps"]);
    layer(r#"{"normalized_shape": 3, "eps": 1e-5}"#).fails(&["`normalized_shape`", "a list"]);
    layer("[]").fails(&["`config`", "not a JSON object"]);
    layer("{").fails(&["`config`", "not JSON"]);
    batch(r#"{"eps": 1e-5, "train": true}"#).fails(&["no config key `momentum`"]);
    batch(r#"{"eps": 1e-5, "momentum": 0.3}"#).fails(&["no config key `train`"]);
    batch(r#"{"eps": 1e-5, "train": 1, "momentum": 0.3}"#).fails(&["`train`", "true or false"]);
    batch(r#"{"eps": 1e-5, "train": true, "momentum": null}"#).fails(&["running_mean"]);
    batch(r#"{"eps": 1e-5, "train": false, "momentum": 0.3}"#).fails(&["tolerances"]);
    let rms = Draft::of("rms_norm-bias-f32");
    let config = |more: &str| format!(r#"{{"normalized_shape": [6], "eps": 1e-6, {more}}}"#);
    rms.clone()
        .meta("config", &config(r#""cast": "never""#))
        .fails(&["unknown cast `never`"]);
    rms.meta("config", &config(r#""offset": 1"#))
        .fails(&["tolerances"]);
    let weight = Draft::of(WEIGHT);
    weight
        .clone()
        .meta("config", r#"{"dim": -1}"#)
        .fails(&["`dim`", "a whole number or null"]);
    weight
        .clone()
        .meta("config", r#"{"dim": 2}"#)
        .fails(&["`dim`", "[5, 7]"]);
    weight.meta("config", "{}").fails(&["no config key `dim`"]);
}

#[test]
fn metadata_is_read_strictly() {
    let layer = || Draft::of(LAYER);
    for key in ["op", "config", "dtype", "rtol", "atol"] {
        layer()
            .without_meta(key)
            .fails(&[&format!("no metadata key `{key}`")]);
    }
    for wrong in ["", "two", "NaN", "inf", "-1e-6"] {
        layer().meta("atol", wrong).fails(&["`atol`"]);
    }
    layer().meta("dtype", "f8").fails(&["unknown dtype `f8`"]);
    layer().meta("dtype", "f16").fails(&["is F32, must be F16"]);
    layer()
        .meta("scales", r#"{"dz": 1}"#)
        .fails(&["unknown scale `dz`"]);
    layer()
        .meta("scales", r#"{"y": "1"}"#)
        .fails(&["scale `y`"]);
    // The tolerances of the file are the ones that count.
    layer()
        .meta("rtol", "0")
        .meta("atol", "0")
        .fails(&["tolerances"]);
    let off = layer().element("expected.y", 1, |v| v + 1e-4);
    off.clone().fails(&["y["]);
    off.meta("scales", r#"{"y": 1000}"#).passes();
}

#[test]
fn tensors_are_read_strictly() {
    let layer = || Draft::of(LAYER);
    let one = || Tensor::new(1f32, &Device::Cpu).unwrap();
    layer().without("x").fails(&["no tensor `x`"]);
    layer()
        .tensor("gamma", one())
        .fails(&["unknown tensor `gamma`"]);
    layer()
        .tensor("running_mean", one())
        .fails(&["unknown tensor `running_mean`"]);
    layer().without("weight").fails(&["`weight`"]);
    layer().without("dy").fails(&["without `dy`"]);
    layer()
        .tensor("expected.dv", f64s(&[1.]))
        .fails(&["unknown tensor `expected.dv`"]);
    layer()
        .tensor("expected.sum", f64s(&[1.]))
        .fails(&["unknown tensor `expected.sum`"]);
    layer()
        .tensor("expected.y", one())
        .fails(&["`expected.y` is F32, must be F64"]);
    let mut nothing = layer();
    nothing
        .tensors
        .retain(|name, _| !name.starts_with("expected."));
    nothing.fails(&["expects nothing"]);
    let dy = Tensor::zeros((3, 7), DType::F32, &Device::Cpu).unwrap();
    layer()
        .tensor("dy", dy)
        .fails(&["`dy`", "[3, 7]", "[7, 3]"]);

    layer()
        .tensor("residual", one())
        .fails(&["unknown tensor `residual`"]);
    layer()
        .tensor("dsum", one())
        .fails(&["unknown tensor `dsum`"]);

    let add = || Draft::of("add_layer_norm-3x19-f32");
    add().without("residual").fails(&["no tensor `residual`"]);
    add().tensor("dsum", one()).fails(&["`dsum`", "[3, 19]"]);
    // Without its cotangent the sum still passes on what reaches it through y.
    add().without("dsum").fails(&["dx[", "tolerances"]);
    add().without("dy").fails(&["dweight", "tolerances"]);
    let neither = add().without("dsum").without("dy");
    neither.fails(&["without `dy`"]);

    Draft::of(WEIGHT).without("g").fails(&["no tensor `g`"]);
    let half = Tensor::new(&[1f32, 2., 3.], &Device::Cpu)
        .unwrap()
        .to_dtype(DType::F16)
        .unwrap();
    Draft::of(BATCH)
        .tensor("running_mean", half)
        .fails(&["`running_mean` is F16, must be F32"]);
    Draft::of(BATCH)
        .without("running_var")
        .fails(&["no tensor `running_var`"]);
    Draft::of(INSTANCE)
        .meta(
            "config",
            r#"{"eps": 1e-5, "train": true, "track_running_stats": false}"#,
        )
        .fails(&["running_mean", "produced none"]);
    Draft::of(BATCH)
        .element("running_var", 0, |_| -1.)
        .fails(&["running_var"]);
}

#[test]
fn a_training_case_without_state_starts_from_a_new_layer() {
    let mut draft = Draft::of("batch_norm-momentum1-f32");
    for state in ["running_mean", "running_var", "num_batches_tracked"] {
        draft = draft.without(state);
    }
    // With momentum 1 nothing of the start is left but the count.
    draft
        .element("expected.num_batches_tracked", 0, |_| 1.)
        .passes();
}

#[test]
fn a_count_is_a_scalar_or_a_vector_of_one() {
    let vector = |draft: &Draft, name: &str| draft.tensors[name].reshape(1).unwrap();
    let mut draft = Draft::of(BATCH);
    for name in ["num_batches_tracked", "expected.num_batches_tracked"] {
        let value = vector(&draft, name);
        draft = draft.tensor(name, value);
    }
    draft.passes();
}

#[test]
fn folders_that_hold_no_case_fail() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("README.md"), "no case").unwrap();
    let report = run_folder(folder.path());
    assert!(!report.passes());
    assert!(
        report.failures[0].contains("no .safetensors file"),
        "{:?}",
        report.failures
    );
    assert_eq!(report.closing_line(), "0 passed, 1 failed");
    assert!(!run_folder(&folder.path().join("missing")).passes());
}

#[test]
fn one_bad_file_fails_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("inner")).unwrap();
    Draft::of(LAYER).write(folder.path(), "inner/good.safetensors");
    std::fs::write(folder.path().join("bad.safetensors"), "not one").unwrap();
    Draft::of(BATCH)
        .meta("op", "x")
        .write(folder.path(), "worse.safetensors");
    let report = run_folder(folder.path());
    assert_eq!(report.closing_line(), "1 passed, 2 failed");
    let names: Vec<_> = report
        .failures
        .iter()
        .map(|f| f.split(':').next().unwrap())
        .collect();
    assert_eq!(names, ["bad", "worse"]);
    let text = report.to_string();
    assert!(
        text.contains("FAILED bad: ") && text.ends_with("1 passed, 2 failed\n"),
        "{text}"
    );
    // What ran is counted by path, so that a path that served nothing cannot look as if it had.
    assert!(
        text.contains("composed path: 1 contiguous, 1 every other element, 1 reversed axes"),
        "{text}"
    );
    assert!(
        text.contains("fused path: 1 contiguous, 1 every other element, 1 reversed axes"),
        "{text}"
    );
}
