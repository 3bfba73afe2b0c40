//! Reversible normalization of windows with values that are missing, by a mask or as NaN.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::Affine;
use candle_norm::gradcheck::gradcheck;
use candle_norm::scaling::{RevIn, RevInOptions, rev_in};

use testkit::data::{Draw, tensor, values};
use testkit::errors::message;

fn layer(series: usize, dtype: DType, options: RevInOptions) -> Result<RevIn> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let layer = rev_in(series, options, vb)?;
    for (name, at) in [("affine_weight", 1.5), ("affine_bias", -0.25)] {
        let vars = vars.data().lock().unwrap();
        if let Some(var) = vars.get(name) {
            var.set(&(var.ones_like()? * at)?)?;
        }
    }
    Ok(layer)
}

fn near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let both_nan = got.is_nan() && want.is_nan();
        assert!(
            both_nan || (got - want).abs() <= tolerance * want.abs().max(1.),
            "{what}: {got} at {i}, should be {want}"
        );
    }
}

/// A window with gaps is normalized as the window of the values that are there.
#[test]
fn gaps_are_no_part_of_the_window() -> Result<()> {
    let nan = f64::NAN;
    let gaps = [nan, 3., 7., nan, 5., nan];
    let dense = tensor(&[3., 7., 5.], &[1, 3, 1], DType::F64)?;
    for subtract_last in [false, true] {
        for affine in [Affine::None, Affine::WeightAndBias] {
            let options = RevInOptions {
                subtract_last,
                affine,
                ignore_nan: true,
                ..Default::default()
            };
            let layer = layer(1, DType::F64, options)?;
            let (want, want_stats) = layer.normalize(&dense)?;
            let want = values(&want)?;
            let missing = if affine.has_bias() { -0.25 } else { 0. };
            let want = [missing, want[0], want[1], missing, want[2], missing];
            let xs = tensor(&gaps, &[1, 6, 1], DType::F64)?;
            let mask = tensor(
                &gaps.map(|v| f64::from(!v.is_nan())),
                &[1, 6, 1],
                DType::F64,
            )?;
            // Whatever stands where nothing is observed.
            let filled = tensor(
                &gaps.map(|v| if v.is_nan() { 1e9 } else { v }),
                &[1, 6, 1],
                DType::F64,
            )?;
            for (y, stats) in [
                layer.normalize(&xs)?,
                layer.normalize_masked(&xs, &mask)?,
                layer.normalize_masked(&filled, &mask.to_dtype(DType::U8)?)?,
            ] {
                near("y", &values(&y)?, &want, 1e-12);
                near(
                    "center",
                    &values(stats.center())?,
                    &values(want_stats.center())?,
                    1e-12,
                );
                near(
                    "std",
                    &values(stats.std())?,
                    &values(want_stats.std())?,
                    1e-12,
                );
                let back = values(&layer.denormalize(&y, &stats)?)?;
                near("back", &[back[1], back[2], back[4]], &[3., 7., 5.], 1e-12);
            }
        }
    }
    Ok(())
}

#[test]
fn without_gaps_it_is_the_same_layer() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6), (DType::BF16, 1e-2)] {
        let x: Vec<f64> = Draw::new(3)
            .normal(2 * 50 * 3)
            .iter()
            .map(|z| 1e3 + z)
            .collect();
        let x = match dtype {
            DType::BF16 => tensor(&Draw::new(3).normal(300), &[2, 50, 3], dtype)?,
            _ => tensor(&x, &[2, 50, 3], dtype)?,
        };
        for subtract_last in [false, true] {
            let plain = RevInOptions {
                subtract_last,
                ..Default::default()
            };
            let ignoring = RevInOptions {
                ignore_nan: true,
                ..plain
            };
            let (want, want_stats) = layer(3, dtype, plain)?.normalize(&x)?;
            let (y, stats) = layer(3, dtype, ignoring)?.normalize(&x)?;
            assert_eq!(
                (y.dtype(), stats.std().dtype()),
                (want.dtype(), want_stats.std().dtype())
            );
            near("y", &values(&y)?, &values(&want)?, 4. * tolerance);
            near(
                "std",
                &values(stats.std())?,
                &values(want_stats.std())?,
                tolerance,
            );
            let mask = Tensor::ones((2, 50, 1), DType::U8, &Device::Cpu)?;
            let (masked, _) = layer(3, dtype, plain)?.normalize_masked(&x, &mask)?;
            near("masked", &values(&masked)?, &values(&y)?, 0.);
        }
    }
    Ok(())
}

/// Each series has its own gaps, and one that is not there at all leaves the others as they are.
#[test]
fn a_series_that_is_not_there_is_not_known() -> Result<()> {
    let nan = f64::NAN;
    let xs = tensor(&[nan, 1., nan, nan, nan, 5.], &[1, 3, 2], DType::F32)?;
    let options = RevInOptions {
        ignore_nan: true,
        ..Default::default()
    };
    let layer = layer(2, DType::F32, options)?;
    let var = Var::from_tensor(&xs)?;
    let (y, stats) = layer.normalize(&var)?;
    near("y", &values(&y.narrow(2, 0, 1)?)?, &[-0.25; 3], 0.);
    assert_eq!(values(&y)?[3], -0.25);
    near("center", &values(stats.center())?, &[nan, 3.], 1e-6);
    let forecast = values(&layer.denormalize(&y, &stats)?)?;
    assert!(
        forecast[0].is_nan() && (forecast[1] - 1.).abs() < 1e-5,
        "{forecast:?}"
    );
    // What is missing gets no gradient, and spoils none.
    let weights = tensor(&Draw::new(1).normal(6), &[1, 3, 2], DType::F32)?;
    let gradients = (y.sqr()? * weights)?.sum_all()?.backward()?;
    let gradient = values(gradients.get(&var).expect("a gradient"))?;
    for (i, g) in gradient.iter().enumerate() {
        assert!(
            g.is_finite() && ([1, 5].contains(&i) || *g == 0.),
            "{gradient:?}"
        );
    }
    Ok(())
}

#[test]
fn gradients_pass_where_values_are() -> Result<()> {
    let mask = tensor(
        &[1., 0., 1., 1., 1., 1., 0., 1., 1., 1.],
        &[1, 5, 2],
        DType::F64,
    )?;
    for subtract_last in [false, true] {
        let options = RevInOptions {
            subtract_last,
            ..Default::default()
        };
        let layer = layer(2, DType::F64, options)?;
        let x = tensor(&Draw::new(8).normal(10), &[1, 5, 2], DType::F64)?;
        gradcheck(
            |v| {
                let (y, stats) = layer.normalize_masked(&v[0], &mask)?;
                layer.denormalize(&y.tanh()?, &stats)
            },
            &[x],
        )?;
    }
    Ok(())
}

#[test]
fn a_mask_of_other_windows_is_said() -> Result<()> {
    let layer = layer(2, DType::F32, RevInOptions::default())?;
    let xs = Tensor::zeros((3, 4, 2), DType::F32, &Device::Cpu)?;
    for dims in [vec![3, 4], vec![3, 4, 3], vec![3, 5, 2], vec![1, 4, 2]] {
        let mask = Tensor::ones(dims, DType::U8, &Device::Cpu)?;
        let told = message(layer.normalize_masked(&xs, &mask));
        assert!(
            told.contains("RevIn: expected a mask [3, 4, 2] or [3, 4, 1]"),
            "{told}"
        );
    }
    let none = Tensor::zeros((0, 4, 2), DType::F32, &Device::Cpu)?;
    let mask = Tensor::ones((0, 4, 1), DType::U8, &Device::Cpu)?;
    assert_eq!(layer.normalize_masked(&none, &mask)?.0.dims(), [0, 4, 2]);
    Ok(())
}
