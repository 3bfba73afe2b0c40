//! Reversible instance normalization: the reference's numbers, both ways, gradients, names, errors,
//! threads.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::scaling::{RevIn, RevInOptions, RevInStats, rev_in};
use candle_norm::{Affine, Path, with_path};

use super::Fixture;
use testkit::compare::{assert_close, assert_same_bits, tolerance};
use testkit::data::{Draw, bits, tensor, values};
use testkit::errors::message;

const PATHS: [Path; 2] = [Path::Fused, Path::Composed];

/// A layer with these parameters, and the variables that it has them from.
fn layer(weight: &Tensor, bias: &Tensor, options: RevInOptions) -> Result<(RevIn, VarMap)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, weight.dtype(), &Device::Cpu);
    let layer = rev_in(weight.elem_count(), options, vb)?;
    for (name, value) in [("affine_weight", weight), ("affine_bias", bias)] {
        if let Some(var) = vars.data().lock().unwrap().get(name) {
            var.set(value)?;
        }
    }
    Ok((layer, vars))
}

/// A layer of tensors as they come, which may be a part of a graph.
fn layer_of(weight: &Tensor, bias: &Tensor, options: RevInOptions) -> Result<RevIn> {
    let named = [("affine_weight", weight), ("affine_bias", bias)];
    let named = named.map(|(name, t)| (name.to_string(), t.clone()));
    let vb = VarBuilder::from_tensors(named.into_iter().collect(), weight.dtype(), &Device::Cpu);
    rev_in(weight.elem_count(), options, vb)
}

fn plain(series: usize, dtype: DType) -> Result<RevIn> {
    let options = RevInOptions {
        affine: Affine::None,
        ..Default::default()
    };
    rev_in(series, options, VarBuilder::zeros(dtype, &Device::Cpu))
}

/// Windows at levels and spreads that are far apart.
fn windows(dims: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let n = dims.iter().product();
    let noise = tensor(&Draw::new(seed).normal(n), dims, DType::F64)?;
    let level = tensor(
        &Draw::new(seed + 1).normal(dims[0]),
        &[dims[0], 1, 1],
        DType::F64,
    )?;
    noise.broadcast_add(&(level * 30.)?)?.to_dtype(dtype)
}

#[test]
fn values_and_gradients_of_the_reference() -> Result<()> {
    let fixture = Fixture::load("rev_in")?;
    let [x, forecast, target, weight, bias] =
        ["x", "forecast", "target", "weight", "bias"].map(|name| fixture.tensor(name));
    for path in PATHS {
        for subtract_last in [false, true] {
            let key =
                |name: &str| format!("{}_{name}", ["mean", "last"][usize::from(subtract_last)]);
            let options = RevInOptions {
                eps: fixture.values("eps")[0],
                subtract_last,
                ..Default::default()
            };
            let (layer, _vars) = layer(&weight, &bias, options)?;
            with_path(path, || -> Result<()> {
                let (y, stats) = layer.normalize(&x)?;
                assert_close("y", &y, &fixture.values(&key("y")), 1e-10);
                let ahead = forecast.broadcast_add(&y.narrow(1, 11, 1)?.tanh()?)?;
                let restored = layer.denormalize(&ahead, &stats)?;
                assert_close(
                    "restored",
                    &restored,
                    &fixture.values(&key("restored")),
                    1e-10,
                );
                // The authors' `w + eps²` shows in the tenth place of the distance from the center.
                let by_authors = fixture.values(&key("restored_by_authors"));
                assert_close("restored by the authors", &restored, &by_authors, 1e-9);
                assert_ne!(values(&restored)?, by_authors);
                let loss = ((restored - &target)?.sqr()? / 1e4)?.sum_all()?;
                let gradients = loss.backward()?;
                for (param, name) in [(layer.weight(), "dweight"), (layer.bias(), "dbias")] {
                    let gradient = gradients.get(param.unwrap()).unwrap();
                    assert_close(name, gradient, &fixture.values(&key(name)), 1e-10);
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn gradients_of_both_ways() -> Result<()> {
    let x = windows(&[2, 5, 2], DType::F64, 1)?;
    let weight = tensor(&[0.7, -1.6], &[2], DType::F64)?;
    let bias = tensor(&[0.2, -0.5], &[2], DType::F64)?;
    let model = tensor(&Draw::new(7).normal(15), &[3, 5], DType::F64)?;
    for path in PATHS {
        for subtract_last in [false, true] {
            let options = RevInOptions {
                subtract_last,
                eps: 1e-3,
                ..Default::default()
            };
            let inputs = [x.clone(), weight.clone(), bias.clone(), model.clone()];
            with_path(path, || -> Result<()> {
                // The statistics that are returned are part of the graph.
                gradcheck(
                    |v| {
                        let (y, stats) = layer_of(&v[1], &v[2], options)?.normalize(&v[0])?;
                        let parts = [y, stats.center().unsqueeze(1)?, stats.std().unsqueeze(1)?];
                        Tensor::cat(&parts, 1)
                    },
                    &inputs[..3],
                )?;
                // Through a model over time, and back.
                gradcheck(
                    |v| {
                        let layer = layer_of(&v[1], &v[2], options)?;
                        let (y, stats) = layer.normalize(&v[0])?;
                        layer.denormalize(&v[3].broadcast_matmul(&y)?.tanh()?, &stats)
                    },
                    &inputs,
                )
            })?;
        }
    }
    Ok(())
}

#[test]
fn back_is_the_inverse_in_every_dtype() -> Result<()> {
    for (dtype, params) in [
        (DType::F64, DType::F64),
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::BF16, DType::F32),
    ] {
        for subtract_last in [false, true] {
            let options = RevInOptions {
                subtract_last,
                ..Default::default()
            };
            let weight = tensor(&[0.7, -1.6, 3.], &[3], params)?;
            let bias = tensor(&[0.2, -0.5, 0.], &[3], params)?;
            let (layer, _vars) = layer(&weight, &bias, options)?;
            let x = windows(&[5, 16, 3], dtype, 3)?;
            let (y, stats) = layer.normalize(&x)?;
            let back = layer.denormalize(&y, &stats)?;
            assert_eq!((y.dtype(), back.dtype()), (dtype, dtype));
            assert_eq!((y.dims(), back.dims()), (x.dims(), x.dims()));
            assert!(y.is_contiguous() && back.is_contiguous());
            let wide = if dtype == DType::F64 {
                DType::F64
            } else {
                DType::F32
            };
            assert_eq!(
                (stats.std().dtype(), stats.std().dims()),
                (wide, &[5, 3][..])
            );
            // One rounding of y, and one of what comes back.
            assert_close("back", &back, &values(&x)?, 4. * tolerance(dtype));
        }
    }
    Ok(())
}

#[test]
fn windows_have_mean_zero_and_variance_one_and_units_do_not_matter() -> Result<()> {
    let layer = plain(2, DType::F64)?;
    let x = windows(&[3, 40, 2], DType::F64, 5)?;
    let (y, _) = layer.normalize(&x)?;
    assert_close("mean", &y.mean(1)?, &[0.; 6], 1e-12);
    assert_close("var", &y.sqr()?.mean(1)?, &[1.; 6], 1e-4);
    let other_units = ((&x * 1e6)? + 1e9)?;
    let (same, stats) = layer.normalize(&other_units)?;
    assert_close("other units", &same, &values(&y)?, 2e-5);
    let back = layer.denormalize(&same, &stats)?;
    assert_close("back", &back, &values(&other_units)?, 1e-13);
    Ok(())
}

#[test]
fn both_paths_agree_on_statistics_that_nothing_tracks_and_that_are_tracked() -> Result<()> {
    let x = windows(&[4, 33, 3], DType::F32, 9)?;
    let tracked = Var::from_tensor(&x)?;
    let layer = plain(3, DType::F32)?;
    let mut all: Vec<(Tensor, RevInStats)> = vec![];
    for path in PATHS {
        for x in [&x, tracked.as_tensor()] {
            all.push(with_path(path, || layer.normalize(x))?);
        }
    }
    for (y, stats) in &all[1..] {
        assert_close("y", y, &values(&all[0].0)?, 2e-6);
        assert_close("center", stats.center(), &values(all[0].1.center())?, 2e-6);
        assert_close("std", stats.std(), &values(all[0].1.std())?, 2e-6);
    }
    Ok(())
}

#[test]
fn a_checkpoint_has_the_names_of_the_reference() -> Result<()> {
    let weight = tensor(&[2., 3.], &[2], DType::F32)?;
    let bias = tensor(&[4., 5.], &[2], DType::F32)?;
    let (first, vars) = layer(&weight, &bias, RevInOptions::default())?;
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    assert_eq!(names, ["affine_bias", "affine_weight"]);
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("model.safetensors");
    vars.save(&file)?;
    let (second, mut vars) = layer(&bias, &weight, RevInOptions::default())?;
    vars.load(&file)?;
    let x = windows(&[2, 6, 2], DType::F32, 2)?;
    assert_same_bits("y", &second.normalize(&x)?.0, &first.normalize(&x)?.0);
    second.reset()?;
    assert_eq!(values(second.weight().unwrap())?, [1., 1.]);
    assert_eq!(values(second.bias().unwrap())?, [0., 0.]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_said() -> Result<()> {
    let (weight, bias) = (
        tensor(&[1., 0.], &[2], DType::F64)?,
        tensor(&[0.; 2], &[2], DType::F64)?,
    );
    let (layer, _vars) = layer(&weight, &bias, 1e-5.into())?;
    let x = windows(&[3, 6, 2], DType::F64, 2)?;
    let (_, stats) = layer.normalize(&x)?;
    let (_, other_series) = plain(1, DType::F64)?.normalize(&x.narrow(2, 0, 1)?)?;
    let (_, other_dtype) = plain(2, DType::F32)?.normalize(&x.to_dtype(DType::F32)?)?;
    for (result, want) in [
        (
            layer.normalize(&x.narrow(2, 0, 1)?).map(|y| y.0),
            "expected windows [N, T, 2], the series on the last axis, got shape [3, 6, 1]",
        ),
        (layer.normalize(&x.get(0)?).map(|y| y.0), "got shape [6, 2]"),
        (
            layer.normalize(&x.narrow(1, 0, 1)?).map(|y| y.0),
            "at least 2 steps",
        ),
        (
            layer.normalize(&x.to_dtype(DType::U32)?).map(|y| y.0),
            "dtype F16, BF16, F32 or F64",
        ),
        (
            layer.normalize(&x.to_dtype(DType::F32)?).map(|y| y.0),
            "affine_weight with the input's dtype F32",
        ),
        (
            layer.denormalize(&x.narrow(0, 0, 2)?, &stats),
            "forecasts of the 3 windows that the statistics are of, got 2",
        ),
        (layer.denormalize(&x, &stats), "got 0 for series 1"),
        (
            layer.denormalize(&x, &other_series),
            "statistics with shape [3, 2], got [3, 1]",
        ),
        (
            layer.denormalize(&x, &other_dtype),
            "statistics with dtype F64, got F32",
        ),
    ] {
        let message = message(result);
        assert!(
            message.starts_with("RevIn: expected ") && message.contains(want),
            "{message}"
        );
    }
    for eps in [0., -1., f64::NAN, f64::INFINITY] {
        let built = rev_in(2, eps, VarBuilder::zeros(DType::F32, &Device::Cpu));
        assert!(message(built).contains("eps > 0"));
    }
    Ok(())
}

#[test]
fn no_windows_and_constant_windows() -> Result<()> {
    for path in PATHS {
        for subtract_last in [false, true] {
            let options = RevInOptions {
                subtract_last,
                ..Default::default()
            };
            let layer = rev_in(
                2,
                options,
                VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu),
            )?;
            let none = Tensor::zeros((0, 6, 2), DType::F32, &Device::Cpu)?;
            let (y, stats) = with_path(path, || layer.normalize(&none))?;
            assert_eq!(y.dims(), [0, 6, 2]);
            assert_eq!(layer.denormalize(&y, &stats)?.dims(), [0, 6, 2]);
            let constant = Tensor::full(1234.5f32, (1, 6, 2), &Device::Cpu)?;
            let (y, stats) = with_path(path, || layer.normalize(&constant))?;
            assert_eq!(values(&y)?, [0.; 12]);
            assert_eq!(values(&layer.denormalize(&y, &stats)?)?, [1234.5; 12]);
        }
    }
    Ok(())
}

/// The layer remembers no window: threads that share one restore their own.
#[test]
fn threads_share_a_layer() -> Result<()> {
    let layer = plain(2, DType::F32)?;
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let layer = &layer;
            scope.spawn(move || {
                let x = windows(&[4, 12, 2], DType::F32, 100 * seed).unwrap();
                let alone = plain(2, DType::F32).unwrap().normalize(&x).unwrap().0;
                for _ in 0..50 {
                    let (y, stats) = layer.normalize(&x).unwrap();
                    assert_eq!(bits(&y).unwrap(), bits(&alone).unwrap());
                    let back = layer.denormalize(&y, &stats).unwrap();
                    assert_close("back", &back, &values(&x).unwrap(), 1e-5);
                }
            });
        }
    });
    Ok(())
}

/// A scale or a shift alone is the pair with the other one neutral, there and back.
#[test]
fn a_parameter_alone_is_the_pair_with_a_neutral_other() -> Result<()> {
    let x = windows(&[3, 6, 2], DType::F64, 5)?;
    let weight = tensor(&[1.5, -0.5], &[2], DType::F64)?;
    let bias = tensor(&[0.25, -2.], &[2], DType::F64)?;
    for (affine, weight, bias, name) in [
        (
            Affine::Weight,
            weight.clone(),
            bias.zeros_like()?,
            "affine_weight",
        ),
        (
            Affine::Bias,
            weight.ones_like()?,
            bias.clone(),
            "affine_bias",
        ),
    ] {
        for (subtract_last, ignore_nan) in [(false, false), (true, false), (false, true)] {
            let options = RevInOptions {
                affine,
                subtract_last,
                ignore_nan,
                ..Default::default()
            };
            let (alone, vars) = layer(&weight, &bias, options)?;
            let names: Vec<String> = vars.data().lock().unwrap().keys().cloned().collect();
            assert_eq!(names, [name]);
            let pair = RevInOptions {
                affine: Affine::WeightAndBias,
                ..options
            };
            let (pair, _vars) = layer(&weight, &bias, pair)?;
            let (y, stats) = alone.normalize(&x)?;
            let (want, want_stats) = pair.normalize(&x)?;
            assert_close("y", &y, &values(&want)?, 1e-14);
            let back = alone.denormalize(&y, &stats)?;
            let want = pair.denormalize(&want, &want_stats)?;
            assert_close("back", &back, &values(&want)?, 1e-13);
            assert_close("input", &back, &values(&x)?, 1e-12);
            let grads = y.sqr()?.sum_all()?.backward()?;
            assert!(
                vars.all_vars().iter().all(|var| grads.get(var).is_some()),
                "{affine:?}"
            );
        }
    }
    Ok(())
}
