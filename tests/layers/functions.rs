//! The functions beside the norms of rows, groups and channels, by the table of them: gradients of
//! first and second order, dtypes, edges, and what they say.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::GradCheck;
use candle_norm::ops::{self, GateOptions, L2Form};
use candle_norm::{
    GlobalResponseNormOptions, L2Normalize, LayerScaleOptions, Norm, Path, global_response_norm,
    layer_scale, with_path,
};

use testkit::compare::{assert_close, assert_same_bits, tolerance};
use testkit::data::{Draw, noise, tensor, values, variable};
use testkit::errors::assert_message;
use testkit::functions::{FUNCTIONS, Function};
use testkit::subjects::{backward, gradient};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];
/// Those that are fast enough for differences.
const ON_THE_CPU: [Path; 3] = [Path::Fused, Path::Composed, Path::Reference];
const HALF: [DType; 2] = [DType::F16, DType::BF16];

/// Arguments of a function for an input of shape `dims`.
fn arguments(function: &Function, dims: &[usize], dtype: DType) -> Result<Vec<Tensor>> {
    let mut draw = Draw::new(dims.iter().sum::<usize>() as u64);
    let shapes = [vec![dims.to_vec()], (function.params)(dims)].concat();
    let made = shapes.iter().map(|dims| {
        let numbers = draw.normal(dims.iter().product());
        variable(&numbers, dims, dtype)
    });
    made.collect()
}

#[test]
fn gradients_are_those_of_central_differences() -> Result<()> {
    let mut faults = vec![];
    for function in FUNCTIONS {
        for dims in function.tiny {
            let mut inputs = vec![arguments(function, dims, DType::F64)?];
            if function.smooth_at_zero {
                let zeros = inputs[0][0].zeros_like()?;
                inputs.push([&[zeros], &inputs[0][1..]].concat());
            }
            for arguments in inputs {
                for path in ON_THE_CPU {
                    let check = GradCheck {
                        projections: (arguments[0].elem_count() > 60).then_some(4),
                        ..Default::default()
                    };
                    let what = format!("{} of {dims:?}, {path:?}", function.name);
                    match with_path(path, || check.check(function.call, &arguments)) {
                        Ok(report) if report.passed() && report.unreached.is_empty() => {}
                        Ok(report) => faults.push(format!("{what}: {report}")),
                        Err(error) => faults.push(format!("{what}: {error}")),
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    Ok(())
}

/// In half precision, with parameters of it or of `f32`: what `f64` gives for the same numbers.
#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    for function in FUNCTIONS {
        for (dims, dtype) in function.tiny.iter().flat_map(|d| HALF.map(|h| (d, h))) {
            for wide_params in [false, true] {
                let mut narrow = arguments(function, dims, dtype)?;
                // A residual is like the input.
                for t in narrow.iter_mut().skip(1) {
                    if wide_params && t.dims() != *dims {
                        *t = variable(&values(t)?, t.dims(), DType::F32)?;
                    }
                }
                let wide = narrow
                    .iter()
                    .map(|t| variable(&values(t)?, t.dims(), DType::F64));
                let wide: Vec<Tensor> = wide.collect::<Result<_>>()?;
                let dy = Draw::new(7).normal(narrow[0].elem_count());
                let want = (function.call)(&wide)?;
                let rounded = tensor(&dy, want.dims(), dtype)?;
                let grads = backward(&want, &rounded.to_dtype(DType::F64)?)?;
                for path in PATHS {
                    let (y, got) = with_path(path, || -> Result<_> {
                        let y = (function.call)(&narrow)?;
                        let grads = backward(&y, &rounded)?;
                        Ok((y, grads))
                    })?;
                    assert_eq!((y.dims(), y.dtype()), (narrow[0].dims(), dtype));
                    assert!(y.is_contiguous());
                    let what = format!("{} of {dims:?} in {dtype:?}, {path:?}", function.name);
                    assert_close(&what, &y, &values(&want)?, tolerance(dtype));
                    for (i, (t, wide)) in narrow.iter().zip(&wide).enumerate() {
                        let want = values(&gradient(&grads, wide))?;
                        let what = format!("{what}: gradient {i}");
                        assert_close(&what, &gradient(&got, t), &want, 2. * tolerance(dtype));
                    }
                }
            }
        }
    }
    Ok(())
}

/// NaN and infinity stay in their vector, row or sample.
#[test]
fn what_is_not_finite_stays_in_its_row() -> Result<()> {
    for path in PATHS {
        for function in FUNCTIONS {
            let dims = [3, 4, 5];
            let mut inputs = arguments(function, &dims, DType::F32)?;
            let mut numbers = values(&inputs[0])?;
            numbers[20 + 6] = f64::NAN;
            numbers[20 + 13] = f64::INFINITY;
            inputs[0] = variable(&numbers, &dims, DType::F32)?;
            let y = with_path(path, || (function.call)(&inputs))?;
            let sample = |i| values(&y.get(i)?);
            let finite = |v: Vec<f64>| v.iter().all(|v| v.is_finite());
            let what = format!("{}, {path:?}", function.name);
            assert!(finite(sample(0)?) && finite(sample(2)?), "{what}");
            assert!(!finite(sample(1)?), "{what}");
        }
    }
    Ok(())
}

/// Parameters of an empty input get gradients of zero.
#[test]
fn empty_inputs_give_empty_outputs() -> Result<()> {
    for path in PATHS {
        for function in FUNCTIONS {
            for dims in [[0, 4, 5], [3, 0, 5]] {
                let inputs = arguments(function, &dims, DType::F32)?;
                let (y, grads) = with_path(path, || -> Result<_> {
                    let y = (function.call)(&inputs)?;
                    let grads = y.sum_all()?.backward()?;
                    Ok((y, grads))
                })?;
                assert_eq!(y.dims(), dims, "{}", function.name);
                for t in inputs.iter().filter(|t| t.elem_count() > 0) {
                    let zeros = values(&gradient(&grads, t))?;
                    assert!(zeros.iter().all(|v| *v == 0.), "{}", function.name);
                }
            }
        }
    }
    Ok(())
}

/// A layer is its function.
#[test]
fn layers_are_their_functions() -> Result<()> {
    let x = noise((2, 3, 4), DType::F32)?;
    let vars = VarMap::new();
    let norm = global_response_norm(4, 1e-3, vb(&vars, DType::F32).pp("grn"))?;
    // It starts as the identity.
    assert_same_bits("GRN", &norm.forward(&x)?, &x);
    let options = GlobalResponseNormOptions {
        channels_first: true,
        ..1e-3.into()
    };
    let (weight, bias) = (noise(3, DType::F32)?, noise(3, DType::F32)?);
    let first = candle_norm::GlobalResponseNorm::new(weight.clone(), bias.clone(), options);
    let want = ops::global_response_norm(&x, &weight, &bias, 1e-3, true)?;
    assert_same_bits("GRN", &first.forward(&x)?, &want);
    let names: Vec<_> = norm.parameters().into_iter().map(|(n, _)| n).collect();
    assert_eq!((norm.kind(), names), ("grn", vec!["weight", "bias"]));

    let options = LayerScaleOptions {
        shift: true,
        ..0.5.into()
    };
    let scale = layer_scale(4, options, vb(&vars, DType::F32).pp("ls"))?;
    assert_close(
        "LayerScale",
        &scale.forward(&x)?,
        &values(&(&x * 0.5)?)?,
        0.,
    );
    let both = scale.forward_add(&x, &x)?;
    assert_close("LayerScale", &both, &values(&(&x * 1.5)?)?, 1e-6);
    let names: Vec<_> = scale.parameters().into_iter().map(|(n, _)| n).collect();
    assert_eq!(
        (scale.kind(), names),
        ("layer_scale", vec!["gamma", "beta"])
    );
    for (_, param) in scale.parameters() {
        candle_core::Var::from_tensor(&param)?.set(&param.ones_like()?.detach())?;
    }
    scale.reset()?;
    assert_eq!(scale.gamma().to_vec1::<f32>()?, [0.5; 4]);
    assert_eq!(values(scale.beta().expect("a shift"))?, [0.; 4]);

    let unit = L2Normalize::new(1e-12);
    let want = ops::l2_normalize(&x, D::Minus1, 1e-12, L2Form::Max)?;
    assert_same_bits("L2Normalize", &unit.forward(&x)?, &want);
    assert!(unit.parameters().is_empty() && unit.frozen().is_err());
    Ok(())
}

/// Vectors of any size in `f32`, and of the largest in `f16`, have the length one.
#[test]
fn lengths_neither_overflow_nor_vanish() -> Result<()> {
    for path in PATHS {
        for size in [1e-37, 1e-20, 1e-10, 1., 1e10, 1e15, 1e30, 3e38] {
            let x = tensor(&[size, 0., -size], &[1, 3], DType::F32)?;
            let call = || ops::l2_normalize(&x, 1, 1e-38, L2Form::Max);
            let y = values(&with_path(path, call)?)?;
            assert!(
                (y[0] - 0.5f64.sqrt()).abs() < 1e-6,
                "{size:e}, {path:?}: {y:?}"
            );
            assert_eq!((y[1], y[2]), (0., -y[0]), "{size:e}, {path:?}");
        }
        let x = tensor(&[6e4; 64], &[1, 64], DType::F16)?;
        let y = with_path(path, || ops::l2_normalize(&x, 1, 1e-12, L2Form::Max))?;
        assert_eq!(values(&y)?, [0.125; 64]);
    }
    Ok(())
}

/// Rows of −∞, NaN and +∞ are those of PyTorch; those with some −∞ are as without them.
#[test]
fn softmax_of_what_is_not_finite() -> Result<()> {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let rows = [
        [-inf; 3],
        [0., nan, 1.],
        [0., inf, 1.],
        [1., -inf, 1.],
        [-9e2, -9e2, -inf],
    ];
    for path in PATHS {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let x = Tensor::new(&rows, &CPU)?.to_dtype(dtype)?;
            let y = with_path(path, || ops::softmax_last_dim(&x))?;
            let y = y.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            assert!(
                y[..3].iter().flatten().all(|v| v.is_nan()),
                "{path:?}: {y:?}"
            );
            assert_eq!(y[3..], [[0.5, 0., 0.5], [0.5, 0.5, 0.]], "{path:?}");
            let log = with_path(path, || ops::log_softmax_last_dim(&x))?;
            let log = log.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            assert!(
                log[..3].iter().flatten().all(|v| v.is_nan()),
                "{path:?}: {log:?}"
            );
            assert_eq!((log[3][1], log[4][2]), (-inf, -inf), "{path:?}");
        }
    }
    Ok(())
}

/// Numbers of a file with further axes of size 1, and under every name.
#[test]
fn files_have_other_names_and_axes() -> Result<()> {
    let build = |tensors: Vec<(&str, Vec<usize>)>| {
        let made = tensors.into_iter().enumerate().map(|(i, (name, dims))| {
            let line = Tensor::arange(0f32, 4., &CPU)?;
            Ok((name.to_string(), (line + i as f64)?.reshape(dims)?))
        });
        let made: HashMap<_, _> = made.collect::<Result<_>>()?;
        Ok::<_, candle_core::Error>(VarBuilder::from_tensors(made, DType::F32, &CPU))
    };
    for names in [["weight", "bias"], ["gamma", "beta"]] {
        for dims in [vec![4], vec![1, 1, 1, 4], vec![4, 1, 1]] {
            let vb = build(vec![(names[0], dims.clone()), (names[1], dims)])?;
            let norm = global_response_norm(4, 1e-6, vb)?;
            assert_eq!(norm.weight().to_vec1::<f32>()?, [0., 1., 2., 3.]);
            assert_eq!(norm.bias().to_vec1::<f32>()?, [1., 2., 3., 4.]);
        }
    }
    for name in ["gamma", "lambda1", "layer_scale_parameter", "scale"] {
        let scale = layer_scale(4, 1e-5, build(vec![(name, vec![4, 1, 1])])?)?;
        assert_eq!(scale.gamma().to_vec1::<f32>()?, [0., 1., 2., 3.], "{name}");
    }
    let renamed = build(vec![("blocks.0.lambda_2", vec![4])])?;
    let renamed = renamed.rename_f(|_| "blocks.0.lambda_2".to_string());
    assert_eq!(
        values(layer_scale(4, 1., renamed)?.gamma())?,
        [0., 1., 2., 3.]
    );
    assert!(layer_scale(2, 1., build(vec![("gamma", vec![4])])?).is_err());
    assert!(global_response_norm(4, 1., build(vec![("weight", vec![4])])?).is_err());
    Ok(())
}

#[test]
fn mistakes_are_named() -> Result<()> {
    let x = noise((2, 3, 4), DType::F32)?;
    let whole = Tensor::zeros((2, 3), DType::U32, &CPU)?;
    let l2 = |x: &Tensor, dim: usize, eps| ops::l2_normalize(x, dim, eps, L2Form::Max);
    assert_message(l2(&x, 3, 1e-12), &["l2_normalize", "axis", "[2, 3, 4]"]);
    assert_message(l2(&x, 1, 0.), &["l2_normalize", "eps"]);
    assert_message(l2(&whole, 1, 1e-12), &["l2_normalize", "U32"]);
    let number = Tensor::new(1f32, &CPU)?;
    assert_message(ops::softmax_last_dim(&number), &["softmax_last_dim", "[]"]);
    assert_message(
        ops::log_softmax_last_dim(&whole),
        &["log_softmax_last_dim", "U32"],
    );

    let (three, four) = (noise(3, DType::F32)?, noise(4, DType::F32)?);
    let grn = |weight: &Tensor, first| ops::global_response_norm(&x, weight, &four, 1e-6, first);
    assert_message(
        grn(&three, false),
        &["GlobalResponseNorm", "weight", "[4]", "[3]"],
    );
    assert_message(
        grn(&three, true),
        &["GlobalResponseNorm", "bias", "[3]", "[4]"],
    );
    assert_message(
        ops::global_response_norm(&x, &four, &four, -1., false),
        &["GlobalResponseNorm", "eps"],
    );
    assert_message(
        ops::global_response_norm(&four, &four, &four, 1e-6, false),
        &["GlobalResponseNorm", "[N, ..., C]"],
    );
    let gate = GateOptions::default();
    assert_message(
        ops::layer_scale(&x, &three, None, gate),
        &["layer_scale", "the gate", "[4]", "[3]"],
    );
    let by_sample = noise((3, 4), DType::F32)?;
    assert_message(
        ops::layer_scale(&x, &by_sample, None, gate),
        &["layer_scale", "the gate", "[2, 4]", "[3, 4]"],
    );
    assert_message(
        ops::gated_residual(&four, &x, &four, None, gate),
        &["gated_residual", "residual", "[2, 3, 4]"],
    );
    let half = four.to_dtype(DType::F16)?;
    assert_message(
        ops::layer_scale(&x, &half, None, gate),
        &["layer_scale", "the gate", "F16"],
    );
    let infinite = layer_scale(4, f64::INFINITY, vb(&VarMap::new(), DType::F32));
    assert_message(infinite, &["LayerScale", "init"]);
    Ok(())
}
