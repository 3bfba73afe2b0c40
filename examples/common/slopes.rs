//! The slope of a network: its largest change of the outputs, relative to that of the inputs.
#![allow(dead_code)] // Each user has some of it.

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var};
use candle_norm::ops::{L2Form, l2_normalize};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// The largest slope that a search finds, from the inputs `[N, I]` on by random steps uphill.
pub(crate) fn steepest(
    net: impl Fn(&Tensor) -> Result<Tensor>,
    inputs: &Tensor,
    rounds: usize,
) -> Result<f32> {
    let mut rng = StdRng::seed_from_u64(2);
    let mut inputs = inputs.clone();
    let mut found = slopes(&net, &inputs)?;
    for _ in 0..rounds {
        let noise = (0..inputs.elem_count()).map(|_| 0.05 * rng.sample::<f32, _>(StandardNormal));
        let noise = Tensor::from_vec(noise.collect(), inputs.shape(), &Device::Cpu)?;
        let there = (&inputs + noise)?;
        let new = slopes(&net, &there)?;
        let better = new.gt(&found)?;
        let wide = better.unsqueeze(1)?.broadcast_as(inputs.shape())?;
        inputs = wide.where_cond(&there, &inputs)?;
        found = better.where_cond(&new, &found)?;
    }
    found.max(0)?.to_scalar()
}

/// The largest slope at each of the inputs `[N, I]`: that of the derivative of all outputs.
fn slopes(net: impl Fn(&Tensor) -> Result<Tensor>, inputs: &Tensor) -> Result<Tensor> {
    let inputs = Var::from_tensor(inputs)?;
    let outputs = net(&inputs)?;
    let row = |at| {
        let grads = outputs.i((.., at))?.sum_all()?.backward()?;
        let none = || inputs.zeros_like();
        grads
            .get(&inputs)
            .map_or_else(none, |grad| Ok(grad.clone()))
    };
    let rows: Vec<_> = (0..outputs.dim(1)?).map(row).collect::<Result<_>>()?;
    largest_singular_values(&Tensor::stack(&rows, 1)?.detach())
}

/// The largest singular values of matrices `[N, O, I]`, by the power method, `[N]`.
pub(crate) fn largest_singular_values(matrices: &Tensor) -> Result<Tensor> {
    let (n, _, inputs) = matrices.dims3()?;
    let transposed = matrices.t()?.contiguous()?;
    let mut v = Tensor::ones((n, 1, inputs), DType::F32, &Device::Cpu)?;
    for _ in 0..100 {
        let u = unit(&v.matmul(&transposed)?)?;
        v = unit(&u.matmul(matrices)?)?;
    }
    v.matmul(&transposed)?.sqr()?.sum((1, 2))?.sqrt()
}

/// Rows of length 1.
pub(crate) fn unit(xs: &Tensor) -> Result<Tensor> {
    l2_normalize(xs, D::Minus1, 1e-12, L2Form::Max)
}
