//! Checking the backward of an operation of your own.
//!
//! candle takes the gradient of a `CustomOp1` from its `bwd` and does not check it. A network with
//! a wrong gradient still trains, but to a worse result. `gradcheck` compares the gradient with the
//! change of the forward when each input element is moved a little. This example has SiLU, x ·
//! σ(x), with a correct gradient and with two wrong ones.
//!
//! ```text
//! cargo run --release --example gradcheck_own_op
//! ```
//!
//! Replace `forward` and the gradients by those of your operation. The check needs a forward in
//! `f64`.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use candle_nn::ops::sigmoid;
use candle_norm::gradcheck::GradCheck;

/// From the input and the gradient of the output to the gradient of the input.
type Rule = fn(&Tensor, &Tensor) -> Result<Tensor>;

struct Silu(Rule);

fn forward(x: &f64) -> f64 {
    x / (1. + (-x).exp())
}

impl CustomOp1 for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("silu: expected a contiguous input")
        };
        let y = storage.as_slice::<f64>()?[start..end].iter().map(forward);
        Ok((CpuStorage::F64(y.collect()), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        (self.0)(x, dy).map(Some)
    }
}

/// σ(x) · (1 + x · (1 − σ(x))) · dy
fn right(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let s = sigmoid(x)?;
    let slope = (&s * (1. + (x * (1. - &s)?)?)?)?;
    slope * dy
}

/// Half of the product rule: right at 0 and nowhere else.
fn lost_term(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    sigmoid(x)? * dy
}

/// Right only if the loss is the sum of the outputs, as it is in many a test.
fn lost_cotangent(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    right(x, &dy.ones_like()?)
}

fn main() -> Result<()> {
    let x = Tensor::new(&[[-2f64, -0.5, 0.], [0.3, 1., 4.]], &Device::Cpu)?;
    let rules: [(&str, Rule, bool); 3] = [
        ("The right rule", right, true),
        ("A rule that lost a term", lost_term, false),
        (
            "A rule that ignores the gradient it is given",
            lost_cotangent,
            false,
        ),
    ];
    for (what, rule, is_right) in rules {
        let op = |inputs: &[Tensor]| inputs[0].apply_op1(Silu(rule));
        let report = GradCheck::default().check(op, std::slice::from_ref(&x))?;
        println!("{what}\n{report}\n");
        if report.passed() != is_right {
            bail!("expected gradcheck to tell right rules from wrong ones")
        }
    }
    println!("In a test: gradcheck(op, &[x])?, which is an error with the same text.");
    Ok(())
}
