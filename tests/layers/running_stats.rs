//! Running statistics: forwards that leave them alone, batches in pieces, statistics put back, and
//! what layers of the same variables share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarMap;
use candle_norm::{
    BatchNorm, BatchNormOptions, Norm, Path, RunningStats, Snapshot, batch_norm, pool_updates,
    with_path, without_updates,
};

use testkit::compare::assert_near;
use testkit::data::{Draw, bits, tensor, values};
use testkit::table;
use testkit::tracked::{self, DEFAULTS, Settings};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const PATHS: [Path; 2] = [Path::Fused, Path::Composed];

fn stats(norm: &dyn Norm) -> &RunningStats {
    norm.running_stats().expect("statistics are tracked")
}

/// Mean, variance and counter, to the bit.
fn state(norm: &dyn Norm) -> Result<(Vec<u64>, Vec<u64>, i64)> {
    let s = stats(norm).snapshot()?;
    Ok((bits(&s.mean)?, bits(&s.var)?, s.num_batches_tracked))
}

const DIMS: [usize; 3] = [8, 3, 5];

/// Normal values on a mean that rises with the position and with every second sample.
fn rising_noise(seed: u64) -> Result<Tensor> {
    let x = Draw::new(seed).normal(DIMS.iter().product());
    let x: Vec<f64> = (x.iter().enumerate())
        .map(|(i, z)| 4. * (i / 30) as f64 + (i % 15) as f64 + z)
        .collect();
    tensor(&x, &DIMS, DType::F64)
}

/// `[[2], [6]]` moves a mean of 0 to 0.4, and then to 0.76.
#[test]
fn forwards_in_the_scope_update_nothing() -> Result<()> {
    let vars = VarMap::new();
    let norm = batch_norm(1, 1e-5, vb(&vars, DType::F64))?;
    let x = Tensor::new(&[[2f64], [6.]], &CPU)?;
    let mean = || -> Result<f64> { Ok(values(norm.running_mean())?[0]) };
    let y = norm.forward_train(&x)?;
    assert!((mean()? - 0.4).abs() < 1e-15);
    let again = without_updates(|| norm.forward_train(&x))?;
    assert_eq!(bits(&again)?, bits(&y)?);
    assert!((mean()? - 0.4).abs() < 1e-15);
    norm.forward_train(&x)?;
    assert!((mean()? - 0.76).abs() < 1e-15);
    assert_eq!(state(&norm)?.2, 2);
    Ok(())
}

#[test]
fn every_layer_leaves_its_statistics_alone_in_the_scope() -> Result<()> {
    for which in table::tracked() {
        for path in PATHS {
            let vars = VarMap::new();
            let norm = which.build(3, DEFAULTS, vb(&vars, DType::F64))?;
            let train = |x: &Tensor| with_path(path, || norm.forward_t(x, true));
            train(&rising_noise(1)?)?;
            let before = state(&*norm)?;
            let inside = without_updates(|| -> Result<Tensor> {
                train(&rising_noise(2)?)?;
                // The scope within ends by itself.
                without_updates(|| train(&rising_noise(3)?))?;
                train(&rising_noise(4)?)
            })?;
            assert_eq!(state(&*norm)?, before, "{which:?}");
            assert_eq!(bits(&inside)?, bits(&train(&rising_noise(4)?)?)?);
            assert_ne!(state(&*norm)?, before, "{which:?}");
        }
    }
    Ok(())
}

#[test]
fn a_scope_ends_with_an_error_and_with_a_panic() -> Result<()> {
    let vars = VarMap::new();
    let norm = batch_norm(3, 1e-5, vb(&vars, DType::F64))?;
    let x = rising_noise(1)?;
    let failed = without_updates(|| norm.forward_train(&x.narrow(1, 0, 2)?));
    assert!(failed.is_err());
    norm.forward_train(&x)?;
    assert_eq!(state(&norm)?.2, 1);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        without_updates(|| panic!("on purpose"))
    }));
    assert!(panicked.is_err());
    norm.forward_train(&x)?;
    assert_eq!(state(&norm)?.2, 2);
    // A scope that a panic leaves does not take the scope around it along.
    without_updates(|| -> Result<()> {
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            without_updates(|| panic!("on purpose"))
        }));
        assert!(panicked.is_err());
        norm.forward_train(&x).map(|_| ())
    })?;
    assert_eq!(state(&norm)?.2, 2);
    Ok(())
}

/// Other threads go on, and a scope is not handed to a thread that is started in it.
#[test]
fn a_scope_is_one_of_its_thread() -> Result<()> {
    let vars = VarMap::new();
    let options = Settings {
        momentum: None,
        ..DEFAULTS
    };
    let norm = tracked::BATCH.build(3, options, vb(&vars, DType::F64))?;
    let x = rising_noise(1)?;
    thread::scope(|scope| {
        for t in 0..8 {
            let (norm, x) = (&norm, &x);
            scope.spawn(move || {
                for _ in 0..50 {
                    match t % 2 {
                        0 => norm.forward_t(x, true),
                        _ => without_updates(|| norm.forward_t(x, true)),
                    }
                    .expect("a batch that fits");
                }
            });
        }
    });
    assert_eq!(state(&*norm)?.2, 200);
    without_updates(|| {
        thread::scope(|scope| {
            let inside = scope.spawn(|| norm.forward_t(&x, true).map(|_| ()));
            inside.join().expect("no panic")
        })
    })?;
    assert_eq!(state(&*norm)?.2, 201);
    Ok(())
}

/// Threads that pool, each its own micro-batches, lose no update.
#[test]
fn threads_that_pool_lose_no_update() -> Result<()> {
    let vars = VarMap::new();
    let options = Settings {
        momentum: None,
        ..DEFAULTS
    };
    let norm = tracked::BATCH.build(3, options, vb(&vars, DType::F64))?;
    let x = rising_noise(1)?;
    thread::scope(|scope| {
        for _ in 0..8 {
            let (norm, x) = (&norm, &x);
            scope.spawn(move || {
                for _ in 0..50 {
                    pool_updates(|| {
                        norm.forward_t(&x.narrow(0, 0, 3)?, true)?;
                        norm.forward_t(&x.narrow(0, 3, 5)?, true)
                    })
                    .expect("batches that fit");
                }
            });
        }
    });
    let whole = tracked::BATCH.build(3, options, vb(&VarMap::new(), DType::F64))?;
    whole.forward_t(&x, true)?;
    let (got, want) = (stats(&*norm).snapshot()?, stats(&*whole).snapshot()?);
    assert_eq!(got.num_batches_tracked, 400);
    for (got, want) in [(got.mean, want.mean), (got.var, want.var)] {
        let want = values(&want)?;
        assert_near(
            "pooled",
            &values(&got)?,
            &want,
            &vec![0.; want.len()],
            1e-12,
        );
    }
    Ok(())
}

/// 1, 2, 4, …, 128 in pairs: the variances are 0.5 to 2048, their mean 546.125. Of all eight it
/// is 13716.875 / 7.
#[test]
fn micro_batches_are_pooled_to_the_whole_batch() -> Result<()> {
    let powers: Vec<f64> = (0..8).map(|k| f64::from(1 << k)).collect();
    let mean = powers.iter().sum::<f64>() / 8.;
    let var = powers.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 7.;
    assert_eq!((mean, var), (31.875, 13716.875 / 7.));
    for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 1e-6)] {
        let vars = VarMap::new();
        let settings = BatchNormOptions {
            momentum: Some(1.),
            ..Default::default()
        };
        let norm = batch_norm(1, settings, vb(&vars, dtype))?;
        let x = tensor(&powers, &[8, 1], dtype)?;
        pool_updates(|| {
            for i in 0..4 {
                norm.forward_train(&x.narrow(0, 2 * i, 2)?)?;
                // Nothing moves before the end.
                assert_eq!(state(&norm)?.2, 0);
            }
            Ok(())
        })?;
        let s = norm.running_stats().expect("statistics").snapshot()?;
        let (m, v) = (values(&s.mean)?[0], values(&s.var)?[0]);
        assert!((m - mean).abs() <= bound * mean, "{m} for {mean}");
        assert!((v - var).abs() <= bound * var, "{v} for {var}");
        assert_eq!(s.num_batches_tracked, 1);
    }
    Ok(())
}

/// Of whatever sizes, in every layer, in the momentum of the layer and by the average, and before
/// and after other batches.
#[test]
fn any_pieces_of_a_batch_are_pooled_to_it() -> Result<()> {
    for which in table::tracked() {
        for momentum in [Some(0.3), None] {
            for (path, dtype, bound) in [
                (Path::Fused, DType::F64, 1e-12),
                (Path::Composed, DType::F64, 1e-12),
                (Path::Fused, DType::F32, 2e-6),
            ] {
                let settings = Settings {
                    momentum,
                    ..DEFAULTS
                };
                let trained = |sizes: &[usize]| -> Result<Snapshot> {
                    let norm = which.build(3, settings, vb(&VarMap::new(), dtype))?;
                    norm.forward_t(&rising_noise(7)?.to_dtype(dtype)?, true)?;
                    let x = rising_noise(8)?.to_dtype(dtype)?;
                    let mut start = 0;
                    pool_updates(|| {
                        for size in sizes {
                            let piece = x.narrow(0, start, *size)?;
                            with_path(path, || norm.forward_t(&piece, true))?;
                            start += size;
                        }
                        Ok(())
                    })?;
                    assert_eq!(start, 8);
                    norm.forward_t(&rising_noise(9)?.to_dtype(dtype)?, true)?;
                    stats(&*norm).snapshot()
                };
                let whole = trained(&[8])?;
                assert_eq!(whole.num_batches_tracked, 3);
                for sizes in [&[2, 2, 2, 2][..], &[1, 7], &[5, 1, 1, 1], &[3, 0, 5]] {
                    let pooled = trained(sizes)?;
                    assert_eq!(pooled.num_batches_tracked, 3);
                    for (got, want) in [(&pooled.mean, &whole.mean), (&pooled.var, &whole.var)] {
                        let want = values(want)?;
                        let what = format!("{which:?} {momentum:?} {path:?} {dtype:?} {sizes:?}");
                        assert_near(&what, &values(got)?, &want, &vec![0.; want.len()], bound);
                    }
                }
            }
        }
    }
    Ok(())
}

/// A pooled mean far from zero costs no digits.
#[test]
fn pooling_about_a_large_mean() -> Result<()> {
    let x = (rising_noise(3)? + 3000.)?.to_dtype(DType::F32)?;
    let settings = Settings {
        momentum: Some(1.),
        ..DEFAULTS
    };
    let norm = tracked::BATCH.build(3, settings, vb(&VarMap::new(), DType::F32))?;
    pool_updates(|| {
        for i in 0..8 {
            norm.forward_t(&x.narrow(0, i, 1)?, true)?;
        }
        Ok(())
    })?;
    let whole = tracked::BATCH.build(3, settings, vb(&VarMap::new(), DType::F64))?;
    whole.forward_t(&x.to_dtype(DType::F64)?, true)?;
    let (got, want) = (stats(&*norm).snapshot()?, stats(&*whole).snapshot()?);
    for (got, want) in [(got.mean, want.mean), (got.var, want.var)] {
        let want = values(&want)?;
        // The means of micro-batches are rounded to f32, 1.2e-4 apart here.
        assert_near("pooled", &values(&got)?, &want, &[0.; 3], 2e-6);
    }
    Ok(())
}

/// Each micro-batch is normalized by its own statistics, pooled or not.
#[test]
fn pooling_does_not_change_outputs() -> Result<()> {
    for which in table::tracked() {
        let norm = which.build(3, DEFAULTS, vb(&VarMap::new(), DType::F64))?;
        let x = rising_noise(5)?.narrow(0, 0, 2)?;
        let pooled = pool_updates(|| norm.forward_t(&x, true))?;
        assert_eq!(
            bits(&pooled)?,
            bits(&norm.forward_t(&x, true)?)?,
            "{which:?}"
        );
    }
    Ok(())
}

#[test]
fn what_fails_midway_pools_nothing() -> Result<()> {
    for which in table::tracked() {
        let vars = VarMap::new();
        let settings = Settings {
            refuse_non_finite: true,
            ..DEFAULTS
        };
        let norm = which.build(3, settings, vb(&vars, DType::F64).pp("a"))?;
        let other = which.build(3, settings, vb(&vars, DType::F64).pp("b"))?;
        for norm in [&norm, &other] {
            norm.forward_t(&rising_noise(1)?, true)?;
        }
        let states = || Ok::<_, candle_core::Error>((state(&*norm)?, state(&*other)?));
        let before = states()?;
        let (good, poisoned) = (rising_noise(2)?, (rising_noise(2)? * f64::NAN)?);
        for bad in [&good.narrow(1, 0, 2)?, &poisoned] {
            let failed = pool_updates(|| {
                norm.forward_t(&good, true)?;
                other.forward_t(&good, true)?;
                other.forward_t(bad, true)
            });
            assert!(failed.is_err());
            assert_eq!(states()?, before, "{which:?}");
        }
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            pool_updates(|| -> Result<()> {
                norm.forward_t(&good, true)?;
                panic!("on purpose")
            })
        }));
        assert!(panicked.is_err());
        assert_eq!(states()?, before, "{which:?}");
        // A batch that is refused and left out is not pooled, the rest is.
        pool_updates(|| {
            assert!(norm.forward_t(&poisoned, true).is_err());
            norm.forward_t(&good, true)
        })?;
        assert_ne!(states()?.0, before.0);
        assert!(
            values(&stats(&*norm).snapshot()?.mean)?
                .iter()
                .all(|v| v.is_finite())
        );
        // Nothing is left open.
        norm.forward_t(&good, true)?;
        assert_eq!(state(&*norm)?.2, 3);
    }
    Ok(())
}

#[test]
fn scopes_nest() -> Result<()> {
    let build = || batch_norm(3, 1e-5, vb(&VarMap::new(), DType::F64));
    let (x, whole) = (rising_noise(6)?, build()?);
    whole.forward_train(&x)?;
    let piece = |from, len| x.narrow(0, from, len);
    let norm = build()?;
    pool_updates(|| {
        norm.forward_train(&piece(0, 2)?)?;
        // The outer scope gets what the inner one pooled, and nothing of what failed.
        pool_updates(|| {
            norm.forward_train(&piece(2, 3)?)?;
            norm.forward_train(&piece(5, 1)?)
        })?;
        let failed = pool_updates(|| {
            norm.forward_train(&piece(0, 8)?)?;
            norm.forward_train(&x.narrow(1, 0, 1)?)
        });
        assert!(failed.is_err());
        without_updates(|| pool_updates(|| norm.forward_train(&piece(0, 8)?)))?;
        assert_eq!(state(&norm)?.2, 0);
        norm.forward_train(&piece(6, 2)?)
    })?;
    let (got, want) = (stats(&norm).snapshot()?, stats(&whole).snapshot()?);
    assert_eq!(got.num_batches_tracked, 1);
    for (got, want) in [(got.mean, want.mean), (got.var, want.var)] {
        assert_near("nested", &values(&got)?, &values(&want)?, &[0.; 3], 1e-13);
    }
    Ok(())
}

#[test]
fn a_snapshot_can_be_put_back() -> Result<()> {
    for which in table::tracked() {
        for dtype in [DType::F64, DType::F32, DType::F16] {
            let norm = which.build(3, DEFAULTS, vb(&VarMap::new(), dtype))?;
            norm.forward_t(&rising_noise(1)?.to_dtype(dtype)?, true)?;
            let (before, kept) = (state(&*norm)?, stats(&*norm).snapshot()?);
            norm.forward_t(&rising_noise(2)?.to_dtype(dtype)?, true)?;
            assert_ne!(state(&*norm)?, before);
            stats(&*norm).restore(&kept)?;
            assert_eq!(state(&*norm)?, before, "{which:?}");
            // The snapshot is a copy, and can be put back again.
            norm.forward_t(&rising_noise(2)?.to_dtype(dtype)?, true)?;
            stats(&*norm).restore(&kept)?;
            assert_eq!(state(&*norm)?, before, "{which:?}");
        }
    }
    Ok(())
}

#[test]
fn what_no_layer_can_have_left_is_not_put_back() -> Result<()> {
    let norm = batch_norm(2, 1e-5, vb(&VarMap::new(), DType::F32))?;
    norm.forward_train(&Tensor::new(&[[1f32, 2.], [3., 5.]], &CPU)?)?;
    let before = state(&norm)?;
    let row = |v: [f64; 2]| Tensor::new(&v, &CPU);
    let good = Snapshot::new(row([1., 2.])?, row([3., 4.])?, 5);
    let with_mean = |mean| Snapshot::new(mean, good.var.clone(), 5);
    let with_var = |var| Snapshot::new(good.mean.clone(), var, 5);
    let cases = [
        (
            with_mean(Tensor::zeros((1, 2), DType::F32, &CPU)?),
            "running_mean with shape [2]",
        ),
        (with_mean(row([1., f64::NAN])?), "running_mean to be finite"),
        (with_mean(row([1., 1e300])?), "running_mean to be finite"),
        (
            with_var(row([1., f64::INFINITY])?),
            "running_var to be finite",
        ),
        (with_var(row([1., -1.])?), "running_var to be at least 0"),
        (
            with_var(Tensor::zeros(3, DType::F32, &CPU)?),
            "running_var with shape [2]",
        ),
        (
            Snapshot::new(good.mean.clone(), good.var.clone(), -1),
            "num_batches_tracked to be a whole number of at least 0",
        ),
    ];
    for (snapshot, expected) in cases {
        let error = stats(&norm)
            .restore(&snapshot)
            .expect_err(expected)
            .to_string();
        assert!(error.contains("BatchNorm: expected"), "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(state(&norm)?, before);
    }
    stats(&norm).restore(&good)?;
    assert_eq!(values(norm.running_var())?, [3., 4.]);
    Ok(())
}

/// Statistics that a frozen layer took with it stay where they are.
#[test]
fn frozen_layers_keep_their_snapshot() -> Result<()> {
    let norm = batch_norm(3, 1e-5, vb(&VarMap::new(), DType::F64))?;
    norm.forward_train(&rising_noise(1)?)?;
    let (frozen, kept) = (
        norm.frozen()?,
        norm.running_stats().expect("statistics").snapshot()?,
    );
    let before = bits(&frozen.forward(&rising_noise(4)?)?)?;
    pool_updates(|| {
        norm.forward_train(&rising_noise(2)?)?;
        norm.forward_train(&rising_noise(3)?)
    })?;
    let moved = bits(norm.running_mean())?;
    stats(&norm).restore(&kept)?;
    stats(&norm).set_momentum(Some(1.))?;
    assert_ne!(moved, bits(norm.running_mean())?);
    norm.forward_train(&rising_noise(2)?)?;
    assert_eq!(bits(&frozen.forward(&rising_noise(4)?)?)?, before);
    Ok(())
}

/// Of whatever layer, and whatever the layer was built with.
#[test]
fn a_momentum_that_is_set_holds_for_all_layers_of_the_variables() -> Result<()> {
    for which in table::tracked() {
        let vars = VarMap::new();
        let build = |momentum| {
            let settings = Settings {
                momentum,
                ..DEFAULTS
            };
            which.build(3, settings, vb(&vars, DType::F64))
        };
        let (first, second) = (build(Some(0.1))?, build(None)?);
        assert_eq!(stats(&*first).momentum(), Some(0.1));
        assert_eq!(stats(&*second).momentum(), None);
        stats(&*first).set_momentum(Some(1.))?;
        let third = build(Some(0.5))?;
        for norm in [&first, &second, &third] {
            assert_eq!(stats(&**norm).momentum(), Some(1.));
            norm.forward_t(&rising_noise(1)?, true)?;
            let alone = which.build(
                3,
                Settings {
                    momentum: Some(1.),
                    ..DEFAULTS
                },
                vb(&VarMap::new(), DType::F64),
            )?;
            alone.forward_t(&rising_noise(1)?, true)?;
            assert_eq!(state(&**norm)?.1, state(&*alone)?.1, "{which:?}");
        }
        // The cumulative average of four batches of which three were alike.
        stats(&*third).set_momentum(None)?;
        let before = values(&stats(&*third).snapshot()?.var)?;
        first.forward_t(&(rising_noise(1)? * 0.)?, true)?;
        let want: Vec<f64> = before.iter().map(|v| v * 0.75).collect();
        let got = values(&stats(&*first).snapshot()?.var)?;
        assert_near("cumulative", &got, &want, &[0.; 3], 1e-13);

        for momentum in [-0.1, 1.1, f64::NAN] {
            let error = stats(&*first)
                .set_momentum(Some(momentum))
                .expect_err("an error");
            assert!(
                error
                    .to_string()
                    .contains("expected a momentum between 0 and 1")
            );
            assert_eq!(stats(&*second).momentum(), None);
        }
    }
    Ok(())
}

/// Statistics are protected as soon as one layer that has them asks for it.
#[test]
fn refusal_of_what_is_not_finite_holds_for_all_layers_of_the_variables() -> Result<()> {
    for which in table::tracked() {
        for order in [[true, false], [false, true]] {
            let vars = VarMap::new();
            let layers = order.map(|refuse_non_finite| {
                let settings = Settings {
                    refuse_non_finite,
                    ..DEFAULTS
                };
                which.build(3, settings, vb(&vars, DType::F64))
            });
            for layer in layers {
                let layer = layer?;
                let before = state(&*layer)?;
                let error = layer.forward_t(&(rising_noise(1)? * f64::NAN)?, true);
                let error = error.expect_err("a batch that is refused").to_string();
                assert!(error.contains("refuse_non_finite"), "{error}");
                assert_eq!(state(&*layer)?, before, "{which:?}");
            }
        }
    }
    Ok(())
}

/// Layers of given variables count together, though no model holds a counter; one that does takes
/// its place.
#[test]
fn layers_of_given_variables_share_a_counter() -> Result<()> {
    let mean = Var::zeros(3, DType::F64, &CPU)?;
    let var = Var::ones(3, DType::F64, &CPU)?;
    let build = || {
        let (mean, var) = (mean.as_tensor().clone(), var.as_tensor().clone());
        BatchNorm::new_no_bias(3, mean, var, 1e-5)
    };
    let (first, second) = (build()?, build()?);
    first.forward_train(&rising_noise(1)?)?;
    second.forward_train(&rising_noise(2)?)?;
    assert_eq!((state(&first)?, state(&first)?.2), (state(&second)?, 2));

    let vars = VarMap::new();
    {
        let mut data = vars.data().lock().expect("no panic");
        data.insert("running_mean".to_string(), mean.clone());
        data.insert("running_var".to_string(), var.clone());
    }
    let of_model = batch_norm(3, 1e-5, vb(&vars, DType::F64))?;
    first.forward_train(&rising_noise(3)?)?;
    let counter = vars.data().lock().expect("no panic")["num_batches_tracked"].clone();
    assert_eq!(counter.to_scalar::<i64>()?, 1);
    assert_eq!(
        (state(&of_model)?, state(&of_model)?.2),
        (state(&second)?, 1)
    );
    Ok(())
}

/// Layers of the same variables pool together.
#[test]
fn layers_of_the_same_variables_pool_together() -> Result<()> {
    for which in table::tracked() {
        let vars = VarMap::new();
        let build = |vars: &VarMap| which.build(3, DEFAULTS, vb(vars, DType::F64));
        let (first, second) = (build(&vars)?, build(&vars)?);
        let (x, whole) = (rising_noise(6)?, build(&VarMap::new())?);
        pool_updates(|| {
            first.forward_t(&x.narrow(0, 0, 3)?, true)?;
            second.forward_t(&x.narrow(0, 3, 5)?, true)
        })?;
        whole.forward_t(&x, true)?;
        let (got, want) = (stats(&*first).snapshot()?, stats(&*whole).snapshot()?);
        assert_eq!(got.num_batches_tracked, 1);
        for (got, want) in [(got.mean, want.mean), (got.var, want.var)] {
            let want = values(&want)?;
            assert_near("pooled", &values(&got)?, &want, &[0.; 3], 1e-13);
        }
    }
    Ok(())
}

/// A counter that cannot grow stays, and says so without a panic.
#[test]
fn a_counter_at_its_end_stays_there() -> Result<()> {
    let vars = VarMap::new();
    let settings = BatchNormOptions {
        momentum: None,
        ..Default::default()
    };
    let norm = batch_norm(3, settings, vb(&vars, DType::F64))?;
    let mut full = stats(&norm).snapshot()?;
    full.num_batches_tracked = i64::MAX;
    stats(&norm).restore(&full)?;
    assert_eq!(norm.momentum(), 1. / i64::MAX as f64);
    norm.forward_train(&rising_noise(1)?)?;
    assert_eq!(state(&norm)?.2, i64::MAX);
    Ok(())
}

/// A variance that only pooling makes too large for the statistics is refused like that of a batch.
#[test]
fn pooled_statistics_that_are_not_finite_are_refused() -> Result<()> {
    let settings = Settings {
        refuse_non_finite: true,
        ..DEFAULTS
    };
    let norm = tracked::BATCH.build(3, settings, vb(&VarMap::new(), DType::F32))?;
    let before = state(&*norm)?;
    let error = pool_updates(|| {
        for level in [-1e25, 1e25] {
            norm.forward_t(&Tensor::full(level as f32, &DIMS, &CPU)?, true)?;
        }
        Ok(())
    });
    let error = error.expect_err("a variance beyond f32").to_string();
    assert!(
        error.contains("refuse_non_finite") && error.contains("pooled"),
        "{error}"
    );
    assert_eq!(state(&*norm)?, before);
    Ok(())
}
