//! Batches in shares of ranks, and layers that train on them.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarMap;
use candle_norm::distributed::{Collective, Threads};
use candle_norm::{Path, with_path};
use testkit::data::{Draw, values};

/// A batch, and how many of its samples each rank has.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    /// Of the whole batch.
    pub(crate) dims: Vec<usize>,
    pub(crate) counts: Vec<usize>,
    pub(crate) dtype: DType,
    pub(crate) path: Path,
    pub(crate) seed: u64,
    /// The mean of the values, whose spread is 1.
    pub(crate) mean: f64,
}

/// Results of a layer on one rank, or on the whole batch.
#[derive(Debug, Clone)]
pub(crate) struct Trained {
    pub(crate) y: Tensor,
    pub(crate) dx: Tensor,
    /// The gradients of the variables, by name.
    pub(crate) gradients: Vec<(String, Tensor)>,
    /// Statistics by name, after the forward.
    pub(crate) buffers: Vec<(&'static str, Tensor)>,
}

impl Shares {
    pub(crate) fn new(dims: &[usize], counts: &[usize], dtype: DType, path: Path) -> Self {
        let mut dims = dims.to_vec();
        dims.insert(0, counts.iter().sum());
        Self {
            dims,
            counts: counts.to_vec(),
            dtype,
            path,
            seed: 1711,
            mean: 0.5,
        }
    }

    /// The whole of x and dy, in the dtype of the case.
    pub(crate) fn whole(&self) -> Result<[Tensor; 2]> {
        let mut draw = Draw::new(self.seed);
        let n = self.dims.iter().product();
        let x: Vec<f64> = draw.normal(n).into_iter().map(|z| self.mean + z).collect();
        let tensor = |values: Vec<f64>| {
            Tensor::from_vec(values, self.dims.as_slice(), &Device::Cpu)?.to_dtype(self.dtype)
        };
        Ok([tensor(x)?, tensor(draw.normal(n))?])
    }

    /// The samples of a rank.
    pub(crate) fn of(&self, rank: usize, whole: &Tensor) -> Result<Tensor> {
        let start = self.counts[..rank].iter().sum();
        whole
            .narrow(0, start, self.counts[rank])?
            .force_contiguous()
    }

    /// The results of every rank, in their order.
    pub(crate) fn run<M>(&self, model: M) -> Result<Vec<Trained>>
    where
        M: Fn(&VarMap, Option<Arc<dyn Collective>>, &Tensor) -> Result<Model> + Sync,
    {
        let whole = self.whole()?;
        Threads::run(self.counts.len(), |group| {
            let rank = group.rank();
            let [x, dy] = [self.of(rank, &whole[0])?, self.of(rank, &whole[1])?];
            with_path(self.path, || trained(&model, Some(group), &x, &dy))
        })
    }

    /// The results of one rank that has the whole batch, in float64.
    pub(crate) fn run_whole<M>(&self, model: M) -> Result<Trained>
    where
        M: Fn(&VarMap, Option<Arc<dyn Collective>>, &Tensor) -> Result<Model>,
    {
        let [x, dy] = self.whole()?;
        let (x, dy) = (x.to_dtype(DType::F64)?, dy.to_dtype(DType::F64)?);
        trained(&model, None, &x, &dy)
    }
}

/// The output of a model, and its statistics after the forward.
pub(crate) struct Model {
    pub(crate) y: Tensor,
    pub(crate) buffers: Vec<(&'static str, Tensor)>,
}

fn trained<M>(
    model: &M,
    group: Option<Arc<dyn Collective>>,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Trained>
where
    M: Fn(&VarMap, Option<Arc<dyn Collective>>, &Tensor) -> Result<Model>,
{
    let vars = VarMap::new();
    let x = Var::from_tensor(x)?;
    let Model { y, buffers } = model(&vars, group, &x)?;
    let grads = (&y * dy)?.sum_all()?.backward()?;
    let dx = match grads.get(&x) {
        Some(dx) => dx.clone(),
        None => x.zeros_like()?,
    };
    let vars = vars.data().lock().expect("no thread panicked");
    let mut gradients: Vec<(String, Tensor)> = (vars.iter())
        .filter_map(|(name, var)| Some((name.clone(), grads.get(var)?.clone())))
        .collect();
    gradients.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Trained {
        y,
        dx,
        gradients,
        buffers,
    })
}

/// The gradient of a variable, summed over ranks.
pub(crate) struct Summed {
    pub(crate) name: String,
    pub(crate) values: Vec<f64>,
    /// Sums of the absolute values on the ranks, each of which is rounded.
    pub(crate) terms: Vec<f64>,
}

/// Sums of the gradients of all ranks, in float64.
pub(crate) fn summed(ranks: &[Trained]) -> Result<Vec<Summed>> {
    let sum = |i: usize, name: &String| {
        let mut all: Vec<Vec<f64>> = vec![];
        for rank in ranks {
            assert_eq!(rank.gradients[i].0, *name);
            all.push(values(&rank.gradients[i].1)?);
        }
        let over = |of: fn(f64) -> f64| {
            let sum = |k: usize| all.iter().map(|rank| of(rank[k])).sum();
            (0..all[0].len()).map(sum).collect()
        };
        Ok(Summed {
            name: name.clone(),
            values: over(|v| v),
            terms: over(f64::abs),
        })
    };
    let names = ranks[0].gradients.iter().enumerate();
    names.map(|(i, (name, _))| sum(i, name)).collect()
}

/// `of` of all ranks that have samples, along the batch.
pub(crate) fn joined(ranks: &[Trained], of: fn(&Trained) -> &Tensor) -> Result<Tensor> {
    let parts: Vec<&Tensor> = ranks
        .iter()
        .map(of)
        .filter(|t| t.elem_count() > 0)
        .collect();
    Tensor::cat(&parts, 0)
}
