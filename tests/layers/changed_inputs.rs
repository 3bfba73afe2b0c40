//! Variables that are set between forward and backward: the gradient is that of the values that the
//! forward saw, or the call fails.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::{Path, ops, with_path};

use testkit::compare::{assert_near, assert_same_bits};
use testkit::data::{Draw, tensor, values};
use testkit::subjects::{Kind, Params, Subject, backward, gradient};
use testkit::table::{LAYERS, shapes};

/// Every kind of every layer, at shapes for one thread.
fn inputs() -> impl Iterator<Item = (Kind, &'static [usize])> {
    LAYERS.iter().flat_map(|layer| shapes(layer.short))
}

fn var(dims: &[usize], seed: u64, dtype: DType) -> Result<Var> {
    let numbers = Draw::new(seed).weight(dims.iter().product());
    Var::from_tensor(&tensor(&numbers, dims, dtype)?)
}

/// Which variables are set between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Set {
    Nothing,
    Input,
    Weight,
    Both,
}

/// The gradients of the input and of all parameters.
fn gradients(
    kind: Kind,
    dims: &[usize],
    dtype: DType,
    set: Set,
    path: Path,
) -> Result<Vec<Tensor>> {
    let subject = Subject::new(kind, 1e-3);
    let features = subject.param_dims(dims).to_vec();
    let x = var(dims, 1, dtype)?;
    let params: Vec<Var> = (2..)
        .take(kind.num_params())
        .map(|seed| var(&features, seed, dtype))
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = params.iter().map(|p| p.as_tensor().clone()).collect();
    let y = with_path(path, || subject.forward(&x, &Params::new(&tensors)))?;
    if matches!(set, Set::Input | Set::Both) {
        x.set(&var(dims, 4, dtype)?.as_detached_tensor())?;
    }
    if matches!(set, Set::Weight | Set::Both) {
        params[0].set(&var(&features, 5, dtype)?.as_detached_tensor())?;
    }
    let dy = tensor(&Draw::new(6).normal(y.elem_count()), dims, dtype)?;
    let grads = backward(&y, &dy)?;
    let leaves = [x.as_tensor()].into_iter().chain(&tensors);
    Ok(leaves.map(|v| gradient(&grads, v)).collect())
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, layer: &str) {
    let Err(error) = result else {
        panic!("{layer}: a gradient of two inputs")
    };
    let message = error.to_string();
    for part in [layer, "expected the input of the forward", "Var::set"] {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// As an optimizer does it between two backwards, or in another thread.
#[test]
fn a_weight_that_is_set_does_not_reach_into_a_pending_gradient() -> Result<()> {
    for (kind, dims) in inputs() {
        for path in [Path::Fused, Path::Composed] {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let want = gradients(kind, dims, dtype, Set::Nothing, path)?;
                let got = gradients(kind, dims, dtype, Set::Weight, path)?;
                for (got, want) in got.iter().zip(&want) {
                    assert_same_bits(&format!("{kind:?} {path:?} {dtype:?}"), got, want);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_input_that_is_set_is_refused_by_the_fused_path() -> Result<()> {
    for (kind, dims) in inputs() {
        // The input that is transposed first is a copy.
        let is_copied = kind.is_channels_first();
        for set in [Set::Input, Set::Both] {
            for dtype in [DType::F64, DType::F32] {
                let want = gradients(kind, dims, dtype, Set::Nothing, Path::Fused)?;
                match gradients(kind, dims, dtype, set, Path::Fused) {
                    Ok(got) if is_copied => {
                        for (got, want) in got.iter().zip(&want) {
                            assert_same_bits(&format!("{kind:?} {dtype:?}"), got, want);
                        }
                    }
                    refused => assert_refused(refused, "expected"),
                }
            }
        }
    }
    Ok(())
}

/// In half precision a layer may compute on a copy: the gradient is that of the forward, or none.
#[test]
fn an_input_in_half_precision_that_is_set_changes_no_gradient() -> Result<()> {
    for (kind, dims) in inputs() {
        for dtype in [DType::F16, DType::BF16] {
            let want = gradients(kind, dims, dtype, Set::Nothing, Path::Fused)?;
            match gradients(kind, dims, dtype, Set::Both, Path::Fused) {
                Ok(got) => {
                    for (got, want) in got.iter().zip(&want) {
                        assert_same_bits(&format!("{kind:?} {dtype:?}"), got, want);
                    }
                }
                refused => assert_refused(refused, "expected"),
            }
        }
    }
    Ok(())
}

#[test]
fn an_input_that_is_set_does_not_reach_into_a_pending_gradient_of_the_composed_path() -> Result<()>
{
    for (kind, dims) in inputs() {
        for set in [Set::Input, Set::Both] {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let want = gradients(kind, dims, dtype, Set::Nothing, Path::Composed)?;
                let got = gradients(kind, dims, dtype, set, Path::Composed)?;
                for (got, want) in got.iter().zip(&want) {
                    assert_same_bits(&format!("{kind:?} {dtype:?}"), got, want);
                }
            }
        }
    }
    Ok(())
}

/// The name of the layer is in the message, also where the input is a part of a variable, or is
/// written by `slice_set`.
#[test]
fn views_and_slices_are_told_too() -> Result<()> {
    let base = var(&[3, 40], 1, DType::F32)?;
    let x = base.narrow(0, 1, 2)?.reshape((4, 20))?;
    let y = ops::layer_norm(&x, 20, None, None, 1e-5)?;
    base.set(&var(&[3, 40], 2, DType::F32)?.as_detached_tensor())?;
    assert_refused(y.sqr()?.sum_all()?.backward(), "LayerNorm");

    let weight = var(&[20], 3, DType::F32)?;
    let x = tensor(&Draw::new(4).normal(80), &[4, 20], DType::F32)?;
    let y = ops::rms_norm(&x, 20, Some(&weight), ops::RmsOptions::default())?;
    x.slice_set(&x.narrow(0, 0, 1)?.affine(2., 1.)?, 0, 2)?;
    assert_refused(y.sqr()?.sum_all()?.backward(), "RmsNorm");

    // Channels last.
    let x = var(&[2, 5, 5, 3], 5, DType::F32)?;
    let y = ops::batch_norm(&x.permute((0, 3, 1, 2))?, None, None, 1e-5)?.0;
    x.set(&var(&[2, 5, 5, 3], 6, DType::F32)?.as_detached_tensor())?;
    assert_refused(y.sqr()?.sum_all()?.backward(), "BatchNorm");

    // The storage may change where the input does not lie.
    let base = var(&[3, 40], 7, DType::F32)?;
    let y = ops::layer_norm(&base.narrow(0, 1, 1)?, 40, None, None, 1e-5)?;
    let row = Tensor::ones((1, 40), DType::F32, &Device::Cpu)?;
    base.as_tensor().slice_set(&row, 0, 2)?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    assert_eq!(gradient(&grads, &base).dims(), [3, 40]);
    Ok(())
}

/// A backward of the same forward once more is as good as the first one, until its input is set.
#[test]
fn a_second_backward() -> Result<()> {
    let x = var(&[4, 20], 1, DType::F64)?;
    let loss = ops::layer_norm(&x, 20, None, None, 1e-5)?
        .powf(3.)?
        .sum_all()?;
    let first = gradient(&loss.backward()?, &x);
    assert_same_bits("again", &gradient(&loss.backward()?, &x), &first);
    x.set(&(x.as_detached_tensor() - first)?)?;
    assert_refused(loss.backward(), "LayerNorm");
    Ok(())
}

/// A large input is looked at in some places, which an optimizer's step changes as all others.
#[test]
fn a_step_of_an_optimizer_is_told_in_large_inputs() -> Result<()> {
    for dims in [[65, 1031], [3, 20_011]] {
        let x = var(&dims, 1, DType::F32)?;
        let y = ops::layer_norm(&x, dims[1], None, None, 1e-5)?;
        let step = tensor(&Draw::new(2).normal(x.elem_count()), &dims, DType::F32)?;
        x.set(&(x.as_detached_tensor() - (step * 1e-3)?)?)?;
        assert_refused(y.sqr()?.sum_all()?.backward(), "LayerNorm");
    }
    Ok(())
}

/// The direction of a weight norm is a parameter, and large: it is told, not copied. The magnitude
/// is copied.
#[test]
fn weight_norm() -> Result<()> {
    for dim in [Some(0), Some(1), None] {
        let magnitude: &[usize] = match dim {
            Some(0) => &[6, 1],
            Some(_) => &[1, 8],
            None => &[],
        };
        let run = |path: Path, set_v: bool, set_g: bool| -> Result<[Tensor; 2]> {
            let (v, g) = (var(&[6, 8], 1, DType::F64)?, var(magnitude, 2, DType::F64)?);
            let w = with_path(path, || ops::weight_norm(&v, &g, dim))?;
            if set_v {
                v.set(&var(&[6, 8], 3, DType::F64)?.as_detached_tensor())?;
            }
            if set_g {
                g.set(&var(magnitude, 4, DType::F64)?.as_detached_tensor())?;
            }
            let dw = tensor(&Draw::new(5).normal(48), &[6, 8], DType::F64)?;
            let grads = backward(&w, &dw)?;
            Ok([&v, &g].map(|v| gradient(&grads, v)))
        };
        let want = run(Path::Composed, false, false)?;
        let assert_right = |got: [Tensor; 2]| -> Result<()> {
            for (got, want) in got.iter().zip(&want) {
                let want = values(want)?;
                let what = format!("along {dim:?}");
                assert_near(&what, &values(got)?, &want, &vec![0.; want.len()], 1e-12);
            }
            Ok(())
        };
        for (set_v, set_g) in [(false, true), (true, false), (true, true)] {
            assert_right(run(Path::Composed, set_v, set_g)?)?;
            match run(Path::Fused, set_v, set_g) {
                // Rows along another axis than the first are a copy.
                Ok(got) if !set_v || dim == Some(1) => assert_right(got)?,
                refused => assert_refused(refused, "WeightNorm"),
            }
        }
    }
    Ok(())
}

/// Neither input of a sum is in the backward.
#[test]
fn add_norm() -> Result<()> {
    for path in [Path::Fused, Path::Composed] {
        let run = |set: bool| -> Result<[Tensor; 3]> {
            let (x, residual) = (var(&[4, 33], 1, DType::F32)?, var(&[4, 33], 2, DType::F32)?);
            let weight = var(&[33], 3, DType::F32)?;
            let (y, sum) = with_path(path, || {
                ops::add_layer_norm(&x, &residual, 33, [Some(&weight), None], 1e-5)
            })?;
            if set {
                for v in [&x, &residual, &weight] {
                    v.set(&var(v.dims(), 4, DType::F32)?.as_detached_tensor())?;
                }
            }
            let dy = tensor(&Draw::new(5).normal(132), &[4, 33], DType::F32)?;
            let grads = ((y * &dy)? + sum)?.sum_all()?.backward()?;
            Ok([&x, &residual, &weight].map(|v| gradient(&grads, v)))
        };
        for (got, want) in run(true)?.iter().zip(&run(false)?) {
            assert_same_bits(&format!("{path:?}"), got, want);
        }
    }
    Ok(())
}
