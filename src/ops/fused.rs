//! The fused path: how kernels on slices become nodes of candle's graph.
//!
//! A [`FusedOp`] is made for one call and lives in the graph: what its forward leaves for the backward stays inside it. The backward
//! reaches the storages of its arguments as an op does, by an inner op without a backward of its own, on detached
//! tensors: `storage_and_layout` could wait for ever on a thread that sets a variable, where two arguments share a storage.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType,
    bail,
};

use crate::kernels::simd::{Elem, Real};

/// An element type that both candle and the kernels know.
pub(super) trait Native: WithDType + Elem<Acc: Accumulator> {}
impl<T: WithDType + Elem<Acc: Accumulator>> Native for T {}

/// What the kernels compute in.
pub(super) trait Accumulator: Real + WithDType + Elem<Acc = Self> {}
impl<T: Real + WithDType + Elem<Acc = T>> Accumulator for T {}

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
            dtype => candle_core::bail!("{}: no kernel for {dtype:?}", $layer),
        }
    };
}
pub(super) use with_native;

/// One argument of an op.
pub(super) type Arg<'a> = (&'a CpuStorage, &'a Layout);

pub(super) fn dtype(arg: &Arg) -> DType {
    arg.0.dtype()
}

/// The elements of a contiguous argument.
pub(super) fn elements<'a, T: WithDType>((storage, layout): Arg<'a>) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("internal error: a kernel was given a strided tensor"),
    }
}

/// The elements of a parameter in the precision that it is multiplied in.
pub(super) fn widened<'a, A: Accumulator>(arg: Arg<'a>) -> Result<Cow<'a, [A]>> {
    let wide = |v: f64| A::from_wide(v);
    Ok(match arg.0 {
        CpuStorage::F16(_) => elements::<half::f16>(arg)?
            .iter()
            .map(|v| wide(v.to_f64()))
            .collect(),
        CpuStorage::BF16(_) => elements::<half::bf16>(arg)?
            .iter()
            .map(|v| wide(v.to_f64()))
            .collect(),
        CpuStorage::F32(_) if A::DTYPE == DType::F64 => elements::<f32>(arg)?
            .iter()
            .map(|v| wide(f64::from(*v)))
            .collect(),
        _ => Cow::Borrowed(elements::<A>(arg)?),
    })
}

/// A layer on the fused path: at most three arguments, all contiguous, the input first.
pub(super) trait FusedOp: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// The output, of the input's shape and dtype.
    fn forward(&self, args: &[Arg]) -> Result<CpuStorage>;

    /// The gradient of the input from the arguments and, after them, the gradient of the output; those of the parameters go into the
    /// second place, in `f64`. `wanted` says which arguments anything tracks.
    fn backward(&self, args: &[Arg], wanted: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)>;

    /// The same gradients by tensor operations, for derivatives of higher order.
    fn backward_composed(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Tensor>>;
}

/// Applies `op` to `x` and the parameters that there are.
pub(super) fn apply<F: FusedOp>(op: F, x: &Tensor, params: &[Option<&Tensor>]) -> Result<Tensor> {
    let mut args = vec![x.contiguous()?];
    for param in params.iter().flatten() {
        args.push(param.contiguous()?);
    }
    let node = Node(op);
    match args.as_slice() {
        [x] => x.apply_op1(node),
        [x, a] => x.apply_op2(a, node),
        [x, a, b] => x.apply_op3(a, b, node),
        _ => bail!("internal error: an op of more than three arguments"),
    }
}

/// A [`FusedOp`] as candle's op of as many arguments as it has.
struct Node<F>(F);

impl<F: FusedOp> Node<F> {
    fn fwd(&self, args: &[Arg]) -> Result<(CpuStorage, Shape)> {
        Ok((self.0.forward(args)?, args[0].1.shape().clone()))
    }

    fn bwd(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        if higher_order() {
            let grads = self.0.backward_composed(args, dy)?;
            return Ok(grads.into_iter().map(Some).collect());
        }
        let (dx, dparams) = gradients(&self.0, args, dy)?;
        Ok(std::iter::once(Some(dx)).chain(dparams).collect())
    }
}

/// Whether candle keeps the graph of gradients; it reads the variable once for each thread, as this does.
fn higher_order() -> bool {
    thread_local! {
        static KEPT: Cell<Option<bool>> = const { Cell::new(None) };
    }
    KEPT.get().unwrap_or_else(|| {
        let value = std::env::var("CANDLE_GRAD_DO_NOT_DETACH").unwrap_or_default();
        let kept = !value.is_empty() && value != "0";
        KEPT.set(Some(kept));
        kept
    })
}

/// The gradients of `op`: of the input, and of each parameter that anything tracks.
pub(super) fn gradients<F: FusedOp>(
    op: &F,
    args: &[&Tensor],
    dy: &Tensor,
) -> Result<(Tensor, Vec<Option<Tensor>>)> {
    // Of the parameters, only the first can be a factor of the gradients: a bias is left out.
    let mut inputs = vec![args[0].detach(), dy.detach().contiguous()?];
    inputs.extend(args.get(1).map(|weight| weight.detach()));
    let wanted: Vec<bool> = args.iter().map(|t| t.track_op()).collect();
    let inner = Backward {
        op,
        wanted: &wanted,
        dparams: OnceLock::new(),
    };
    let dx = match inputs.as_slice() {
        [x, dy, weight] => x.apply_op3_no_bwd(dy, weight, &inner)?,
        [x, dy] => x.apply_op2_no_bwd(dy, &inner)?,
        _ => bail!("internal error: an op without arguments"),
    };
    let mut dparams = inner.dparams.into_inner().unwrap_or_default().into_iter();
    let dparams = args[1..]
        .iter()
        .zip(&wanted[1..])
        .map(|(param, wanted)| match (dparams.next(), wanted) {
            (Some(grad), true) => {
                let grad = Tensor::from_vec(grad, param.shape(), param.device())?;
                grad.to_dtype(param.dtype()).map(Some)
            }
            _ => Ok(None),
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((dx, dparams))
}

/// The backward of a [`FusedOp`] as an op of the input, the gradient of the output, and the weight.
struct Backward<'a, F> {
    op: &'a F,
    wanted: &'a [bool],
    dparams: OnceLock<Vec<Vec<f64>>>,
}

impl<F: FusedOp> Backward<'_, F> {
    fn run(&self, args: &[Arg]) -> Result<(CpuStorage, Shape)> {
        let (dx, dparams) = self.op.backward(args, self.wanted)?;
        let _ = self.dparams.set(dparams);
        Ok((dx, args[0].1.shape().clone()))
    }
}

impl<F: FusedOp> CustomOp2 for Backward<'_, F> {
    fn name(&self) -> &'static str {
        self.op.name()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2)])
    }
}

impl<F: FusedOp> CustomOp3 for Backward<'_, F> {
    fn name(&self) -> &'static str {
        self.op.name()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&[(s1, l1), (s2, l2), (s3, l3)])
    }
}

impl<F: FusedOp> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s, l)])
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.bwd(&[x], dy)?.swap_remove(0))
    }
}

impl<F: FusedOp> CustomOp2 for Node<F> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2)])
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.bwd(&[x, a], dy)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl<F: FusedOp> CustomOp3 for Node<F> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.bwd(&[x, a, b], dy)?.into_iter();
        Ok((
            grads.next().flatten(),
            grads.next().flatten(),
            grads.next().flatten(),
        ))
    }
}
