//! Computations as nodes of candle's graph.
//!
//! A [`Node`] is made for one call and lives in the graph: what its forward leaves for the backward
//! stays inside it. A backward reaches the storages of its arguments as an op does, by an inner op
//! without a backward of its own, on detached tensors: `storage_and_layout` could wait for ever on
//! a thread that sets a variable, where two arguments share a storage.

use std::any::Any;
use std::cell::Cell;
use std::iter::once;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape,
    StorageRef, Tensor, bail,
};

use super::fingerprint::Fingerprint;
use super::path::Kernels;
use crate::backend::cpu::Cpu;
#[cfg(any(feature = "cuda", feature = "internals"))]
use crate::backend::cuda::Cuda;
#[cfg(feature = "cuda")]
use crate::backend::cuda::driver::Driver;
#[cfg(feature = "internals")]
use crate::backend::cuda::emulated::Emulated;
#[cfg(feature = "internals")]
use crate::backend::reference::Reference;
use crate::backend::{
    AddOn, Backend, Backward, DeviceStorage, Forward, On, Running, Statistics, View,
};
use crate::computations::{Args, Gradients, composed};
use candle_norm_support::messages;

/// A computation that every backend carries out, or else names as one that it does not.
pub(crate) trait Served: On<Cpu> + OnTests + OnCards {}
impl<C: On<Cpu> + OnTests + OnCards> Served for C {}

/// A computation that every backend carries out on sums.
pub(crate) trait ServedAdded: Served + AddOn<Cpu> + AddOnTests + AddOnCards {}
impl<C: Served + AddOn<Cpu> + AddOnTests + AddOnCards> ServedAdded for C {}

/// Bounds of the backends that there are under a feature.
macro_rules! under {
    ($feature:literal: $($name:ident, $on:ident: [$($backend:ty),+];)+) => {$(
        #[cfg(feature = $feature)]
        pub(crate) trait $name: $($on<$backend> +)+ {}
        #[cfg(feature = $feature)]
        impl<C: $($on<$backend> +)+> $name for C {}
        #[cfg(not(feature = $feature))]
        pub(crate) trait $name {}
        #[cfg(not(feature = $feature))]
        impl<C> $name for C {}
    )+};
}
under!("internals":
    OnTests, On: [Reference, Cuda<Emulated>];
    AddOnTests, AddOn: [Reference, Cuda<Emulated>];
);
under!("cuda":
    OnCards, On: [Cuda<Driver>];
    AddOnCards, AddOn: [Cuda<Driver>];
);

/// `$body`, in which `$b` is the backend that has `$kernels`.
macro_rules! with_backend {
    ($kernels:expr, $b:ident => $body:expr) => {
        match $kernels {
            Kernels::Cpu => {
                type $b = Cpu;
                $body
            }
            #[cfg(feature = "internals")]
            Kernels::Reference => {
                type $b = Reference;
                $body
            }
            #[cfg(feature = "internals")]
            Kernels::Emulated => {
                type $b = Cuda<Emulated>;
                $body
            }
            #[cfg(feature = "cuda")]
            Kernels::Cuda => {
                type $b = Cuda<Driver>;
                $body
            }
        }
    };
}

/// Whether the backend of `kernels` carries out `computation`.
pub(super) fn is_carried_out<C: Served>(computation: &C, kernels: Kernels) -> bool {
    with_backend!(kernels, B => On::<B>::is_carried_out(computation))
}

/// Whether the backend of `kernels` carries out `computation` on sums.
pub(super) fn is_carried_out_added<C: ServedAdded>(computation: &C, kernels: Kernels) -> bool {
    with_backend!(kernels, B => AddOn::<B>::is_carried_out_added(computation))
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

/// One call of a computation on a backend.
struct Node<C: On<B>, B: Backend> {
    computation: C,
    names: Names,
    saved: OnceLock<C::Saved>,
    /// Whether a backward or a question for statistics may follow.
    is_followed: bool,
    /// The output, where it was computed before.
    ready: OneShot<B::Storage>,
    /// Of the input of the forward, where a backward that reads it may follow and the host can read
    /// it too.
    input: Option<OnceLock<Fingerprint>>,
}

/// `computation` of `args` as a node of the graph. The caller needs its statistics, or not
/// (`keeps_statistics`).
pub(super) fn fused<C: Served>(
    computation: C,
    kernels: Kernels,
    args: Args<&Tensor>,
    keeps_statistics: bool,
) -> Result<(Tensor, Arc<dyn KeepsStatistics>)> {
    with_backend!(kernels, B => {
        let (y, node) = connected::<C, B>(computation, args, keeps_statistics, None)?;
        Ok((y, node as Arc<dyn KeepsStatistics>))
    })
}

/// `[mean, var, counter]` of running statistics after a batch with a mean and a variance, outside
/// of the graph, where the backend of `kernels` has a kernel for them. Nothing else locks the
/// batch's.
pub(super) fn updated(
    layer: &'static str,
    kernels: Kernels,
    running: [&Tensor; 3],
    batch: [&Tensor; 2],
    momentum: Option<f64>,
) -> Result<Option<[Tensor; 3]>> {
    with_backend!(kernels, B => updated_on::<B>(layer, running, batch, momentum))
}

fn updated_on<B: Backend>(
    layer: &'static str,
    running: [&Tensor; 3],
    batch: [&Tensor; 2],
    momentum: Option<f64>,
) -> Result<Option<[Tensor; 3]>> {
    if !B::UPDATES {
        return Ok(None);
    }
    let [batch_mean, batch_var] = batch.map(Tensor::contiguous);
    let (batch_mean, batch_var) = (batch_mean?, batch_var?);
    let (mean, [var, counter]) = on_storages::<B::Storage, _>(layer, &running, |all| {
        let batch = [&batch_mean, &batch_var].map(Tensor::storage_and_layout);
        let updated = B::updated(
            layer,
            Running {
                mean: all[0],
                var: all[1],
                counter: all[2],
                batch_mean: view(layer, &batch[0])?,
                batch_var: view(layer, &batch[1])?,
                momentum,
            },
        )?;
        let shape = all[0].layout.shape().clone();
        Ok((updated.mean, shape, [updated.var, updated.counter]))
    })?;
    let [_, of_var, of_counter] = running.map(Tensor::shape);
    let var = outside(var, of_var.clone());
    Ok(Some([mean, var, outside(counter, of_counter.clone())]))
}

/// A node, and its output.
type Connected<C, B> = (Tensor, Arc<Node<C, B>>);

/// The node of a computation whose forward has run, where there is one.
fn connected<C: On<B>, B: Backend>(
    computation: C,
    args: Args<&Tensor>,
    keeps_statistics: bool,
    ran: Option<Forward<B::Storage, C::Saved>>,
) -> Result<Connected<C, B>> {
    let Args { x, weight, bias } = args;
    let takes = computation.takes(x.layout());
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
        names: Names {
            weight: weight.is_some(),
            bias: bias.is_some(),
        },
        saved: saved.map(OnceLock::from).unwrap_or_default(),
        is_followed: keeps_statistics || is_tracked || recorded(),
        ready: OneShot::new(ready),
        input: reads_input.then(OnceLock::new),
    });
    let op = Custom(node.clone());
    let y = match inputs.as_slice() {
        [x] => x.apply_op1(op)?,
        [x, a] => x.apply_op2(a, op)?,
        [x, a, b] => x.apply_op3(a, b, op)?,
        _ => messages::internal(node.computation.layer(), "at most three arguments")?,
    };
    #[cfg(feature = "internals")]
    {
        let node = node.clone();
        super::recorder::record(move |dy| node.backward(&inputs.iter().collect::<Vec<_>>(), dy));
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

impl<C: On<B>, B: Backend> Op for Arc<Node<C, B>> {
    type Storage = B::Storage;

    fn layer(&self) -> &'static str {
        self.computation.layer()
    }

    fn forward(&self, all: &[View<B::Storage>]) -> Result<(B::Storage, Shape)> {
        let args = self.names.args(all)?;
        if let (Some(input), Some(x)) = (&self.input, on_host(args.x)) {
            let _ = input.set(Fingerprint::of(x));
        }
        let (shape, _) = self
            .computation
            .output(args.x.layout.shape(), args.x.storage.dtype());
        if let Some(y) = self.ready.take() {
            return Ok((y, shape));
        }
        if !self.is_followed {
            return Ok((self.computation.inference(args)?, shape));
        }
        let Forward { y, saved } = self.computation.forward(args)?;
        let _ = self.saved.set(saved);
        Ok((y, shape))
    }

    /// The gradients of all arguments, in their order.
    fn backward(&self, all: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
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
}

impl<C: On<B>, B: Backend> Node<C, B> {
    fn saved(&self) -> Result<&C::Saved> {
        match self.saved.get() {
            Some(saved) => Ok(saved),
            None => messages::internal(self.computation.layer(), "a forward before the backward"),
        }
    }

    /// Checks that the backward finds the input of the forward.
    fn check_input(&self, x: &Tensor) -> Result<()> {
        let Some(input) = self.input.as_ref().and_then(OnceLock::get) else {
            return Ok(());
        };
        let layer = self.computation.layer();
        let (_, is_same) = on_storages::<CpuStorage, _>(layer, &[x], |all| {
            let is_same = Fingerprint::of(all[0]) == *input;
            Ok((CpuStorage::U8(vec![]), Shape::from(0), is_same))
        })?;
        unchanged(layer, is_same)
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
        let (dx, [dweight, dbias]) = on_storages::<B::Storage, _>(layer, &inputs, |all| {
            let bias = bias.as_ref().map(Tensor::storage_and_layout);
            let bias = bias.as_ref().map(|b| view(layer, b)).transpose()?;
            let grads = self.computation.backward(Backward {
                x: all[0],
                dy: all[1],
                weight: all.get(2).copied(),
                bias,
                saved,
                params,
            })?;
            let shape = all[0].layout.shape().clone();
            Ok((grads.dx, shape, [grads.dweight, grads.dbias]))
        })?;
        let of = |grad: Option<B::Storage>, arg: Option<&Tensor>| {
            Some(outside(grad?, arg?.elem_count()))
        };
        Ok(Gradients {
            dx,
            dweight: of(dweight, args.weight),
            dbias: of(dbias, args.bias),
        })
    }
}

impl<C: On<B>, B: Backend> KeepsStatistics for Node<C, B> {
    fn statistics(&self) -> Result<&dyn Statistics> {
        match C::statistics(self.saved()?) {
            Some(statistics) => Ok(statistics),
            None => messages::internal(self.computation.layer(), "statistics"),
        }
    }
}

/// A view of elements that the host can read.
fn on_host<S: DeviceStorage>(view: View<S>) -> Option<View<CpuStorage>> {
    let View { storage, layout } = view;
    let storage = storage.on_host()?;
    Some(View { storage, layout })
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
fn outside(storage: impl DeviceStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage.into_storage(), shape, BackpropOp::none(), false)
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

    fn put(&self, value: Option<T>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }

    fn take(&self) -> Option<T> {
        let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        value.take()
    }
}

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
    with_backend!(kernels, B => added_on::<C, B>(computation, args, residual))
}

fn added_on<C: AddOn<B>, B: Backend>(
    computation: C,
    args: Args<&Tensor>,
    residual: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (layer, x) = (computation.layer(), args.x);
    // Copies, which nothing else locks: an inner op has no argument left for them.
    let copy = |p: Option<&Tensor>| p.map(|p| p.detach().force_contiguous()).transpose();
    let (weight, bias) = (copy(args.weight)?, copy(args.bias)?);
    let rest = Arc::new(OneShot::new(None));
    let sum = Through {
        layer,
        dtype: composed::accumulator(x.dtype()),
        run: {
            let (computation, rest) = (computation.clone(), rest.clone());
            move |all: &[View<B::Storage>]| {
                let [weight, bias] =
                    [&weight, &bias].map(|p| p.as_ref().map(Tensor::storage_and_layout));
                let view = |param| Option::as_ref(param).map(|p| view(layer, p)).transpose();
                let args = Args {
                    x: all[0],
                    weight: view(&weight)?,
                    bias: view(&bias)?,
                };
                let added = computation.add_forward(args, all[1])?;
                rest.put(Some((added.rounded, added.normalized)));
                Ok(added.sum)
            }
        },
        storage: PhantomData,
    };
    let sum = x.apply_op2(residual, Custom(sum))?;
    let Some((rounded, normalized)) = rest.take() else {
        return messages::internal(layer, "a forward of the sum");
    };
    let args = Args { x: &sum, ..args };
    let (y, _) = connected(computation, args, false, Some(normalized))?;
    let Some(rounded) = rounded else {
        return Ok((y, sum));
    };
    let rounded = OneShot::new(Some(rounded));
    let rounding = Through {
        layer,
        dtype: x.dtype(),
        run: move |_: &[View<B::Storage>]| match rounded.take() {
            Some(rounded) => Ok(rounded),
            None => messages::internal(layer, "the rounded sum"),
        },
        storage: PhantomData,
    };
    Ok((y, sum.apply_op1(Custom(rounding))?))
}

fn view<'a, S: DeviceStorage>(
    layer: &str,
    (storage, layout): &'a (StorageRef<'_>, &'a Layout),
) -> Result<View<'a, S>> {
    match S::of(storage) {
        Some(storage) => Ok(View { storage, layout }),
        None => messages::internal(layer, "parameters on the device of the input"),
    }
}

/// An op whose output has the shape of its arguments, and through which gradients pass as they are.
struct Through<S, F> {
    layer: &'static str,
    /// Of the output.
    dtype: DType,
    run: F,
    storage: PhantomData<fn() -> S>,
}

impl<S: DeviceStorage, F: Fn(&[View<S>]) -> Result<S>> Op for Through<S, F> {
    type Storage = S;

    fn layer(&self) -> &'static str {
        self.layer
    }

    fn forward(&self, all: &[View<S>]) -> Result<(S, Shape)> {
        Ok(((self.run)(all)?, all[0].layout.shape().clone()))
    }

    fn backward(&self, all: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let name = "the gradient of the sum";
        let grads = all.iter().map(|arg| {
            messages::shape(self.layer, name, dy, arg.dims())?;
            messages::dtype(self.layer, name, dy, self.dtype)?;
            let is_tracked = arg.track_op();
            is_tracked.then(|| dy.to_dtype(arg.dtype())).transpose()
        });
        grads.collect()
    }
}

/// The output of `f` for the storages of tensors, and what else it returns, outside of the graph.
fn on_storages<S: DeviceStorage, R>(
    layer: &'static str,
    tensors: &[&Tensor],
    f: impl Fn(&[View<S>]) -> Result<(S, Shape, R)>,
) -> Result<(Tensor, R)> {
    let rest = OneShot::new(None);
    let visit = Custom(Visit {
        layer,
        run: |all: &[View<S>]| {
            let (output, shape, other) = f(all)?;
            rest.put(Some(other));
            Ok((output, shape))
        },
        storage: PhantomData,
    });
    let detached: Vec<Tensor> = tensors.iter().map(|t| t.detach()).collect();
    let output = match detached.as_slice() {
        [a] => a.apply_op1_no_bwd(&visit)?,
        [a, b] => a.apply_op2_no_bwd(b, &visit)?,
        [a, b, c] => a.apply_op3_no_bwd(b, c, &visit)?,
        _ => messages::internal(layer, "at most three arguments")?,
    };
    match rest.take() {
        Some(rest) => Ok((output, rest)),
        None => messages::internal(layer, "a result"),
    }
}

/// An op without a backward.
struct Visit<S, F> {
    layer: &'static str,
    run: F,
    storage: PhantomData<fn() -> S>,
}

impl<S: DeviceStorage, F: Fn(&[View<S>]) -> Result<(S, Shape)>> Op for Visit<S, F> {
    type Storage = S;

    fn layer(&self) -> &'static str {
        self.layer
    }

    fn forward(&self, all: &[View<S>]) -> Result<(S, Shape)> {
        (self.run)(all)
    }

    fn backward(&self, _: &[&Tensor], _: &Tensor) -> Result<Vec<Option<Tensor>>> {
        messages::internal(self.layer, "an op without a backward")
    }
}

/// An op of one to three arguments on storages of one kind.
trait Op {
    type Storage: DeviceStorage;

    /// The name that messages begin with.
    fn layer(&self) -> &'static str;

    fn forward(&self, all: &[View<Self::Storage>]) -> Result<(Self::Storage, Shape)>;

    /// The gradients of all arguments, in their order.
    fn backward(&self, all: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

/// An [`Op`] as candle's op of as many arguments as it has.
struct Custom<O>(O);

impl<O: Op> Custom<O> {
    /// The forward on storages of `S`, which is the op's own kind: another device would have
    /// another node.
    fn run<S: DeviceStorage>(&self, all: &[(&S, &Layout)]) -> Result<(S, Shape)> {
        let own = |&(storage, layout)| {
            let storage = (storage as &dyn Any).downcast_ref()?;
            Some(View { storage, layout })
        };
        let Some(all) = all.iter().map(own).collect::<Option<Vec<_>>>() else {
            return messages::internal(self.0.layer(), "arguments on the device of its node");
        };
        let (y, shape) = self.0.forward(&all)?;
        match S::from_storage(y.into_storage()) {
            Some(y) => Ok((y, shape)),
            None => messages::internal(self.0.layer(), "an output on the device of its node"),
        }
    }
}

/// candle's op of as many arguments as there are names.
macro_rules! custom_op {
    ($op:ident, $grads:ty: $($arg:ident $storage:ident $layout:ident),+) => {
        impl<O: Op> $op for Custom<O> {
            fn name(&self) -> &'static str {
                self.0.layer()
            }
            fn cpu_fwd(
                &self,
                $($storage: &CpuStorage, $layout: &Layout),+
            ) -> Result<(CpuStorage, Shape)> {
                self.run(&[$(($storage, $layout)),+])
            }
            fn cuda_fwd(
                &self,
                $($storage: &CudaStorage, $layout: &Layout),+
            ) -> Result<(CudaStorage, Shape)> {
                self.run(&[$(($storage, $layout)),+])
            }
            fn bwd(&self, $($arg: &Tensor,)+ _: &Tensor, dy: &Tensor) -> Result<$grads> {
                let mut grads = self.0.backward(&[$($arg),+], dy)?.into_iter();
                Ok(($({
                    let $arg = grads.next().flatten();
                    $arg
                }),+))
            }
        }
    };
}
type Grad = Option<Tensor>;
custom_op!(CustomOp1, Grad: a s1 l1);
custom_op!(CustomOp2, (Grad, Grad): a s1 l1, b s2 l2);
custom_op!(CustomOp3, (Grad, Grad, Grad): a s1 l1, b s2 l2, c s3 l3);
