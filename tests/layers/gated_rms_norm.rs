//! Gated RMS norm: worked examples, gradients, every option on every path, and what is refused.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Activation, Module, VarMap};
use candle_norm::gradcheck::{GradCheck, gradcheck};
use candle_norm::{
    Cast, Gate, GatedRmsNorm, GatedRmsNormOptions, Path, gated_rms_norm, ops, with_path,
};

use testkit::compare::{assert_close, assert_digits, tolerance};
use testkit::data::{noise_by, uniform, values, variable};
use testkit::errors::assert_message;
use testkit::subjects::gradients;
use testkit::vars::{names, vb};

const CPU: Device = Device::Cpu;
const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];
/// Those that are fast enough for differences.
const ON_THE_CPU: [Path; 3] = [Path::Fused, Path::Composed, Path::Reference];

#[test]
fn the_examples() -> Result<()> {
    let before = GatedRmsNormOptions {
        gate: Gate::Before,
        group_size: Some(2),
        ..1e-5.into()
    };
    let after = GatedRmsNormOptions {
        group_size: Some(4),
        ..1e-6.into()
    };
    let sigmoid = GatedRmsNormOptions {
        activation: Activation::Sigmoid,
        ..after
    };
    let cases = [
        (
            before,
            [1.352563324, 0.2064949533, 0., -1.414107729],
            [0.3042388003, 0.1521160219, 0., -0.0008465704699],
            [0.1883855541, 0.08182059831, 5.802986671, -0.0005371241677],
            Some([1.352563324, -0.4129899066, 0., 2.828215458]),
        ),
        (
            after,
            [0.9333152528, 0.1424886259, 0., -0.1936621213],
            [0.904999304, 0.1278762107, -0.08494784655, -0.7888064595],
            [0.5779115317, 0.03832109358, 0.7947193027, -0.4914917749],
            Some([0.9333152528, -0.2849772518, 0., 0.3873242426]),
        ),
        (
            sigmoid,
            [0.4666576264, -0.1424886259, 1.589438605, -0.1936621213],
            [0.395321414, 0.07142811191, 0.05089779694, -0.8103165913],
            [0.05562695265, 0.1041675323, 0.3973596513, -0.1041675323],
            None,
        ),
    ];
    for path in PATHS {
        for (options, y, dx, dz, dw) in cases {
            with_path(path, || {
                let x = variable(&[1., -2., 3., 0.5], &[1, 4], DType::F64)?;
                let z = variable(&[2., -1., 0., 1.], &[1, 4], DType::F64)?;
                let w = variable(&[1., 0.5, 2., -1.], &[4], DType::F64)?;
                let dy = Tensor::new(&[[1., -1., 0.5, 2.]], &CPU)?;
                let norm = GatedRmsNorm::new(w.clone(), options)?;
                let got = norm.forward(&x, Some(&z))?;
                assert_digits("y", &values(&got)?, &y);
                let grads = gradients(&got, &dy, &[&x, &z, &w])?;
                assert_digits("dx", &grads[0], &dx);
                assert_digits("dz", &grads[1], &dz);
                if let Some(dw) = dw {
                    assert_digits("dw", &grads[2], &dw);
                }
                Ok::<_, candle_core::Error>(())
            })?;
        }
    }
    Ok(())
}

/// All places of the gate, with groups and without, with a gate and a weight and without.
fn all(features: usize) -> impl Iterator<Item = (GatedRmsNormOptions, [bool; 2])> {
    let gates = [Gate::Before, Gate::After];
    let sizes = [None, Some(features / 2)];
    let there = [[true, true], [true, false], [false, true]];
    gates.into_iter().flat_map(move |gate| {
        sizes.into_iter().flat_map(move |group_size| {
            there.into_iter().map(move |there| {
                let options = GatedRmsNormOptions {
                    gate,
                    group_size,
                    ..Default::default()
                };
                (options, there)
            })
        })
    })
}

#[test]
fn gradients_agree_with_differences() -> Result<()> {
    let check = GradCheck {
        projections: Some(2),
        ..Default::default()
    };
    for features in [4, 36] {
        for (options, [has_gate, has_weight]) in all(features) {
            for activation in [Activation::Silu, Activation::Sigmoid, Activation::Gelu] {
                let options = GatedRmsNormOptions {
                    activation,
                    ..options
                };
                let mut inputs = vec![uniform((2, 3, features), 1)];
                inputs.extend(has_gate.then(|| uniform((2, 3, features), 2)));
                inputs.extend(has_weight.then(|| uniform(features, 3)));
                let f = |v: &[Tensor]| {
                    let gate = has_gate.then(|| &v[1]);
                    let weight = has_weight.then(|| &v[v.len() - 1]);
                    ops::gated_rms_norm(&v[0], gate, weight, options)
                };
                for path in ON_THE_CPU {
                    let report = with_path(path, || check.check(f, &inputs))?;
                    assert!(report.passed(), "{options:?} {path:?}: {report}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_path_and_dtype() -> Result<()> {
    for features in [6usize, 34, 1000] {
        for (options, [has_gate, has_weight]) in all(features) {
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
                let rows = if features == 1000 { 70 } else { 5 };
                let dims = (rows, features);
                let rounded = |t: Tensor, dtype: DType| -> Result<Tensor> {
                    Ok(Var::from_tensor(&t.to_dtype(dtype)?)?.into_inner())
                };
                let ties = |step: usize| {
                    let x = noise_by(dims, |i| i * i + step * i)?;
                    (x * 4.)?.round()? / 4.
                };
                let x = rounded(ties(3)?, dtype)?;
                // A gate of another dtype than the input, for half precision.
                let wide_gate = options.group_size.is_some() && dtype != DType::F64;
                let of_gate = if wide_gate { DType::F32 } else { dtype };
                let gate = has_gate.then(|| rounded(ties(5)?, of_gate)).transpose()?;
                let weight = has_weight
                    .then(|| rounded(noise_by(features, |i| 5 * i * i)?, dtype))
                    .transpose()?;
                let dy = ties(13)?.to_dtype(dtype)?;
                let run = |x: &Tensor, z: Option<&Tensor>, w: Option<&Tensor>, dy: &Tensor| {
                    let y = ops::gated_rms_norm(x, z, w, options)?;
                    let of: Vec<&Tensor> = [Some(x), z, w].into_iter().flatten().collect();
                    let grads = gradients(&y, dy, &of)?;
                    Ok::<_, candle_core::Error>((y, grads))
                };
                let wide = |t: &Tensor| rounded(t.clone(), DType::F64);
                let (z64, w64) = (
                    gate.as_ref().map(wide).transpose()?,
                    weight.as_ref().map(wide).transpose()?,
                );
                let (want, wants) = with_path(Path::Reference, || {
                    run(
                        &wide(&x)?,
                        z64.as_ref(),
                        w64.as_ref(),
                        &dy.to_dtype(DType::F64)?,
                    )
                })?;
                for path in PATHS {
                    let (y, grads) =
                        with_path(path, || run(&x, gate.as_ref(), weight.as_ref(), &dy))?;
                    let what = format!("{options:?} {features} {dtype:?} {path:?}");
                    let bound = 4. * tolerance(dtype);
                    assert_close(&format!("y of {what}"), &y, &values(&want)?, bound);
                    for (j, (grad, want)) in grads.iter().zip(&wants).enumerate() {
                        let grad = Tensor::new(grad.as_slice(), &CPU)?;
                        assert_close(&format!("gradient {j} of {what}"), &grad, want, bound);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn without_a_gate_it_is_an_rms_norm() -> Result<()> {
    let vars = VarMap::new();
    let norm = gated_rms_norm(12, 1e-6, vb(&vars, DType::F64))?;
    let plain = candle_norm::rms_norm(12, 1e-6, vb(&vars, DType::F64))?;
    assert_eq!(names(&vars), ["weight"]);
    let x = uniform((3, 12), 1);
    assert_digits(
        "y",
        &values(&norm.forward(&x, None)?)?,
        &values(&plain.forward(&x)?)?,
    );
    let options = GatedRmsNormOptions {
        group_size: Some(4),
        ..1e-6.into()
    };
    let grouped = ops::gated_rms_norm(&x, None, None, options)?;
    let want = ops::rms_norm(&x.reshape((3, 3, 4))?, 4, None, 1e-6)?;
    assert_digits("groups", &values(&grouped)?, &values(&want)?);
    Ok(())
}

#[test]
fn a_row_that_the_gate_closes() -> Result<()> {
    for path in PATHS {
        for gate in [Gate::Before, Gate::After] {
            let options = GatedRmsNormOptions {
                gate,
                ..Default::default()
            };
            let x = Var::from_tensor(&uniform((2, 6), 1))?.into_inner();
            let z = Var::zeros((2, 6), DType::F64, &CPU)?.into_inner();
            let y = with_path(path, || ops::gated_rms_norm(&x, Some(&z), None, options))?;
            assert!(values(&y)?.iter().all(|y| *y == 0.));
            for grad in gradients(&y, &uniform((2, 6), 2), &[&x, &z])? {
                assert!(
                    grad.iter().all(|g| g.is_finite()),
                    "{gate:?} {path:?}: {grad:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_cast_decides_where_half_precision_is_rounded() -> Result<()> {
    let x = uniform((4, 64), 1).to_dtype(DType::BF16)?;
    let z = uniform((4, 64), 2).to_dtype(DType::BF16)?;
    let w = uniform(64, 3).to_dtype(DType::BF16)?;
    for path in PATHS {
        let run = |cast, gate| {
            let options = GatedRmsNormOptions {
                cast,
                gate,
                ..Default::default()
            };
            let y = with_path(path, || {
                ops::gated_rms_norm(&x, Some(&z), Some(&w), options)
            })?;
            values(&y)
        };
        let [once, twice] = [
            run(Cast::AfterWeight, Gate::Before)?,
            run(Cast::BeforeWeight, Gate::Before)?,
        ];
        assert_ne!(once, twice, "{path:?}");
        // By hand: the normalized value is rounded, then the product.
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let h = (wide(&x)? * candle_nn::ops::silu(&wide(&z)?)?)?;
        let normal = ops::rms_norm(&h, 64, None, 1e-6)?.to_dtype(DType::BF16)?;
        let want = values(&(wide(&normal)?.broadcast_mul(&wide(&w)?)?).to_dtype(DType::BF16)?)?;
        let same = twice.iter().zip(&want).filter(|(a, b)| a == b).count();
        assert!(same >= 250, "{path:?}: {same} of 256");
    }
    Ok(())
}

#[test]
fn without_elements_the_gradients_are_zero() -> Result<()> {
    let x = Var::zeros((0, 6), DType::F64, &CPU)?.into_inner();
    let w = Var::ones(6, DType::F64, &CPU)?.into_inner();
    let y = ops::gated_rms_norm(&x, Some(&x), Some(&w), 1e-6)?;
    assert_eq!(y.dims(), [0, 6]);
    let grads = y.sum_all()?.backward()?;
    assert_eq!(values(grads.get(&w).expect("a gradient"))?, [0.; 6]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let x = uniform((2, 6), 1);
    let size = |n| GatedRmsNormOptions {
        group_size: Some(n),
        ..Default::default()
    };
    for n in [0, 4, 7] {
        let expected = &["GatedRmsNorm", "group_size", "6", &n.to_string()];
        assert_message(ops::gated_rms_norm(&x, None, None, size(n)), expected);
        let norm = gated_rms_norm(6, size(n), vb(&VarMap::new(), DType::F64));
        assert_message(norm, expected);
    }
    let z = uniform((2, 5), 1);
    assert_message(
        ops::gated_rms_norm(&x, Some(&z), None, 1e-6),
        &["GatedRmsNorm", "gate", "[2, 6]", "[2, 5]"],
    );
    assert_message(
        ops::gated_rms_norm(&x, None, Some(&uniform(5, 1)), 1e-6),
        &["GatedRmsNorm", "weight", "[6]", "[5]"],
    );
    assert_message(
        ops::gated_rms_norm(&x, None, None, 0.),
        &["GatedRmsNorm", "eps"],
    );
    let options = GatedRmsNormOptions {
        activation: Activation::Elu(1.),
        ..Default::default()
    };
    assert_message(
        ops::gated_rms_norm(&x, None, None, options),
        &["GatedRmsNorm", "Elu", "Silu"],
    );
    Ok(())
}

#[test]
fn second_inputs_are_checked_in_full() -> Result<()> {
    let inputs = [uniform((2, 4), 1), uniform((2, 4), 2), uniform(4, 3)];
    gradcheck(
        |v| ops::gated_rms_norm(&v[0], Some(&v[1]), Some(&v[2]), 1e-6),
        &inputs,
    )
}
