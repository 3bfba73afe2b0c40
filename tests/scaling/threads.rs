//! A scaler that is fed while another thread transforms is the old or the new one, never a mixture.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use candle_core::Tensor;
use candle_norm::scaling::{Nan, Scaler};

use super::kinds::{each_built, rows};
use crate::common::data::{bits, values};

/// Wide, so that there is time to be interrupted while the numbers are put together.
const WIDTH: usize = 64;
const STEPS: usize = 60;
const READERS: usize = 3;

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
    each_built(|kind, build| {
        // What the scaler answers after each step.
        let reference = build(Nan::Refuse);
        let mut answers = HashSet::new();
        for k in 0..STEPS {
            reference.partial_fit(&step(k)).unwrap();
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
                        while !done.load(Ordering::Relaxed) {
                            let y = bits(&scaler.transform(&probe()).unwrap()).unwrap();
                            assert!(answers.contains(&y), "a mixture");
                        }
                    })
                })
                .collect();
            start.wait();
            for k in 1..STEPS {
                scaler.partial_fit(&step(k)).unwrap();
                thread::yield_now();
            }
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                assert!(reader.join().is_ok(), "{kind}: a mixture");
            }
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
