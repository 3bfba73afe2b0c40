//! Requests of the layers to a GPU: the launches of a step, and no copy to the host.
//!
//! `asked` counts while the kernels run on the emulator, whose tensors it takes for those of a GPU.
//! `tests/docs/architecture.rs` has what the sources must not say, so that nothing reaches the host
//! where it is not counted.

use candle_core::{D, DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_norm::internals::{Asked, asked, launches};
use candle_norm::ops::{self, L2Form, Modulation, RmsOptions};
use candle_norm::{
    BatchNormOptions, Cast, LayerNormOptions, Path, batch_norm, gated_rms_norm, group_norm,
    instance_norm, layer_norm, layer_scale, rms_norm, switch_norm, weight_norm, with_path,
};
use testkit::functions::FUNCTIONS;
use testkit::table::forms;

use testkit::vars::fresh_vb;

fn var(dims: &[usize]) -> Result<Var> {
    Var::randn(0f32, 1., dims, &Device::Cpu)
}

/// The kernels of a forward, and those of its backward.
#[track_caller]
fn assert_launches(
    x: &Var,
    forward: impl Fn(&Tensor) -> Result<Tensor>,
    expected: [&[&str]; 2],
) -> Result<()> {
    with_path(Path::Emulated, || {
        let (y, of_forward) = launches(|| forward(x));
        let loss = y?.sqr()?.sum_all()?;
        let (grads, of_backward) = launches(|| loss.backward());
        assert!(grads?.get(x).is_some());
        for (got, expected) in [of_forward, of_backward].iter().zip(expected) {
            let begin = got.iter().zip(expected).all(|(got, e)| got.starts_with(e));
            assert!(got.len() == expected.len() && begin, "{got:?}");
        }
        Ok(())
    })
}

#[test]
fn a_small_forward_is_one_launch_and_its_backward_two() -> Result<()> {
    let norm = layer_norm(256, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[64, 256])?,
        |x| norm.forward_t(x, true),
        [
            &["layer_norm_forward"],
            &["layer_norm_backward", "rows_finish"],
        ],
    )?;
    let norm = rms_norm(1001, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[3, 1001])?,
        |x| norm.forward_t(x, true),
        [&["rms_norm_forward"], &["rms_norm_backward", "rows_finish"]],
    )?;
    let norm = group_norm(4, 16, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[4, 16, 64])?,
        |x| norm.forward_t(x, true),
        [&["planes_fit"], &["groups_grad_fit", "groups_grad_merge"]],
    )?;
    let norm = instance_norm(16, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[4, 16, 64])?,
        |x| norm.forward_t(x, true),
        [&["planes_fit"], &["groups_grad_fit"]],
    )
}

#[test]
fn running_statistics_are_one_launch_more() -> Result<()> {
    for momentum in [Some(0.1), None] {
        let options = BatchNormOptions {
            momentum,
            ..Default::default()
        };
        let norm = batch_norm(16, options, fresh_vb())?;
        assert_launches(
            &var(&[4, 16, 64])?,
            |x| norm.forward_t(x, true),
            [&["planes_fit", "update_running"], &["planes_grad_fit"]],
        )?;
    }
    Ok(())
}

#[test]
fn a_sum_is_formed_in_the_launch_that_normalizes_it() -> Result<()> {
    let residual = var(&[64, 256])?;
    assert_launches(
        &var(&[64, 256])?,
        |x| {
            let (y, sum) = ops::add_layer_norm(x, &residual, 256, [None, None], 1e-5)?;
            y + sum
        },
        [&["add_layer_norm_forward"], &["layer_norm_backward"]],
    )
}

/// Rounding before the weight and half precision change nothing of that.
#[test]
fn a_half_sum_that_is_rounded_before_the_weight_is_one_launch() -> Result<()> {
    let of = |dims: &[usize]| Var::from_tensor(&var(dims)?.to_dtype(DType::BF16)?);
    let (residual, weight) = (of(&[64, 256])?, of(&[256])?);
    let options = RmsOptions {
        eps: Some(1e-5),
        cast: Cast::BeforeWeight,
        ..Default::default()
    };
    assert_launches(
        &of(&[64, 256])?,
        |x| {
            let (y, sum) = ops::add_rms_norm(x, &residual, 256, Some(&weight), options)?;
            y + sum
        },
        [
            &["add_rms_norm_forward"],
            &["sum_rms_norm_backward", "rows_finish"],
        ],
    )
}

/// Weights of each sample are the kernels of the layout, with a grid of samples.
#[test]
fn weights_of_each_sample_are_no_launch_more() -> Result<()> {
    let scale = var(&[4, 16])?;
    let modulation = Modulation::new(Some(&scale), Some(&scale));
    let norm = layer_norm(16, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[4, 8, 16])?,
        |x| norm.forward_modulated_by(x, &modulation),
        [
            &["layer_norm_forward"],
            &["layer_norm_backward", "rows_finish"],
        ],
    )?;
    let norm = group_norm(4, 16, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[4, 16, 64])?,
        |x| norm.forward_modulated_by(x, &modulation),
        [&["planes_fit"], &["groups_grad_fit", "groups_grad_merge"]],
    )
}

/// The statistics, and one pass over the elements; the backward has one pass more than without.
#[test]
fn an_activation_is_a_pass_of_its_own() -> Result<()> {
    let options = LayerNormOptions {
        activation: Some(Activation::Gelu),
        ..1e-5.into()
    };
    let norm = layer_norm(256, options, fresh_vb())?;
    assert_launches(
        &var(&[64, 256])?,
        |x| norm.forward_t(x, true),
        [
            &["layer_norm_forward", "pointwise_forward"],
            &["pointwise_backward", "layer_norm_backward", "rows_finish"],
        ],
    )
}

#[test]
fn functions_of_rows_are_one_launch_each_way() -> Result<()> {
    assert_launches(
        &var(&[64, 256])?,
        ops::softmax_last_dim,
        [&["softmax_f32"], &["softmax_grad_f32"]],
    )?;
    assert_launches(
        &var(&[64, 256])?,
        |x| ops::l2_normalize(x, D::Minus1, 1e-12, L2Form::Max),
        [&["weight_norm_f32"], &["weight_norm_grad_f32"]],
    )?;
    let gate = var(&[64, 256])?;
    let norm = gated_rms_norm(256, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[64, 256])?,
        |x| norm.forward(x, Some(&gate)),
        [
            &["gated_f32_f32"],
            &["gated_grad", "columns_grad_sums", "columns_grad_merge"],
        ],
    )?;
    let scale = layer_scale(256, 1e-5, fresh_vb())?;
    let residual = var(&[64, 256])?;
    assert_launches(
        &var(&[64, 256])?,
        |x| scale.forward_add(x, &residual),
        [
            &["pointwise_forward"],
            &[
                "columns_grad_sums",
                "columns_grad_merge",
                "columns_grad_input",
            ],
        ],
    )
}

/// The mixture is a few numbers for each plane, between the moments and the scaling.
#[test]
fn a_switch_norm_is_kernels_alone() -> Result<()> {
    let norm = switch_norm(16, 1e-5, fresh_vb())?;
    assert_launches(
        &var(&[4, 16, 64])?,
        |x| norm.forward_t(x, true),
        [
            &[
                "planes_moments",
                "planes_merge",
                "mixture_unions",
                "mixture_forward",
                "columns_normalize",
                "planes_normalize",
                "update_running",
            ],
            &[
                "planes_grad_sums",
                "planes_grad_merge",
                "planes_grad_input",
                "columns_grad_sums",
                "columns_grad_merge",
                "mixture_sums",
                "mixture_backward",
                "planes_normalize",
            ],
        ],
    )
}

#[test]
fn inference_keeps_no_statistics_and_is_one_launch() -> Result<()> {
    let x = var(&[64, 256])?.detach();
    let norm = layer_norm(256, 1e-5, fresh_vb())?;
    let (y, of_forward) = with_path(Path::Emulated, || launches(|| norm.forward_t(&x, false)));
    assert_eq!(y?.dims(), [64, 256]);
    assert_eq!(of_forward.len(), 1, "{of_forward:?}");
    Ok(())
}

/// Requests of a forward, and of the backward of all that it depends on, to the emulator.
fn asked_by_step(x: &Tensor, forward: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Asked> {
    let (step, asked) = asked(|| {
        with_path(Path::Emulated, || {
            let y = forward(x)?;
            (&y * y.detach())?.sum_all()?.backward()
        })
    });
    step.map(|_| asked)
}

fn assert_no_wait(what: &str, of: &Asked) {
    let waits = [of.to_host, of.synchronizations];
    assert_eq!(waits, [0, 0], "{what}: {of:?}");
}

#[test]
fn no_layer_copies_to_the_host_or_waits_for_it() -> Result<()> {
    let mut launched = 0;
    for dtype in [DType::F32, DType::BF16] {
        for (_, form) in forms() {
            let dims = [2, 4, 3, 5];
            let vb = VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu);
            let norm = (form.build)(&dims, vb)?;
            let x = Var::from_tensor(&var(&dims)?.to_dtype(dtype)?)?;
            for is_training in [true, false] {
                let what = format!("{}, {dtype:?}, training: {is_training}", form.name);
                let step = asked_by_step(&x, |x| norm.forward_t(x, is_training))?;
                assert_no_wait(&what, &step);
                let data = x.detach();
                let run = || norm.forward_t(&data, is_training);
                let (y, of_data) = asked(|| with_path(Path::Emulated, run));
                assert_eq!(y?.dims(), dims);
                assert_no_wait(&what, &of_data);
                let has_kernels = !step.launches.is_empty() && !of_data.launches.is_empty();
                assert!(has_kernels, "{what}: {step:?}, {of_data:?}");
                assert!(step.allocations > 0 && of_data.allocations > 0, "{what}");
                launched += step.launches.len();
            }
        }
    }
    assert!(launched > 100, "{launched} launches");
    Ok(())
}

#[test]
fn weight_norm_and_sums_copy_nothing_to_the_host() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let vb = || VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu);
        let x = Var::from_tensor(&var(&[5, 24])?.to_dtype(dtype)?)?;
        let residual = Var::from_tensor(&var(&[5, 24])?.to_dtype(dtype)?)?;
        let rows = [
            layer_norm(24, 1e-5, vb())?,
            rms_norm(24, 1e-5, vb())?.into_inner(),
        ];
        for norm in &rows {
            let step = asked_by_step(&x, |x| {
                let (y, sum) = norm.forward_add(x, &residual)?;
                y + sum
            })?;
            assert!(!step.launches.is_empty(), "{step:?}");
            assert_no_wait("a sum", &step);
        }
        for dim in [Some(0), None] {
            let linear = weight_norm::linear(24, 6, dim.into(), vb())?;
            let step = asked_by_step(&x, |x| linear.forward(x))?;
            assert!(!step.launches.is_empty(), "{step:?}");
            assert_no_wait("weight norm", &step);
        }
    }
    Ok(())
}

#[test]
fn functions_copy_masks_alone_to_the_host() -> Result<()> {
    for function in FUNCTIONS {
        let dims = function.tiny[0];
        let shapes = (function.params)(dims);
        let mut arguments = vec![var(dims)?.into_inner()];
        for shape in &shapes {
            arguments.push(var(shape)?.into_inner());
        }
        let step = asked_by_step(&arguments[0], |_| (function.call)(&arguments))?;
        // Which positions are valid decides about shapes.
        let masks = usize::from(function.name.contains("masked"));
        let waits = [step.to_host, step.synchronizations];
        assert_eq!(waits, [masks; 2], "{}: {step:?}", function.name);
    }
    Ok(())
}

/// A strided input is copied where it lies, and parameters are cast there.
#[test]
fn copies_on_the_device_are_counted() -> Result<()> {
    let x = Var::from_tensor(&var(&[8, 3])?.to_dtype(DType::BF16)?)?;
    let weight = var(&[3])?;
    // One element behind a multiple of 16 bytes.
    let behind = |x: &Tensor| x.flatten_all()?.narrow(0, 1, 21)?.reshape((7, 3));
    let step = asked_by_step(&x, |x| ops::rms_norm(&behind(x)?, 3, Some(&weight), 1e-5))?;
    assert!(step.copies > 0, "{step:?}");
    assert_no_wait("a part of a tensor", &step);
    Ok(())
}

#[test]
fn a_copy_to_the_host_is_seen() -> Result<()> {
    let x = var(&[4, 16, 64])?;
    let step = |refuse_non_finite, reads_counter: bool| {
        let options = BatchNormOptions {
            refuse_non_finite,
            ..Default::default()
        };
        let norm = batch_norm(16, options, fresh_vb())?;
        asked_by_step(&x, |x| {
            let y = norm.forward_t(x, true)?;
            if reads_counter && let Some(statistics) = norm.running_stats() {
                statistics.snapshot()?;
            }
            Ok(y)
        })
    };
    assert_no_wait("batch norm", &step(false, false)?);
    let counted = step(false, true)?;
    assert_eq!([counted.to_host, counted.synchronizations], [1, 1]);
    // The mean and the variance.
    let checked = step(true, false)?;
    assert_eq!([checked.to_host, checked.synchronizations], [2, 2]);
    Ok(())
}
