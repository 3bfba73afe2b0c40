//! Normalization of groups of elements, whichever elements make up a group.

use candle_core::{CpuStorage, DType, Device, Result, Tensor};

use super::{Sum, rounded, stored};
use crate::backend::Statistics;
use crate::computations::composed::Along;
use crate::computations::{Activation, Gradients};

/// Statistics that a group is normalized by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stats {
    pub(super) mean: f64,
    /// Rounding error of the mean.
    pub(super) mean_error: f64,
    /// Biased.
    pub(super) var: f64,
    pub(super) std: f64,
}

impl Stats {
    pub(super) fn new(mean: f64, mean_error: f64, var: f64, eps: f64) -> Self {
        Self {
            mean,
            mean_error,
            var,
            std: (var + eps).sqrt(),
        }
    }

    /// `x̂`.
    pub(super) fn normalized(&self, x: f64) -> f64 {
        ((x - self.mean) - self.mean_error) / self.std
    }
}

/// Index of the weight of each element where weights lie `along` axes.
pub(super) fn weights((dims, along): ([usize; 3], Along)) -> (usize, impl Fn(usize) -> usize) {
    (along.count(dims), move |i| along.of(dims, i))
}

/// Group, and weight and bias, that each element of a contiguous tensor belongs to.
pub(super) struct Normalization<G, P> {
    pub(super) num_groups: usize,
    pub(super) group: G,
    pub(super) num_params: usize,
    pub(super) param: P,
}

impl<G: Fn(usize) -> usize, P: Fn(usize) -> usize> Normalization<G, P> {
    /// The mean of each group of `values`.
    fn means(&self, values: impl Iterator<Item = f64>) -> Vec<f64> {
        let mut sums = vec![Sum::default(); self.num_groups];
        let mut counts = vec![0.; self.num_groups];
        for (i, v) in values.enumerate() {
            sums[(self.group)(i)].add(v);
            counts[(self.group)(i)] += 1.;
        }
        let means = sums.iter().zip(counts);
        means.map(|(sum, count)| sum.value() / count).collect()
    }

    /// The mean and variance of each group; without `center`, zero and the mean square.
    pub(super) fn stats(&self, x: &[f64], center: bool, eps: f64) -> Vec<Stats> {
        let indexed = || x.iter().copied().enumerate();
        let (mut mean, mut error) = (vec![0.; self.num_groups], vec![0.; self.num_groups]);
        if center {
            mean = self.means(x.iter().copied());
            error = self.means(indexed().map(|(i, x)| x - mean[(self.group)(i)]));
            for (mean, error) in mean.iter_mut().zip(&mut error) {
                let nearest = *mean + *error;
                *error += *mean - nearest;
                *mean = nearest;
            }
        }
        let squares = indexed().map(|(i, x)| {
            let group = (self.group)(i);
            ((x - mean[group]) - error[group]).powi(2)
        });
        let var = self.means(squares);
        (0..self.num_groups)
            .map(|g| Stats::new(mean[g], error[g], var[g], eps))
            .collect()
    }

    /// `y = act(x̂ · weight + bias)`; where `round` has a dtype, `x̂` is rounded to it first.
    pub(super) fn forward(&self, x: &[f64], stats: &[Stats], following: Following) -> Vec<f64> {
        let y = x.iter().enumerate().map(|(i, &x)| {
            let u = self.before_activation(i, x, stats, following);
            following
                .activation
                .map_or(u, |activation| activation.of(u))
        });
        y.collect()
    }

    fn before_activation(&self, i: usize, x: f64, stats: &[Stats], following: Following) -> f64 {
        let param = (self.param)(i);
        let Following {
            weight,
            bias,
            round,
            ..
        } = following;
        let normalized = stats[(self.group)(i)].normalized(x);
        let normalized = round.map_or(normalized, |dtype| rounded(normalized, dtype));
        let scaled = normalized * weight.map_or(1., |w| w[param]);
        bias.map_or(scaled, |b| scaled + b[param])
    }

    /// The gradients of [`forward`](Self::forward). `own` says whether the statistics are those of
    /// `x`, and if so, whether they are centered.
    pub(super) fn backward(
        &self,
        [x, dy]: [&[f64]; 2],
        stats: &[Stats],
        following: Following,
        own: Option<bool>,
    ) -> (Vec<f64>, [Vec<f64>; 2]) {
        let Following { weight, round, .. } = following;
        let through = |(i, dy): (usize, &f64)| match following.activation {
            None => *dy,
            Some(activation) => {
                dy * activation.slope_at(self.before_activation(i, x[i], stats, following))
            }
        };
        let dy: Vec<f64> = dy.iter().enumerate().map(through).collect();
        let normalized = |i: usize| stats[(self.group)(i)].normalized(x[i]);
        let g = |i: usize| dy[i] * weight.map_or(1., |w| w[(self.param)(i)]);
        let (mut mean, mut along) = (vec![0.; self.num_groups], vec![0.; self.num_groups]);
        if own.is_some() {
            along = self.means((0..x.len()).map(|i| g(i) * normalized(i)));
        }
        if own == Some(true) {
            mean = self.means((0..x.len()).map(g));
        }
        let mut dweight = vec![Sum::default(); self.num_params];
        let mut dbias = dweight.clone();
        let mut dx = Vec::with_capacity(x.len());
        for (i, dy) in dy.iter().enumerate() {
            let (group, param) = ((self.group)(i), (self.param)(i));
            let through = match own {
                Some(_) => (g(i) - mean[group]) - normalized(i) * along[group],
                None => g(i),
            };
            dx.push(through / stats[group].std);
            let scaled = round.map_or(normalized(i), |dtype| rounded(normalized(i), dtype));
            dweight[param].add(dy * scaled);
            dbias[param].add(*dy);
        }
        let values = |sums: Vec<Sum>| sums.into_iter().map(Sum::value).collect();
        (dx, [values(dweight), values(dbias)])
    }
}

/// Steps after the normalization.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Following<'a> {
    pub(super) weight: Option<&'a [f64]>,
    pub(super) bias: Option<&'a [f64]>,
    /// The dtype that the normalized values are rounded to first.
    pub(super) round: Option<DType>,
    pub(super) activation: Option<Activation>,
}

/// Gradients as storages, that of the input in `dtype`.
pub(super) fn gradients(
    (dx, [dweight, dbias]): (Vec<f64>, [Vec<f64>; 2]),
    dtype: DType,
) -> Result<Gradients<CpuStorage>> {
    Ok(Gradients {
        dx: stored(dx, dtype)?,
        dweight: Some(CpuStorage::F64(dweight)),
        dbias: Some(CpuStorage::F64(dbias)),
    })
}

impl Statistics for Vec<Stats> {
    fn mean(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.mean).collect())
    }

    fn var(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.var).collect())
    }

    fn std(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.std).collect())
    }

    fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]> {
        let samples = (self.len() / channels) as f64;
        let average = |of: fn(&Stats) -> f64| {
            let mut sums = vec![Sum::default(); channels];
            for (i, stats) in self.iter().enumerate() {
                sums[i % channels].add(of(stats));
            }
            tensor(sums.into_iter().map(|s| s.value() / samples).collect())
        };
        Ok([average(|s| s.mean)?, average(|s| s.var)?])
    }
}

fn tensor(values: Vec<f64>) -> Result<Tensor> {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu)
}
