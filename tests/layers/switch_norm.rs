//! Switchable normalization: what it is at the corners of its mixture, its names, errors, and what
//! training leaves for inference.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{
    Norm, Path, SwitchNormOptions, gradcheck, ops, param_groups, switch_norm, with_path,
};

use testkit::data::{self, values};
use testkit::errors::assert_message;
use testkit::vars::{set, vb};

/// [`noise`](data::noise) of twice its range, about 0.5.
fn wide_noise(dims: &[usize]) -> Result<Tensor> {
    data::noise(dims, DType::F64)?.affine(2., 0.5)
}

const CPU: Device = Device::Cpu;
const PATHS: [Path; 3] = [Path::Fused, Path::Composed, Path::Emulated];

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, bound: f64) -> Result<()> {
    assert_eq!(got.dims(), want.dims());
    for (got, want) in values(got)?.into_iter().zip(values(want)?) {
        assert!(
            (got - want).abs() <= bound * (1. + want.abs()),
            "{got} for {want}"
        );
    }
    Ok(())
}

#[test]
fn a_share_of_one_is_the_norm_that_it_is_of() -> Result<()> {
    let x = wide_noise(&[3, 4, 2, 5])?;
    let alone = [
        ops::instance_norm(&x, None, None, 1e-5)?.0,
        ops::group_norm(&x, 1, None, None, 1e-5)?,
        ops::batch_norm(&x, None, None, 1e-5)?.0,
    ];
    for (source, want) in alone.iter().enumerate() {
        for path in PATHS {
            let vars = VarMap::new();
            let options = SwitchNormOptions {
                unbiased: false,
                ..Default::default()
            };
            let norm = switch_norm(4, options, vb(&vars, DType::F64))?;
            let mut weights = [-400f64; 3];
            weights[source] = 400.;
            for name in ["mean_weight", "var_weight"] {
                set(&vars, name, &Tensor::new(&weights, &CPU)?)?;
            }
            assert_close(&with_path(path, || norm.forward_t(&x, true))?, want, 1e-12)?;
            let mut shares = vec![0.; 3];
            shares[source] = 1.;
            assert_eq!(
                (norm.mean_mixing_weights()?, norm.var_mixing_weights()?),
                (shares.clone(), shares)
            );
        }
    }
    Ok(())
}

#[test]
fn names_and_shapes_are_those_of_the_reference_implementation() -> Result<()> {
    let cases = [
        (2, true, &[1, 6, 1, 1][..], &[1, 6, 1][..], 3),
        (3, true, &[1, 6, 1, 1, 1], &[1, 6, 1], 3),
        (0, true, &[1, 6], &[1, 6], 2),
        (2, false, &[1, 6, 1, 1], &[], 2),
    ];
    for (spatial_dims, using_bn, affine, statistics, sources) in cases {
        let vars = VarMap::new();
        let options = SwitchNormOptions {
            spatial_dims,
            using_bn,
            ..Default::default()
        };
        let norm = switch_norm(6, options, vb(&vars, DType::F32))?;
        let named = vars.data().lock().expect("no thread panicked").clone();
        let mut want = vec![("weight", affine.to_vec()), ("bias", affine.to_vec())];
        want.push(("mean_weight", vec![sources]));
        want.push(("var_weight", vec![sources]));
        if using_bn {
            want.push(("running_mean", statistics.to_vec()));
            want.push(("running_var", statistics.to_vec()));
            want.push(("num_batches_tracked", vec![]));
        }
        assert_eq!(named.len(), want.len());
        for (name, dims) in want {
            assert_eq!(named[name].dims(), dims, "{name}");
        }
        // None of them decays.
        let groups = param_groups(&vars);
        assert_eq!((groups.decay.len(), groups.no_decay.len()), (0, 4));
        assert_eq!(norm.parameters().len(), 4);
    }
    Ok(())
}

#[test]
fn inference_uses_what_training_left_and_reset_forgets_it() -> Result<()> {
    let x = wide_noise(&[3, 4, 2, 5])?;
    let vars = VarMap::new();
    let options = SwitchNormOptions {
        momentum: Some(1.),
        ..Default::default()
    };
    let norm = switch_norm(4, options, vb(&vars, DType::F64))?;
    let trained = norm.forward_t(&x, true)?;
    // With a momentum of 1 the running statistics are those of the batch.
    assert_close(&norm.forward_t(&x, false)?, &trained, 1e-12)?;
    let stats = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(
        (stats.mean.dims(), stats.num_batches_tracked),
        (&[1, 4, 1][..], 1)
    );
    set(&vars, "mean_weight", &Tensor::new(&[3f64, 0., 1.], &CPU)?)?;
    norm.reset()?;
    let fresh = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(
        (values(&fresh.mean)?, fresh.num_batches_tracked),
        (vec![0.; 4], 0)
    );
    assert_eq!(values(norm.mean_weight())?, [1.; 3]);
    Ok(())
}

#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        for path in PATHS {
            for train in [true, false] {
                let x = (wide_noise(&[3, 4, 5, 7])? * 3.)?.to_dtype(dtype)?;
                // Output and gradients, that of the input last.
                let run = |x: &Tensor, tracked: bool| -> Result<Vec<Tensor>> {
                    let vars = VarMap::new();
                    let norm = switch_norm(4, 1e-5, vb(&vars, DType::F32))?;
                    let x = match tracked {
                        true => Var::from_tensor(x)?.into_inner(),
                        false => x.clone(),
                    };
                    let y = with_path(path, || norm.forward_t(&x, train))?;
                    let cotangent = wide_noise(x.dims())?.to_dtype(dtype)?.to_dtype(y.dtype())?;
                    let grads = (&y * cotangent)?.sum_all()?.backward()?;
                    let mut all = vec![y];
                    all.extend(norm.parameters().into_iter().map(|(_, p)| p));
                    all.push(x);
                    let gradient = |t: &Tensor| grads.get(t).cloned();
                    let found = all[1..].iter().filter_map(gradient).collect::<Vec<_>>();
                    Ok([vec![all[0].detach()], found].concat())
                };
                let half = run(&x, true)?;
                let wide = run(&x.to_dtype(DType::F32)?, true)?;
                let ends = [0, half.len() - 1];
                for i in ends {
                    assert_eq!(half[i].dtype(), dtype);
                    assert_eq!(values(&half[i])?, values(&wide[i].to_dtype(dtype)?)?);
                }
                // An input that tracks no gradients is not widened first, which nobody sees.
                let untracked = run(&x, false)?;
                assert_eq!((half.len(), untracked.len()), (6, 5));
                for (half, untracked) in half.iter().zip(&untracked) {
                    assert_eq!(values(half)?, values(untracked)?);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_said_and_changes_nothing() -> Result<()> {
    let vars = VarMap::new();
    let norm = switch_norm(4, 1e-5, vb(&vars, DType::F64))?;
    let state =
        || -> Result<Vec<Vec<f64>>> { norm.buffers().iter().map(|(_, t)| values(t)).collect() };
    let before = state()?;
    assert_message(
        norm.forward_t(&wide_noise(&[2, 4])?, true),
        &["SwitchNorm", "rank at least 3", "[2, 4]"],
    );
    assert_message(
        norm.forward_t(&wide_noise(&[2, 3, 5])?, true),
        &["SwitchNorm", "expected 4 channels"],
    );
    let one = [
        "SwitchNorm",
        "more than 1 value per channel of a sample",
        "[2, 4, 1]",
        "set unbiased to false",
    ];
    assert_message(norm.forward_t(&wide_noise(&[2, 4, 1])?, true), &one);
    assert_eq!(state()?, before);
    for (options, expected) in [
        (SwitchNormOptions::from(0.), "expected eps > 0"),
        (
            SwitchNormOptions {
                momentum: Some(1.5),
                ..Default::default()
            },
            "expected a momentum between 0 and 1",
        ),
        (
            SwitchNormOptions {
                spatial_dims: 7,
                ..Default::default()
            },
            "expected spatial_dims of at most 6, got 7",
        ),
    ] {
        assert_message(
            switch_norm(4, options, vb(&VarMap::new(), DType::F64)),
            &["SwitchNorm", expected],
        );
    }
    let flat = SwitchNormOptions {
        spatial_dims: 0,
        ..Default::default()
    };
    let norm = switch_norm(4, flat, vb(&VarMap::new(), DType::F64))?;
    assert_message(
        norm.forward_t(&wide_noise(&[1, 4])?, true),
        &["SwitchNorm", "more than 1 value per channel"],
    );
    assert_eq!(norm.forward_t(&wide_noise(&[1, 4])?, false)?.dims(), [1, 4]);
    Ok(())
}

/// As long as nothing was learned, the batch has a mean of 0 and a variance of 1.
#[test]
fn inference_before_training_is_by_neutral_statistics() -> Result<()> {
    for path in PATHS {
        let vars = VarMap::new();
        let norm = switch_norm(4, 1e-5, vb(&vars, DType::F64))?;
        for name in ["mean_weight", "var_weight"] {
            set(&vars, name, &Tensor::new(&[-400f64, -400., 400.], &CPU)?)?;
        }
        let x = wide_noise(&[3, 4, 2, 5])?;
        let y = with_path(path, || norm.forward_t(&x, false))?;
        assert_close(&y, &(x / 1.00001f64.sqrt())?, 1e-12)?;
    }
    Ok(())
}

/// Without statistics of the batch, samples do not see each other.
#[test]
fn what_is_not_finite_stays_in_its_sample_in_inference_and_without_batches() -> Result<()> {
    let dims = [3, 4, 2, 5];
    for (using_bn, train) in [(true, false), (false, true), (false, false)] {
        for path in PATHS {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let options = SwitchNormOptions {
                    using_bn,
                    ..Default::default()
                };
                let norm = switch_norm(4, options, vb(&VarMap::new(), DType::F32))?;
                let run = |data: Vec<f64>| -> Result<[Vec<f64>; 2]> {
                    let x = Tensor::from_vec(data, &dims, &CPU)?.to_dtype(DType::F32)?;
                    let x = Var::from_tensor(&x)?;
                    let y = with_path(path, || norm.forward_t(&x, train))?;
                    let dy = wide_noise(&dims)?.to_dtype(DType::F32)?;
                    let grads = (&y * dy)?.sum_all()?.backward()?;
                    Ok([values(&y)?, values(grads.get(&x).expect("a gradient"))?])
                };
                let clean = values(&wide_noise(&dims)?)?;
                let mut poisoned = clean.clone();
                poisoned[47] = bad;
                for (got, clean) in run(poisoned)?.iter().zip(run(clean)?) {
                    for (i, (got, clean)) in got.iter().zip(clean).enumerate() {
                        match i / 40 {
                            1 => assert!(got.is_nan(), "{path:?} {bad} at {i}: {got}"),
                            _ => assert_eq!(*got, clean, "{path:?} {bad} at {i}"),
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Running means that have not come near the data yet cost no digits, nor do channels that are far
/// from each other.
#[test]
fn inference_far_from_the_running_means_keeps_its_digits() -> Result<()> {
    const BOUND: f64 = 2e-6;
    let far = |x: Tensor, levels: [f64; 2]| -> Result<Tensor> {
        let levels = Tensor::new(&levels, &CPU)?.reshape((1, 2, 1))?;
        // As `f32` holds it.
        x.broadcast_add(&levels)?
            .to_dtype(DType::F32)?
            .to_dtype(DType::F64)
    };
    let cases = [
        ([3000., 3000.], [1f64, 1., 1.], [20, 2, 3]),
        ([3000., 3001.], [0., 1., -1.], [20, 2, 3]),
        ([-3000., 3000.], [1., 1., 1.], [20, 2, 3]),
        // Instances alone, of which three values would leave little of a gradient.
        ([-3000., 3000.], [30., 0., 0.], [20, 2, 40]),
    ];
    for (levels, shares, dims) in cases {
        for train in [false, true] {
            // Output and gradients, and the statistics.
            let run = |dtype: DType, path: Path| -> Result<Vec<Tensor>> {
                let vars = VarMap::new();
                let norm = switch_norm(2, 1e-5, vb(&vars, dtype))?;
                set(
                    &vars,
                    "mean_weight",
                    &Tensor::new(&shares, &CPU)?.to_dtype(dtype)?,
                )?;
                set(
                    &vars,
                    "var_weight",
                    &Tensor::new(&shares, &CPU)?.to_dtype(dtype)?,
                )?;
                let batch = far(wide_noise(&dims)?, levels)?.to_dtype(dtype)?;
                norm.forward_t(&batch, true)?;
                let x = far((wide_noise(&dims)? * -0.7)?, levels)?.to_dtype(dtype)?;
                let x = Var::from_tensor(&x)?;
                let y = with_path(path, || norm.forward_t(&x, train))?;
                // Not a multiple of x, whose gradient would be that of a length that cannot change.
                let dy = wide_noise(&dims)?.sqr()?.to_dtype(dtype)?;
                let grads = (&y * dy)?.sum_all()?.backward()?;
                let leaves = [("x", x.into_inner())].into_iter().chain(norm.parameters());
                let grads = leaves.map(|(_, p)| grads.get(&p).expect("a gradient").clone());
                let mut all: Vec<Tensor> = [y].into_iter().chain(grads).collect();
                all.extend(norm.buffers().into_iter().take(2).map(|(_, s)| s));
                Ok(all)
            };
            let want = run(DType::F64, Path::Composed)?;
            for path in PATHS {
                for (i, (got, want)) in run(DType::F32, path)?.iter().zip(&want).enumerate() {
                    // Weights of shares near 0 and 1 get gradients that are differences of equal
                    // sums.
                    if shares[0] == 30. && [4, 5].contains(&i) {
                        continue;
                    }
                    let (got, want) = (values(got)?, values(want)?);
                    let scale = want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64;
                    for (got, want) in got.iter().zip(want) {
                        assert!(
                            (got - want).abs() <= BOUND * (scale.sqrt() + want.abs()),
                            "{levels:?} {shares:?} {path:?} training {train}, tensor {i}: {got:e} \
                            for {want:e}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn frozen_statistics_of_the_batch_stay_and_parameters_stay_live() -> Result<()> {
    let x = wide_noise(&[3, 4, 2, 5])?;
    for path in PATHS {
        let vars = VarMap::new();
        let norm = switch_norm(4, 1e-5, vb(&vars, DType::F64))?;
        norm.forward_t(&x, true)?;
        let frozen = norm.frozen()?;
        let run = || with_path(path, || frozen.forward(&x));
        let want = with_path(path, || norm.forward_t(&x, false))?;
        assert_eq!(values(&run()?)?, values(&want)?);
        // The layer trains on, and its frozen statistics stay.
        norm.forward_t(&(&x * 3.)?, true)?;
        assert_eq!(values(&run()?)?, values(&want)?);
        let still = with_path(path, || norm.forward_t(&x, false))?;
        assert_ne!(values(&still)?, values(&want)?);
        let mean = frozen.running_mean().expect("statistics of the batch");
        assert_eq!(mean.dims(), [4]);
        // Every parameter is the layer's own, and gets its gradient.
        set(&vars, "bias", &Tensor::full(2f64, (1, 4, 1, 1), &CPU)?)?;
        assert_close(&run()?, &(&want + 2.)?, 1e-12)?;
        let grads = (run()? * wide_noise(&[3, 4, 2, 5])?)?
            .sum_all()?
            .backward()?;
        for (name, parameter) in norm.parameters() {
            assert!(grads.get(&parameter).is_some(), "{name}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_a_frozen_layer_are_right() -> Result<()> {
    let names = ["weight", "bias", "mean_weight", "var_weight"];
    let dims: [&[usize]; 4] = [&[1, 3, 1, 1], &[1, 3, 1, 1], &[3], &[3]];
    let mut inputs = vec![wide_noise(&[2, 3, 2, 3])?];
    for dims in dims {
        inputs.push((wide_noise(dims)? + 0.1)?);
    }
    let running = [("running_mean", 0.3), ("running_var", 1.7)];
    for path in PATHS {
        let run = |v: &[Tensor]| {
            let mut tensors = HashMap::new();
            for (name, value) in names.iter().zip(&v[1..]) {
                tensors.insert(name.to_string(), value.clone());
            }
            for (name, value) in running {
                tensors.insert(name.to_string(), Tensor::full(value, (1, 3, 1), &CPU)?);
            }
            let norm = switch_norm(3, 1e-5, VarBuilder::from_tensors(tensors, DType::F64, &CPU))?;
            with_path(path, || norm.frozen()?.forward(&v[0]))
        };
        gradcheck::gradcheck(run, &inputs)?;
    }
    Ok(())
}

#[test]
fn a_layer_without_the_batch_is_frozen_as_it_is() -> Result<()> {
    let x = wide_noise(&[3, 4, 2, 5])?;
    let options = SwitchNormOptions {
        using_bn: false,
        ..Default::default()
    };
    let norm = switch_norm(4, options, vb(&VarMap::new(), DType::F64))?;
    let frozen = norm.frozen()?;
    assert!(frozen.running_mean().is_none() && frozen.running_var().is_none());
    let (got, want) = (frozen.forward(&x)?, norm.forward_t(&x, true)?);
    assert_eq!(values(&got)?, values(&want)?);
    // Its statistics are those of each input: nothing of it folds into another layer.
    assert_message(Norm::frozen(&norm), &["statistics that stay the same"]);
    Ok(())
}
