//! The launches of the CUDA kernels that a step takes.
//!
//! A launch is all that the backend asks of a device, beside candle's own copies and casts on it:
//! `tests/docs/architecture.rs` has what its sources must not say, so that nothing copies to the
//! host or waits for the device.

use candle_core::{D, DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_norm::internals::launches;
use candle_norm::ops::{self, L2Form, Modulation, RmsOptions};
use candle_norm::{
    BatchNormOptions, Cast, LayerNormOptions, Path, batch_norm, gated_rms_norm, group_norm,
    instance_norm, layer_norm, layer_scale, rms_norm, switch_norm, with_path,
};

fn vb() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)
}

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
    let norm = layer_norm(256, 1e-5, vb())?;
    assert_launches(
        &var(&[64, 256])?,
        |x| norm.forward_t(x, true),
        [
            &["layer_norm_forward"],
            &["layer_norm_backward", "rows_finish"],
        ],
    )?;
    let norm = rms_norm(1001, 1e-5, vb())?;
    assert_launches(
        &var(&[3, 1001])?,
        |x| norm.forward_t(x, true),
        [&["rms_norm_forward"], &["rms_norm_backward", "rows_finish"]],
    )?;
    let norm = group_norm(4, 16, 1e-5, vb())?;
    assert_launches(
        &var(&[4, 16, 64])?,
        |x| norm.forward_t(x, true),
        [&["planes_fit"], &["groups_grad_fit", "groups_grad_merge"]],
    )?;
    let norm = instance_norm(16, 1e-5, vb())?;
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
        let norm = batch_norm(16, options, vb())?;
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
    let norm = layer_norm(16, 1e-5, vb())?;
    assert_launches(
        &var(&[4, 8, 16])?,
        |x| norm.forward_modulated_by(x, &modulation),
        [
            &["layer_norm_forward"],
            &["layer_norm_backward", "rows_finish"],
        ],
    )?;
    let norm = group_norm(4, 16, 1e-5, vb())?;
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
    let norm = layer_norm(256, options, vb())?;
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
    let norm = gated_rms_norm(256, 1e-5, vb())?;
    assert_launches(
        &var(&[64, 256])?,
        |x| norm.forward(x, Some(&gate)),
        [
            &["gated_f32_f32"],
            &["gated_grad", "columns_grad_sums", "columns_grad_merge"],
        ],
    )?;
    let scale = layer_scale(256, 1e-5, vb())?;
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
    let norm = switch_norm(16, 1e-5, vb())?;
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
    let norm = layer_norm(256, 1e-5, vb())?;
    let (y, of_forward) = with_path(Path::Emulated, || launches(|| norm.forward_t(&x, false)));
    assert_eq!(y?.dims(), [64, 256]);
    assert_eq!(of_forward.len(), 1, "{of_forward:?}");
    Ok(())
}
