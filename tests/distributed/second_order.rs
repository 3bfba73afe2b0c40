//! Derivatives of gradients through synchronized batch norm: those of the whole batch.
//!
//! candle keeps the graph of a backward pass only where the environment variable
//! `CANDLE_GRAD_DO_NOT_DETACH` is set, and so the test runs itself again in a process of its own.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{ModuleT, VarMap};
use candle_norm::distributed::{Collective, Threads};
use candle_norm::{Path, batch_norm, with_path};
use testkit::child;
use testkit::compare::assert_close;
use testkit::data::{Draw, tensor, values};
use testkit::vars::{set, vb};

use crate::shares::Shares;

const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// The gradients of Σ r · (∂L/∂x)² by x and by the weight, with L = Σ y · c + ½ Σ y².
fn second(
    group: Option<Arc<dyn Collective>>,
    x: &Tensor,
    c: &Tensor,
    path: Path,
) -> Result<[Tensor; 2]> {
    let vars = VarMap::new();
    let mut norm = batch_norm(2, 1e-2, vb(&vars, DType::F64))?;
    if let Some(group) = group {
        norm = norm.synchronized(group);
    }
    set(&vars, "weight", &Tensor::new(&[1.5, -0.7], &Device::Cpu)?)?;
    set(&vars, "bias", &Tensor::new(&[0.3, 0.2], &Device::Cpu)?)?;
    let x = Var::from_tensor(x)?;
    with_path(path, || {
        let y = norm.forward_t(&x, true)?;
        let loss = ((&y * c)?.sum_all()? + (y.sqr()?.sum_all()? * 0.5)?)?;
        let dx = match loss.backward()?.get(&x) {
            Some(dx) => dx.clone(),
            None => x.zeros_like()?,
        };
        let grads = (dx.sqr()? * c)?.sum_all()?.backward()?;
        let of = |t: &Tensor| grads.get(t).cloned().map_or(t.zeros_like(), Ok);
        let weight = norm.weight().expect("a weight");
        Ok([of(&x)?, of(weight)?])
    })
}

#[test]
fn second_derivatives_are_those_of_the_whole_batch() -> Result<()> {
    if !std::env::var(SWITCH).is_ok_and(|v| v == "1") {
        let name = child::name(
            module_path!(),
            "second_derivatives_are_those_of_the_whole_batch",
        );
        let mut command = child::command(&name);
        command.env(SWITCH, "1");
        child::assert_passes(&name, &mut command);
        return Ok(());
    }
    for path in [Path::Fused, Path::Composed, Path::Reference] {
        // candle's autograd adds gradients without elements to nothing, and so cuts their graph: a
        // rank needs samples.
        for counts in [&[3, 2][..], &[1, 4, 2]] {
            let shares = Shares::new(&[2, 3], counts, DType::F64, path);
            let [x, _] = shares.whole()?;
            let c = tensor(&Draw::new(4).normal(x.elem_count()), x.dims(), DType::F64)?;
            let want = second(None, &x, &c, Path::Composed)?;
            let got = Threads::run(counts.len(), |group| {
                let rank = group.rank();
                second(
                    Some(group),
                    &shares.of(rank, &x)?,
                    &shares.of(rank, &c)?,
                    path,
                )
            })?;
            let dx: Vec<&Tensor> = got.iter().map(|[dx, _]| dx).collect();
            let what = format!("{path:?} {counts:?}");
            assert_close(&what, &Tensor::cat(&dx, 0)?, &values(&want[0])?, 1e-9);
            let mut dweight = want[1].zeros_like()?;
            for [_, part] in &got {
                dweight = (dweight + part)?;
            }
            assert_close(&what, &dweight, &values(&want[1])?, 1e-9);
        }
    }
    Ok(())
}
