//! The launches of the CUDA kernels that a step takes.
//!
//! A launch is all that the backend asks of a device, beside candle's own copies and casts on it:
//! `tests/docs/architecture.rs` has what its sources must not say, so that nothing copies to the
//! host or waits for the device.

use candle_core::{Device, ModuleT, Result, Tensor, Var};
use candle_norm::internals::launches;
use candle_norm::{
    BatchNormOptions, Path, batch_norm, group_norm, instance_norm, layer_norm, ops, rms_norm,
    with_path,
};

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

#[test]
fn inference_keeps_no_statistics_and_is_one_launch() -> Result<()> {
    let x = var(&[64, 256])?.detach();
    let norm = layer_norm(256, 1e-5, fresh_vb())?;
    let (y, of_forward) = with_path(Path::Emulated, || launches(|| norm.forward_t(&x, false)));
    assert_eq!(y?.dims(), [64, 256]);
    assert_eq!(of_forward.len(), 1, "{of_forward:?}");
    Ok(())
}
