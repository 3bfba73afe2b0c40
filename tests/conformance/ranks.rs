//! A batch that several ranks have shares of, as one node of one graph.
//!
//! The runner calls a layer and backpropagates on one thread, and ranks wait for each other on
//! threads of their own. So the node runs all ranks forward, and runs them again, forward and
//! backward, when its gradient arrives.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, Var, bail,
};
use candle_nn::ModuleT;
use candle_norm::distributed::Threads;
use candle_norm::{BatchNormOptions, Path, RunningStats, batch_norm, with_path};

use crate::layers::{Inputs, Outputs, builder, with_state};
use crate::runner::loss;

thread_local! {
    static PATH: Cell<Path> = const { Cell::new(Path::Auto) };
}

/// Runs `f` on a path, which the ranks that it starts take too.
pub(crate) fn on_path<T>(path: Path, f: impl FnOnce() -> T) -> T {
    let before = PATH.replace(path);
    let result = with_path(path, f);
    PATH.set(before);
    result
}

/// Ranks that train one synchronized batch norm, each with a copy of its variables.
#[derive(Clone)]
pub(crate) struct Ranks {
    /// The number of samples of each.
    pub(crate) counts: Vec<usize>,
    pub(crate) channels: usize,
    pub(crate) options: BatchNormOptions,
    pub(crate) dtype: DType,
    /// Running statistics before the call.
    pub(crate) state: HashMap<String, Tensor>,
}

/// The outcome of one rank.
struct Ran {
    outputs: Outputs,
    /// By name; `x` is that of the input.
    gradients: HashMap<String, Tensor>,
}

impl Ranks {
    /// The output for `inputs`, connected to them, and the statistics of rank 0, which are those of
    /// all.
    pub(crate) fn train(self, inputs: &Inputs) -> Result<Outputs> {
        let path = PATH.get();
        let names: Vec<String> = ["x", "weight", "bias"]
            .into_iter()
            .filter(|name| inputs.contains_key(*name))
            .map(str::to_string)
            .collect();
        let args: Vec<Tensor> = names.iter().map(|name| inputs[name].clone()).collect();
        let ran = self.run(path, &names, &args, None)?;
        let state = ran[0].outputs.state.clone();
        for rank in &ran {
            for ((name, first), (_, own)) in state.iter().zip(&rank.outputs.state) {
                let bits = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                let (first, own) = (bits(first)?, bits(own)?);
                if (first.iter().zip(&own)).any(|(a, b)| a.to_bits() != b.to_bits()) {
                    bail!("{name} differs between ranks: {first:?}, {own:?}")
                }
            }
        }
        let y = joined(ran.iter().map(|rank| &rank.outputs.y), &args[0])?;
        let node = Node {
            ranks: Arc::new(self),
            path,
            names,
            y,
        };
        let y = match args.as_slice() {
            [x] => x.apply_op1(node)?,
            [x, a] => x.apply_op2(a, node)?,
            [x, a, b] => x.apply_op3(a, b, node)?,
            _ => bail!("more arguments than an op has"),
        };
        Ok(Outputs {
            y,
            sum: None,
            state,
        })
    }

    /// Every rank forward, and backward if there is a `dy`.
    fn run(
        &self,
        path: Path,
        names: &[String],
        args: &[Tensor],
        dy: Option<&Tensor>,
    ) -> Result<Vec<Ran>> {
        Threads::run(self.counts.len(), |group| {
            let start = self.counts[..group.rank()].iter().sum();
            let count = self.counts[group.rank()];
            let share = |t: &Tensor| t.detach().narrow(0, start, count);
            let mut vars = HashMap::new();
            for (name, arg) in names.iter().zip(args) {
                let value = if name == "x" {
                    share(arg)?
                } else {
                    arg.detach()
                };
                vars.insert(name.clone(), Var::from_tensor(&value.force_contiguous()?)?);
            }
            with_path(path, || {
                let tensors = vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone()));
                let mut tensors: Inputs = tensors.collect();
                // Where it lies in memory counts in the forward.
                let x = match dy {
                    Some(_) => tensors["x"].clone(),
                    None => share(&args[0])?,
                };
                tensors.extend(self.state.clone());
                let vb = builder(tensors, self.dtype);
                let norm = batch_norm(self.channels, self.options, vb)?.synchronized(group);
                let y = norm.forward_t(&x, true)?;
                let mut gradients = HashMap::new();
                if let Some(dy) = dy {
                    let grads = loss(&y, &share(dy)?)?.backward()?;
                    for (name, var) in &vars {
                        let gradient = grads.get(var).cloned();
                        gradients.insert(name.clone(), gradient.map_or(var.zeros_like(), Ok)?);
                    }
                }
                let stats: Option<&RunningStats> = norm.running_stats();
                Ok(Ran {
                    outputs: with_state(y, stats)?,
                    gradients,
                })
            })
        })
    }
}

/// Shares of a batch that is like `whole`.
fn joined<'a>(shares: impl Iterator<Item = &'a Tensor>, whole: &Tensor) -> Result<Tensor> {
    let shares: Vec<Tensor> = shares
        .filter(|t| t.elem_count() > 0)
        .map(Tensor::detach)
        .collect();
    match shares.is_empty() {
        true => whole.detach().force_contiguous(),
        false => Tensor::cat(&shares, 0),
    }
}

/// All ranks as one op.
struct Node {
    ranks: Arc<Ranks>,
    path: Path,
    names: Vec<String>,
    y: Tensor,
}

impl Node {
    fn forward(&self) -> Result<(CpuStorage, Shape)> {
        let y = self.y.flatten_all()?;
        let storage = match y.dtype() {
            DType::F64 => CpuStorage::F64(y.to_vec1()?),
            DType::F32 => CpuStorage::F32(y.to_vec1()?),
            DType::F16 => CpuStorage::F16(y.to_vec1()?),
            _ => CpuStorage::BF16(y.to_vec1()?),
        };
        Ok((storage, self.y.shape().clone()))
    }

    /// The gradient of `x` joined, and those of the parameters summed over the ranks.
    fn backward(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let args: Vec<Tensor> = args.iter().map(|arg| (*arg).clone()).collect();
        let ran = self.ranks.run(self.path, &self.names, &args, Some(dy))?;
        let gradient = |(name, arg): (&String, &Tensor)| {
            let parts = ran.iter().map(|rank| &rank.gradients[name]);
            if name == "x" {
                return joined(parts, arg).map(Some);
            }
            let mut sum = arg.zeros_like()?.to_dtype(DType::F64)?.detach();
            for part in parts {
                sum = (sum + part.to_dtype(DType::F64)?)?;
            }
            Ok(Some(sum.to_dtype(arg.dtype())?))
        };
        self.names.iter().zip(&args).map(gradient).collect()
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        "ranks"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(&[x], dy)?.swap_remove(0))
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        "ranks"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[x, a], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next()))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        "ranks"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[x, a, b], dy)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}
