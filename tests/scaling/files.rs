//! Scalers in files: to the bit, beside a model, and refused where anything is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::checkpoint;
use candle_norm::scaling::{
    self, Archive, MinMaxScaler, Nan, RobustScaler, RobustScalerOptions, Scaler, StandardScaler,
};

use super::kinds::{each_built, everything, rows};
use crate::common::data::Draw;

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("scaler.safetensors");
    (folder, file)
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_round_trip_keeps_every_bit_and_goes_on() {
    let (_folder, file) = scratch();
    let data = rows(&Draw::new(8).normal(60), 2);
    each_built(|kind, build| {
        let scaler = build(Nan::Ignore);
        scaler.fit(&data).unwrap();
        scaler.partial_fit(&rows(&[f64::NAN, 0.1], 2)).unwrap();
        scaler.save(&file).unwrap();

        let restored = build(Nan::Refuse);
        restored.load(&file).unwrap();
        let unknown = scaling::load(&file).unwrap();
        for other in [&restored, &unknown] {
            assert_eq!(
                everything(&**other).unwrap(),
                everything(&*scaler).unwrap(),
                "{kind}"
            );
        }
        for other in [&scaler, &restored, &unknown] {
            other
                .partial_fit(&rows(&[f64::NAN, 7., 100., -3.], 2))
                .unwrap();
        }
        assert_eq!(
            everything(&*restored).unwrap(),
            everything(&*scaler).unwrap(),
            "{kind}"
        );
        assert_eq!(
            everything(&*unknown).unwrap(),
            everything(&*scaler).unwrap(),
            "{kind}"
        );
    });
}

/// Beyond the size of its sketch, a feature has more than one level of it.
#[test]
fn a_sketch_that_has_dropped_values_comes_back_to_the_bit() {
    let (_folder, file) = scratch();
    let options = RobustScalerOptions {
        sketch_size: 16,
        ..Default::default()
    };
    let scaler = RobustScaler::new(options)
        .unwrap()
        .with_names(["a", "b"])
        .unwrap();
    scaler.fit(&rows(&Draw::new(9).normal(5000), 2)).unwrap();
    scaler.save(&file).unwrap();
    let restored = scaling::load(&file).unwrap();
    assert_eq!(
        everything(&*restored).unwrap(),
        everything(&scaler).unwrap()
    );
    restored.partial_fit(&rows(&[1., 2.], 2)).unwrap();
    assert_eq!(restored.seen()[0].values, 2501);
}

#[test]
fn a_scaler_without_data_is_saved_too() {
    let (_folder, file) = scratch();
    let scaler = MinMaxScaler::default().with_names(["a", "b"]).unwrap();
    scaler.save(&file).unwrap();
    let restored = scaling::load(&file).unwrap();
    assert_eq!(restored.features().names(), scaler.features().names());
    assert!(!restored.is_fitted());
}

/// Every file that a write could have left unfinished.
#[test]
fn a_truncated_file_is_refused() {
    let (_folder, file) = scratch();
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2., 3., 4.], 2)).unwrap();
    scaler.save(&file).unwrap();
    let whole = fs::read(&file).unwrap();
    let before = everything(&scaler).unwrap();
    for len in 0..whole.len() {
        fs::write(&file, &whole[..len]).unwrap();
        let message = message(scaler.load(&file));
        assert!(
            message.contains("expected a whole safetensors file at"),
            "{len}: {message}"
        );
    }
    assert_eq!(everything(&scaler).unwrap(), before);
    let missing = message(scaler.load(Path::new("no/such/file")));
    assert!(missing.contains("no/such/file"), "{missing}");
}

/// Any byte changed: an error or another scaler, but no panic.
#[test]
fn a_damaged_file_does_not_panic() {
    let (_folder, file) = scratch();
    each_built(|_, build| {
        let scaler = build(Nan::Refuse);
        scaler.fit(&rows(&[1., 2., 3., 4.], 2)).unwrap();
        scaler.save(&file).unwrap();
        let whole = fs::read(&file).unwrap();
        for i in 0..whole.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[i] ^= change;
                fs::write(&file, &bytes).unwrap();
                if let Ok(restored) = scaling::load(&file) {
                    let _ = restored.partial_fit(&rows(&[5., 6.], 2));
                    let _ = restored.transform(&rows(&[5., 6.], 2));
                    let _ = restored.state();
                }
            }
        }
    });
}

/// Writes `scaler` with `from` in its header replaced by `to`, of the same length.
fn edited(file: &Path, scaler: &dyn Scaler, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    scaler.save(file).unwrap();
    let mut bytes = fs::read(file).unwrap();
    let at = bytes
        .windows(from.len())
        .position(|w| w == from.as_bytes())
        .expect("the text");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn another_kind_version_or_feature_set_is_refused() {
    let (_folder, file) = scratch();
    let build = |names: [&str; 2]| StandardScaler::default().with_names(names).unwrap();
    let scaler = build(["mileage", "doors"]);
    scaler.fit(&rows(&[1., 2., 3., 4.], 2)).unwrap();
    let before = everything(&scaler).unwrap();
    scaler.save(&file).unwrap();
    for (result, expected) in [
        (
            MinMaxScaler::default().load(&file),
            "MinMaxScaler: expected the state of a MinMaxScaler, got that of a StandardScaler",
        ),
        (
            build(["mileage", "sound"]).load(&file),
            r#"StandardScaler: expected feature 1 to be "sound", got "doors""#,
        ),
        (
            StandardScaler::default()
                .with_names(["a"])
                .unwrap()
                .load(&file),
            "expected as many features as names, 1, got 2: feature 1 has no name",
        ),
    ] {
        let message = message(result);
        assert!(message.contains(expected), "{message}");
    }
    for (from, to, expected) in [
        (
            r#"\"version\":1"#,
            r#"\"version\":7"#,
            "expected state of version 1, got version 7",
        ),
        (
            r#"\"kind\":\"Sta"#,
            r#"\"kind\":\"Sto"#,
            "got that of a Stondard",
        ),
        (
            r#"scaler.m2"#,
            r#"scaler.q2"#,
            r#"expected tensor "m2" in the saved state, got none"#,
        ),
        (
            r#"\"with_std\":\"true"#,
            r#"\"with_std\":\"trua"#,
            r#"option "with_std""#,
        ),
        (
            r#"\"values\":[2,2]"#,
            r#"\"values\":[222]"#,
            "of nan in the saved state",
        ),
        (
            r#"candle_norm:scaler"#,
            r#"candle_norm:skaler"#,
            r#"expected a part "scaler""#,
        ),
    ] {
        edited(&file, &scaler, from, to);
        let message = message(scaler.load(&file));
        assert!(message.contains(expected), "{message}");
    }
    assert_eq!(everything(&scaler).unwrap(), before);
}

#[test]
fn a_statistic_that_cannot_be_is_refused() {
    let state = |m2: f64| {
        let scaler = StandardScaler::default();
        scaler.fit(&rows(&[1., 3.], 1)).unwrap();
        scaler.state().unwrap().with_values("m2", &[m2]).unwrap()
    };
    assert!(StandardScaler::from_state(&state(2.)).is_ok());
    for m2 in [-1., f64::NAN, f64::INFINITY] {
        let message = message(StandardScaler::from_state(&state(m2)));
        assert!(
            message.contains("expected a possible m2 of feature 0"),
            "{message}"
        );
    }
}

/// Scalers beside a model: each reads its own, and those that know nothing of scalers read the model.
#[test]
fn scalers_live_in_the_file_of_a_model() {
    let (_folder, file) = scratch();
    let model = |vars: &VarMap| {
        let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
        candle_nn::linear(2, 1, vb.pp("head")).unwrap()
    };
    let vars = VarMap::new();
    model(&vars);
    vars.save(&file).unwrap();
    let (inputs, targets) = (StandardScaler::default(), MinMaxScaler::default());
    inputs.fit(&rows(&[1., 2., 3., 4.], 2)).unwrap();
    targets.fit(&rows(&[5., 9.], 1)).unwrap();

    // Into the file that is there.
    let mut archive = Archive::read(&file).unwrap();
    archive.put("inputs", &inputs.state().unwrap()).unwrap();
    archive.put("targets", &targets.state().unwrap()).unwrap();
    archive.write(&file).unwrap();

    let archive = Archive::read(&file).unwrap();
    assert_eq!(archive.parts(), ["inputs", "targets"]);
    let restored = StandardScaler::from_state(&archive.state("inputs").unwrap()).unwrap();
    assert_eq!(everything(&restored).unwrap(), everything(&inputs).unwrap());

    let weight = |vars: &VarMap| {
        let all = vars.data().lock().unwrap();
        all["head.weight"].as_tensor().to_vec2::<f32>().unwrap()
    };
    let mut loaded = VarMap::new();
    model(&loaded);
    loaded.load(&file).unwrap();
    assert_eq!(weight(&loaded), weight(&vars));
    let report = checkpoint::load_into(&loaded, &file).unwrap();
    assert!(
        report.missing.is_empty() && report.unexpected.len() == 5,
        "{report}"
    );
}

#[test]
fn names_in_a_file_are_used_once() {
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2.], 1)).unwrap();
    let state = scaler.state().unwrap();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    candle_nn::linear(2, 1, vb.pp("inputs")).unwrap();

    let mut archive = Archive::default();
    archive.put("inputs", &state).unwrap();
    assert!(message(archive.put("inputs", &state)).contains(r#"got "inputs" twice"#));
    assert!(message(archive.put_vars(&vars)).contains("choose another prefix"));
    let mut archive = Archive::default();
    archive.put_vars(&vars).unwrap();
    assert!(message(archive.put("inputs", &state)).contains("choose another prefix"));
}

/// An archive that cannot be written leaves the file that was there.
#[test]
fn a_write_that_fails_leaves_the_old_file() {
    let (folder, file) = scratch();
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2.], 1)).unwrap();
    scaler.save(&file).unwrap();
    assert!(
        scaler
            .save(&folder.path().join("no/such/folder/file"))
            .is_err()
    );
    assert!(scaling::load(&file).is_ok());
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A tensor of a model is not lost on the way, whatever its dtype.
#[test]
fn tensors_of_a_model_keep_their_dtype() {
    let (_folder, file) = scratch();
    let vars = VarMap::new();
    for (name, dtype) in [("a", DType::F16), ("b", DType::F64), ("c", DType::I64)] {
        let value = Tensor::ones((2, 2), dtype, &Device::Cpu).unwrap();
        let var = candle_core::Var::from_tensor(&value).unwrap();
        vars.data().lock().unwrap().insert(name.to_string(), var);
    }
    let mut archive = Archive::default();
    archive.put_vars(&vars).unwrap();
    archive.write(&file).unwrap();
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    assert_eq!(tensors["a"].dtype(), DType::F16);
    assert_eq!(tensors["b"].dtype(), DType::F64);
    assert_eq!(tensors["c"].dtype(), DType::I64);
}
