//! Ghost batches, batch renormalization, dynamic tanh and erf, cumulative layer norm: worked
//! examples, and what is true of each alone.

use std::collections::HashMap;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::{GradCheck, gradcheck};
use candle_norm::ops::{self, Modulation, RenormOptions};
use candle_norm::{
    Affine, AveragedModel, BatchNorm, BatchNormOptions, BatchRenorm, BatchRenormOptions,
    CumulativeLayerNormOptions, CumulativeState, DyTOptions, Norm, Path, Squash, batch_norm,
    batch_renorm, checkpoint, cumulative_layer_norm, dyt, group_norm, param_groups, pool_updates,
    trainable_vars, with_path, without_updates,
};

use testkit::compare::{assert_close, assert_same_bits};
use testkit::data::{noise, tensor, values, variable};
use testkit::errors::assert_message;
use testkit::subjects::{backward, gradient};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const PATHS: [Path; 3] = [Path::Fused, Path::Composed, Path::Reference];

/// Ten digits.
fn assert_digits(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!(
            (got - want).abs() <= 1e-9 * want.abs().max(1e-6),
            "{what}: {got}, want {want}"
        );
    }
}

fn numbers(v: &[f64], dims: &[usize]) -> Tensor {
    variable(v, dims, DType::F64).unwrap()
}

fn renewed(norm: &dyn Norm, [mean, var]: [f64; 2]) -> Result<()> {
    let stats = norm.running_stats().expect("running statistics");
    let full = |v: f64| Tensor::full(v, stats.mean().shape(), &CPU);
    let snapshot = candle_norm::Snapshot::new(full(mean)?, full(var)?, 0);
    stats.restore(&snapshot)
}

fn weights(norm: &dyn Norm, values: &[(&str, f64)]) -> Result<()> {
    for (name, param) in norm.parameters() {
        let value = values.iter().find(|(n, _)| *n == name);
        let value = value.unwrap_or_else(|| panic!("{name}")).1;
        Var::from_tensor(&param)?.set(&Tensor::full(value, param.shape(), &CPU)?)?;
    }
    Ok(())
}

#[test]
fn example_of_dyt() -> Result<()> {
    for path in PATHS {
        let x = numbers(&[-2., 0., 0.5], &[1, 3]);
        let (alpha, w) = (numbers(&[0.5], &[1]), numbers(&[1., 2., -1.], &[3]));
        let b = numbers(&[0., 0.1, 0.2], &[3]);
        let dy = tensor(&[1., -1., 2.], &[1, 3], DType::F64)?;
        let (y, grads) = with_path(path, || -> Result<_> {
            let y = ops::dyt(&x, &alpha, Some(&w), Some(&b), false)?;
            let grads = backward(&y, &dy)?;
            Ok((y, grads))
        })?;
        let of = |t: &Tensor| values(&gradient(&grads, t)).unwrap();
        assert_digits("y", &values(&y)?, &[-0.761594156, 0.1, -0.0449186624]);
        assert_digits("dx", &of(&x), &[0.2099871708, -1., -0.9400148488]);
        assert_digits("dalpha", &of(&alpha), &[-1.779963532]);
        assert_digits("dw", &of(&w), &[-0.761594156, 0., 0.4898373248]);
        assert_digits("db", &of(&b), &[1., -1., 2.]);
    }
    Ok(())
}

#[test]
fn example_of_derf() -> Result<()> {
    for path in PATHS {
        let x = numbers(&[-2., 0., 0.5], &[1, 3]);
        let (alpha, w) = (numbers(&[0.5], &[1]), numbers(&[1., 2., -1.], &[3]));
        let (b, s) = (numbers(&[0., 0.1, 0.2], &[3]), numbers(&[0.1], &[1]));
        let dy = tensor(&[1., -1., 2.], &[1, 3], DType::F64)?;
        let (y, grads) = with_path(path, || -> Result<_> {
            let y = ops::derf(&x, &alpha, Some(&s), Some(&w), Some(&b), false)?;
            let grads = backward(&y, &dy)?;
            Ok((y, grads))
        })?;
        let of = |t: &Tensor| values(&gradient(&grads, t)).unwrap();
        assert_digits(
            "y",
            &values(&y)?,
            &[-0.7969082124, 0.324925832, -0.1793820536],
        );
        assert_digits("dx", &of(&x), &[0.2509842871, -1.117151607, -0.9982837121]);
        assert_digits("dalpha", &of(&alpha), &[-2.002220861]);
        assert_digits("ds", &of(&s), &[-3.728902064]);
    }
    Ok(())
}

#[test]
fn example_of_ghost_batches() -> Result<()> {
    for path in PATHS {
        let vars = VarMap::new();
        let options = BatchNormOptions {
            virtual_batch_size: Some(3),
            ..Default::default()
        };
        let norm = batch_norm(1, options, vb(&vars, DType::F64))?;
        let x = numbers(&[1., 3., 6., -2., 0., 1.], &[6, 1]);
        let dy = tensor(&[1., 0., -1., 2., 1., 0.5], &[6, 1], DType::F64)?;
        let (y, grads) = with_path(path, || -> Result<_> {
            let y = norm.forward_train(&x)?;
            let grads = backward(&y, &dy)?;
            Ok((y, grads))
        })?;
        let want = [
            -1.135548603,
            -0.162221229,
            1.297769832,
            -1.336301914,
            0.2672603829,
            1.069041531,
        ];
        assert_digits("y", &values(&y)?, &want);
        let want = [
            0.03842187903,
            -0.06403454401,
            0.02561266498,
            4.295228541e-6,
            -8.590457082e-7,
            -3.436182833e-6,
        ];
        let dx = values(&gradient(&grads, &x))?;
        assert_digits("dx", &dx[..3], &want[..3]);
        // Differences of numbers near 1: ten digits of these.
        for (got, want) in dx[3..].iter().zip(&want[3..]) {
            assert!((got - want).abs() < 1e-14, "{path:?}: {got}, want {want}");
        }
        let after = norm.running_stats().expect("statistics").snapshot()?;
        assert_digits("mean", &values(&after.mean)?, &[0.2666666667]);
        assert_digits("var", &values(&after.var)?, &[1.613333333]);
        assert_eq!(after.num_batches_tracked, 2);
    }
    Ok(())
}

#[test]
fn examples_of_batch_renormalization() -> Result<()> {
    let free = (
        [3., 5.],
        [0.9999375117, 1.999812535, 5.999312629, -0.9998125351],
        [0.07697853395, -0.4999375117, 0.1920233759, 0.2309356019],
    );
    let bound = (
        [1.1, 0.5],
        [0.6371553755, 1.5, 4.951378498, -1.088533873],
        [0.06642881627, -0.4314223122, 0.1657070472, 0.1992864488],
    );
    for ([rmax, dmax], want_y, want_dx) in [free, bound] {
        for path in PATHS {
            let vars = VarMap::new();
            let options = BatchRenormOptions {
                rmax,
                dmax,
                warmup_steps: 0,
                ..Default::default()
            };
            let norm = batch_renorm(1, options, vb(&vars, DType::F64))?;
            weights(&norm, &[("weight", 2.), ("bias", 0.5)])?;
            renewed(&norm, [0.5, 4.])?;
            let x = numbers(&[1., 2., 6., -1.], &[4, 1]);
            let dy = tensor(&[1., 0., -1., 2.], &[4, 1], DType::F64)?;
            let (y, grads) = with_path(path, || -> Result<_> {
                let y = norm.forward_t(&x, true)?;
                let grads = backward(&y, &dy)?;
                Ok((y, grads))
            })?;
            assert_digits("y", &values(&y)?, &want_y);
            assert_digits("dx", &values(&gradient(&grads, &x))?, &want_dx);
            if rmax == 3. {
                let dw = values(&gradient(&grads, norm.weight().expect("a weight")))?;
                assert_digits("dw", &dw, &[-3.999500094]);
            }
            // A hundredth of the batch, with the unbiased variance.
            assert_digits("mean", &values(norm.running_mean())?, &[0.515]);
            assert_digits("var", &values(norm.running_var())?, &[3.96 + 0.26 / 3.]);
        }
    }
    Ok(())
}

#[test]
fn example_of_cumulative_layer_norm() -> Result<()> {
    for path in PATHS {
        let x = numbers(&[1., 3., 2., 2., 0., 5.], &[1, 2, 3]);
        let (w, b) = (numbers(&[1., 2.], &[2]), numbers(&[0., 0.5], &[2]));
        let dy = tensor(&[1., 0., -1., 0.5, 2., 1.], &[1, 2, 3], DType::F64)?;
        let (y, grads) = with_path(path, || -> Result<_> {
            let y = ops::cumulative_layer_norm(&x, Some(&w), Some(&b), 1e-8)?;
            let grads = backward(&y, &dy)?;
            Ok((y, grads))
        })?;
        let want = [
            -0.99999998,
            1.341640781,
            -0.1059997878,
            2.49999996,
            -2.183281562,
            4.103992785,
        ];
        assert_digits("y", &values(&y)?, &want);
        let want = [
            -1.245286116,
            0.4011154011,
            -0.7003132049,
            -0.4220853574,
            1.509221875,
            0.4573474019,
        ];
        assert_digits("dx", &values(&gradient(&grads, &x))?, &want);
    }
    Ok(())
}

/// Up to each position, the layer is group norm of one group.
#[test]
fn cumulative_layer_norm_is_group_norm_of_each_prefix() -> Result<()> {
    let vars = VarMap::new();
    let norm = cumulative_layer_norm(3, 1e-5, vb(&vars, DType::F64).pp("a"))?;
    let group = group_norm(1, 3, 1e-5, vb(&vars, DType::F64).pp("b"))?;
    let x = ((noise((2, 3, 19), DType::F64)? * 2.)? + 300.)?;
    for path in PATHS {
        let y = with_path(path, || norm.forward(&x))?;
        for t in 0..19 {
            let prefix = with_path(path, || group.forward(&x.narrow(2, 0, t + 1)?))?;
            let want = values(&prefix.narrow(2, t, 1)?)?;
            assert_close("a prefix", &y.narrow(2, t, 1)?, &want, 1e-10);
        }
        // No position depends on a later one, to the bit.
        let start = with_path(path, || norm.forward(&x.narrow(2, 0, 7)?))?;
        assert_same_bits("a prefix", &start, &y.narrow(2, 0, 7)?.contiguous()?);
    }
    Ok(())
}

/// Parts of a stream of any size give what the whole gives, in every dtype.
#[test]
fn a_stream_is_its_parts() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6), (DType::BF16, 9e-3)] {
        let vars = VarMap::new();
        let norm = cumulative_layer_norm(5, 1e-5, vb(&vars, dtype))?;
        let x = (noise((3, 5, 23), DType::F64)? + 3.)?.to_dtype(dtype)?;
        let whole = norm.forward(&x)?;
        for path in PATHS {
            let mut state = CumulativeState::new();
            let mut start = 0;
            for len in [1, 4, 0, 2, 16] {
                let part = x.narrow(2, start, len)?;
                let y = with_path(path, || norm.forward_stream(&part, &mut state))?;
                let want = values(&whole.narrow(2, start, len)?)?;
                assert_close("a part", &y, &want, tolerance);
                start += len;
            }
            let all = state.moments().expect("moments");
            assert!(all.iter().all(|m| m.count() == 115.));
            // Another number of samples changes nothing.
            let before = state.clone();
            let other = norm.forward_stream(&x.narrow(0, 0, 2)?, &mut state);
            assert_message(other, &["CumulativeLayerNorm", "3 samples", "[2, 5, 23]"]);
            assert_eq!(state, before);
        }
    }
    Ok(())
}

#[test]
fn an_empty_sequence_gives_an_empty_sequence() -> Result<()> {
    let norm = cumulative_layer_norm(5, 1e-5, vb(&VarMap::new(), DType::F32))?;
    let x = Var::zeros((2, 5, 0), DType::F32, &CPU)?;
    for path in PATHS {
        let (y, grads) = with_path(path, || -> Result<_> {
            let y = norm.forward(&x)?;
            let grads = y.sum_all()?.backward()?;
            Ok((y, grads))
        })?;
        assert_eq!(y.dims(), [2, 5, 0]);
        for (name, param) in norm.parameters() {
            assert_eq!(values(&gradient(&grads, &param))?, [0.; 5], "{name}");
        }
    }
    Ok(())
}

/// No gradient leads into an earlier part; that of a part is right.
#[test]
fn gradients_of_a_part_of_a_stream() -> Result<()> {
    let vars = VarMap::new();
    let norm = cumulative_layer_norm(3, 1e-2, vb(&vars, DType::F64))?;
    let x = noise((2, 3, 9), DType::F64)?;
    let mut state = CumulativeState::new();
    norm.forward_stream(&x.narrow(2, 0, 4)?, &mut state)?;
    let part = Var::from_tensor(&x.narrow(2, 4, 5)?.contiguous()?)?;
    for path in PATHS {
        with_path(path, || {
            let state = state.clone();
            let call = |v: &[Tensor]| norm.forward_stream(&v[0], &mut state.clone());
            gradcheck(call, &[part.as_tensor().clone()])
        })?;
    }
    Ok(())
}

/// Every option of every layer, and modulation.
#[test]
fn gradients_of_all_options() -> Result<()> {
    let check = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]| -> Result<()> {
        for path in PATHS {
            let report = with_path(path, || GradCheck::default().check(f, inputs))?;
            assert!(
                report.passed() && report.unreached.is_empty(),
                "{path:?}: {report}"
            );
        }
        Ok(())
    };
    let x = noise((5, 2, 3), DType::F64)?;
    let [w, b] = [noise(2, DType::F64)?, (noise(2, DType::F64)? + 1.)?];
    let all = [x.clone(), w.clone(), b.clone()];
    for size in [1, 2, 3, 5, 9] {
        check(
            &|t| Ok(ops::ghost_batch_norm(&t[0], size, Some(&t[1]), Some(&t[2]), 1e-2)?.0),
            &all,
        )?;
    }
    // Five rows by two: two and three.
    let rows = noise((5, 2), DType::F64)?;
    check(
        &|t| Ok(ops::ghost_batch_norm(&t[0], 2, Some(&t[1]), Some(&t[2]), 1e-2)?.0),
        &[rows, w.clone(), b.clone()],
    )?;
    // Around what the layer holds, without changes of its statistics.
    let options = BatchNormOptions {
        virtual_batch_size: Some(2),
        activation: Some(candle_nn::Activation::Silu),
        remove_mean: false,
        ..1e-2.into()
    };
    let norm = batch_norm(2, options, vb(&VarMap::new(), DType::F64))?;
    check(
        &|t| without_updates(|| norm.forward_train(&t[0])),
        &all[..1],
    )?;
    let scale = noise((5, 2), DType::F64)?;
    let outside = [x.clone(), scale, x.clone()];
    check(
        &|t| without_updates(|| norm.forward_modulated_t(&t[0], Some(&t[1]), Some(&t[2]), true)),
        &outside,
    )?;
    for (rmax, dmax) in [(3., 5.), (1.05, 0.1), (1., 0.)] {
        let running = [noise(2, DType::F64)?, (noise(2, DType::F64)?.sqr()? + 0.5)?];
        // Constants of the backward: central differences have to hold them too.
        let options = RenormOptions::default()
            .with_eps(1e-2)
            .with_bounds(rmax, dmax);
        let (y, statistics) =
            ops::batch_renorm(&x, [&running[0], &running[1]], Some(&w), Some(&b), options)?;
        let statistics = statistics.expect("statistics");
        let n = 15.;
        let (mean, var) = (statistics.mean, (statistics.var * ((n - 1.) / n))?);
        let inv = (&running[1] + 1e-2)?.sqrt()?.recip()?;
        let r = ((var + 1e-2)?.sqrt()? * &inv)?.clamp(1. / rmax, rmax)?;
        let d = ((mean - &running[0])? * inv)?.clamp(-dmax, dmax)?;
        let by_hand = |t: &[Tensor]| {
            let (scale, moved) = ((&t[1] * &r)?, (&t[2] + (&t[1] * &d)?)?);
            Ok(ops::batch_norm(&t[0], Some(&scale), Some(&moved), 1e-2)?.0)
        };
        check(&by_hand, &all)?;
        let leaves: Vec<Tensor> = (all.iter())
            .map(|t| Ok(Var::from_tensor(t)?.as_tensor().clone()))
            .collect::<Result<_>>()?;
        let dy = noise(x.dims(), DType::F64)?;
        let want = by_hand(&leaves)?;
        let want_grads = backward(&want, &dy)?;
        for path in PATHS {
            let got = with_path(path, || {
                let running = [&running[0], &running[1]];
                let (w, b) = (Some(&leaves[1]), Some(&leaves[2]));
                Ok::<_, candle_core::Error>(
                    ops::batch_renorm(&leaves[0], running, w, b, options)?.0,
                )
            })?;
            assert_close("y", &got, &values(&want)?, 1e-12);
            assert_close("y", &y, &values(&want)?, 1e-12);
            let grads = backward(&got, &dy)?;
            for leaf in &leaves {
                let want = values(&gradient(&want_grads, leaf))?;
                assert_close("a gradient", &gradient(&grads, leaf), &want, 1e-11);
            }
        }
    }
    for function in [Squash::Tanh, Squash::Erf] {
        for affine in [
            Affine::None,
            Affine::Weight,
            Affine::Bias,
            Affine::WeightAndBias,
        ] {
            for channels_first in [false, true] {
                let options = DyTOptions {
                    function,
                    affine,
                    channels_first,
                    ..0.7.into()
                };
                let channels = if channels_first { 2 } else { 3 };
                let layer = dyt(channels, options, vb(&VarMap::new(), DType::F64))?;
                check(&|t| layer.forward(&t[0]), &all[..1])?;
                assert_eq!(layer.shift().is_some(), function == Squash::Erf);
            }
        }
    }
    for affine in [
        Affine::None,
        Affine::Weight,
        Affine::Bias,
        Affine::WeightAndBias,
    ] {
        let options = CumulativeLayerNormOptions { affine, eps: 1e-2 };
        let norm = cumulative_layer_norm(2, options, vb(&VarMap::new(), DType::F64))?;
        check(&|t| norm.forward(&t[0]), &all[..1])?;
        let by_sample = noise((5, 2), DType::F64)?;
        check(
            &|t| norm.forward_modulated(&t[0], Some(&t[1]), None),
            &[x.clone(), by_sample],
        )?;
    }
    Ok(())
}

/// A part is normalized as a batch of its own, and updates as one.
#[test]
fn ghost_batches_are_batches_one_after_the_other() -> Result<()> {
    for (samples, size, lens) in [
        (6, 3, &[3, 3][..]),
        (7, 3, &[3, 3, 1]),
        (10, 4, &[4, 4, 2]),
        (4, 9, &[4]),
        (5, 1, &[1; 5]),
    ] {
        for remove_mean in [true, false] {
            let options = BatchNormOptions {
                remove_mean,
                ..Default::default()
            };
            let ghost = BatchNormOptions {
                virtual_batch_size: Some(size),
                ..options
            };
            let plain = batch_norm(3, options, vb(&VarMap::new(), DType::F64))?;
            let norm = batch_norm(3, ghost, vb(&VarMap::new(), DType::F64))?;
            let x = noise((samples, 3, 4), DType::F64)?;
            let y = norm.forward_t(&x, true)?;
            let (mut start, mut parts) = (0, vec![]);
            for len in lens {
                parts.push(plain.forward_t(&x.narrow(0, start, *len)?, true)?);
                start += len;
            }
            assert_close("y", &y, &values(&Tensor::cat(&parts, 0)?)?, 1e-13);
            let of = |norm: &BatchNorm| norm.running_stats().expect("statistics").snapshot();
            let (got, want) = (of(&norm)?, of(&plain)?);
            assert_close("mean", &got.mean, &values(&want.mean)?, 1e-13);
            assert_close("var", &got.var, &values(&want.var)?, 1e-13);
            assert_eq!(got.num_batches_tracked, lens.len() as i64);
            // Inference is that of the whole batch.
            let inferred = norm.forward_t(&x, false)?;
            assert_close(
                "y",
                &inferred,
                &values(&plain.forward_t(&x, false)?)?,
                1e-13,
            );
        }
    }
    // Five rows by two: the last one is no batch, and joins the two before it.
    let options = BatchNormOptions {
        virtual_batch_size: Some(2),
        ..Default::default()
    };
    let norm = batch_norm(3, options, vb(&VarMap::new(), DType::F64))?;
    norm.forward_train(&noise((5, 3), DType::F64)?)?;
    let after = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(after.num_batches_tracked, 2);
    // A scope pools all parts.
    let pooled = batch_norm(3, options, vb(&VarMap::new(), DType::F64))?;
    let plain = batch_norm(3, 1e-5, vb(&VarMap::new(), DType::F64))?;
    let x = noise((6, 3, 2), DType::F64)?;
    pool_updates(|| pooled.forward_train(&x))?;
    plain.forward_train(&x)?;
    assert_close(
        "var",
        pooled.running_var(),
        &values(plain.running_var())?,
        1e-13,
    );
    Ok(())
}

/// An error, and a part that is refused, leave the statistics alone.
#[test]
fn mistakes_are_named_and_change_nothing() -> Result<()> {
    let options = |size| BatchNormOptions {
        virtual_batch_size: Some(size),
        refuse_non_finite: true,
        ..Default::default()
    };
    let build = |size| batch_norm(2, options(size), vb(&VarMap::new(), DType::F64));
    assert_message(build(0), &["BatchNorm", "virtual_batch_size"]);
    let norm = build(1)?;
    let rows = noise((4, 2), DType::F64)?;
    let what = [
        "BatchNorm",
        "more than 1 value per channel",
        "virtual_batch_size 1",
        "[4, 2]",
    ];
    assert_message(norm.forward_train(&rows), &what);
    let one = rows.narrow(0, 0, 1)?;
    assert_message(
        norm.forward_train(&one),
        &["more than 1 value per channel", "[1, 2]"],
    );
    let mask = Tensor::ones(4, DType::U8, &CPU)?;
    assert_message(
        norm.forward_masked_t(&rows, &mask, true),
        &["BatchNorm", "virtual_batch_size", "mask"],
    );
    let norm = build(2)?;
    let late = tensor(&[1., 2., 3., 4., f64::NAN, 0., 1., 1.], &[4, 2], DType::F64)?;
    assert_message(
        norm.forward_train(&late),
        &["BatchNorm", "finite", "unchanged"],
    );
    let after = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(after.num_batches_tracked, 0);
    assert_eq!(values(&after.mean)?, [0., 0.]);

    let renorm = |o: BatchRenormOptions| batch_renorm(2, o, vb(&VarMap::new(), DType::F64));
    for (rmax, dmax, name) in [
        (0.5, 1., "rmax"),
        (f64::NAN, 1., "rmax"),
        (f64::INFINITY, 1., "rmax"),
        (2., -1., "dmax"),
        (2., f64::NAN, "dmax"),
    ] {
        let options = BatchRenormOptions {
            rmax,
            dmax,
            ..Default::default()
        };
        assert_message(renorm(options), &["BatchRenorm", name]);
    }
    assert_message(renorm(0f64.into()), &["BatchRenorm", "eps"]);
    let norm = renorm(1e-3.into())?;
    assert_message(
        norm.forward_t(&one, true),
        &["BatchRenorm", "more than 1 value"],
    );
    assert_message(
        norm.forward_t(&noise((4, 3), DType::F64)?, true),
        &["BatchRenorm", "2 channels", "3"],
    );
    assert_eq!(norm.running_stats().snapshot()?.num_batches_tracked, 0);

    let x = noise((2, 3, 4), DType::F64)?;
    let cumulative = cumulative_layer_norm(3, 1e-8, vb(&VarMap::new(), DType::F64))?;
    let maps = noise((2, 3, 4, 5), DType::F64)?;
    assert_message(
        cumulative.forward(&maps),
        &["CumulativeLayerNorm", "[N, C, T]"],
    );
    assert_message(
        cumulative.forward(&maps.get(0)?),
        &["CumulativeLayerNorm", "3", "4"],
    );
    let bad = cumulative_layer_norm(3, -1., vb(&VarMap::new(), DType::F64));
    assert_message(bad, &["CumulativeLayerNorm", "eps"]);
    let layer = dyt(3, 0.5, vb(&VarMap::new(), DType::F64))?;
    assert_message(layer.forward(&x), &["DyT", "3 features", "[2, 3, 4]"]);
    let bad = dyt(3, f64::NAN, vb(&VarMap::new(), DType::F64));
    assert_message(bad, &["DyT", "alpha"]);
    let two = noise(2, DType::F64)?;
    assert_message(
        ops::dyt(&x, &two, None, None, false),
        &["DyT", "alpha", "[1]", "[2]"],
    );
    Ok(())
}

/// The correction starts after the warm-up, which is batch norm to the bit.
#[test]
fn batch_renorm_is_batch_norm_until_it_is_warm() -> Result<()> {
    let options = BatchRenormOptions {
        eps: 1e-5,
        momentum: Some(0.1),
        warmup_steps: 3,
        ..Default::default()
    };
    let norm = batch_renorm(2, options, vb(&VarMap::new(), DType::F32))?;
    let plain = batch_norm(2, 1e-5, vb(&VarMap::new(), DType::F32))?;
    for step in 0..5 {
        let x = ((noise((4, 2, 3), DType::F32)? * 2.)? + step as f64)?;
        let (y, want) = (norm.forward_t(&x, true)?, plain.forward_t(&x, true)?);
        match step < 3 {
            true => assert_same_bits("y", &y, &want),
            false => assert_ne!(values(&y)?, values(&want)?),
        }
        assert_same_bits("mean", norm.running_mean(), plain.running_mean());
        assert_same_bits("var", norm.running_var(), plain.running_var());
    }
    // Where nothing is clipped, training is inference.
    let x = noise((64, 2), DType::F32)?;
    let inferred = norm.forward_t(&x, false)?;
    let loose = BatchRenormOptions {
        rmax: 1e3,
        dmax: 1e3,
        warmup_steps: 0,
        ..options
    };
    let same = batch_renorm(2, loose, vb(&VarMap::new(), DType::F32))?;
    same.running_stats()
        .restore(&norm.running_stats().snapshot()?)?;
    assert_close("y", &same.forward_t(&x, true)?, &values(&inferred)?, 1e-5);
    let frozen = norm.frozen()?;
    assert_same_bits("y", &frozen.forward(&x)?, &inferred);
    // Modulation is behind the correction.
    let ones = Tensor::ones((64, 2), DType::F32, &CPU)?;
    let modulation = Modulation::new(Some(&ones), None);
    let twice = norm.forward_modulated_by_t(&x, &modulation, false)?;
    assert_close("y", &twice, &values(&(inferred * 2.)?)?, 1e-6);
    Ok(())
}

/// Names that are written and read, kinds of variables, and averages.
#[test]
fn parameters_have_their_names_and_groups() -> Result<()> {
    let vars = VarMap::new();
    let root = vb(&vars, DType::F32);
    let derf = dyt(4, DyTOptions::derf(), root.pp("derf"))?;
    let renorm = batch_renorm(4, 1e-3, root.pp("renorm"))?;
    let cumulative = cumulative_layer_norm(4, 1e-8, root.pp("cln"))?;
    let names = |norm: &dyn Norm| norm.parameters().iter().map(|p| p.0).collect::<Vec<_>>();
    assert_eq!(names(&derf), ["alpha", "s", "weight", "bias"]);
    assert_eq!(names(&renorm), ["weight", "bias"]);
    assert_eq!(names(&cumulative), ["weight", "bias"]);
    let buffers: Vec<_> = renorm.buffers().into_iter().map(|b| b.0).collect();
    assert_eq!(
        buffers,
        ["running_mean", "running_var", "num_batches_tracked"]
    );
    assert!(derf.buffers().is_empty() && derf.frozen().is_err());
    assert_eq!(trainable_vars(&vars).len(), 8);
    let groups = param_groups(&vars);
    let sizes = [
        groups.decay.len(),
        groups.no_decay.len(),
        groups.statistics.len(),
    ];
    assert_eq!(sizes, [0, 8, 3]);
    // Every parameter is averaged.
    let mut averaged = AveragedModel::new(&vars, candle_norm::Average::Equal)?;
    for var in trainable_vars(&vars) {
        var.set(&(var.as_tensor() + 1.)?.detach())?;
    }
    averaged.update()?;
    for norm in [&derf as &dyn Norm, &renorm, &cumulative] {
        norm.reset()?;
        let start = |name: &str| match name {
            "alpha" => 0.5,
            "weight" => 1.,
            _ => 0.,
        };
        for (name, param) in norm.parameters() {
            assert!(values(&param)?.iter().all(|v| *v == start(name)), "{name}");
        }
    }
    Ok(())
}

/// Numbers of files: x-transformers' without axes, asteroid's with further ones.
#[test]
fn files_have_other_names_and_axes() -> Result<()> {
    let line = |start: f32, dims: &[usize]| {
        let count: usize = dims.iter().product();
        Tensor::arange(start, start + count as f32, &CPU)?.reshape(dims)
    };
    let tensors = HashMap::from([
        ("pre_tanh_scale".to_string(), line(2., &[])?),
        ("gamma".to_string(), line(0., &[4])?),
        ("beta".to_string(), line(1., &[1, 4, 1])?),
    ]);
    let vb_of = |tensors| VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let layer = dyt(4, 0.5, vb_of(tensors.clone()))?;
    assert_eq!(layer.alpha().to_vec1::<f32>()?, [2.]);
    assert_eq!(values(layer.weight().expect("a weight"))?, [0., 1., 2., 3.]);
    assert_eq!(values(layer.bias().expect("a bias"))?, [1., 2., 3., 4.]);
    let cumulative = cumulative_layer_norm(4, 1e-8, vb_of(tensors.clone()))?;
    assert_eq!(
        values(cumulative.bias().expect("a bias"))?,
        [1., 2., 3., 4.]
    );
    // Into variables too.
    let vars = VarMap::new();
    let layer = dyt(4, 0.5, vb(&vars, DType::F32).pp("norm"))?;
    let folder = std::env::temp_dir().join(format!("second_family_{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("dyt.safetensors");
    let named = tensors.into_iter().map(|(n, t)| (format!("norm.{n}"), t));
    candle_core::safetensors::save(&named.collect::<HashMap<_, _>>(), &path)?;
    let report = checkpoint::load_into(&vars, &path)?;
    assert!(
        report.missing.is_empty() && report.unexpected.is_empty(),
        "{report:?}"
    );
    std::fs::remove_dir_all(&folder)?;
    assert_eq!(layer.alpha().to_vec1::<f32>()?, [2.]);
    assert_eq!(values(layer.bias().expect("a bias"))?, [1., 2., 3., 4.]);
    let bad = HashMap::from([("alpha".to_string(), line(0., &[4])?)]);
    assert!(dyt(4, 0.5, vb_of(bad)).is_err());
    Ok(())
}

/// Values far from zero and near to it keep their digits, in every dtype and layout.
#[test]
fn dynamic_functions_keep_their_digits() -> Result<()> {
    let xs: Vec<f64> = (-60..=60)
        .flat_map(|i| [1e-12, 1e-6, 1e-3, 0.02, 0.1, 0.9].map(|s| s * i as f64))
        .collect();
    for (dtype, tolerance) in [(DType::F64, 4e-15), (DType::F32, 6e-7)] {
        let x = tensor(&xs, &[xs.len(), 1], dtype)?;
        let x = Var::from_tensor(&x)?;
        let alpha = tensor(&[1.], &[1], dtype)?;
        let ones = x.ones_like()?;
        let y = ops::dyt(&x, &alpha, None, None, false)?;
        let slopes = backward(&y, &ones)?;
        let (y, slopes) = (values(&y)?, values(&gradient(&slopes, &x))?);
        for ((x, y), slope) in values(&x)?.iter().zip(y).zip(slopes) {
            let close = |a: f64, b: f64| (a - b).abs() <= tolerance * b.abs();
            assert!(close(y, x.tanh()), "tanh({x}) is {y} in {dtype:?}");
            let want = x.cosh().powi(-2);
            let tiny = want < 1e-30;
            assert!(
                tiny || close(slope, want),
                "slope at {x}: {slope} in {dtype:?}"
            );
        }
        let y = ops::derf(&x, &alpha, None, None, None, false)?;
        let slopes = backward(&y, &ones)?;
        let (y, slopes) = (values(&y)?, values(&gradient(&slopes, &x))?);
        for ((x, y), slope) in values(&x)?.iter().zip(y).zip(slopes) {
            let close = |a: f64, b: f64, t: f64| (a - b).abs() <= t * b.abs();
            let want = candle_core::cpu::erf::erf_f64(*x);
            assert!(close(y, want, tolerance), "erf({x}) is {y} in {dtype:?}");
            let want = std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp();
            // The square is rounded before the exponential is taken of it.
            let slack = tolerance * (1. + x * x);
            let tiny = want < 1e-30;
            assert!(
                tiny || close(slope, want, slack),
                "slope at {x}: {slope} in {dtype:?}"
            );
        }
    }
    Ok(())
}

/// Threads that train one layer lose no update.
#[test]
fn threads_lose_no_update() -> Result<()> {
    let vars = VarMap::new();
    let options = BatchNormOptions {
        virtual_batch_size: Some(2),
        ..Default::default()
    };
    let ghost = batch_norm(2, options, vb(&vars, DType::F32).pp("ghost"))?;
    let options = BatchRenormOptions {
        warmup_steps: 5,
        ..Default::default()
    };
    let renorm: BatchRenorm = batch_renorm(2, options, vb(&vars, DType::F32).pp("renorm"))?;
    let x = noise((6, 2, 3), DType::F32)?;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..8 {
                    ghost.forward_t(&x, true).unwrap();
                    renorm.forward_t(&x, true).unwrap();
                }
            });
        }
    });
    let count = |norm: &dyn Norm| {
        let stats = norm.running_stats().expect("statistics");
        Ok::<_, candle_core::Error>(stats.snapshot()?.num_batches_tracked)
    };
    assert_eq!((count(&ghost)?, count(&renorm)?), (96, 32));
    Ok(())
}

/// A mean of ten thousand deviations: the part of the mean that the dtype lacks matters.
#[test]
fn large_means_cost_no_digits() -> Result<()> {
    let x = (noise((2, 4, 12), DType::F64)? + 1e4)?.to_dtype(DType::F32)?;
    let wide = x.to_dtype(DType::F64)?;
    let parts = |t: &Tensor, dtype| -> Result<Vec<f64>> {
        let norm = cumulative_layer_norm(4, 1e-8, vb(&VarMap::new(), dtype))?;
        let mut state = CumulativeState::new();
        norm.forward_stream(&t.narrow(2, 0, 5)?, &mut state)?;
        values(&norm.forward_stream(&t.narrow(2, 5, 7)?, &mut state)?)
    };
    let want = parts(&wide, DType::F64)?;
    let options = BatchRenormOptions {
        warmup_steps: 0,
        ..Default::default()
    };
    let renorm = |t: &Tensor, dtype| -> Result<Vec<f64>> {
        let norm = batch_renorm(4, options, vb(&VarMap::new(), dtype))?;
        // Far from the batch by less than dmax: the distance has few digits of the mean.
        renewed(&norm, [9999., 1.])?;
        values(&norm.forward_t(t, true)?)
    };
    let renormed = renorm(&wide, DType::F64)?;
    for path in PATHS {
        with_path(path, || -> Result<()> {
            let got = tensor(&parts(&x, DType::F32)?, &[want.len()], DType::F64)?;
            assert_close(&format!("a part, {path:?}"), &got, &want, 2e-6);
            let got = tensor(&renorm(&x, DType::F32)?, &[renormed.len()], DType::F64)?;
            assert_close(&format!("renorm, {path:?}"), &got, &renormed, 2e-6);
            Ok(())
        })?;
    }
    Ok(())
}

/// A modulation in half precision is rounded once, with the norm.
#[test]
fn modulated_cumulative_layer_norm_is_rounded_once() -> Result<()> {
    for (dtype, tolerance) in [(DType::F16, 6e-4), (DType::BF16, 4.5e-3)] {
        let norm = |dtype| cumulative_layer_norm(4, 1e-5, vb(&VarMap::new(), dtype));
        let x = noise((2, 4, 12), dtype)?;
        // Of opposite signs, so that most of the sum cancels.
        let scale = Tensor::full(0f32, (2, 4), &CPU)?.to_dtype(dtype)?;
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let plain = norm(DType::F64)?.forward(&wide(&x)?)?;
        let shift = (plain.detach() * -1.)?.to_dtype(dtype)?;
        let want = norm(DType::F64)?.forward_modulated(
            &wide(&x)?,
            Some(&wide(&scale)?),
            Some(&wide(&shift)?),
        )?;
        for path in PATHS {
            let y = with_path(path, || {
                norm(dtype)?.forward_modulated(&x, Some(&scale), Some(&shift))
            })?;
            assert_eq!(y.dtype(), dtype);
            assert_close(&format!("{path:?}"), &y, &values(&want)?, tolerance);
        }
    }
    Ok(())
}

#[test]
fn dynamic_functions_without_parameters_know_their_channels() -> Result<()> {
    let options = DyTOptions {
        affine: Affine::None,
        ..Default::default()
    };
    let layer = dyt(4, options, vb(&VarMap::new(), DType::F32))?;
    assert_message(
        layer.forward(&noise((2, 7), DType::F32)?),
        &["DyT", "4", "7"],
    );
    assert!(layer.forward(&noise((2, 4), DType::F32)?).is_ok());
    Ok(())
}
