//! Windows and exponential weights: files, errors, threads.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};
use candle_norm::scaling::{
    Archive, Causal, EwmScaler, EwmScalerOptions, Nan, Scaler, SlidingScaler, from_state,
};

use super::End;
use super::following::{Kind, series};
use testkit::compare::assert_same_bits;
use testkit::data::{column, tensor, values};
use testkit::errors::message;

#[test]
fn files_of_any_kind_are_told_apart() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for kind in Kind::both(Causal::Before, Nan::Ignore) {
        let scaler = kind.build();
        let file = folder.path().join(scaler.scaler().kind());
        scaler.scaler().partial_fit(&series(10, 1))?;
        scaler.scaler().save(&file)?;
        let restored = from_state(&Archive::read(&file)?.state(candle_norm::scaling::PREFIX)?)?;
        assert_eq!(restored.kind(), scaler.scaler().kind());
        let next = series(5, 2);
        restored.partial_fit(&next)?;
        scaler.scaler().partial_fit(&next)?;
        assert_same_bits(
            "next",
            &restored.transform(&next)?,
            &scaler.scaler().transform(&next)?,
        );
    }
    let sliding = SlidingScaler::new(4)?;
    let error = message(sliding.load(folder.path().join("EwmScaler")));
    assert!(
        error.contains(
            "SlidingScaler: expected the state of a SlidingScaler, got that of a EwmScaler"
        ),
        "{error}"
    );
    Ok(())
}

/// A window takes memory for the rows that it has, not for those that it may have.
#[test]
fn a_window_may_be_longer_than_any_series() -> Result<()> {
    let scaler = SlidingScaler::new(usize::MAX)?;
    scaler.partial_fit(&column(&[1., 3.]))?;
    let scaler = SlidingScaler::from_state(&scaler.state()?)?;
    scaler.partial_fit(&column(&[8.]))?;
    assert_eq!(scaler.mean()?, [4.]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_said_and_changes_nothing() -> Result<()> {
    for kind in Kind::both(Causal::Through, Nan::Refuse) {
        let scaler = kind.build();
        let scaler = scaler.scaler();
        let name = scaler.kind();
        let error = message(scaler.transform(&series(2, 1)));
        assert!(
            error.contains(name) && error.contains("expected a fitted scaler"),
            "{error}"
        );
        scaler.partial_fit(&series(20, 1))?;
        let probe = series(3, 9);
        let before = scaler.transform(&probe)?;
        let with = |value: f64| {
            let mut v = values(&series(2, 3)).unwrap();
            v[4] = value;
            tensor(&v, &[2, 3], DType::F64).unwrap()
        };
        for (x, want) in [
            (with(f64::NAN), "sample 1 of feature 1"),
            (with(f64::INFINITY), "got inf in sample 1 of feature 1"),
            (series(2, 1).narrow(1, 0, 2)?, "feature 2 is missing"),
            (series(0, 1), "at least one sample"),
            (
                series(2, 1).to_dtype(DType::U32)?,
                "dtype F16, BF16, F32 or F64",
            ),
        ] {
            let error = message(scaler.partial_fit(&x));
            assert!(error.contains(name) && error.contains(want), "{error}");
            assert_same_bits(want, &scaler.transform(&probe)?, &before);
        }
        let error = message(scaler.merge(scaler));
        assert!(error.contains("order"), "{error}");
    }
    assert!(message(SlidingScaler::new(0)).contains("window of at least 1, got 0"));
    for (options, want) in [
        (EwmScalerOptions::alpha(0.), "alpha above 0"),
        (EwmScalerOptions::alpha(1.5), "alpha above 0"),
        (EwmScalerOptions::alpha(f64::NAN), "alpha above 0"),
        (EwmScalerOptions::halflife(0.), "halflife above 0"),
        (EwmScalerOptions::span(0.5), "span of at least 1"),
        (EwmScalerOptions::com(-1.), "com of at least 0"),
    ] {
        assert!(message(options).contains(want), "{want}");
    }
    Ok(())
}

/// A damaged state is refused, whatever is missing or wrong.
#[test]
fn a_damaged_state_is_refused() -> Result<()> {
    let sliding = SlidingScaler::new(4)?;
    sliding.partial_fit(&series(9, 1))?;
    let state = sliding.state()?;
    for (damaged, want) in [
        (
            state.clone().with_option("stretches", "0 1 2 3"),
            "five ascending ends",
        ),
        (
            state.clone().with_option("stretches", "0 1 2 3 9"),
            "five ascending ends",
        ),
        (
            state.clone().with_option("stretches", "3 2 1 0 4"),
            "five ascending ends",
        ),
        (state.clone().with_option("stretches", "a"), "well-formed"),
        (
            state.clone().with_option("window", 0),
            "window of at least 1",
        ),
        (state.clone().with_values("rows", &[1.])?, "values of rows"),
        (
            state.clone().with_values("rows", &[f64::NAN; 48])?,
            "a possible count",
        ),
    ] {
        let error = message(SlidingScaler::from_state(&damaged));
        assert!(
            error.contains("SlidingScaler") && error.contains(want),
            "{error}"
        );
    }
    let ewm = EwmScaler::new(EwmScalerOptions::alpha(0.1)?)?;
    ewm.partial_fit(&series(9, 1))?;
    let state = ewm.state()?;
    for (damaged, want) in [
        (
            state.clone().with_values("weight", &[-1.; 3])?,
            "a possible weight",
        ),
        (
            state.clone().with_values("mean", &[f64::NAN; 3])?,
            "a possible mean",
        ),
        (state.clone().with_values("m2", &[1.; 2])?, "values of m2"),
        (state.clone().with_option("alpha", 7), "alpha above 0"),
    ] {
        let error = message(EwmScaler::from_state(&damaged));
        assert!(
            error.contains("EwmScaler") && error.contains(want),
            "{error}"
        );
    }
    Ok(())
}

/// One thread feeds rows, alternately at two levels, in calls that fill the window; whoever
/// transforms meanwhile sees one level or the other.
#[test]
fn a_scaler_that_is_fed_is_the_old_or_the_new_one() -> Result<()> {
    let level = |at: f64| -> Result<Tensor> {
        let rows: Vec<f64> = (0..64)
            .map(|i| at * (1. + 0.5 * f64::from(i % 2 * 2 - 1)))
            .collect();
        tensor(&rows, &[64], DType::F64)
    };
    let (low, high) = (level(1.)?, level(1000.)?);
    let probe = Tensor::new(&[0f64, 1.], &Device::Cpu)?;
    // A window of 64 rows holds those of one call, and so does what is fitted anew.
    let sliding = SlidingScaler::new(64)?;
    let by_fit = EwmScaler::new(EwmScalerOptions::alpha(0.1)?)?;
    type Feed = fn(&dyn Scaler, &Tensor) -> Result<()>;
    let feeds: [(&dyn Scaler, Feed); 2] = [
        (&sliding, |s, x| s.partial_fit(x)),
        (&by_fit, |s, x| s.fit(x)),
    ];
    for (scaler, feed) in feeds {
        let seen = [&low, &high].map(|x| {
            feed(scaler, x).unwrap();
            values(&scaler.transform(&probe).unwrap()).unwrap()
        });
        let (done, start) = (AtomicBool::new(false), Barrier::new(4));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _end = End(&done);
                start.wait();
                for _ in 0..300 {
                    feed(scaler, &low).unwrap();
                    feed(scaler, &high).unwrap();
                }
            });
            for _ in 0..3 {
                scope.spawn(|| {
                    start.wait();
                    while !done.load(Ordering::Relaxed) {
                        let now = values(&scaler.transform(&probe).unwrap()).unwrap();
                        let near = |want: &Vec<f64>| {
                            now.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-9)
                        };
                        assert!(seen.iter().any(near), "{now:?} is neither of {seen:?}");
                    }
                });
            }
        });
    }
    Ok(())
}
