//! Gradients of gradients. candle keeps the graph of a backward pass only under an environment variable, which it reads once
//! for each thread: the tests run in a process of their own that has it.

mod common;

use std::process::Command;

use candle_core::{Result, Tensor, Var};
use candle_norm::gradcheck::gradcheck;
use candle_norm::ops::{self, Cast};
use common::uniform;

const KEEPS_GRAPHS: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// The gradient of a loss that is nonlinear in every argument of `f`, as one vector.
fn gradient(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<Tensor> {
    // The derivative by a variable of zeros that is added is the one by the input, and depends on the input still.
    let zeros = inputs
        .iter()
        .map(|x| Var::from_tensor(&x.zeros_like()?.detach()));
    let zeros = zeros.collect::<Result<Vec<_>>>()?;
    let moved = inputs
        .iter()
        .zip(&zeros)
        .map(|(x, zero)| x + zero.as_tensor());
    let y = f(&moved.collect::<Result<Vec<_>>>()?)?;
    let loss = (y.sqr()? * uniform(y.dims(), 99))?.sum_all()?;
    let gradients = loss.backward()?;
    let parts = zeros.iter().map(|zero| match gradients.get(zero) {
        Some(gradient) => gradient.flatten_all(),
        None => candle_core::bail!("an argument got no gradient"),
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
}

fn check(name: &str, f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) {
    let outcome = gradcheck(|v| gradient(&f, v), inputs);
    assert!(outcome.is_ok(), "{name}: {}", outcome.unwrap_err());
}

#[test]
fn second_derivatives_of_every_layer() -> Result<()> {
    if std::env::var_os(KEEPS_GRAPHS).is_none() {
        let test = Command::new(std::env::current_exe()?)
            .args(["--exact", "second_derivatives_of_every_layer"])
            .env(KEEPS_GRAPHS, "1")
            .output()?;
        assert!(
            test.status.success(),
            "{}",
            String::from_utf8_lossy(&test.stdout)
        );
        return Ok(());
    }
    let rows = [uniform((3, 4), 1), uniform(4, 2), uniform(4, 3)];
    check(
        "layer_norm",
        |v| ops::layer_norm(&v[0], 4, Some(&v[1]), Some(&v[2]), 1e-2),
        &rows,
    );
    for cast in [Cast::AfterWeight, Cast::BeforeWeight] {
        check(
            "rms_norm",
            |v| ops::rms_norm(&v[0], 4, Some(&v[1]), Some(1e-2), 1., cast),
            &rows[..2],
        );
    }
    let maps = [uniform((2, 4, 3), 4), uniform(4, 5), uniform(4, 6)];
    check(
        "group_norm",
        |v| ops::group_norm(&v[0], 2, Some(&v[1]), Some(&v[2]), 1e-2),
        &maps,
    );
    check(
        "instance_norm",
        |v| Ok(ops::instance_norm(&v[0], Some(&v[1]), Some(&v[2]), 1e-2)?.0),
        &maps,
    );
    check(
        "batch_norm",
        |v| Ok(ops::batch_norm(&v[0], Some(&v[1]), Some(&v[2]), 1e-2)?.0),
        &maps,
    );
    let (mean, var) = (uniform(4, 7), (uniform(4, 8) + 2.)?);
    check(
        "batch_norm_inference",
        |v| ops::batch_norm_inference(&v[0], &mean, &var, Some(&v[1]), Some(&v[2]), 1e-2),
        &maps,
    );
    for (dim, shape) in [(Some(0), vec![3, 1]), (Some(1), vec![1, 4]), (None, vec![])] {
        check(
            "weight_norm",
            |v| ops::weight_norm(&v[0], &v[1], dim),
            &[uniform((3, 4), 9), uniform(shape, 10)],
        );
    }
    Ok(())
}
