//! Files that no training run wrote: `load_into` takes what makes sense, and refuses the rest by
//! name, whole.

use std::collections::HashMap;
use std::fs;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarBuilder, VarMap};
use candle_norm::{batch_norm, checkpoint};

/// The variables of a batch norm of two channels, and what `load_into` says of a file of these
/// bytes.
fn load(
    dtype: DType,
    bytes: Vec<u8>,
) -> (
    HashMap<String, Vec<f64>>,
    std::result::Result<String, String>,
) {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let vars = VarMap::new();
        batch_norm(2, 1e-5, VarBuilder::from_varmap(&vars, dtype, &Device::Cpu)).expect("a layer");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors");
        fs::write(&path, bytes).expect("a file");
        let report = checkpoint::load_into(&vars, &path);
        let outcome = report.map(|r| r.to_string()).map_err(|e| e.to_string());
        let values = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let data = vars.data().lock().expect("one thread");
        let state = data
            .iter()
            .map(|(n, v)| (n.clone(), values(v).expect("values")));
        sender.send((state.collect(), outcome)).expect("a reader");
    });
    let seconds = Duration::from_secs(60);
    receiver
        .recv_timeout(seconds)
        .expect("neither a panic nor a loop without end")
}

/// A safetensors file of this header and this data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}

fn of_one(name: &str, dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let len = data.len();
    let tensor = format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{len}]}}"#);
    file(&format!(r#"{{"{name}":{tensor}}}"#), data)
}

/// A tensor beside the statistics of two channels without which it means nothing.
fn of_statistics(name: &str, dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = vec![];
    let mut bytes = vec![];
    let one = [1f32, 1.].map(f32::to_le_bytes).concat();
    for statistic in ["running_mean", "running_var", "num_batches_tracked"] {
        let (dtype, shape, data) = match statistic == name {
            true => (dtype, shape, data),
            false if statistic == "num_batches_tracked" => continue,
            false => ("F32", "[2]", &one[..]),
        };
        let (start, end) = (bytes.len(), bytes.len() + data.len());
        header.push(format!(
            r#""{statistic}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#
        ));
        bytes.extend(data);
    }
    file(&format!("{{{}}}", header.join(",")), &bytes)
}

/// A fresh batch norm.
fn fresh() -> HashMap<String, Vec<f64>> {
    let named = [
        ("weight", vec![1.; 2]),
        ("bias", vec![0.; 2]),
        ("running_mean", vec![0.; 2]),
        ("running_var", vec![1.; 2]),
        ("num_batches_tracked", vec![0.]),
    ];
    named
        .map(|(name, values)| (name.to_string(), values))
        .into()
}

/// Every element type that the format knows, with what one element of 2 is there; none where candle
/// cannot read it.
const DTYPES: [(&str, Option<&[u8]>); 18] = [
    ("F64", Some(&[0, 0, 0, 0, 0, 0, 0, 0x40])),
    ("F32", Some(&[0, 0, 0, 0x40])),
    ("F16", Some(&[0, 0x40])),
    ("BF16", Some(&[0, 0x40])),
    ("F8_E4M3", Some(&[0x40])),
    ("U8", Some(&[2])),
    ("I16", Some(&[2, 0])),
    ("I32", Some(&[2, 0, 0, 0])),
    ("I64", Some(&[2, 0, 0, 0, 0, 0, 0, 0])),
    ("U16", Some(&[2, 0])),
    ("U32", Some(&[2, 0, 0, 0])),
    ("BOOL", None),
    ("I8", None),
    ("U64", None),
    ("F8_E5M2", None),
    ("F8_E8M0", None),
    ("F6_E2M3", None),
    ("F4", None),
];

#[test]
fn every_element_type_is_taken_or_refused() {
    for model in [DType::F32, DType::F64] {
        for (dtype, two) in DTYPES {
            let what = format!("{dtype} for {model:?}");
            // Six bits and four have no element of whole bytes: four of them do.
            let (shape, data) = match (dtype, two) {
                (_, Some(two)) => ("[2]", two.repeat(2)),
                ("F4", _) => ("[2]", vec![0x11]),
                ("F6_E2M3", _) => ("[4]", vec![0x11; 3]),
                ("U64", _) => ("[2]", vec![0; 16]),
                _ => ("[2]", vec![0, 1]),
            };
            for name in ["weight", "running_var"] {
                let bytes = match name {
                    "weight" => of_one(name, dtype, shape, &data),
                    _ => of_statistics(name, dtype, shape, &data),
                };
                let (state, outcome) = load(model, bytes);
                if dtype.contains('F') && two.is_some() {
                    outcome.unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert_eq!(state[name], [2., 2.], "{what}");
                } else {
                    outcome.expect_err(&what);
                    assert_eq!(state, fresh(), "{what}");
                }
            }
            let Some(two) = two else { continue };
            for (data, count) in [(two.to_vec(), 2.), (vec![0; two.len()], 0.)] {
                let counter = of_statistics("num_batches_tracked", dtype, "[1]", &data);
                let (state, outcome) = load(model, counter);
                outcome.unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(state["num_batches_tracked"], [count], "{what}");
            }
        }
    }
}

#[test]
fn what_is_no_such_file_is_refused() {
    let of = |dtype: &str, shape: &str, end: usize| {
        format!(r#"{{"weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    let overlapping = concat!(
        r#"{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""bias":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#
    );
    let twice = format!("[{},{}]", usize::MAX, usize::MAX);
    for (what, bytes) in [
        ("nothing", vec![]),
        ("a header without end", u64::MAX.to_le_bytes().to_vec()),
        ("no header", file("", &[])),
        ("no JSON", file("weight", &[])),
        ("a list", file("[]", &[])),
        ("overlapping tensors", file(overlapping, &[0; 12])),
        ("a size without end", file(&of("F32", &twice, 8), &[0; 8])),
        ("a negative size", file(&of("F32", "[-2]", 8), &[0; 8])),
        ("missing data", file(&of("F32", "[2]", 8), &[0; 3])),
        ("data of nobody", file(&of("F32", "[2]", 8), &[0; 30])),
        (
            "an element type of nobody",
            file(&of("F128", "[2]", 32), &[0; 32]),
        ),
        ("no elements", file(&of("F32", "[0]", 0), &[])),
        (
            "one element without axes",
            file(&of("F32", "[]", 4), &[0; 4]),
        ),
        ("another axis", file(&of("F32", "[2,2]", 16), &[0; 16])),
    ] {
        let (state, outcome) = load(DType::F32, bytes);
        outcome.expect_err(what);
        assert_eq!(state, fresh(), "{what}");
    }
}

/// Two names of one tensor: the first of the names is taken, and the other one is reported.
#[test]
fn a_file_with_two_names_of_one_tensor() -> Result<()> {
    let header = concat!(
        r#"{"scale":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""gamma":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#
    );
    let data: Vec<u8> = [3f32, 3., 4., 4.]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let (state, outcome) = load(DType::F32, file(header, &data));
    assert_eq!(state["weight"], [4., 4.]);
    let report = outcome.expect("a report");
    assert!(
        report.contains("weight from gamma") && report.contains("unexpected in the file: scale"),
        "{report}"
    );
    Ok(())
}

/// A counter without its statistics, or statistics without their counter: only the latter says that
/// no batches are known.
#[test]
fn a_file_of_another_part_of_the_model_leaves_the_counter() -> Result<()> {
    let vars = VarMap::new();
    let norm = batch_norm(
        2,
        1e-5,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    norm.forward_t(&Tensor::new(&[[0f32, 1.], [2., 3.]], &Device::Cpu)?, true)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let ones = || Tensor::ones(2, DType::F32, &Device::Cpu);
    let count = || -> Result<i64> {
        let stats = norm.running_stats().expect("statistics").snapshot()?;
        Ok(stats.num_batches_tracked)
    };
    candle_core::safetensors::save(&[("weight", ones()?)].into(), &path)?;
    let report = checkpoint::load_into(&vars, &path)?;
    assert_eq!((report.counters_reset.len(), count()?), (0, 1));
    assert!(report.missing.contains(&"num_batches_tracked".to_string()));

    // Under another name, the statistics are there all the same.
    let statistics = [("moving_mean", ones()?), ("moving_variance", ones()?)];
    candle_core::safetensors::save(&statistics.into(), &path)?;
    let report = checkpoint::load_into(&vars, &path)?;
    assert_eq!(report.counters_reset, ["num_batches_tracked"]);
    assert_eq!(count()?, 0);
    Ok(())
}
