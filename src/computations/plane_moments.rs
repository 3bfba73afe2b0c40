//! The mean and variance of each plane as tensors of the graph, which switchable norm mixes.

use candle_core::{DType, Result, Shape, Tensor};

use super::composed;
use super::{Args, Composed, Computation, Gradients};

/// The means and biased variances of the rows of the last axis, `[2, rows]` in `f64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlaneMoments {
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
}

impl PlaneMoments {
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.reshape(((), self.len))
    }
}

impl Computation for PlaneMoments {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn output(&self, x: &Shape, _: DType) -> (Shape, DType) {
        (Shape::from((2, x.elem_count() / self.len)), DType::F64)
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let x = composed::unshared(args.x)?;
        let rows = self.rows(&x)?.to_dtype(composed::accumulator(x.dtype()))?;
        let (mean, var) = composed::mean_and_var(&rows)?;
        Ok(Tensor::stack(&[mean, var], 0)?.to_dtype(DType::F64)?.into())
    }

    /// With n values in a plane, `dx = (x − mean) · 2 dvar / n + dmean / n`.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let rows = self.rows(args.x)?;
        let planes = rows.dims()[0];
        let grad_of = |i: usize, factor: f64| {
            let grad = (dy.narrow(0, i, 1)? * (factor / self.len as f64))?;
            grad.to_dtype(rows.dtype())?.reshape((planes, 1))
        };
        let (mean, _) = composed::mean_and_var(&rows)?;
        let dx = rows
            .broadcast_sub(&mean.unsqueeze(1)?)?
            .broadcast_mul(&grad_of(1, 2.)?)?
            .broadcast_add(&grad_of(0, 1.)?)?;
        Ok(Gradients {
            dx,
            dweight: None,
            dbias: None,
        })
    }
}
