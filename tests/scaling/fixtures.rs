//! The values of scikit-learn, of `scripts/make_scaling.py`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use candle_norm::scaling::{
    MaxAbsScaler, MaxAbsScalerOptions, MinMaxScaler, MinMaxScalerOptions, Nan, RobustScaler,
    RobustScalerOptions, Scaler, StandardScaler, StandardScalerOptions,
};
use safetensors::SafeTensors;
use serde_json::Value;

use testkit::data::values;

/// The share of a value, or of 1, that may be off.
const TOLERANCE: f64 = 1e-10;

struct Case {
    name: String,
    tensors: HashMap<String, Tensor>,
    kind: String,
    options: Value,
    splits: Vec<usize>,
}

fn cases() -> Vec<Case> {
    let folder =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/fixtures/scaling");
    let mut cases = vec![];
    for entry in std::fs::read_dir(folder).expect("the fixtures") {
        let path = entry.expect("a file").path();
        let name = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .to_string();
        if !name.starts_with("sklearn_") {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a fixture");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
        let metadata = header.metadata().clone().expect("metadata");
        cases.push(Case {
            name,
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("tensors"),
            kind: metadata["kind"].clone(),
            options: serde_json::from_str(&metadata["options"]).expect("options"),
            splits: serde_json::from_str(&metadata["splits"]).expect("splits"),
        });
    }
    cases
}

/// A scaler of this crate, and how the values are named that scikit-learn has of it.
enum Any {
    Standard(StandardScaler),
    MinMax(MinMaxScaler),
    MaxAbs(MaxAbsScaler),
    Robust(RobustScaler),
}

impl Any {
    fn of(case: &Case) -> Self {
        let get = |name: &str| &case.options[name];
        let flag = |name: &str| get(name).as_bool().expect("a flag");
        let pair = |name: &str| {
            let of = |i: usize| get(name)[i].as_f64().expect("a number");
            (of(0), of(1))
        };
        let nan: Nan = get("nan")
            .as_str()
            .expect("a word")
            .parse()
            .expect("a policy");
        match case.kind.as_str() {
            "StandardScaler" => Self::Standard(
                StandardScaler::new(StandardScalerOptions {
                    with_mean: flag("with_mean"),
                    with_std: flag("with_std"),
                    nan,
                })
                .unwrap(),
            ),
            "MinMaxScaler" => Self::MinMax(
                MinMaxScaler::new(MinMaxScalerOptions {
                    feature_range: pair("feature_range"),
                    clip: flag("clip"),
                    nan,
                })
                .unwrap(),
            ),
            "MaxAbsScaler" => Self::MaxAbs(
                MaxAbsScaler::new(MaxAbsScalerOptions {
                    clip: flag("clip"),
                    nan,
                })
                .unwrap(),
            ),
            "RobustScaler" => Self::Robust(
                RobustScaler::new(RobustScalerOptions {
                    with_centering: flag("with_centering"),
                    with_scaling: flag("with_scaling"),
                    quantile_range: pair("quantile_range"),
                    nan,
                    ..Default::default()
                })
                .unwrap(),
            ),
            other => panic!("unknown kind {other}"),
        }
    }

    fn scaler(&self) -> &dyn Scaler {
        match self {
            Self::Standard(s) => s,
            Self::MinMax(s) => s,
            Self::MaxAbs(s) => s,
            Self::Robust(s) => s,
        }
    }

    fn attribute(&self, name: &str) -> Vec<f64> {
        match (self, name) {
            (Self::Standard(s), "scale") => s.scale(),
            (Self::Standard(s), "mean") => s.mean(),
            (Self::Standard(s), "var") => s.var(),
            (Self::MinMax(s), "scale") => s.scale(),
            (Self::MinMax(s), "min") => s.data_min(),
            (Self::MinMax(s), "max") => s.data_max(),
            (Self::MaxAbs(s), "scale") => s.scale(),
            (Self::MaxAbs(s), "max_abs") => s.max_abs(),
            (Self::Robust(s), "scale") => s.scale(),
            (Self::Robust(s), "center") => s.center(),
            (_, name) => panic!("unknown attribute {name}"),
        }
        .expect("a fitted scaler")
    }
}

fn worst(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error = |(got, want): (&f64, &f64)| match got == want || (got.is_nan() && want.is_nan()) {
        true => 0.,
        false => ((got - want).abs() / want.abs().max(1.)).max(f64::MIN_POSITIVE),
    };
    let errors = got.iter().zip(want).map(error);
    // A NaN against a number must not be lost in `max`.
    errors.fold(0., |worst, e| {
        if e.is_nan() {
            f64::INFINITY
        } else {
            f64::max(worst, e)
        }
    })
}

fn assert_agrees(case: &Case, how: &str, any: &Any) {
    let want = |name: &str| values(&case.tensors[name]).expect("numbers");
    let mut got: Vec<(&str, Vec<f64>)> = vec![];
    let y = any.scaler().transform(&case.tensors["probe"]).expect("y");
    let back = any
        .scaler()
        .inverse_transform(&case.tensors["y"])
        .expect("back");
    got.push(("y", values(&y).unwrap()));
    got.push(("back", values(&back).unwrap()));
    for name in case.tensors.keys() {
        if !["x", "weight", "probe", "y", "back"].contains(&name.as_str()) {
            got.push((name, any.attribute(name)));
        }
    }
    for (name, got) in got {
        let error = worst(&got, &want(name));
        assert!(
            error <= TOLERANCE,
            "{}, {how}: {name} is off by {error:e}: {got:?}, should be {:?}",
            case.name,
            want(name)
        );
    }
}

#[test]
fn scikit_learn_agrees() {
    let cases = cases();
    assert!(cases.len() > 30, "only {} fixtures", cases.len());
    let weighted = |case: &&Case| case.tensors.contains_key("weight");
    assert!(cases.iter().filter(weighted).count() > 3);
    for case in &cases {
        let x = &case.tensors["x"];
        let weight = case.tensors.get("weight");
        let part_of = |start: usize, len: usize| {
            let of = |t: &Tensor| t.narrow(0, start, len).unwrap();
            (of(x), weight.map(of))
        };
        let fit = |scaler: &dyn Scaler, (x, weight): (Tensor, Option<Tensor>)| match weight {
            Some(weight) => scaler.fit_weighted(&x, &weight),
            None => scaler.fit(&x),
        };
        let partial_fit = |scaler: &dyn Scaler, (x, weight): (Tensor, Option<Tensor>)| match weight
        {
            Some(weight) => scaler.partial_fit_weighted(&x, &weight),
            None => scaler.partial_fit(&x),
        };
        let whole = Any::of(case);
        fit(whole.scaler(), part_of(0, x.dims()[0])).unwrap();
        assert_agrees(case, "fit", &whole);

        let (parts, merged) = (Any::of(case), Any::of(case));
        let mut start = 0;
        for &len in &case.splits {
            partial_fit(parts.scaler(), part_of(start, len)).unwrap();
            let other = Any::of(case);
            fit(other.scaler(), part_of(start, len)).unwrap();
            merged.scaler().merge(other.scaler()).unwrap();
            start += len;
        }
        assert_agrees(case, "partial_fit", &parts);
        assert_agrees(case, "merge", &merged);
        let restored = Any::of(case);
        restored
            .scaler()
            .restore(&parts.scaler().state().unwrap())
            .unwrap();
        assert_agrees(case, "restore", &restored);

        let nan = values(x).unwrap().iter().filter(|v| v.is_nan()).count() as u64;
        let counted = parts.scaler().seen().iter().map(|s| s.nan).sum::<u64>();
        assert_eq!(counted, nan, "{}", case.name);
    }
}
