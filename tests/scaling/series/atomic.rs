//! Calls that fail change nothing, and no content of a file is a reason to panic.

use candle_core::{DType, Result, Tensor};
use candle_norm::scaling::{
    AdaptiveScaler, DriftMonitor, DriftOptions, EwmScaler, EwmScalerOptions, Nan, OnDrift, Scaler,
    SlidingScaler, StandardScaler, StandardScalerOptions, State, from_state,
};

use testkit::data::{column, normal, tensor, values};
use testkit::errors::message;

fn text(state: &State) -> String {
    format!("{state:?}")
}

/// Statistics that `f32` cannot hold, at the last row of a call and at any place in the window's
/// turn.
#[test]
fn a_series_that_cannot_be_scaled_is_not_taken_in() -> Result<()> {
    for before in 1..40 {
        let past: Vec<f64> = (0..before).map(f64::from).collect();
        let sliding = SlidingScaler::new(5)?;
        let ewm = EwmScaler::new(EwmScalerOptions::alpha(0.3)?)?;
        let next = tensor(&[1., 4., 2., 3.4e38, -3.4e38], &[5], DType::F32)?;
        let fresh = [sliding.state()?, ewm.state()?];
        for known in [false, true] {
            let wide = SlidingScaler::new(sliding.options())?;
            for scaler in [&sliding as &dyn Scaler, &ewm] {
                match known {
                    true => scaler.partial_fit(&column(&past))?,
                    false => scaler.reset(),
                }
            }
            let states = [sliding.state()?, ewm.state()?];
            let past = column(&[1e60, -1e60]);
            if known {
                sliding.partial_fit(&past)?;
                ewm.partial_fit(&past)?;
                let states = [sliding.state()?, ewm.state()?];
                for error in [sliding.transform_series(&next), ewm.transform_series(&next)] {
                    assert!(message(error).contains("that F32 can hold"));
                }
                assert_eq!(text(&sliding.state()?), text(&states[0]), "{before}");
                assert_eq!(text(&ewm.state()?), text(&states[1]), "{before}");
                // It goes on as one that never saw them.
                wide.restore(&states[0])?;
                for x in [column(&[1., 2., 3.]), column(&[7., 5., 6., 4.])] {
                    assert_eq!(
                        values(&sliding.transform_series(&x)?.0)?,
                        values(&wide.transform_series(&x)?.0)?
                    );
                }
            } else {
                assert_eq!(states.map(|s| text(&s)), fresh.clone().map(|s| text(&s)));
            }
        }
    }
    Ok(())
}

/// Ends of stretches that no window has, sums that no rows have, and sizes whose product no number
/// holds.
#[test]
fn a_window_that_cannot_be_is_refused() -> Result<()> {
    let scaler = SlidingScaler::new(6)?;
    scaler.partial_fit(&column(&[1., 2., 3., 4., 5., 6., 7., 8.]))?;
    let state = scaler.state()?;
    let good: String = state.option("stretches")?;
    let mut accepted = 0;
    for ends in 0..7usize.pow(5) {
        let ends: Vec<usize> = (0..5).map(|i| ends / 7usize.pow(i) % 7).collect();
        let text = ends
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(" ");
        let rows = vec![[1., 2., 0., 0.]; ends[4]].concat();
        let other = state
            .clone()
            .with_option("stretches", &text)
            .with_values("rows", &rows)?;
        let Ok(restored) = SlidingScaler::from_state(&other) else {
            assert_ne!(text, good);
            continue;
        };
        accepted += 1;
        for i in 0..40 {
            restored.partial_fit(&column(&[f64::from(i)]))?;
        }
        // The rows of now, whatever was before.
        assert_eq!(restored.mean()?, [36.5], "{text}");
    }
    assert!(accepted > 3, "{accepted}");
    let huge = usize::MAX;
    let claims = state
        .clone()
        .with_option("window", huge)
        .with_option("stretches", format!("{huge} {huge} {huge} {huge} {huge}"));
    assert!(SlidingScaler::from_state(&claims).is_err());
    for name in ["rows", "middle", "recent"] {
        let len = state.tensor(name)?.elem_count();
        for (place, wrong, what) in [
            (0, -1., "count"),
            (0, 0.5, "count"),
            (0, 1e300, "count"),
            (1, f64::NAN, "mean"),
            (2, f64::INFINITY, "mean"),
            (3, -1., "m2"),
            (3, f64::INFINITY, "m2"),
        ] {
            let mut parts = state.values(name, len)?;
            parts[place] = wrong;
            let error = message(SlidingScaler::from_state(
                &state.clone().with_values(name, &parts)?,
            ));
            assert!(
                error.contains(&format!("a possible {what} of feature 0")),
                "{name}: {error}"
            );
        }
    }
    Ok(())
}

fn two(a: &[f64], b: &[f64]) -> Tensor {
    let both: Vec<f64> = a.iter().zip(b).flat_map(|(a, b)| [*a, *b]).collect();
    tensor(&both, &[a.len(), 2], DType::F64).unwrap()
}

fn ignoring() -> Result<AdaptiveScaler> {
    adaptive(OnDrift::Refit)
}

fn adaptive(on_drift: OnDrift) -> Result<AdaptiveScaler> {
    let scaler = StandardScaler::new(StandardScalerOptions {
        nan: Nan::Ignore,
        ..Default::default()
    })?;
    let options = DriftOptions {
        nan: Nan::Ignore,
        ..Default::default()
    };
    AdaptiveScaler::new(scaler, options, on_drift)
}

/// The means that a scaler of two features subtracts, and the distances that it makes 1 of.
fn center_and_scale(scaler: &dyn Scaler) -> Result<[f64; 4]> {
    let back = values(&scaler.inverse_transform(&two(&[0., 1.], &[0., 1.]))?)?;
    Ok([back[0], back[1], back[2] - back[0], back[3] - back[1]])
}

/// The sensor of one feature dies, and the other drifts twice: that is followed, and the silent one
/// stays at what it was fitted to, to the
/// bit, until it is back.
#[test]
fn a_sensor_that_dies_does_not_stop_the_others() -> Result<()> {
    for on_drift in [OnDrift::Refit, OnDrift::Blend(0.9)] {
        let mut left = vec![];
        for one_by_one in [false, true] {
            let scaler = adaptive(on_drift)?;
            scaler.fit(&two(&normal(1000, 1, 0., 1.), &normal(1000, 2, 7., 1.)))?;
            let before = center_and_scale(&scaler)?;
            let probe = two(&[1.], &[1.]);
            let second = values(&scaler.transform(&probe)?)?[1];
            let mut steps = vec![];
            for (seed, level) in [(3, 5.), (4, -5.), (5, 20.)] {
                let silent = vec![f64::NAN; 800];
                let mut x = two(&normal(800, seed, level, 1.), &silent);
                if seed == 4 {
                    // A single value is no data to be fitted to, and is not lost either.
                    let mut spoke = silent;
                    spoke[9] = 7.5;
                    x = two(&normal(800, seed, level, 1.), &spoke);
                }
                let found = match one_by_one {
                    false => scaler.observe(&x)?,
                    true => {
                        let rows = (0..800).map(|row| scaler.observe(&x.narrow(0, row, 1)?));
                        rows.collect::<Result<Vec<_>>>()?.concat()
                    }
                };
                assert!(
                    !found.is_empty() && found.iter().all(|e| e.feature == 0),
                    "{on_drift}: {found:?}"
                );
                steps.extend(found);
                let [first, second_center, scale, second_scale] = center_and_scale(&scaler)?;
                assert!(
                    on_drift != OnDrift::Refit || (first - level).abs() < 0.3,
                    "{on_drift}: {first}, should be {level}, in steps of {scale}"
                );
                assert_eq!([second_center, second_scale], [before[1], before[3]]);
                assert_eq!(values(&scaler.transform(&probe)?)?[1], second);
            }
            // What it said is the first of its recent values; a file has it, and the reference that
            // was kept.
            let restored = AdaptiveScaler::from_state(&scaler.state()?)?;
            let back = two(&normal(600, 6, 20., 1.), &normal(600, 7, 30., 1.));
            let events = scaler.observe(&back)?;
            assert!(events.iter().any(|e| e.feature == 1), "{events:?}");
            assert_eq!(restored.observe(&back)?, events);
            assert_eq!(text(&restored.state()?), text(&scaler.state()?));
            let second = center_and_scale(&scaler)?[1];
            assert!(
                on_drift != OnDrift::Refit || (second - 30.).abs() < 0.3,
                "{second}"
            );
            left.push((steps, text(&scaler.state()?)));
        }
        assert!(left[0] == left[1], "{on_drift}");
    }
    Ok(())
}

/// The scaler inside wants more values than a window has. What that call found is returned by the
/// next that succeeds, before its own.
#[test]
fn events_of_a_call_that_fails_are_not_lost() -> Result<()> {
    let wants = DriftOptions {
        bins: 500,
        ..Default::default()
    };
    let reaches = |level: f64, seed: u64| column(&normal(400, seed, level, 1.));
    let inner = || AdaptiveScaler::new(StandardScaler::default(), wants, OnDrift::Refit);
    let scaler = AdaptiveScaler::new(inner()?, DriftOptions::default(), OnDrift::Refit)?;
    let monitor = DriftMonitor::new(DriftOptions::default())?;
    let start = column(&normal(1000, 1, 0., 1.));
    scaler.fit(&start)?;
    monitor.fit(&start)?;
    let before = values(&scaler.transform(&start)?)?;
    let x = reaches(5., 2);
    let mut want = monitor.observe(&x)?;
    assert!(!want.is_empty());
    let told = message(scaler.observe(&x));
    assert!(
        told.contains(&want[0].to_string()) && told.contains("at least 500 values of feature 0"),
        "{told}"
    );
    // Rows to which there is nothing to say.
    let quiet = column(&normal(1, 3, 5., 1.));
    want.extend(monitor.observe(&quiet)?);
    assert_eq!(scaler.observe(&quiet)?, want);
    assert_eq!(scaler.observe(&quiet)?, []);
    assert_eq!(values(&scaler.transform(&start)?)?, before);
    Ok(())
}

/// Data that a monitor refuses as a reference are refused by a scaler with a monitor too, which
/// stays as it was.
#[test]
fn a_reference_has_as_many_values_as_bins() -> Result<()> {
    let scaler = AdaptiveScaler::new(
        StandardScaler::default(),
        DriftOptions::default(),
        OnDrift::Refit,
    )?;
    let few = column(&[1., 2., 3.]);
    for told in [scaler.fit(&few), scaler.partial_fit(&few)] {
        assert!(message(told).contains("at least 10 values of feature 0, got 3"));
    }
    assert!(!scaler.is_fitted());
    scaler.fit(&column(&normal(10, 1, 0., 1.)))?;
    let before = text(&scaler.state()?);
    assert!(message(scaler.fit(&few)).contains("at least 10 values"));
    assert_eq!(text(&scaler.state()?), before);
    Ok(())
}

#[test]
fn scaler_and_monitor_agree() -> Result<()> {
    let options = DriftOptions {
        nan: Nan::Ignore,
        ..Default::default()
    };
    let mixed = AdaptiveScaler::new(StandardScaler::default(), options, OnDrift::Refit);
    assert!(message(mixed).contains("expected the same nan for the scaler and the monitor"));

    let fitted = |width: usize| -> Result<State> {
        let scaler = ignoring()?;
        let data = tensor(&normal(40 * width, 1, 0., 1.), &[40, width], DType::F64)?;
        scaler.fit(&data)?;
        scaler.state()
    };
    let (one, two) = (fitted(1)?, fitted(2)?);
    let foreign: String = two.option("monitor")?;
    let mut mixed = one.clone().with_option("monitor", foreign);
    for name in ["reference", "recent"] {
        let name = format!("monitor.{name}");
        mixed = mixed.with_tensor(&name, two.tensor(&name)?.clone());
    }
    assert!(message(from_state(&mixed)).contains("feature 1"));
    let refusing: String = one.option("scaler")?;
    let refusing = refusing.replace("ignore", "refuse");
    let mixed = one.clone().with_option("scaler", refusing);
    assert!(message(from_state(&mixed)).contains("the same nan"));
    let scaler = ignoring()?;
    assert!(message(scaler.restore(&mixed)).contains("the same nan"));
    assert!(!scaler.is_fitted());
    Ok(())
}

/// The scaler that is handed out is a copy: fitting it does not reach the one that is watched.
#[test]
fn what_is_wrapped_is_not_handed_out() -> Result<()> {
    let scaler = ignoring()?;
    scaler.fit(&column(&normal(300, 1, 0., 1.)))?;
    let before = text(&scaler.state()?);
    scaler.scaler().fit(&column(&normal(10, 2, 1e3, 1.)))?;
    let copy = scaler.snapshot();
    copy.fit(&column(&normal(10, 2, 1e3, 1.)))?;
    assert_eq!(text(&scaler.state()?), before);
    // One that was fitted before it was wrapped has no reference yet: the first data are that.
    let fitted = StandardScaler::default();
    fitted.fit(&column(&[1., 2.]))?;
    let scaler = AdaptiveScaler::new(fitted, DriftOptions::default(), OnDrift::Refit)?;
    scaler.partial_fit(&column(&normal(300, 1, 0., 1.)))?;
    assert_eq!(scaler.seen()[0].values, 300);
    Ok(())
}

/// False alarms after a refit, whose reference is as short as the window, and with several
/// features, each of which may give one.
#[test]
fn alarms_after_a_refit_and_of_several_features() -> Result<()> {
    let scaler = AdaptiveScaler::new(
        StandardScaler::default(),
        DriftOptions::default(),
        OnDrift::Refit,
    )?;
    let mut after_refit = 0;
    for seed in 0..20 {
        scaler.fit(&column(&normal(200, 1000 + seed, 0., 1.)))?;
        let events = scaler.observe(&column(&normal(5000, 2000 + seed, 0., 1.)))?;
        let mut steps: Vec<u64> = events.iter().map(|e| e.step).collect();
        steps.dedup();
        after_refit += steps.len();
    }
    let monitor = DriftMonitor::new(DriftOptions::default())?;
    monitor.fit(&tensor(
        &normal(20_000, 1, 0., 1.),
        &[1000, 20],
        DType::F64,
    )?)?;
    let wide = tensor(&normal(400_000, 2, 0., 1.), &[20_000, 20], DType::F64)?;
    let of_several = monitor.observe(&wide)?.len();
    println!("a reference of 200 rows: {after_refit} refits without cause in 100000 rows");
    println!("20 features: {of_several} events in 20000 rows");
    assert!(
        after_refit <= 20 && of_several <= 2,
        "{after_refit}, {of_several}"
    );
    Ok(())
}
