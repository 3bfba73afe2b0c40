//! Wrong arguments of a caller: a message that names the feature, and nothing changed.

use candle_core::{DType, Result, Tensor};
use candle_norm::scaling::{
    DriftMonitor, DriftOptions, MinMaxScaler, MinMaxScalerOptions, Nan, RobustScaler,
    RobustScalerOptions, Scaler, StandardScaler, StandardScalerOptions, from_state,
};

use super::kinds::{KINDS, OF_SERIES, each, each_built, each_of_all, everything, rows};
use testkit::data::{tensor, values};
use testkit::errors;

#[track_caller]
fn assert_message<T>(result: Result<T>, expected: &str) {
    errors::assert_message(result, &[expected])
}

fn named() -> StandardScaler {
    StandardScaler::default()
        .with_names(["mileage", "doors", "price"])
        .unwrap()
}

#[test]
fn every_error_leaves_the_scaler_as_it_was() {
    let (good, nan, inf) = ([1., 2., 3., 5.], f64::NAN, f64::INFINITY);
    each_built(|kind, build| {
        let scaler = build(Nan::Refuse);
        scaler.fit(&rows(&good, 2)).unwrap();
        let before = everything(&*scaler).unwrap();
        let wrong = [
            (rows(&[1., 2., 3.], 3), "feature 2 is too many"),
            (rows(&[1.], 1), "feature 1 is missing"),
            (rows(&[1., nan], 2), "one in sample 0 of feature 1"),
            (rows(&[1., 2., inf, 2.], 2), "inf in sample 1 of feature 0"),
            (
                tensor(&[], &[0, 2], DType::F64).unwrap(),
                "at least one sample",
            ),
            (
                tensor(&[1.], &[], DType::F64).unwrap(),
                "at least one sample",
            ),
            (
                rows(&[1., 2.], 2).to_dtype(DType::I64).unwrap(),
                "convert it with to_dtype",
            ),
        ];
        for (x, expected) in &wrong {
            assert_message(scaler.partial_fit(x), expected);
            assert_eq!(everything(&*scaler).unwrap(), before, "{kind}: {expected}");
        }
        // A fit from anew takes other features, and nothing else.
        for (x, expected) in &wrong[2..] {
            assert_message(scaler.fit(x), expected);
            assert_eq!(everything(&*scaler).unwrap(), before, "{kind}: {expected}");
        }
        for (x, expected) in wrong.iter().take(2) {
            assert_message(scaler.transform(x), expected);
            assert_message(scaler.inverse_transform(x), expected);
        }
        let other = build(Nan::Refuse);
        other.fit(&rows(&[1., 2., 3.], 3)).unwrap();
        assert_message(scaler.merge(&*other), "feature 2 is too many");
        assert_message(
            scaler.restore(&other.state().unwrap()),
            "feature 2 is too many",
        );
        for (other_kind, build) in KINDS.iter().filter(|(other, _)| *other != kind) {
            let expected =
                format!("{kind}: expected the state of a {kind}, got that of a {other_kind}");
            assert_message(scaler.merge(&*build(Nan::Refuse)), &expected);
        }
        assert_eq!(everything(&*scaler).unwrap(), before, "{kind}");
        assert!(scaler.fit(&rows(&[1., 2., 3.], 3)).is_ok());
    });
}

#[test]
fn a_scaler_without_data_says_so() {
    each(|kind, scaler| {
        let x = rows(&[1., 2.], 2);
        let expected = format!("{kind}: expected a fitted scaler, got one without data; call fit");
        assert!(!scaler.is_fitted());
        assert_message(scaler.transform(&x), &expected);
        scaler.fit(&x).unwrap();
        assert!(scaler.is_fitted());
        scaler.reset();
        assert_message(scaler.inverse_transform(&x), &expected);
    });
}

#[test]
fn names_are_in_the_messages() {
    let scaler = named();
    assert_message(
        scaler.fit(&rows(&[1., 2.], 2)),
        r#"feature 2 "price" has no data"#,
    );
    assert_message(scaler.fit(&rows(&[1.; 4], 4)), "feature 3 has no name");
    assert_message(
        scaler.fit(&rows(&[1., f64::NAN, 3.], 3)),
        r#"expected data without NaN, got one in sample 0 of feature 1 "doors""#,
    );
    scaler.fit(&rows(&[1., 2., 3.], 3)).unwrap();
    assert_message(
        scaler.transform(&rows(&[1., 2.], 2)),
        r#"feature 2 "price" is missing"#,
    );
    assert!(scaler.check_names(&["mileage", "doors", "price"]).is_ok());
    assert_message(
        scaler.check_names(&["mileage", "sound", "price"]),
        r#"expected feature 1 to be "doors", got "sound""#,
    );
    assert_message(
        scaler.check_names(&["mileage", "doors"]),
        r#"feature 2 "price" has no name"#,
    );
    let twice = StandardScaler::default().with_names(["a", "b", "a"]);
    assert_message(twice, r#"got "a" for features 0 and 2"#);

    let other = StandardScaler::default()
        .with_names(["mileage", "sound", "price"])
        .unwrap();
    other.fit(&rows(&[1., 2., 3.], 3)).unwrap();
    let expected = r#"StandardScaler: expected feature 1 to be "doors", got "sound""#;
    assert_message(scaler.merge(&other), expected);
    assert_message(scaler.restore(&other.state().unwrap()), expected);
}

#[test]
fn a_feature_of_several_axes_is_named_by_its_position() {
    let scaler = StandardScaler::default();
    let x = tensor(&[1., 2., 3., f64::NAN], &[1, 2, 2], DType::F64).unwrap();
    assert_message(scaler.fit(&x), "in sample 0 of feature [1, 1]");
    let x = tensor(&[1., 2., 3., 4.], &[1, 2, 2], DType::F64).unwrap();
    scaler.fit(&x).unwrap();
    assert_message(
        scaler.transform(&rows(&[1., 2., 3., 4.], 4)),
        "reshape the data",
    );
}

#[test]
fn nan_is_ignored_and_counted_where_that_is_chosen() {
    let nan = f64::NAN;
    each_built(|kind, build| {
        let scaler = build(Nan::Ignore);
        scaler.fit(&rows(&[nan, 1., 3., nan, 5., 9.], 2)).unwrap();
        scaler.partial_fit(&rows(&[nan, 2.], 2)).unwrap();
        let counts: Vec<_> = scaler.seen().iter().map(|s| (s.values, s.nan)).collect();
        assert_eq!(counts, [(2, 2), (3, 1)], "{kind}");
        let dense = build(Nan::Refuse);
        dense.fit(&rows(&[3., 5.], 1)).unwrap();
        let probe = rows(&[4., nan], 2);
        let y = scaler.transform(&probe).unwrap().to_vec2::<f64>().unwrap()[0].clone();
        let want = dense
            .transform(&rows(&[4.], 1))
            .unwrap()
            .to_vec2::<f64>()
            .unwrap();
        assert!(y[0] == want[0][0] && y[1].is_nan(), "{kind}: {y:?}");
    });
}

/// As in scikit-learn: what nothing is known of becomes NaN, in every dtype and both ways, and the
/// others are scaled.
#[test]
fn a_feature_of_only_nan_is_nan_and_the_others_are_scaled() {
    let nan = f64::NAN;
    let kinds = KINDS.iter().chain(&OF_SERIES[..2]);
    for (kind, build) in kinds {
        let scaler = build(Nan::Ignore);
        scaler.fit(&rows(&[nan, 1., nan, 5., nan, 9.], 2)).unwrap();
        let alone = build(Nan::Ignore);
        alone.fit(&rows(&[1., 5., 9.], 1)).unwrap();
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let probe = rows(&[4., 5., nan, 2.], 2).to_dtype(dtype).unwrap();
            let second = probe.narrow(1, 1, 1).unwrap();
            for (y, want) in [
                (scaler.transform(&probe), alone.transform(&second)),
                (
                    scaler.inverse_transform(&probe),
                    alone.inverse_transform(&second),
                ),
            ] {
                let [y, want] = [y, want].map(|t| values(&t.unwrap()).unwrap());
                assert!(y[0].is_nan() && y[2].is_nan(), "{kind}: {y:?}");
                assert_eq!([y[1], y[3]], want[..], "{kind}");
            }
        }
        // It comes back from a file, and becomes known.
        let restored = build(Nan::Ignore);
        restored.restore(&scaler.state().unwrap()).unwrap();
        let probe = rows(&[4., 5.], 2);
        for scaler in [&scaler, &restored] {
            scaler.partial_fit(&rows(&[7., 1., 9., 2.], 2)).unwrap();
            let y = values(&scaler.transform(&probe).unwrap()).unwrap();
            assert!(y.iter().all(|v| v.is_finite()), "{kind}: {y:?}");
        }
        // Where nothing is known of any of them there is nothing to scale.
        scaler.fit(&rows(&[nan, nan], 2)).unwrap();
        assert_message(scaler.transform(&probe), "at least one value of ");
    }
    let ignore = Nan::Ignore;
    let x = rows(&[nan, 1.], 2);
    let standard = StandardScaler::new(StandardScalerOptions {
        nan: ignore,
        ..Default::default()
    });
    let standard = standard.unwrap();
    standard.fit(&x).unwrap();
    let min_max = MinMaxScaler::new(MinMaxScalerOptions {
        nan: ignore,
        clip: true,
        ..Default::default()
    });
    let min_max = min_max.unwrap();
    min_max.fit(&x).unwrap();
    let robust = RobustScaler::new(RobustScalerOptions {
        nan: ignore,
        ..Default::default()
    });
    let robust = robust.unwrap();
    robust.fit(&x).unwrap();
    for known in [
        standard.mean(),
        standard.var(),
        standard.scale(),
        min_max.data_min(),
        min_max.data_max(),
        robust.center(),
        robust.scale(),
        robust.quantile(90.),
    ] {
        let known = known.unwrap();
        assert!(known[0].is_nan() && known[1].is_finite(), "{known:?}");
    }
    let y = values(&min_max.transform(&rows(&[3., 9.], 2)).unwrap()).unwrap();
    assert!(y[0].is_nan() && y[1] == 1., "{y:?}");
}

/// No features at all are no data, neither in what is fitted nor in a file.
#[test]
fn axes_without_elements_are_refused() {
    let none = tensor(&[], &[5, 0], DType::F64).unwrap();
    let wide = tensor(&[], &[5, 2, 0], DType::F64).unwrap();
    each_of_all(|_, build| {
        for x in [&none, &wide] {
            let scaler = build(Nan::Refuse);
            assert_message(scaler.fit(x), "of at least one feature, got shape [5");
            assert_message(
                scaler.partial_fit(x),
                "of at least one feature, got shape [5",
            );
            assert!(!scaler.is_fitted());
        }
    });
    let monitor = DriftMonitor::new(DriftOptions::default()).unwrap();
    assert_message(monitor.fit(&none), "of at least one feature");
}

#[test]
fn weights_of_samples_are_checked() {
    let x = rows(&[1., 2., 3., 5., 4., 4.], 2);
    let weights = |w: &[f64]| tensor(w, &[w.len()], DType::F64).unwrap();
    each(|kind, scaler| {
        scaler.fit(&x).unwrap();
        let before = everything(scaler).unwrap();
        if kind == "RobustScaler" {
            assert_message(
                scaler.fit_weighted(&x, &weights(&[1.; 3])),
                "got sample_weight; repeat",
            );
        }
        for (wrong, expected) in [
            (
                weights(&[1., 2.]),
                "one weight for each of the 3 samples, got sample_weight of shape [2]",
            ),
            (rows(&[1.; 3], 1), "sample_weight of shape [3, 1]"),
            (weights(&[1., -1., 3.]), "got -1 for sample 1"),
            (weights(&[1., 1., f64::NAN]), "got NaN for sample 2"),
            (weights(&[0.; 3]), "with a sum above 0 and finite, got 0"),
            (
                weights(&[1e308; 3]),
                "with a sum above 0 and finite, got inf",
            ),
        ] {
            assert_message(scaler.fit_weighted(&x, &wrong), expected);
            assert_message(scaler.partial_fit_weighted(&x, &wrong), expected);
            assert_eq!(everything(scaler).unwrap(), before, "{kind}: {expected}");
        }
    });
    // A row of a series that is there twice is two steps of it, so that repeating it is no remedy.
    let remedies = [
        "take EwmScaler, which weighs rows by their age",
        "it weighs rows by their age alone",
        "leave out rows that should not count",
    ];
    for ((kind, build), remedy) in OF_SERIES.into_iter().zip(remedies) {
        let (scaler, weights) = (build(Nan::Refuse), weights(&[1.; 3]));
        for told in [
            scaler.fit_weighted(&x, &weights),
            scaler.partial_fit_weighted(&x, &weights),
        ] {
            let told = told.unwrap_err().to_string();
            let start = format!("{kind}: expected samples that count alike, got sample_weight; ");
            assert!(
                told.starts_with(&(start + remedy)) && !told.contains("repeat"),
                "{told}"
            );
        }
    }
    // A sample without weight is none, whatever it is.
    each_built(|kind, build| {
        if kind == "RobustScaler" {
            return;
        }
        let (whole, weighted) = (build(Nan::Refuse), build(Nan::Refuse));
        whole.fit(&x).unwrap();
        let more = rows(
            &[1., 2., f64::NAN, 9., 3., 5., 1e9, f64::INFINITY, 4., 4.],
            2,
        );
        weighted
            .fit_weighted(&more, &weights(&[1., 0., 1., 0., 1.]))
            .unwrap();
        assert_eq!(weighted.seen(), whole.seen(), "{kind}");
        let [got, want] = [&weighted, &whole].map(|s| values(&s.transform(&x).unwrap()).unwrap());
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-14, "{kind}: {got}, {want}");
        }
    });
}

#[test]
fn options_have_ranges() {
    for range in [(1., 1.), (2., 1.), (f64::NAN, 1.), (0., f64::INFINITY)] {
        let options = MinMaxScalerOptions {
            feature_range: range,
            ..Default::default()
        };
        let expected = "MinMaxScaler: expected feature_range of two finite numbers";
        assert_message(MinMaxScaler::new(options), expected);
    }
    for range in [(50., 50.), (-1., 50.), (25., 101.), (f64::NAN, 75.)] {
        let options = RobustScalerOptions {
            quantile_range: range,
            ..Default::default()
        };
        assert_message(
            RobustScaler::new(options),
            "expected quantile_range of two percentages",
        );
    }
    let options = RobustScalerOptions {
        sketch_size: 7,
        ..Default::default()
    };
    assert_message(
        RobustScaler::new(options),
        "expected sketch_size from 8 to 65535, got 7",
    );
    let scaler = RobustScaler::default();
    scaler.fit(&rows(&[1.], 1)).unwrap();
    assert_message(
        scaler.quantile(101.),
        "expected percent from 0 to 100, got 101",
    );
}

/// Statistics that `f64` can hold and `f32` cannot.
#[test]
fn data_of_a_dtype_that_cannot_hold_the_statistics_are_refused() {
    each(|kind, scaler| {
        scaler.fit(&rows(&[1e150, 1., 3e150, 2.], 2)).unwrap();
        let probe = rows(&[1e30, 1.], 2);
        let expected = format!("{kind}: expected statistics of feature 0 that F32 can hold");
        assert_message(
            scaler.transform(&probe.to_dtype(DType::F32).unwrap()),
            &expected,
        );
        assert!(scaler.transform(&probe).is_ok(), "{kind}");
    });
}

#[test]
fn a_range_that_f64_cannot_hold_is_refused() {
    let scaler = MinMaxScaler::default();
    scaler.fit(&rows(&[f64::MIN, f64::MAX], 1)).unwrap();
    let expected = "expected statistics of feature 0 that F64 can hold, got inf";
    assert_message(scaler.transform(&rows(&[0.], 1)), expected);
}

#[test]
fn a_state_of_no_scaler_is_refused() {
    let state = candle_norm::scaling::State::new("Teapot", 1);
    assert_message(from_state(&state), r#"got that of a "Teapot""#);
}

#[test]
fn no_samples_to_transform_is_no_error() {
    each(|kind, scaler| {
        scaler.fit(&rows(&[1., 2.], 2)).unwrap();
        let none: Tensor = tensor(&[], &[0, 2], DType::F32).unwrap();
        let y = scaler.transform(&none).unwrap();
        assert_eq!((y.dims(), y.dtype()), (none.dims(), none.dtype()), "{kind}");
    });
}

/// Squares that no `f64` holds, which a file would be refused for.
#[test]
fn data_whose_variance_no_number_holds_are_refused_when_they_come() {
    let scaler = named();
    let expected = r#"expected statistics of feature 1 "doors" that F64 can hold, got inf"#;
    assert_message(
        scaler.fit(&rows(&[1., 1e200, 1., 2., -1e200, 2.], 3)),
        expected,
    );
    assert!(!scaler.is_fitted());
    scaler.fit(&rows(&[1., 1e200, 1.], 3)).unwrap();
    let before = everything(&scaler).unwrap();
    assert_message(scaler.partial_fit(&rows(&[1., -1e200, 1.], 3)), expected);
    assert_eq!(everything(&scaler).unwrap(), before);
    for (kind, build) in OF_SERIES {
        let scaler = build(Nan::Refuse);
        let message = format!("{:?}", scaler.fit(&rows(&[1., 2., 1., 1e200], 2)));
        let expected = "got 1e200 in sample 1 of feature 1; take a larger unit";
        assert!(message.contains(expected), "{kind}: {message}");
    }
}
