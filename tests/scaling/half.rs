//! The guard of half precision, against what `f16` really does.

use candle_core::DType;
use candle_norm::scaling::{HalfFinding, StandardScalerOptions};
use candle_norm::scaling::{HalfProblem, MaxAbsScaler, Scaler, StandardScaler, half_precision};

use super::kinds::rows;
use testkit::data::values;

/// A scaler that leaves data as they are.
fn identity(data: &[f64], width: usize) -> StandardScaler {
    let options = StandardScalerOptions {
        with_mean: false,
        with_std: false,
        ..Default::default()
    };
    let scaler = StandardScaler::new(options).unwrap();
    scaler.fit(&rows(data, width)).unwrap();
    scaler
}

fn finding(data: &[f64]) -> Option<HalfFinding> {
    half_precision(&identity(data, 1), &rows(data, 1))
        .unwrap()
        .pop()
}

#[test]
fn features_that_leave_f16_are_found_and_the_others_are_not() {
    for (data, problem, scale) in [
        (vec![0., 1., -2., 3.], None, None),
        (vec![5.; 4], None, None),
        (vec![0.; 4], None, None),
        (vec![65504., -1.], None, None),
        (vec![65505., -1.], Some(HalfProblem::Overflow), Some(0.5)),
        (vec![1e6, -1e6], Some(HalfProblem::Overflow), Some(1. / 16.)),
        (
            vec![1e-6, 3e-6, -2e-6],
            Some(HalfProblem::Underflow),
            Some(32.),
        ),
        (
            vec![1000., 1000.1, 1000.2],
            Some(HalfProblem::Resolution),
            None,
        ),
        (vec![1e9, 1e9 + 1.], Some(HalfProblem::Overflow), None),
    ] {
        let found = finding(&data);
        assert_eq!(found.as_ref().map(|f| f.problem), problem, "{data:?}");
        assert_eq!(found.and_then(|f| f.scale), scale, "{data:?}");
    }
}

/// A stated scale is a power of two, keeps the values finite, and tells them apart as it promises.
#[test]
fn the_stated_scale_fixes_it_in_f16() {
    for data in [
        vec![1e6, -3e5, 7e4, 0.],
        vec![1e-7, 2e-7, -3e-7, 2.5e-7],
        vec![3e20, 1e20, -2e20, 5e19],
        vec![1e-30, 4e-30, 2e-30, 3e-30],
    ] {
        let scale = finding(&data).expect("a finding").scale.expect("a scale");
        assert_eq!(scale.log2().fract(), 0.);
        let scaled: Vec<f64> = data.iter().map(|v| v * scale).collect();
        assert!(finding(&scaled).is_none());
        let half = values(&rows(&scaled, 1).to_dtype(DType::F16).unwrap()).unwrap();
        let spread = scaled.iter().fold(0., |m: f64, v| m.max(v.abs()));
        for (half, exact) in half.iter().zip(&scaled) {
            assert!(
                (half - exact).abs() <= spread / 1024.,
                "{half}, should be {exact}"
            );
        }
    }
}

#[test]
fn a_finding_names_the_feature_and_the_remedy() {
    let data = [1., 1e6, 2., 3e6];
    let scaler = identity(&data, 2).with_names(["doors", "price"]).unwrap();
    let found = half_precision(&scaler, &rows(&data, 2)).unwrap();
    let [found] = found.as_slice() else {
        panic!("{found:?}")
    };
    let text = found.to_string();
    assert!(
        text.contains(r#"feature 1 "price" reaches 3.0000e6"#),
        "{text}"
    );
    assert!(
        text.ends_with("multiply it by 0.015625, a power of two"),
        "{text}"
    );
}

/// A center brings back the resolution that a division by the largest value takes from data far
/// from zero.
#[test]
fn a_center_brings_the_resolution_back() {
    let data = [1e5, 1e5 + 1., 1e5 + 2., 1e5 + 3.];
    let (by_size, by_spread) = (MaxAbsScaler::default(), StandardScaler::default());
    by_size.fit(&rows(&data, 1)).unwrap();
    by_spread.fit(&rows(&data, 1)).unwrap();
    let found = half_precision(&by_size, &rows(&data, 1)).unwrap();
    assert_eq!(found[0].problem, HalfProblem::Resolution);
    assert!(
        found[0].to_string().contains("subtract a center"),
        "{}",
        found[0]
    );
    assert!(
        half_precision(&by_spread, &rows(&data, 1))
            .unwrap()
            .is_empty()
    );
    let half = by_size
        .transform(&rows(&data, 1))
        .unwrap()
        .to_dtype(DType::F16)
        .unwrap();
    let half = values(&half).unwrap();
    assert!(half.windows(2).all(|w| w[0] == w[1]), "{half:?}");
}
