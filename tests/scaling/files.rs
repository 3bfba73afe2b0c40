//! Scalers in files: to the bit, beside a model, and refused where anything is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::checkpoint;
use candle_norm::scaling::{
    self, Archive, DriftMonitor, DriftOptions, LossBalancer, MinMaxScaler, Nan, RobustScaler,
    RobustScalerOptions, Scaler, StandardScaler, State,
};

use super::kinds::{each_of_all, everything, rows};
use testkit::data::Draw;
use testkit::errors::message;

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("scaler.safetensors");
    (folder, file)
}

#[test]
fn a_round_trip_keeps_every_bit_and_goes_on() {
    let (_folder, file) = scratch();
    let data = rows(&Draw::new(8).normal(60), 2);
    each_of_all(|kind, build| {
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
    each_of_all(|_, build| {
        let scaler = build(Nan::Refuse);
        scaler.fit(&rows(&[1., 2., 3., 4., 2., 9.], 2)).unwrap();
        scaler.partial_fit(&rows(&[5., 1.], 2)).unwrap();
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

/// Scalers beside a model: each reads its own, and those that know nothing of scalers read the
/// model.
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
            .save(folder.path().join("no/such/folder/file"))
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

/// All that goes into a file: scalers of every kind, a monitor, a balancer.
fn every_state() -> Vec<State> {
    let data = rows(&[1., 2., 3., 5., 4., 4.], 2);
    let mut states = vec![];
    each_of_all(|_, build| {
        let scaler = build(Nan::Refuse);
        scaler.fit(&data).unwrap();
        states.push(scaler.state().unwrap());
    });
    let options = DriftOptions {
        bins: 2,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options).unwrap();
    monitor.fit(&data).unwrap();
    states.push(monitor.state().unwrap());
    let balancer = LossBalancer::new(["a", "b"], Default::default()).unwrap();
    states.push(balancer.state().unwrap());
    states
}

/// Whether `state` is of its kind.
fn restored(state: &State) -> Result<()> {
    match state.kind() {
        "DriftMonitor" => DriftMonitor::from_state(state).map(|_| ()),
        "LossBalancer" => LossBalancer::from_state(state).map(|_| ()),
        _ => scaling::from_state(state).map(|_| ()),
    }
}

#[test]
fn every_kind_refuses_a_file_that_is_cut_off_and_another_version() {
    let (_folder, file) = scratch();
    for state in every_state() {
        let kind = state.kind().to_string();
        let mut archive = Archive::default();
        archive.put("part", &state).unwrap();
        archive.write(&file).unwrap();
        restored(&Archive::read(&file).unwrap().state("part").unwrap()).unwrap();

        let whole = fs::read(&file).unwrap();
        for len in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            fs::write(&file, &whole[..len]).unwrap();
            let message = message(Archive::read(&file));
            let wanted = "expected a whole safetensors file at";
            assert!(message.contains(wanted), "{kind} {len}: {message}");
        }
        let (from, to) = (br#"\"version\":1"#, br#"\"version\":7"#);
        let at = whole.windows(from.len()).position(|w| w == from);
        let mut later = whole.clone();
        later[at.expect("a version")..][..to.len()].copy_from_slice(to);
        fs::write(&file, later).unwrap();
        let message = message(restored(
            &Archive::read(&file).unwrap().state("part").unwrap(),
        ));
        let wanted = format!("{kind}: expected state of version 1, got version 7");
        assert!(message.contains(&wanted), "{message}");
    }
}

/// Rounding may leave the squared distances of a constant below zero, which no data have.
#[test]
fn a_constant_comes_back_whatever_its_rounding() {
    for n in 1..300 {
        for value in [0.1, 1. / 3., 1e9 + 0.7] {
            let scaler = StandardScaler::default();
            scaler.fit(&rows(&vec![value; n], 1)).unwrap();
            StandardScaler::from_state(&scaler.state().unwrap())
                .unwrap_or_else(|e| panic!("{n} of {value}: {e}"));
        }
    }
}

#[test]
fn parts_are_replaced_and_removed() {
    let fitted = |value: f64| {
        let scaler = StandardScaler::default();
        scaler.fit(&rows(&[value, value + 2.], 1)).unwrap();
        scaler.state().unwrap()
    };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    candle_nn::linear(2, 1, vb.pp("head")).unwrap();
    let mut archive = Archive::default();
    archive.put_vars(&vars).unwrap();
    archive.replace("inputs", &fitted(0.)).unwrap();
    archive.put("targets", &fitted(5.)).unwrap();
    archive.replace("inputs", &fitted(8.)).unwrap();
    let mean = |archive: &Archive, part: &str| {
        let state = archive.state(part).unwrap();
        StandardScaler::from_state(&state).unwrap().mean().unwrap()[0]
    };
    assert_eq!(
        (mean(&archive, "inputs"), mean(&archive, "targets")),
        (9., 6.)
    );
    // Tensors of the model are no part.
    assert!(message(archive.replace("head", &fitted(0.))).contains("choose another prefix"));
    assert!(message(archive.put("inputs.more", &fitted(0.))).contains("choose another prefix"));
    assert!(archive.remove("inputs") && !archive.remove("inputs") && !archive.remove("head"));
    assert_eq!(archive.parts(), ["targets"]);
    archive.put("inputs", &fitted(1.)).unwrap();
}

#[test]
fn a_scaler_is_not_saved_over_a_model() {
    let (_folder, file) = scratch();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    candle_nn::linear(2, 1, vb.pp("head")).unwrap();
    vars.save(&file).unwrap();
    let before = fs::read(&file).unwrap();
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2.], 1)).unwrap();
    let message = message(scaler.save(&file));
    assert!(
        message.contains(r#"also holds "head"#) && message.contains("read, replace, write"),
        "{message}"
    );
    assert_eq!(fs::read(&file).unwrap(), before);
    // What the message says.
    let mut archive = Archive::read(&file).unwrap();
    archive.replace("scaler", &scaler.state().unwrap()).unwrap();
    archive.write(&file).unwrap();
    assert!(scaling::load(&file).is_ok());
}

/// Threads that write one file leave the file of one of them, and nothing else.
#[test]
fn a_file_that_many_write_is_whole() {
    let (folder, file) = scratch();
    let start = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        for t in 0..4 {
            let (file, start) = (&file, &start);
            scope.spawn(move || {
                let scaler = StandardScaler::default();
                scaler.fit(&rows(&vec![f64::from(t); 2000], 1000)).unwrap();
                start.wait();
                for _ in 0..20 {
                    scaler.save(file).unwrap();
                    assert_eq!(scaling::load(file).unwrap().seen().len(), 1000);
                }
            });
        }
    });
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A file may claim axes whose product no number holds.
#[test]
fn axes_without_end_are_refused() {
    let (_folder, file) = scratch();
    let scaler = StandardScaler::default();
    scaler.save(&file).unwrap();
    let mut bytes = fs::read(&file).unwrap();
    // The header is padded with spaces, which make room.
    let (from, to) = (r#"\"axes\":null"#, r#"\"axes\":[4294967296,4294967296,9]"#);
    let text = String::from_utf8(bytes.split_off(8)).unwrap();
    let text = text.trim_end().replace(from, to);
    let mut whole = (text.len() as u64).to_le_bytes().to_vec();
    whole.extend(text.bytes());
    fs::write(&file, whole).unwrap();
    let message = message(
        scaling::load(&file)
            .unwrap()
            .fit(&rows(&[1.], 1))
            .and(scaling::load(&file).unwrap().partial_fit(&rows(&[1.], 1))),
    );
    assert!(message.contains("is missing"), "{message}");
}

#[test]
fn sketches_of_another_size_and_bytes_after_them_are_refused() {
    let build = |sketch_size: u16| {
        let options = RobustScalerOptions {
            sketch_size,
            ..Default::default()
        };
        let scaler = RobustScaler::new(options).unwrap();
        scaler.fit(&rows(&[1., 2., 3.], 1)).unwrap();
        scaler
    };
    let state = build(64).state().unwrap();
    let other = state.clone().with_option("sketch_size", 128);
    assert!(message(RobustScaler::from_state(&other)).contains("a possible sketch of feature 0"));
    let mut bytes = state.bytes("sketches").unwrap();
    bytes.push(0);
    let longer = state.with_bytes("sketches", &bytes).unwrap();
    assert!(message(RobustScaler::from_state(&longer)).contains("bytes after the sketches"));
    // What is merged into a scaler is of its size from then on.
    let merged = RobustScaler::new(build(64).options()).unwrap();
    merged.merge(&build(128)).unwrap();
    RobustScaler::from_state(&merged.state().unwrap()).unwrap();
}

/// A file of one tensor of a dtype, one byte an element or less.
fn file_of(dtype: &str, bytes: usize, elements: usize) -> Vec<u8> {
    let header = format!(
        r#"{{"scales":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[0,{bytes}]}}}}"#
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(vec![0x7f; bytes]);
    file
}

/// Dtypes that candle reads and cannot bring back out: the scales of quantized models, and floats
/// of less than a byte.
#[test]
fn a_dtype_that_cannot_be_written_is_an_error() {
    let (_folder, file) = scratch();
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2.], 1)).unwrap();
    let state = scaler.state().unwrap();
    for (dtype, bytes, elements) in [
        ("F8_E8M0", 4, 4),
        ("F6_E2M3", 3, 4),
        ("F6_E3M2", 3, 4),
        ("F4", 2, 4),
        ("C64", 8, 1),
    ] {
        let whole = file_of(dtype, bytes, elements);
        fs::write(&file, &whole).unwrap();
        // Read, replace, write, as the message says that is seen by who saves a scaler over a
        // model.
        let written = Archive::read(&file).and_then(|mut archive| {
            archive.replace("scaler", &state)?;
            archive.write(&file)
        });
        let message = message(written);
        assert!(
            message.contains("Archive: expected tensors of a dtype that")
                && message.contains("scales"),
            "{dtype}: {message}"
        );
        assert_eq!(fs::read(&file).unwrap(), whole, "{dtype}");
    }
    // All that candle can write comes back as it was.
    for (dtype, size) in [
        ("U8", 1),
        ("U32", 4),
        ("I16", 2),
        ("I32", 4),
        ("I64", 8),
        ("BF16", 2),
        ("F16", 2),
        ("F32", 4),
        ("F64", 8),
        ("F8_E4M3", 1),
    ] {
        let whole = file_of(dtype, 4 * size, 4);
        fs::write(&file, &whole).unwrap();
        let mut archive = Archive::read(&file).unwrap();
        archive.put("scaler", &state).unwrap();
        archive.write(&file).unwrap();
        let written = fs::read(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&written).unwrap();
        let tensor = tensors.tensor("scales").unwrap();
        assert_eq!(tensor.data(), vec![0x7f; 4 * size], "{dtype}");
        assert_eq!(format!("{:?}", tensor.dtype()), dtype);
    }
    // Nor does such a tensor get in by another way.
    fs::write(&file, file_of("F8_E8M0", 4, 4)).unwrap();
    let held = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let scales = held["scales"].clone();
    let mut archive = Archive::default();
    let with_scales = State::new("Mine", 1).with_tensor("scales", scales);
    let refused = message(archive.put("mine", &with_scales));
    assert!(refused.contains(r#""mine.scales" of F8E8M0"#), "{refused}");
    assert!(archive.parts().is_empty());
}

/// Who takes one file for another learns what it holds, and what reads it.
#[test]
fn a_part_that_is_not_there_is_looked_for_in_the_file() {
    let (folder, file) = scratch();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    for layer in ["first", "second", "third"] {
        candle_nn::linear(2, 2, vb.pp(layer)).unwrap();
    }
    vars.save(&file).unwrap();
    let told = message(scaling::load(&file));
    for part in [
        r#"expected a part "scaler" in the file "#,
        "scaler.safetensors, got the parts []",
        r#"["first.bias", "first.weight", "second.bias", "second.weight"] and 2 more"#,
        "add scalers by Archive::put, or save a Pipeline",
    ] {
        assert!(told.contains(part), "{told}");
    }
    let scaler = StandardScaler::default();
    scaler.fit(&rows(&[1., 2.], 1)).unwrap();
    let mut archive = Archive::default();
    archive.put("inputs", &scaler.state().unwrap()).unwrap();
    archive.write(&file).unwrap();
    let told = message(scaling::load(&file));
    assert!(
        told.contains(r#"Archive::read(file)?.state("inputs")"#),
        "{told}"
    );
    let one = folder.path().join("one");
    scaler.save(&one).unwrap();
    let told = message(Archive::read(&one).unwrap().state("inputs"));
    assert!(told.contains("read it by scaling::load"), "{told}");
    let monitor = DriftMonitor::new(DriftOptions::default()).unwrap();
    let told = message(scaling::from_state(&monitor.state().unwrap()));
    assert!(told.contains("call DriftMonitor::from_state"), "{told}");
    // A path may be any of those that the standard library takes.
    let text = one.to_str().expect("a path of text");
    scaler.save(text).unwrap();
    scaler.load(text).unwrap();
    let any: Box<dyn Scaler> = scaling::load(text).unwrap();
    any.save(std::ffi::OsString::from(text)).unwrap();
    any.load(one).unwrap();
}
