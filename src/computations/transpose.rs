//! A copy with two axes transposed: how channels that come first are laid out as rows, and back.

use candle_core::{DType, Result, Shape, Tensor};

use super::{Args, Composed, Computation, Gradients};

/// `[a, b, c]` as `[a, c, b]`, contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transpose;

impl Computation for Transpose {
    fn layer(&self) -> &'static str {
        "transpose"
    }

    fn output(&self, x: &Shape, dtype: DType) -> (Shape, DType) {
        let shape = match x.dims() {
            [a, b, c] => Shape::from((*a, *c, *b)),
            _ => x.clone(),
        };
        (shape, dtype)
    }

    fn backward_reads_input(&self) -> bool {
        false
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        Ok(args.x.transpose(1, 2)?.contiguous()?.into())
    }

    fn composed_gradients(&self, _: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        Ok(Gradients {
            dx: dy.transpose(1, 2)?.contiguous()?,
            dweight: None,
            dbias: None,
        })
    }
}
