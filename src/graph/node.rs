//! Nodes of candle's graph: the one file that knows candle's custom ops.
//!
//! A [`Node`] is made for one call and lives in the graph: what its forward leaves for the backward
//! stays inside it. A backward reaches the storages of its arguments as an op does, by an inner op
//! without a backward of its own, on detached tensors: `storage_and_layout` could wait for ever on
//! a thread that sets a variable, where two arguments share a storage.

use std::cell::Cell;
use std::iter::once;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, StorageRef,
    Tensor, bail,
};

use super::fingerprint::Fingerprint;
use super::path::Kernels;
use crate::backend::cpu::Cpu;
#[cfg(feature = "internals")]
use crate::backend::reference::Reference;
use crate::backend::{AddOn, Added, Backward, Forward, On, Statistics, View};
use crate::computations::{Args, Gradients, composed};
use crate::support::messages;

/// A computation that every backend carries out.
#[cfg(not(feature = "internals"))]
pub(crate) trait Served: On<Cpu> {}
#[cfg(not(feature = "internals"))]
impl<C: On<Cpu>> Served for C {}

/// A computation that every backend carries out.
#[cfg(feature = "internals")]
pub(crate) trait Served: On<Cpu> + On<Reference> {}
#[cfg(feature = "internals")]
impl<C: On<Cpu> + On<Reference>> Served for C {}

/// State that a forward left for the backward.
enum Saved<C: Served> {
    Cpu(<C as On<Cpu>>::Saved),
    #[cfg(feature = "internals")]
    Reference(<C as On<Reference>>::Saved),
}

/// A node whose forward formed statistics.
pub(crate) trait KeepsStatistics {
    fn statistics(&self) -> Result<&dyn Statistics>;

    /// The mean and `√(var + eps)` of each row, group or channel, outside of the graph.
    fn mean_and_std(&self) -> Result<[Tensor; 2]> {
        let statistics = self.statistics()?;
        Ok([statistics.mean()?, statistics.std()?])
    }
}

/// Parameters that a node has among its arguments, after the input.
#[derive(Debug, Clone, Copy)]
struct Names {
    weight: bool,
    bias: bool,
}

impl Names {
    fn args<T: Copy>(self, all: &[T]) -> Result<Args<T>> {
        let mut rest = all.iter().copied();
        let Some(x) = rest.next() else {
            return messages::internal("node", "an input");
        };
        let mut next = |is_there: bool| if is_there { rest.next() } else { None };
        Ok(Args {
            x,
            weight: next(self.weight),
            bias: next(self.bias),
        })
    }
}

/// One call of a computation.
pub(super) struct Node<C: Served> {
    computation: C,
    kernels: Kernels,
    names: Names,
    saved: OnceLock<Saved<C>>,
    /// Whether a backward or a question for statistics may follow.
    is_followed: bool,
    /// The output, where it was computed before.
    ready: OneShot<Storage>,
    /// Of the input of the forward, where a backward that reads it may follow.
    input: Option<OnceLock<Fingerprint>>,
}

/// `computation` of `args` as a node of the graph, which is `asked` for statistics or not.
pub(super) fn fused<C: Served>(
    computation: C,
    kernels: Kernels,
    args: Args<&Tensor>,
    asked: bool,
) -> Result<(Tensor, Arc<Node<C>>)> {
    connected(computation, kernels, args, asked, None)
}

/// The node of a computation whose forward has run, where there is one.
fn connected<C: Served>(
    computation: C,
    kernels: Kernels,
    args: Args<&Tensor>,
    asked: bool,
    ran: Option<Forward<Storage, Saved<C>>>,
) -> Result<(Tensor, Arc<Node<C>>)> {
    let Args { x, weight, bias } = args;
    let takes = match kernels {
        Kernels::Cpu => On::<Cpu>::takes(&computation, x.layout()),
        #[cfg(feature = "internals")]
        Kernels::Reference => On::<Reference>::takes(&computation, x.layout()),
    };
    let mut inputs = vec![if takes { x.clone() } else { x.contiguous()? }];
    // The backward multiplies by the weight: a step of an optimizer may come before.
    let all = [Some(x), weight, bias];
    let reads_bias =
        computation.backward_reads_bias() && all.into_iter().flatten().any(Tensor::track_op);
    inputs.extend(match weight {
        Some(weight) if computation.weight_is_input() => Some(composed::unshared(weight)?),
        Some(weight) if x.track_op() || reads_bias => Some(composed::kept(weight)?),
        Some(weight) => Some(weight.contiguous()?),
        None => None,
    });
    inputs.extend(match bias {
        Some(bias) if reads_bias => Some(composed::kept(bias)?),
        Some(bias) => Some(bias.contiguous()?),
        None => None,
    });
    let is_tracked = inputs.iter().any(Tensor::track_op);
    let reads_input = is_tracked && computation.backward_reads_input();
    let (ready, saved) = ran.map(|f| (f.y, f.saved)).unzip();
    let node = Arc::new(Node {
        computation,
        kernels,
        names: Names {
            weight: weight.is_some(),
            bias: bias.is_some(),
        },
        saved: saved.map(OnceLock::from).unwrap_or_default(),
        is_followed: asked || is_tracked || recorded(),
        ready: OneShot::new(ready),
        input: reads_input.then(OnceLock::new),
    });
    let link = Link(node.clone());
    let y = match inputs.as_slice() {
        [x] => x.apply_op1(link)?,
        [x, a] => x.apply_op2(a, link)?,
        [x, a, b] => x.apply_op3(a, b, link)?,
        _ => messages::internal(node.computation.layer(), "at most three arguments")?,
    };
    #[cfg(feature = "internals")]
    {
        let node = node.clone();
        super::recorder::record(move |dy| node.bwd(&inputs.iter().collect::<Vec<_>>(), dy));
    }
    Ok((y, node))
}

/// Whether a test asks for the backward of a node that nothing tracks.
fn recorded() -> bool {
    #[cfg(feature = "internals")]
    return super::recorder::is_recording();
    #[cfg(not(feature = "internals"))]
    false
}

impl<C: Served> Node<C> {
    fn forward_on_cpu(&self, all: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let args = self.names.args(all)?;
        if let Some(input) = &self.input {
            let _ = input.set(Fingerprint::of(args.x));
        }
        let layout = args.x.layout;
        let (shape, _) = self.computation.output(layout.shape(), DType::F32);
        if let Some(Storage::Cpu(y)) = self.ready.take() {
            return Ok((y, shape));
        }
        if !self.is_followed {
            let y = match self.kernels {
                Kernels::Cpu => On::<Cpu>::inference(&self.computation, args)?,
                #[cfg(feature = "internals")]
                Kernels::Reference => On::<Reference>::inference(&self.computation, args)?,
            };
            return Ok((y, shape));
        }
        let (y, saved) = match self.kernels {
            Kernels::Cpu => {
                let Forward { y, saved } = On::<Cpu>::forward(&self.computation, args)?;
                (y, Saved::Cpu(saved))
            }
            #[cfg(feature = "internals")]
            Kernels::Reference => {
                let Forward { y, saved } = On::<Reference>::forward(&self.computation, args)?;
                (y, Saved::Reference(saved))
            }
        };
        let _ = self.saved.set(saved);
        Ok((y, shape))
    }

    fn saved(&self) -> Result<&Saved<C>> {
        match self.saved.get() {
            Some(saved) => Ok(saved),
            None => messages::internal(self.computation.layer(), "a forward before the backward"),
        }
    }

    /// The gradients of all arguments, in their order.
    fn bwd(&self, all: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let args = self.names.args(all)?;
        let (layer, x) = (self.computation.layer(), args.x);
        let (shape, dtype) = self.computation.output(x.shape(), x.dtype());
        messages::shape(layer, "the gradient of the output", dy, shape.dims())?;
        messages::dtype(layer, "the gradient of the output", dy, dtype)?;
        self.check_input(x)?;
        let grads = if higher_order() {
            self.computation.composed_gradients(args, dy)?
        } else {
            self.gradients(args, dy)?
        };
        let like = |grad: Option<Tensor>, arg: &Tensor| {
            grad.map(|g| g.reshape(arg.shape())?.to_dtype(arg.dtype()))
                .transpose()
        };
        let params = [(args.weight, grads.dweight), (args.bias, grads.dbias)];
        let params = params
            .into_iter()
            .filter_map(|(arg, grad)| Some((arg?, grad)));
        once(like(Some(grads.dx), x))
            .chain(params.map(|(arg, grad)| match arg.track_op() {
                true => like(grad, arg),
                false => Ok(None),
            }))
            .collect()
    }

    /// Checks that the backward finds the input of the forward.
    fn check_input(&self, x: &Tensor) -> Result<()> {
        let Some(input) = self.input.as_ref().and_then(OnceLock::get) else {
            return Ok(());
        };
        let is_same = on_storages(self.computation.layer(), &[x], |all| {
            Ok(Fingerprint::of(all[0]) == *input)
        })?;
        unchanged(self.computation.layer(), is_same)
    }

    /// The gradients by the backend that ran the forward, outside of the graph.
    fn gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (layer, saved) = (self.computation.layer(), self.saved()?);
        let params = [args.weight, args.bias].into_iter().flatten();
        let params = params.into_iter().any(Tensor::track_op);
        let dy = dy.contiguous()?;
        let inputs: Vec<&Tensor> = [args.x, &dy].into_iter().chain(args.weight).collect();
        // A copy, which nothing else locks: an inner op has no argument left for it.
        let bias = args.bias.filter(|_| self.computation.backward_reads_bias());
        let bias = bias.map(|b| b.detach().force_contiguous()).transpose()?;
        let grads = on_storages(layer, &inputs, |all| {
            let (x, dy, weight) = (all[0], all[1], all.get(2).copied());
            let bias = bias.as_ref().map(Tensor::storage_and_layout);
            let bias = bias.as_ref().map(|b| view(layer, b)).transpose()?;
            match saved {
                Saved::Cpu(saved) => On::<Cpu>::backward(
                    &self.computation,
                    Backward {
                        x,
                        weight,
                        bias,
                        dy,
                        saved,
                        params,
                    },
                ),
                #[cfg(feature = "internals")]
                Saved::Reference(saved) => On::<Reference>::backward(
                    &self.computation,
                    Backward {
                        x,
                        weight,
                        bias,
                        dy,
                        saved,
                        params,
                    },
                ),
            }
        })?;
        let count = |t: &Tensor| t.elem_count();
        let of = |grad: Option<CpuStorage>, arg: Option<&Tensor>| {
            Some(outside(Storage::Cpu(grad?), arg.map(count)?))
        };
        Ok(Gradients {
            dx: outside(Storage::Cpu(grads.dx), count(args.x)),
            dweight: of(grads.dweight, args.weight),
            dbias: of(grads.dbias, args.bias),
        })
    }
}

impl<C: Served> KeepsStatistics for Node<C> {
    fn statistics(&self) -> Result<&dyn Statistics> {
        let statistics = match self.saved()? {
            Saved::Cpu(saved) => <C as On<Cpu>>::statistics(saved),
            #[cfg(feature = "internals")]
            Saved::Reference(saved) => <C as On<Reference>>::statistics(saved),
        };
        match statistics {
            Some(statistics) => Ok(statistics),
            None => messages::internal(self.computation.layer(), "statistics"),
        }
    }
}

/// Check that the backward finds the input of the forward.
fn unchanged(layer: &str, unchanged: bool) -> Result<()> {
    if !unchanged {
        bail!(
            "{layer}: expected the input of the forward in the backward, got other values in its \
            place, as Var::set and slice_set write them; run the forward again, or set the \
            variable after the backward"
        )
    }
    Ok(())
}

/// A storage as a tensor outside of the graph.
fn outside(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Whether candle keeps the graph of gradients; it reads the variable once for each thread, as this
/// does.
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

/// A value that one node makes and another takes.
struct OneShot<T>(Mutex<Option<T>>);

impl<T> OneShot<T> {
    fn new(value: Option<T>) -> Self {
        Self(Mutex::new(value))
    }

    fn put(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    fn take(&self) -> Option<T> {
        let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        value.take()
    }
}

/// A computation that every backend carries out on sums.
#[cfg(not(feature = "internals"))]
pub(crate) trait ServedAdded: Served + AddOn<Cpu> {}
#[cfg(not(feature = "internals"))]
impl<C: Served + AddOn<Cpu>> ServedAdded for C {}

/// A computation that every backend carries out on sums.
#[cfg(feature = "internals")]
pub(crate) trait ServedAdded: Served + AddOn<Cpu> + AddOn<Reference> {}
#[cfg(feature = "internals")]
impl<C: Served + AddOn<Cpu> + AddOn<Reference>> ServedAdded for C {}

/// `args.x + residual`, and `computation` of that sum: `(y, sum)`, each a node of the graph. One
/// pass computes both.
///
/// In half precision the node of the sum is in `f32`, and a third node rounds it: gradients that
/// reach the sum are then added up in `f32` too.
pub(super) fn fused_added<C: ServedAdded>(
    computation: C,
    kernels: Kernels,
    args: Args<&Tensor>,
    residual: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (layer, x) = (computation.layer(), args.x);
    // Copies, which nothing else locks: an inner op has no argument left for them.
    let copy = |p: Option<&Tensor>| p.map(|p| p.detach().force_contiguous()).transpose();
    let (weight, bias) = (copy(args.weight)?, copy(args.bias)?);
    let added = on_storages(layer, &[x, residual], |all| {
        let [weight, bias] = [&weight, &bias].map(|p| p.as_ref().map(Tensor::storage_and_layout));
        let view = |param| Option::as_ref(param).map(|p| view(layer, p)).transpose();
        let args = Args {
            x: all[0],
            weight: view(&weight)?,
            bias: view(&bias)?,
        };
        match kernels {
            Kernels::Cpu => Ok(stored(
                AddOn::<Cpu>::add_forward(&computation, args, all[1])?,
                Saved::Cpu,
            )),
            #[cfg(feature = "internals")]
            Kernels::Reference => Ok(stored(
                AddOn::<Reference>::add_forward(&computation, args, all[1])?,
                Saved::Reference,
            )),
        }
    })?;
    let ready = |storage: Storage| Ready {
        layer,
        dtype: storage.dtype(),
        storage: OneShot::new(Some(storage)),
    };
    let sum = x.apply_op2(residual, ready(added.sum))?;
    let args = Args { x: &sum, ..args };
    let (y, _) = connected(computation, kernels, args, false, Some(added.normalized))?;
    match added.rounded {
        None => Ok((y, sum)),
        Some(rounded) => Ok((y, sum.apply_op1(ready(rounded))?)),
    }
}

fn view<'a>(
    layer: &str,
    (storage, layout): &'a (StorageRef<'_>, &'a Layout),
) -> Result<View<'a, CpuStorage>> {
    match &**storage {
        Storage::Cpu(storage) => Ok(View { storage, layout }),
        _ => messages::internal(layer, "parameters on the CPU"),
    }
}

fn stored<T, C: Served>(
    added: Added<CpuStorage, T>,
    saved: impl Fn(T) -> Saved<C>,
) -> Added<Storage, Saved<C>> {
    Added {
        sum: Storage::Cpu(added.sum),
        rounded: added.rounded.map(Storage::Cpu),
        normalized: Forward {
            y: Storage::Cpu(added.normalized.y),
            saved: saved(added.normalized.saved),
        },
    }
}

/// A [`Node`] as candle's op of as many arguments as it has.
struct Link<C: Served>(Arc<Node<C>>);

impl<C: Served> CustomOp1 for Link<C> {
    fn name(&self) -> &'static str {
        self.0.computation.layer()
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.forward_on_cpu(&[View { storage, layout }])
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.0.bwd(&[x], dy)?.swap_remove(0))
    }
}

impl<C: Served> CustomOp2 for Link<C> {
    fn name(&self) -> &'static str {
        self.0.computation.layer()
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.forward_on_cpu(&views([s1, s2], [l1, l2]))
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.0.bwd(&[x, a], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next()))
    }
}

impl<C: Served> CustomOp3 for Link<C> {
    fn name(&self) -> &'static str {
        self.0.computation.layer()
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
        self.0.forward_on_cpu(&views([s1, s2, s3], [l1, l2, l3]))
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.0.bwd(&[x, a, b], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}

fn views<'a, const N: usize>(
    storages: [&'a CpuStorage; N],
    layouts: [&'a Layout; N],
) -> [View<'a, CpuStorage>; N] {
    std::array::from_fn(|i| View {
        storage: storages[i],
        layout: layouts[i],
    })
}

/// A node whose output was computed before, through which gradients pass as they are.
struct Ready {
    layer: &'static str,
    dtype: DType,
    storage: OneShot<Storage>,
}

impl Ready {
    fn forward_on_cpu(&self, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.storage.take() {
            Some(Storage::Cpu(storage)) => Ok((storage, layout.shape().clone())),
            _ => messages::internal(self.layer, "the sum on the CPU"),
        }
    }

    fn bwd(&self, arg: &Tensor, dsum: &Tensor) -> Result<Option<Tensor>> {
        let name = "the gradient of the sum";
        messages::shape(self.layer, name, dsum, arg.dims())?;
        messages::dtype(self.layer, name, dsum, self.dtype)?;
        arg.track_op()
            .then(|| dsum.to_dtype(arg.dtype()))
            .transpose()
    }
}

impl CustomOp1 for Ready {
    fn name(&self) -> &'static str {
        self.layer
    }
    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward_on_cpu(layout)
    }
    fn bwd(&self, arg: &Tensor, _: &Tensor, dsum: &Tensor) -> Result<Option<Tensor>> {
        self.bwd(arg, dsum)
    }
}

impl CustomOp2 for Ready {
    fn name(&self) -> &'static str {
        self.layer
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward_on_cpu(layout)
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dsum: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.bwd(a, dsum)?, self.bwd(b, dsum)?))
    }
}

/// The result of `f` for the storages of tensors, outside of the graph.
fn on_storages<R, F>(layer: &'static str, tensors: &[&Tensor], f: F) -> Result<R>
where
    F: Fn(&[View<CpuStorage>]) -> Result<R>,
{
    let visit = Visit {
        layer,
        f,
        result: OneShot::new(None),
    };
    let detached: Vec<Tensor> = tensors.iter().map(|t| t.detach()).collect();
    match detached.as_slice() {
        [a] => a.apply_op1_no_bwd(&visit)?,
        [a, b] => a.apply_op2_no_bwd(b, &visit)?,
        [a, b, c] => a.apply_op3_no_bwd(b, c, &visit)?,
        _ => messages::internal(layer, "at most three arguments")?,
    };
    match visit.result.take() {
        Some(result) => Ok(result),
        None => messages::internal(layer, "a result"),
    }
}

/// An op that hands the storages of its arguments to a function; its output has no elements.
struct Visit<F, R> {
    layer: &'static str,
    f: F,
    result: OneShot<R>,
}

impl<R, F: Fn(&[View<CpuStorage>]) -> Result<R>> Visit<F, R> {
    fn run(&self, views: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        self.result.put((self.f)(views)?);
        Ok((CpuStorage::U8(vec![]), Shape::from(0)))
    }
}

impl<R, F: Fn(&[View<CpuStorage>]) -> Result<R>> CustomOp1 for Visit<F, R> {
    fn name(&self) -> &'static str {
        self.layer
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(&[View { storage, layout }])
    }
}

impl<R, F: Fn(&[View<CpuStorage>]) -> Result<R>> CustomOp2 for Visit<F, R> {
    fn name(&self) -> &'static str {
        self.layer
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(&views([s1, s2], [l1, l2]))
    }
}

impl<R, F: Fn(&[View<CpuStorage>]) -> Result<R>> CustomOp3 for Visit<F, R> {
    fn name(&self) -> &'static str {
        self.layer
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
        self.run(&views([s1, s2, s3], [l1, l2, l3]))
    }
}
