//! The CPU: candle's storages as slices for the kernels, which are multithreaded and vectorized.

mod activation;
mod channels;
mod cumulative;
mod dynamic;
mod gated;
mod groups;
mod lengths;
mod mixture;
mod modulate;
mod plane_moments;
mod rows;
mod scale_add;
mod scale_shift;
mod softmax;
mod statistics;
mod synchronized;
mod transpose;
mod unit_rows;
mod weight_rows;

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, WithDType};

use super::{Backend, View};
use crate::computations::Gradients;
use candle_norm_kernels::Float;
use candle_norm_support::messages;

/// The fused kernels of the CPU.
pub(crate) struct Cpu;

impl Backend for Cpu {
    type Storage = CpuStorage;
}

type Arg<'a> = View<'a, CpuStorage>;

impl Arg<'_> {
    fn dtype(&self) -> DType {
        self.storage.dtype()
    }
}

/// An element type that both candle and the kernels know.
trait Native: WithDType + Float<Acc: Accumulator> {}
impl<T: WithDType + Float<Acc: Accumulator>> Native for T {}

/// The type that the kernels compute in.
trait Accumulator: WithDType + Float<Acc = Self> {}
impl<T: WithDType + Float<Acc = T>> Accumulator for T {}

/// Runs `$body` with `$t` as the element type of dtype `$dtype`.
macro_rules! with_native {
    ($dtype:expr, $layer:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            candle_core::DType::F16 => {
                type $t = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            _ => candle_norm_support::messages::internal($layer, "a dtype that kernels know"),
        }
    };
}
use with_native;

/// The elements of a contiguous argument.
fn elements<'a, T: WithDType>(arg: Arg<'a>) -> Result<&'a [T]> {
    match arg.layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(arg.storage)?[start..end]),
        None => messages::internal("kernel", "a contiguous tensor"),
    }
}

/// The elements of a parameter in the precision that it is multiplied in.
fn widened<'a, A: Accumulator>(arg: Arg<'a>) -> Result<Cow<'a, [A]>> {
    Ok(match arg.storage {
        CpuStorage::F16(_) => elements::<half::f16>(arg)?
            .iter()
            .map(|v| A::from_f64(v.to_f64()))
            .collect(),
        CpuStorage::BF16(_) => elements::<half::bf16>(arg)?
            .iter()
            .map(|v| A::from_f64(v.to_f64()))
            .collect(),
        CpuStorage::F32(_) if A::DTYPE == DType::F64 => elements::<f32>(arg)?
            .iter()
            .map(|v| A::from_f64(f64::from(*v)))
            .collect(),
        _ => Cow::Borrowed(elements::<A>(arg)?),
    })
}

/// [`widened`], of a parameter that there may be.
fn parameter<'a, A: Accumulator>(arg: Option<Arg<'a>>) -> Result<Option<Cow<'a, [A]>>> {
    arg.map(widened).transpose()
}

/// Gradients of the kernels as storages; those of parameters only where they were asked for.
fn stored<T: WithDType>(
    grads: candle_norm_kernels::Gradients<T>,
    params: bool,
) -> Gradients<CpuStorage> {
    let stored = |grad| params.then_some(CpuStorage::F64(grad));
    Gradients {
        dx: T::to_cpu_storage_owned(grads.dx),
        dweight: stored(grads.dweight),
        dbias: stored(grads.dbias),
    }
}
