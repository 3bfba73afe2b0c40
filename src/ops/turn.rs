//! Two axes that change places, in memory too: how channels that come first are laid out as rows, and back.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::fused::{self, elements, with_native};
use crate::kernels::Float;

const NAME: &str = "swap axes";

/// `[a, b, c]` as `[a, c, b]`, contiguous.
pub(super) fn swapped(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype().is_float() {
        x.contiguous()?.apply_op1(Turn)
    } else {
        x.transpose(1, 2)?.contiguous()
    }
}

/// The copy as a node of the graph: candle's own goes element by element, on one thread.
struct Turn;

impl CustomOp1 for Turn {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = (storage, layout);
        let (a, b, c) = layout.shape().dims3()?;
        let values = with_native!(fused::dtype(&x), NAME, T => {
            use candle_core::WithDType;
            Ok(T::to_cpu_storage_owned(T::transposed(elements(x)?, [a, b, c])))
        })?;
        Ok((values, Shape::from((a, c, b))))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        swapped(grad).map(Some)
    }
}
