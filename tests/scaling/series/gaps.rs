//! Exponential weights over gaps of any length: what is relative stays so.

use candle_core::{Result, Tensor};
use candle_norm::scaling::{
    EwmScaler, EwmScalerOptions, Nan, Scaler, SlidingScaler, SlidingScalerOptions,
};

use testkit::data::{column, values};

fn with_gap(before: &[f64], gap: usize, after: &[f64]) -> Tensor {
    let gap = vec![f64::NAN; gap];
    column(&[before, &gap, after].concat())
}

fn fitted(options: EwmScalerOptions, x: &Tensor) -> Result<EwmScaler> {
    let scaler = EwmScaler::new(EwmScalerOptions {
        nan: Nan::Ignore,
        ..options
    })?;
    scaler.fit(x)?;
    Ok(scaler)
}

#[track_caller]
fn near(got: f64, want: f64, tolerance: f64) {
    assert!(
        (got - want).abs() <= tolerance * want.abs(),
        "{got}, should be {want}"
    );
}

/// `(26 − 20)² / 2` for every pair of weights.
#[test]
fn two_values_have_their_variance_over_any_gap() -> Result<()> {
    for adjust in [false, true] {
        for alpha in [2. / 3., 0.5, 2. / 61., 1e-3, 1e-9, 0.999999] {
            let options = EwmScalerOptions {
                adjust,
                ..EwmScalerOptions::alpha(alpha)?
            };
            for gap in (0..60).chain([545, 1100, 5000, 100_000]) {
                let scaler = fitted(options, &with_gap(&[20.], gap, &[26.]))?;
                near(scaler.var()?[0], 18., 1e-14);
                near(scaler.scale()?[0], 18f64.sqrt(), 1e-14);
                near(
                    fitted(
                        EwmScalerOptions {
                            ignore_na: true,
                            ..options
                        },
                        &with_gap(&[20.], gap, &[26.]),
                    )?
                    .var()?[0],
                    18.,
                    1e-14,
                );
            }
        }
    }
    let span = EwmScalerOptions::span(60.)?;
    near(
        fitted(span, &with_gap(&[20.], 1100, &[26.]))?.var()?[0],
        18.,
        1e-14,
    );
    Ok(())
}

#[test]
fn many_values_and_one_after_a_gap() -> Result<()> {
    let before: Vec<f64> = (0..40).map(|i| 20. + f64::from(i % 5)).collect();
    let scaler = fitted(
        EwmScalerOptions::alpha(0.5)?,
        &with_gap(&before, 53, &[26.]),
    )?;
    near(scaler.var()?[0], 4.612903, 1e-6);
    Ok(())
}

/// A gap at the end takes nothing from what there was, however long.
#[test]
fn a_gap_at_the_end_changes_nothing() -> Result<()> {
    let before = [10., 14., 12., 18., 15.];
    let options = EwmScalerOptions::alpha(0.5)?;
    let want = fitted(options, &column(&before))?;
    for gap in [1, 53, 545, 1100, 50_000] {
        let scaler = fitted(options, &with_gap(&before, gap, &[]))?;
        assert_eq!(scaler.var()?, want.var()?);
        let y = values(&scaler.transform(&column(&[30.]))?)?[0];
        near(y, 5.7286, 1e-5);
        // And a file keeps where the gap began.
        let restored = EwmScaler::from_state(&scaler.state()?)?;
        for scaler in [&scaler, &restored] {
            scaler.partial_fit(&column(&[30., 31.]))?;
        }
        assert_eq!(restored.var()?, scaler.var()?);
        assert_eq!(restored.mean()?, scaler.mean()?);
    }
    Ok(())
}

/// By the formula, with the factor taken out that no `f64` holds for the longer gaps.
#[test]
fn three_values_over_a_gap_are_those_of_their_weights() -> Result<()> {
    for gap in [0, 5, 30, 52, 53, 200, 1000, 2000] {
        let scaler = fitted(
            EwmScalerOptions::alpha(0.5)?,
            &with_gap(&[10., 14.], gap, &[19.]),
        )?;
        // Weights ½r, r and 1, of which r is taken out: W² − Σw² = 2 r (½ r + ½ + 1).
        let r = 0.5f64.powi(gap as i32 + 1);
        let total = 1. + 1.5 * r;
        let mean = (19. + r * (14. + 5.)) / total;
        let squares = 0.5 * (10. - mean).powi(2) + (14. - mean).powi(2);
        // 19 − mean = 9.5 r / W.
        let own = r * (9.5 / total).powi(2);
        let want = (squares + own) * total / (2. * (0.5 * r + 1.5));
        near(scaler.var()?[0], want, 1e-13);
        near(scaler.mean()?[0], mean, 1e-14);
    }
    Ok(())
}

/// A variance that is no number is no divisor; too few values to vary are divided by 1, as one
/// sample is.
#[test]
fn no_variance_is_no_scale_of_one() -> Result<()> {
    let one = fitted(EwmScalerOptions::alpha(0.5)?, &column(&[20.]))?;
    assert!(one.var()?[0].is_nan() && one.scale()?[0] == 1.);
    let newest = fitted(EwmScalerOptions::alpha(1.)?, &column(&[20., 26.]))?;
    assert!(newest.mean()?[0] == 26. && newest.scale()?[0] == 1.);
    let sliding = SlidingScaler::new(SlidingScalerOptions {
        ddof: 1,
        ..3.into()
    })?;
    sliding.fit(&column(&[20.]))?;
    assert!(sliding.var()?[0].is_nan() && sliding.scale()?[0] == 1.);
    sliding.partial_fit(&column(&[26.]))?;
    near(sliding.scale()?[0], 18f64.sqrt(), 1e-15);
    Ok(())
}
