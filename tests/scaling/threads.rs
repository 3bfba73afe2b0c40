//! A scaler that is fed while another thread transforms is the old or the new one, never a mixture.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use candle_core::Tensor;
use candle_norm::scaling::{
    MinMaxScaler, MinMaxScalerOptions, Nan, Scaler, StandardScaler, TargetScaler, half_precision,
};

use super::kinds::{each_built, each_of_all, rows};
use testkit::data::{bits, values};

/// Wide, so that there is time to be interrupted while the numbers are put together.
const WIDTH: usize = 64;
const STEPS: usize = 60;
const READERS: usize = 3;

/// Says that there is nothing more to come, also when a test fails on the way: who waits for it
/// would wait for ever.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Data whose center and spread both change at every step, alike for all features.
fn step(k: usize) -> Tensor {
    let k = k as f64 + 1.;
    let row = |v: f64| vec![v; WIDTH];
    rows(&[row(-k), row(3. * k), row(k * k)].concat(), WIDTH)
}

fn probe() -> Tensor {
    rows(&[vec![1.; WIDTH], vec![2.; WIDTH]].concat(), WIDTH)
}

#[test]
fn never_a_mixture() {
    each_of_all(|kind, build| {
        // What the scaler answers after each step.
        let reference = build(Nan::Refuse);
        let mut answers = HashSet::new();
        for k in 0..STEPS {
            reference.partial_fit(&step(k)).unwrap();
            // A scaler of series takes a call's rows as a whole too.
            answers.insert(bits(&reference.transform(&probe()).unwrap()).unwrap());
        }
        assert!(answers.len() > 10, "{kind}: {} answers", answers.len());

        let scaler: Arc<dyn Scaler> = build(Nan::Refuse).into();
        scaler.partial_fit(&step(0)).unwrap();
        let (done, start) = (AtomicBool::new(false), Barrier::new(READERS + 1));
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|_| {
                    let (scaler, done, start) = (scaler.clone(), &done, &start);
                    let answers = &answers;
                    scope.spawn(move || {
                        start.wait();
                        let mut seen = HashSet::new();
                        while !done.load(Ordering::Relaxed) {
                            let y = bits(&scaler.transform(&probe()).unwrap()).unwrap();
                            assert!(answers.contains(&y), "a mixture");
                            seen.insert(y);
                        }
                        seen.len()
                    })
                })
                .collect();
            start.wait();
            {
                let _end = End(&done);
                for k in 1..STEPS {
                    scaler.partial_fit(&step(k)).unwrap();
                    // On two cores readers get a turn between two steps.
                    thread::sleep(Duration::from_micros(200));
                }
            }
            let seen = readers.into_iter().map(|reader| match reader.join() {
                Ok(seen) => seen,
                Err(_) => panic!("{kind}: a mixture"),
            });
            // Whoever saw but one scaler would have seen no mixture.
            let most = seen.max().unwrap();
            assert!(most > 1, "{kind}: readers saw {most} scalers");
        });
        let last = bits(&scaler.transform(&probe()).unwrap()).unwrap();
        assert_eq!(
            last,
            bits(&reference.transform(&probe()).unwrap()).unwrap(),
            "{kind}"
        );
    });
}

#[test]
fn threads_that_feed_lose_nothing() {
    each_built(|kind, build| {
        let (alone, shared) = (
            build(Nan::Refuse),
            Arc::<dyn Scaler>::from(build(Nan::Refuse)),
        );
        for k in 0..STEPS {
            alone.partial_fit(&step(k)).unwrap();
        }
        thread::scope(|scope| {
            for t in 0..4 {
                let shared = shared.clone();
                scope.spawn(move || {
                    for k in (t..STEPS).step_by(4) {
                        shared.partial_fit(&step(k)).unwrap();
                    }
                });
            }
        });
        assert_eq!(shared.seen(), alone.seen(), "{kind}");
        let answer = |s: &dyn Scaler| values(&s.transform(&probe()).unwrap()).unwrap();
        for (got, want) in answer(&*shared).iter().zip(answer(&*alone)) {
            assert!(
                (got - want).abs() <= 1e-12 * want.abs().max(1.),
                "{kind}: {got}, {want}"
            );
        }
    });
}

/// Options that are restored while data are read are not overwritten by those that the data were
/// read by.
#[test]
fn a_fit_does_not_undo_a_restore() {
    let clipping = MinMaxScaler::new(MinMaxScalerOptions {
        clip: true,
        ..Default::default()
    });
    let clipping = clipping.unwrap().state().unwrap();
    let x = rows(&vec![1.; 200_000], 1);
    for _ in 0..20 {
        let (scaler, start) = (MinMaxScaler::default(), Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                scaler.fit(&x).unwrap();
            });
            start.wait();
            thread::sleep(Duration::from_micros(300));
            scaler.restore(&clipping).unwrap();
        });
        assert!(scaler.options().clip);
    }
}

/// Who asks several things of a scaler asks them of one and the same, while another thread gives it
/// other features and other units.
#[test]
fn reports_are_of_one_scaler() {
    let x = rows(&[1., 3.], 1);
    let small = StandardScaler::default();
    small.fit(&x).unwrap();
    let small = small.state().unwrap();
    let large = StandardScaler::default();
    large.fit(&rows(&[1000., 3000.], 1)).unwrap();
    let large = large.state().unwrap();
    let targets = TargetScaler::new(StandardScaler::default());
    targets.scaler().restore(&small).unwrap();
    let wanted: Vec<f64> = [&small, &large]
        .map(|state| {
            targets.scaler().restore(state).unwrap();
            targets.errors(&x, &x).unwrap()[0].ratio()
        })
        .to_vec();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                targets.scaler().restore(&small).unwrap();
                targets.scaler().restore(&large).unwrap();
            }
        });
        let _end = End(&done);
        for _ in 0..20_000 {
            let ratio = targets.errors(&x, &x).unwrap()[0].ratio();
            assert!(wanted.contains(&ratio), "{ratio}, should be of {wanted:?}");
        }
    });
    // Data of one feature, and a scaler that changes between one and three: an error or an answer,
    // and no panic.
    let scaler = StandardScaler::default();
    scaler.fit(&x).unwrap();
    done.store(false, Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                scaler.fit(&rows(&[1., 2., 3.], 3)).unwrap();
                scaler.fit(&x).unwrap();
            }
        });
        let _end = End(&done);
        for _ in 0..20_000 {
            let _ = half_precision(&scaler, &rows(&[1., 2., 3.], 3));
        }
    });
}

trait Ratio {
    /// The scale of the target: the same for every error of one scaler.
    fn ratio(&self) -> f64;
}

impl Ratio for candle_norm::scaling::TargetError {
    fn ratio(&self) -> f64 {
        self.original.rmse / self.scaled.rmse
    }
}
