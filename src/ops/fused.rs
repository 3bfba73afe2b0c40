//! The fused path: how kernels on slices become nodes of candle's graph.
//!
//! A [`FusedOp`] is made for one call and lives in the graph: what its forward leaves for the backward stays inside it. The backward
//! reaches the storages of its arguments as an op does, by an inner op without a backward of its own, on detached
//! tensors: `storage_and_layout` could wait for ever on a thread that sets a variable, where two arguments share a storage.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType,
};

use super::{check, composed};
use crate::kernels::Float;

/// An element type that both candle and the kernels know.
pub(super) trait Native: WithDType + Float<Acc: Accumulator> {}
impl<T: WithDType + Float<Acc: Accumulator>> Native for T {}

/// What the kernels compute in.
pub(super) trait Accumulator: WithDType + Float<Acc = Self> {}
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
            _ => crate::ops::check::internal($layer, "a dtype that kernels know"),
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
        None => check::internal("kernel", "a contiguous tensor"),
    }
}

/// The elements of a parameter in the precision that it is multiplied in.
pub(super) fn widened<'a, A: Accumulator>(arg: Arg<'a>) -> Result<Cow<'a, [A]>> {
    let wide = |v: f64| A::from_f64(v);
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

/// Which parameters an op has, and where they are among its arguments.
#[derive(Debug, Clone, Copy)]
pub(super) struct Params {
    pub(super) weight: bool,
    pub(super) bias: bool,
}

impl Params {
    pub(super) fn of(weight: Option<&Tensor>, bias: Option<&Tensor>) -> Self {
        Self {
            weight: weight.is_some(),
            bias: bias.is_some(),
        }
    }

    /// The weight among the parameters `args`, in the precision that it is multiplied in.
    pub(super) fn weight<'a, A: Accumulator>(
        self,
        args: &[Arg<'a>],
    ) -> Result<Option<Cow<'a, [A]>>> {
        let weight = args.first().filter(|_| self.weight);
        weight.map(|w| widened(*w)).transpose()
    }

    /// The bias among the parameters `args`.
    pub(super) fn bias<'a, A: Accumulator>(self, args: &[Arg<'a>]) -> Result<Option<Cow<'a, [A]>>> {
        let bias = args.last().filter(|_| self.bias);
        bias.map(|b| widened(*b)).transpose()
    }

    /// The gradients of the parameters that there are, in the order of the arguments.
    pub(super) fn pick<T>(self, dweight: T, dbias: T) -> Vec<T> {
        let both = [(self.weight, dweight), (self.bias, dbias)];
        both.into_iter()
            .filter(|(has, _)| *has)
            .map(|(_, d)| d)
            .collect()
    }
}

/// What the forward left for the backward.
pub(super) fn saved<'a, T>(name: &str, slot: &'a OnceLock<T>) -> Result<&'a T> {
    match slot.get() {
        Some(saved) => Ok(saved),
        None => check::internal(name, "the forward to have run before the backward"),
    }
}

/// What one op makes and another takes away, so that neither keeps it.
pub(super) struct Slot<T>(Mutex<Option<T>>);

impl<T> Slot<T> {
    pub(super) fn new(value: Option<T>) -> Self {
        Self(Mutex::new(value))
    }

    pub(super) fn put(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    pub(super) fn take(&self) -> Option<T> {
        let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        value.take()
    }
}

/// Gradients by tensor operations, in the shapes and dtypes of the arguments.
pub(super) fn shaped(
    args: &[&Tensor],
    params: Params,
    grads: super::composed::Gradients,
) -> Result<Vec<Tensor>> {
    let mut all = vec![grads.dx];
    all.extend(params.pick(grads.dweight, grads.dbias));
    let pairs = all.iter().zip(args);
    pairs
        .map(|(g, arg)| g.reshape(arg.shape())?.to_dtype(arg.dtype()))
        .collect()
}

/// Whether `[N, C, *]` lies in memory as `[N, *, C]`, and not as it is written.
pub(super) fn is_channels_last(layout: &Layout) -> bool {
    let rank = layout.dims().len();
    if rank < 3 || layout.is_contiguous() {
        return false;
    }
    let mut step = 1;
    let inward = [1].into_iter().chain((2..rank).rev()).chain([0]);
    for axis in inward {
        let size = layout.dims()[axis];
        if size != 1 && layout.stride()[axis] != step {
            return false;
        }
        step *= size;
    }
    true
}

/// The elements of an argument whose channels are last, in the order in which they lie in memory.
pub(super) fn elements_in_memory<'a, T: WithDType>((storage, layout): Arg<'a>) -> Result<&'a [T]> {
    let (start, len) = (layout.start_offset(), layout.shape().elem_count());
    Ok(&T::cpu_storage_as_slice(storage)?[start..start + len])
}

/// A layer on the fused path: at most three arguments, contiguous unless it [takes](FusedOp::takes) others, the input first.
pub(super) trait FusedOp: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// The dtype of the output for an input of dtype `input`.
    fn output(&self, input: DType) -> DType {
        input
    }

    /// Whether the input may lie in memory like this.
    fn takes(&self, input: &Layout) -> bool {
        input.is_contiguous()
    }

    /// The output, of the input's shape.
    fn forward(&self, args: &[Arg]) -> Result<CpuStorage>;

    /// The gradient of the input from the arguments and, after them, the gradient of the output; those of the parameters go into the
    /// second place, in `f64`. `wanted` says which arguments anything tracks.
    fn backward(&self, args: &[Arg], wanted: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)>;

    /// The same gradients by tensor operations, for derivatives of higher order.
    fn backward_composed(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Tensor>>;
}

/// Applies `op` to `x` and the parameters that there are. Also returns the op, with what it saved.
pub(super) fn apply<F: FusedOp>(
    op: F,
    x: &Tensor,
    params: &[Option<&Tensor>],
) -> Result<(Tensor, Arc<F>)> {
    let mut args = vec![if op.takes(x.layout()) {
        x.clone()
    } else {
        x.contiguous()?
    }];
    for (i, param) in params.iter().enumerate() {
        // The first is a factor of the gradients.
        match param {
            Some(factor) if i == 0 && x.track_op() => args.push(composed::kept(factor)?),
            Some(param) => args.push(param.contiguous()?),
            None => {}
        }
    }
    let node = Node {
        op: Arc::new(op),
        input: args.iter().any(Tensor::track_op).then(Default::default),
    };
    let (op, recorded) = (node.op.clone(), node.clone());
    let y = match args.as_slice() {
        [x] => x.apply_op1(node)?,
        [x, a] => x.apply_op2(a, node)?,
        [x, a, b] => x.apply_op3(a, b, node)?,
        _ => check::internal(op.name(), "at most three arguments")?,
    };
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(slot) = recorder {
            *slot = Some(Box::new(move |dy| {
                recorded.bwd(&args.iter().collect::<Vec<_>>(), dy)
            }));
        }
    });
    Ok((y, op))
}

/// The backward of an op that ran, of the gradient of its output.
pub(super) type Handle = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

thread_local! {
    static RECORDER: RefCell<Option<Option<Handle>>> = const { RefCell::new(None) };
}

/// Runs `f`, and returns the backward of the last op that it applied.
pub(super) fn recording(f: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, Handle)> {
    RECORDER.set(Some(None));
    let y = f();
    match (y, RECORDER.take().flatten()) {
        (Ok(y), Some(handle)) => Ok((y, handle)),
        (Ok(_), None) => check::internal("hook", "a call on the fused path"),
        (Err(e), _) => Err(e),
    }
}

/// A [`FusedOp`] as candle's op of as many arguments as it has.
struct Node<F> {
    op: Arc<F>,
    /// Of the input of the forward, where a backward may follow.
    input: Option<Arc<OnceLock<Fingerprint>>>,
}

impl<F> Clone for Node<F> {
    fn clone(&self) -> Self {
        Self {
            op: self.op.clone(),
            input: self.input.clone(),
        }
    }
}

/// A digest of some elements, by which the backward sees that its input is that of the forward: the
/// statistics that it goes with were
/// formed of that. All elements of a small tensor, and of a large one as many as cost nothing
/// beside the rest.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fingerprint(u64);

impl Fingerprint {
    const MOST: usize = 64;

    fn of((storage, layout): Arg) -> Self {
        let (start, len) = (layout.start_offset(), layout.shape().elem_count());
        let count = len.min(Self::MOST);
        let places = (0..count).map(|i| start + i * (len - 1) / (count - 1).max(1));
        match storage {
            CpuStorage::F16(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::BF16(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::F32(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::F64(v) => Self::mixed(places.map(|i| v[i].to_bits())),
            _ => Self(0),
        }
    }

    fn mixed(bits: impl Iterator<Item = u64>) -> Self {
        Self(bits.fold(0, |sum, bits| {
            let mixed = (sum ^ bits).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^ (mixed >> 32)
        }))
    }
}

/// Comparison of the argument with a fingerprint. It applies to detached tensors, so that no
/// gradient is lost.
struct Look(Fingerprint);

impl CustomOp1 for Look {
    fn name(&self) -> &'static str {
        "fingerprint"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let same = Fingerprint::of((s, l)) == self.0;
        Ok((CpuStorage::U8(vec![u8::from(same)]), Shape::from(())))
    }
}

impl<F: FusedOp> Node<F> {
    fn fwd(&self, args: &[Arg]) -> Result<(CpuStorage, Shape)> {
        if let Some(input) = &self.input {
            let _ = input.set(Fingerprint::of(args[0]));
        }
        Ok((self.op.forward(args)?, args[0].1.shape().clone()))
    }

    fn check_input(&self, x: &Tensor) -> Result<()> {
        let Some(input) = self.input.as_ref().and_then(|input| input.get()) else {
            return Ok(());
        };
        let same = x.detach().apply_op1_no_bwd(&Look(*input))?;
        check::unchanged(self.op.name(), same.to_scalar::<u8>()? == 1)
    }

    fn bwd(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let x = args[0];
        check::shape(self.op.name(), "the gradient of the output", dy, x.dims())?;
        let dtype = self.op.output(x.dtype());
        check::dtype(self.op.name(), "the gradient of the output", dy, dtype)?;
        self.check_input(x)?;
        if higher_order() {
            let grads = self.op.backward_composed(args, dy)?;
            return Ok(grads.into_iter().map(Some).collect());
        }
        let (dx, dparams) = gradients(&*self.op, args, dy)?;
        Ok(std::iter::once(Some(dx)).chain(dparams).collect())
    }
}

/// Whether candle keeps the graph of gradients; it reads the variable once for each thread, as this does.
pub(super) fn higher_order() -> bool {
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
    // Detached, so that the inner op may do without a backward of its own. Of the parameters, only
    // the
    // first can be a factor of the gradients: a bias is left out.
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
        _ => check::internal(op.name(), "an argument")?,
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
        self.op.name()
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
        self.op.name()
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
