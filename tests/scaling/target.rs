//! Targets in two units.

use candle_core::DType;
use candle_norm::scaling::{MinMaxScaler, Nan, RobustScaler, StandardScaler, TargetScaler};

use super::kinds::{each_built, rows};
use testkit::data::{tensor, values};

#[test]
fn the_error_is_reported_in_both_units_for_each_output() {
    let targets = rows(&[10., 1000., 20., 3000., 30., 2000., 40., 6000.], 2);
    let scaler = TargetScaler::new(
        StandardScaler::default()
            .with_names(["doors", "price"])
            .unwrap(),
    );
    scaler.fit(&targets).unwrap();
    let wrong = rows(&[1., -100., 1., 100., -1., 100., -1., -100.], 2);
    let prediction = scaler.scale(&(&targets + &wrong).unwrap()).unwrap();
    let errors = scaler.errors(&prediction, &targets).unwrap();
    let scale = [125f64.sqrt(), 3_500_000f64.sqrt()];
    for (error, (name, size, scale)) in errors
        .iter()
        .zip([("doors", 1., scale[0]), ("price", 100., scale[1])])
    {
        assert_eq!(error.output, name);
        for (got, want) in [
            (error.original.rmse, size),
            (error.original.mae, size),
            (error.scaled.rmse, size / scale),
            (error.scaled.mae, size / scale),
        ] {
            assert!(
                (got - want).abs() < 1e-9 * want,
                "{error}: {got}, should be {want}"
            );
        }
    }
    let text = errors[1].to_string();
    assert!(
        text.starts_with("price: RMSE 100.000000 (0.0535 scaled)"),
        "{text}"
    );
}

#[test]
fn rmse_and_mae_differ_where_errors_do() {
    let targets = rows(&[0., 0., 0., 10.], 1);
    let scaler = TargetScaler::new(MinMaxScaler::default());
    scaler.fit(&targets).unwrap();
    let prediction = rows(&[0., 0., 0., 0.6], 1);
    let error = &scaler.errors(&prediction, &targets).unwrap()[0];
    assert!((error.original.rmse - 2.).abs() < 1e-12 && (error.original.mae - 1.).abs() < 1e-12);
    assert!((error.scaled.rmse - 0.2).abs() < 1e-12 && (error.scaled.mae - 0.1).abs() < 1e-12);
    assert_eq!(error.output, "0");
}

#[test]
fn any_scaler_serves_and_predictions_come_back() {
    each_built(|kind, build| {
        let targets = TargetScaler::from_boxed(build(Nan::Refuse));
        let y = tensor(&[3., 5., 11.], &[3], DType::F32).unwrap();
        targets.fit(&y).unwrap();
        targets.partial_fit(&y).unwrap();
        assert_eq!(targets.scaler().seen()[0].values, 6, "{kind}");
        let back = targets.invert(&targets.scale(&y).unwrap()).unwrap();
        for (got, want) in values(&back).unwrap().iter().zip([3., 5., 11.]) {
            assert!((got - want).abs() < 1e-5, "{kind}: {got}");
        }
    });
}

/// 3 once, 5 three times and 11 not at all; then 3 twice more.
#[test]
fn targets_count_by_their_weight() {
    let targets = TargetScaler::new(StandardScaler::default());
    let column = |y: &[f64]| rows(y, 1);
    let weight = |w: &[f64]| tensor(w, &[w.len()], DType::F64).unwrap();
    let check = |mean: f64, std: f64| {
        let back = values(&targets.invert(&column(&[0., 1.])).unwrap()).unwrap();
        assert!(
            (back[0] - mean).abs() < 1e-12 && (back[1] - mean - std).abs() < 1e-12,
            "{back:?}"
        );
    };
    targets
        .fit_weighted(&column(&[3., 5., 11.]), &weight(&[1., 3., 0.]))
        .unwrap();
    check(4.5, 0.75f64.sqrt());
    targets
        .partial_fit_weighted(&column(&[3.]), &weight(&[2.]))
        .unwrap();
    check(4., 1.);
    let robust = TargetScaler::new(RobustScaler::default());
    for told in [
        robust.fit_weighted(&column(&[1., 2.]), &weight(&[1., 1.])),
        robust.partial_fit_weighted(&column(&[1., 2.]), &weight(&[1., 1.])),
    ] {
        assert!(told.unwrap_err().to_string().contains("got sample_weight"));
    }
}

/// `[N, 1]` against `[N]` would be broadcast to `[N, N]`.
#[test]
fn shapes_that_differ_are_refused() {
    let targets = TargetScaler::new(StandardScaler::default());
    let y = rows(&[1., 2., 3.], 1);
    targets.fit(&y).unwrap();
    let flat = y.flatten_all().unwrap();
    let message = targets.errors(&flat, &y).unwrap_err().to_string();
    assert!(
        message.contains("expected predictions with shape [3, 1], got [3]"),
        "{message}"
    );
}
