//! Drift: the numbers of scipy and evidently, false alarms, delays, what events say, what a scaler
//! does after one.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Tensor};
use candle_norm::scaling::{
    AdaptiveScaler, Archive, DriftEvent, DriftMetric, DriftMonitor, DriftOptions, MinMaxScaler,
    Nan, OnDrift, Scaler, StandardScaler, from_state,
};

use super::{End, Fixture};
use testkit::compare::assert_same_bits;
use testkit::data::{Draw, column, normal, values};
use testkit::errors::message;

/// Independent normal values.
fn normal_rows(rows: usize, seed: u64, mean: f64, std: f64) -> Tensor {
    column(&normal(rows, seed, mean, std))
}

/// An autoregression of first order, of variance 1: each value remembers `memory` of the one
/// before.
fn autoregression(rows: usize, seed: u64, memory: f64) -> Tensor {
    let mut last = 0.;
    let z = Draw::new(seed).normal(rows);
    let next = |z: &f64| {
        last = memory * last + (1. - memory * memory).sqrt() * z;
        last
    };
    column(&z.iter().map(next).collect::<Vec<_>>())
}

#[test]
fn metrics_of_scipy_and_evidently() -> Result<()> {
    let fixture = Fixture::load("drift")?;
    for name in [
        "alike", "shifted", "wider", "skewed", "ties", "apart", "large",
    ] {
        let [reference, recent, want] =
            ["reference", "recent", "metrics"].map(|part| format!("{name}_{part}"));
        let recent = fixture.tensor(&recent);
        let window = recent.elem_count();
        let monitor = DriftMonitor::new(DriftOptions {
            window,
            min_count: window,
            ..Default::default()
        })?;
        monitor.fit(&fixture.tensor(&reference))?;
        monitor.observe(&recent)?;
        let report = monitor.report()?.remove(0);
        let got = [
            report.mean_shift,
            report.variance_ratio,
            report.population_stability,
            report.ks_statistic,
            report.ks_p_value,
        ];
        assert_eq!(
            (report.reference as usize, report.recent as usize),
            (fixture.tensor(&reference).elem_count(), window)
        );
        for (got, want) in got.iter().zip(fixture.values(&want)) {
            // Relative: a p-value of 10⁻⁶⁰ has its places too.
            assert!(
                (got - want).abs() <= 1e-10 * want.abs(),
                "{name}: {got:e}, should be {want:e}"
            );
        }
    }
    Ok(())
}

/// False alarms in 100 000 rows in which nothing changes, by thresholds as they are.
#[test]
fn noise_gives_no_alarm() -> Result<()> {
    let mut alarms = vec![];
    for seed in 0..4 {
        let monitor = DriftMonitor::new(DriftOptions::default())?;
        monitor.fit(&normal_rows(1000, 100 + seed, 5., 2.))?;
        alarms.extend(monitor.observe(&normal_rows(25_000, 200 + seed, 5., 2.))?);
    }
    println!(
        "{} alarms in 100000 rows of independent noise: {alarms:?}",
        alarms.len()
    );
    assert!(alarms.is_empty());
    // Rows that remember each other carry less than their number; a window of them needs more room.
    let options = DriftOptions {
        window: 1000,
        min_count: 1000,
        variance_ratio: Some(2.),
        population_stability: Some(0.5),
        ks_p_value: None,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options)?;
    monitor.fit(&autoregression(10_000, 7, 0.9))?;
    let alarms = monitor.observe(&autoregression(100_000, 8, 0.9))?;
    println!(
        "{} alarms in 100000 rows that remember 0.9 of the row before",
        alarms.len()
    );
    assert!(alarms.is_empty(), "{alarms:?}");
    // The same by the thresholds for independent rows: alarms are no longer an exception.
    let monitor = DriftMonitor::new(DriftOptions::default())?;
    monitor.fit(&autoregression(10_000, 7, 0.9))?;
    let alarms = monitor.observe(&autoregression(100_000, 8, 0.9))?;
    println!(
        "{} alarms in the same rows by the default options",
        alarms.len()
    );
    assert!(!alarms.is_empty());
    Ok(())
}

/// Rows from a change to the first event, over several seeds: the least, the median and the
/// greatest.
fn delays(mean: f64, std: f64) -> Result<[u64; 3]> {
    let mut delays = vec![];
    for seed in 0..15 {
        let monitor = DriftMonitor::new(DriftOptions::default())?;
        monitor.fit(&normal_rows(1000, 300 + seed, 0., 1.))?;
        assert_eq!(monitor.observe(&normal_rows(1000, 400 + seed, 0., 1.))?, []);
        let events = monitor.observe(&normal_rows(600, 500 + seed, mean, std))?;
        delays.push(events.first().map_or(u64::MAX, |e| e.step - 1000));
    }
    delays.sort_unstable();
    Ok([delays[0], delays[7], delays[14]])
}

#[test]
fn a_change_is_seen_within_the_window() -> Result<()> {
    for (name, mean, std, most) in [
        ("a mean that moves by 1 σ", 1., 1., 200),
        ("a mean that moves by 3 σ", 3., 1., 30),
        ("a standard deviation that doubles", 0., 2., 200),
        ("a standard deviation that halves", 0., 0.5, 200),
    ] {
        let [least, median, greatest] = delays(mean, std)?;
        println!("{name}: {median} rows ({least} to {greatest})");
        assert!(
            least > 0 && greatest <= most,
            "{name}: {least}, {median}, {greatest}"
        );
    }
    Ok(())
}

/// Each metric by itself sees what it is for.
#[test]
fn each_metric_has_its_events() -> Result<()> {
    let none = DriftOptions {
        mean_shift: None,
        variance_ratio: None,
        population_stability: None,
        ks_p_value: None,
        ..Default::default()
    };
    let all = DriftOptions::default();
    let shifted = normal_rows(300, 2, 1.5, 1.);
    let wider = normal_rows(300, 2, 0., 3.);
    let narrower = normal_rows(300, 2, 0., 0.3);
    for (metric, options, changed) in [
        (
            DriftMetric::MeanShift,
            DriftOptions {
                mean_shift: all.mean_shift,
                ..none
            },
            vec![&shifted],
        ),
        (
            DriftMetric::VarianceRatio,
            DriftOptions {
                variance_ratio: all.variance_ratio,
                ..none
            },
            vec![&wider, &narrower],
        ),
        (
            DriftMetric::PopulationStability,
            DriftOptions {
                population_stability: all.population_stability,
                ..none
            },
            vec![&shifted, &wider, &narrower],
        ),
        (
            DriftMetric::KolmogorovSmirnov,
            DriftOptions {
                ks_p_value: all.ks_p_value,
                ..none
            },
            vec![&shifted, &wider, &narrower],
        ),
    ] {
        for x in changed {
            let monitor = DriftMonitor::new(options)?.with_names(["load"])?;
            monitor.fit(&normal_rows(1000, 1, 0., 1.))?;
            let events = monitor.observe(x)?;
            assert_eq!(
                events.iter().map(|e| e.metric).collect::<Vec<_>>(),
                [metric],
                "{events:?}"
            );
            let DriftEvent {
                step,
                feature,
                name,
                value,
                threshold,
                ..
            } = &events[0];
            assert_eq!(
                (*feature, name.as_str(), *step),
                (0, "feature 0 \"load\"", 200)
            );
            let crossed = match metric {
                DriftMetric::MeanShift | DriftMetric::PopulationStability => value > threshold,
                DriftMetric::VarianceRatio => *value > *threshold || *value < 1. / threshold,
                DriftMetric::KolmogorovSmirnov => value < threshold,
                _ => panic!("{metric} has no rule here"),
            };
            assert!(
                crossed && events[0].to_string().contains(&metric.to_string()),
                "{}",
                events[0]
            );
        }
    }
    Ok(())
}

#[test]
fn an_event_is_followed_by_quiet() -> Result<()> {
    let options = DriftOptions {
        window: 50,
        min_count: 30,
        check_every: 7,
        cool_down: 105,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options)?;
    monitor.fit(&normal_rows(500, 1, 0., 1.))?;
    let events = monitor.observe(&normal_rows(400, 2, 9., 1.))?;
    let mut steps: Vec<u64> = events.iter().map(|e| e.step).collect();
    steps.dedup();
    // The first multiple of 7 from 30 on, and the first after each 105 rows of quiet, the last of
    // which is a multiple too.
    assert_eq!(steps, [35, 147, 259, 371]);
    Ok(())
}

#[test]
fn what_is_not_there_does_not_count() -> Result<()> {
    let options = DriftOptions {
        window: 50,
        min_count: 30,
        nan: Nan::Ignore,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options)?;
    monitor.fit(&normal_rows(500, 1, 0., 1.))?;
    let far: Vec<f64> = (0..50)
        .map(|i| if i % 2 == 0 { 9. } else { f64::NAN })
        .collect();
    // 25 values in the window, which are too few; then more, until there are 30.
    assert_eq!(monitor.observe(&column(&far))?, []);
    assert_eq!(monitor.report()?[0].recent, 25);
    let events = monitor.observe(&column(&[9.; 50]))?;
    assert_eq!(events[0].step, 60);
    Ok(())
}

/// However rows are cut into calls, and wherever the monitor is saved, the same events come.
#[test]
fn calls_and_files_do_not_show() -> Result<()> {
    let options = DriftOptions {
        window: 60,
        min_count: 40,
        nan: Nan::Ignore,
        ..Default::default()
    };
    let two = |seed: u64, mean: f64| -> Result<Tensor> {
        Tensor::stack(
            &[
                normal_rows(330, seed, mean, 1.),
                normal_rows(330, seed + 1, 0., 1. + mean),
            ],
            1,
        )
    };
    let x = Tensor::cat(&[two(1, 0.)?, two(3, 2.)?], 0)?;
    let whole = DriftMonitor::new(options)?.with_names(["a", "b"])?;
    whole.fit(&two(5, 0.)?)?;
    let events = whole.observe(&x)?;
    assert!(events.iter().any(|e| e.feature == 0) && events.iter().any(|e| e.feature == 1));
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("monitor");
    let mut monitor = DriftMonitor::new(options)?.with_names(["a", "b"])?;
    monitor.fit(&two(5, 0.)?)?;
    let mut found = vec![];
    for start in (0..660).step_by(55) {
        found.extend(monitor.observe(&x.narrow(0, start, 55)?)?);
        let mut archive = Archive::default();
        archive.put("drift", &monitor.state()?)?;
        archive.write(&file)?;
        monitor = DriftMonitor::from_state(&Archive::read(&file)?.state("drift")?)?;
    }
    assert_eq!(found, events);
    assert_eq!(monitor.report()?, whole.report()?);
    assert_eq!((monitor.options(), monitor.steps()), (options, 660));
    Ok(())
}

#[test]
fn what_cannot_be_compared_is_said() -> Result<()> {
    let monitor = DriftMonitor::new(DriftOptions::default())?;
    assert!(
        message(monitor.observe(&normal_rows(3, 1, 0., 1.)))
            .contains("DriftMonitor: expected a fitted")
    );
    assert!(message(monitor.fit(&column(&[1.]))).contains("at least 2 values of feature 0, got 1"));
    let short = message(monitor.fit(&column(&[1., 2., 3.])));
    assert!(short.contains("at least 10 values of feature 0, got 3"));
    assert!(message(monitor.fit(&column(&[1., f64::NAN]))).contains("without NaN"));
    monitor.fit(&normal_rows(100, 1, 0., 1.))?;
    assert!(message(monitor.report()).contains("observe some rows first"));
    monitor.observe(&normal_rows(100, 2, 0., 1.))?;
    let report = monitor.report()?;
    assert!(
        message(monitor.observe(&column(&[0., f64::INFINITY]))).contains("sample 1 of feature 0")
    );
    let wide = Tensor::zeros((2, 2), DType::F64, &Device::Cpu)?;
    assert!(message(monitor.observe(&wide)).contains("feature"));
    assert!(message(monitor.fit(&column(&[0., f64::INFINITY]))).contains("finite"));
    assert_eq!(monitor.report()?, report);
    let good = DriftOptions::default();
    for (options, want) in [
        (
            DriftOptions {
                window: 1,
                min_count: 1,
                ..good
            },
            "window of at least 2",
        ),
        (
            DriftOptions {
                min_count: 201,
                ..good
            },
            "min_count of at most the window, got 201",
        ),
        (
            DriftOptions {
                check_every: 0,
                ..good
            },
            "check_every of at least 1",
        ),
        (DriftOptions { bins: 1, ..good }, "bins between 2 and 10000"),
        (
            DriftOptions {
                mean_shift: Some(0.),
                ..good
            },
            "mean_shift above 0",
        ),
        (
            DriftOptions {
                variance_ratio: Some(0.5),
                ..good
            },
            "variance_ratio above 1",
        ),
        (
            DriftOptions {
                ks_p_value: Some(f64::NAN),
                ..good
            },
            "ks_p_value above 0",
        ),
    ] {
        assert!(message(DriftMonitor::new(options)).contains(want), "{want}");
    }
    Ok(())
}

#[test]
fn a_constant_that_changes_has_drifted() -> Result<()> {
    let options = DriftOptions {
        window: 10,
        min_count: 10,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options)?;
    monitor.fit(&column(&[4.; 50]))?;
    assert_eq!(monitor.observe(&column(&[4.; 10]))?, []);
    let report = &monitor.report()?[0];
    assert_eq!(
        (
            report.mean_shift,
            report.variance_ratio,
            report.population_stability,
            report.ks_p_value
        ),
        (0., 1., 0., 1.)
    );
    let events = monitor.observe(&column(&[3.; 10]))?;
    assert_eq!(events[0].metric, DriftMetric::MeanShift);
    assert_eq!(events[0].value, f64::NEG_INFINITY);
    Ok(())
}

fn adaptive(on_drift: OnDrift) -> Result<AdaptiveScaler> {
    AdaptiveScaler::new(StandardScaler::default(), DriftOptions::default(), on_drift)
}

/// The mean that a scaler subtracts.
fn center(scaler: &dyn Scaler) -> f64 {
    values(&scaler.inverse_transform(&column(&[0.])).unwrap()).unwrap()[0]
}

#[test]
fn a_scaler_is_fitted_to_the_rows_of_the_event() -> Result<()> {
    let x = normal_rows(2000, 2, 3., 1.);
    let before = normal_rows(1000, 1, 0., 1.);
    for on_drift in [OnDrift::Refit, OnDrift::Blend(0.5), OnDrift::Blend(0.01)] {
        let scaler = adaptive(on_drift)?;
        scaler.fit(&before)?;
        assert_eq!(scaler.observe(&normal_rows(400, 3, 0., 1.))?, []);
        let mut steps = vec![];
        for row in 0..600 {
            let events = scaler.observe(&x.narrow(0, row, 1)?)?;
            if let Some(event) = events.first() {
                let recent =
                    Tensor::cat(&[normal_rows(400, 3, 0., 1.), x.narrow(0, 0, row + 1)?], 0)?;
                let recent = recent.narrow(0, 401 + row - 200, 200)?;
                if steps.is_empty() {
                    let want = match on_drift {
                        OnDrift::Refit => recent,
                        // Every fifth row of a thousand.
                        OnDrift::Blend(0.5) => {
                            let fifth = before.reshape((200, 5))?.narrow(1, 4, 1)?.flatten_all()?;
                            Tensor::cat(&[fifth, recent], 0)?
                        }
                        // 1000 rows are 0.99 of 1010.
                        OnDrift::Blend(_) => {
                            let twentieth =
                                recent.reshape((10, 20))?.narrow(1, 19, 1)?.flatten_all()?;
                            Tensor::cat(&[before.clone(), twentieth], 0)?
                        }
                        _ => panic!("{on_drift} has no rule here"),
                    };
                    let fresh = StandardScaler::default();
                    fresh.fit(&want)?;
                    assert_same_bits("refit", &scaler.transform(&x)?, &fresh.transform(&x)?);
                }
                steps.push(event.step);
            }
        }
        println!(
            "{on_drift}: events at {steps:?} after a change at 400, mean {:.2}",
            center(&scaler)
        );
        assert!(steps[0] <= 450, "{steps:?}");
        if on_drift == OnDrift::Refit {
            // The first event's rows are mostly of before; the second's are not.
            assert!((center(&scaler) - 3.).abs() < 0.3, "{}", center(&scaler));
        }
    }
    Ok(())
}

#[test]
fn a_scaler_without_drift_stays_as_it_is() -> Result<()> {
    let scaler = adaptive(OnDrift::Refit)?;
    scaler.fit(&normal_rows(1000, 1, 0., 1.))?;
    let (probe, before) = (normal_rows(9, 2, 0., 1.), center(&scaler));
    let y = scaler.transform(&probe)?;
    scaler.partial_fit(&normal_rows(5000, 3, 0., 1.))?;
    assert_eq!(center(&scaler), before);
    assert_same_bits("y", &scaler.transform(&probe)?, &y);
    Ok(())
}

#[test]
fn an_adaptive_scaler_is_saved_with_what_it_wraps() -> Result<()> {
    let scaler = AdaptiveScaler::new(
        MinMaxScaler::default(),
        DriftOptions::default(),
        OnDrift::Blend(0.25),
    )?;
    scaler.fit(&normal_rows(500, 1, 0., 1.))?;
    scaler.observe(&normal_rows(330, 2, 2., 1.))?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("scaler");
    scaler.save(&file)?;
    let restored = candle_norm::scaling::load(&file)?;
    let typed = AdaptiveScaler::from_state(&Archive::read(&file)?.state("scaler")?)?;
    assert_eq!(
        (restored.kind(), typed.on_drift()),
        ("AdaptiveScaler", OnDrift::Blend(0.25))
    );
    let next = normal_rows(500, 3, 2., 4.);
    assert_eq!(typed.observe(&next)?, scaler.observe(&next)?);
    restored.partial_fit(&next)?;
    let y = scaler.transform(&next)?;
    assert_same_bits("restored", &restored.transform(&next)?, &y);
    assert_same_bits("typed", &typed.transform(&next)?, &y);
    let other = AdaptiveScaler::new(
        MinMaxScaler::default(),
        DriftOptions::default(),
        OnDrift::Refit,
    )?;
    assert!(
        message(other.restore(&scaler.state()?)).contains("answers drift by refit, got blend 0.25")
    );
    let inside = scaler.state()?.with_option("scaler", "{}");
    assert!(message(from_state(&inside)).contains("expected"));
    assert!(message(other.merge(&scaler)).contains("order"));
    for share in [0., 1., f64::NAN] {
        let built = AdaptiveScaler::new(
            MinMaxScaler::default(),
            DriftOptions::default(),
            OnDrift::Blend(share),
        );
        assert!(message(built).contains("between 0 and 1"));
    }
    Ok(())
}

/// An event in one thread; whoever transforms meanwhile sees the scaler before or after one of
/// them, whole.
#[test]
fn a_scaler_that_adapts_is_the_old_or_the_new_one() -> Result<()> {
    let rows = |seed: u64, level: f64| normal_rows(500, seed, level, level);
    let fed: Vec<Tensor> = (0..12)
        .map(|i| rows(i, 1. + 50. * (i % 2) as f64))
        .collect();
    let fresh = || -> Result<AdaptiveScaler> {
        let scaler = adaptive(OnDrift::Refit)?;
        scaler.fit(&rows(99, 1.))?;
        Ok(scaler)
    };
    let probe = column(&[0., 1.]);
    // All that a single thread sees between calls.
    let alone = fresh()?;
    let mut seen = vec![values(&alone.transform(&probe)?)?];
    for x in &fed {
        alone.observe(x)?;
        seen.push(values(&alone.transform(&probe)?)?);
    }
    let (scaler, done) = (fresh()?, AtomicBool::new(false));
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _end = End(&done);
            start.wait();
            for x in &fed {
                scaler.observe(x).unwrap();
            }
        });
        for _ in 0..3 {
            scope.spawn(|| {
                start.wait();
                while !done.load(Ordering::Relaxed) {
                    let now = values(&scaler.transform(&probe).unwrap()).unwrap();
                    assert!(seen.contains(&now), "{now:?} is none of {seen:?}");
                }
            });
        }
    });
    Ok(())
}
