//! Positions normalized by those up to them: the passes of batch norm, with a scan between them.

use candle_core::{CpuStorage, Result};

use super::{Arg, Cpu, Native, elements, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Cumulative, Earlier, Gradients};
use candle_norm_kernels::{AffinePair, Mean, Moments, Order, Shape, Statistics, Stats};

/// Statistics that each position of each sample was normalized by.
pub(crate) struct Scanned {
    stats: Vec<Stats>,
    /// The number of values, by position.
    counts: Vec<f64>,
}

/// Sums for the backward over a position and those after it.
#[derive(Default)]
struct Later {
    a: f64,
    b: f64,
    e: f64,
}

impl Cumulative {
    /// A sample, whose positions are channels and whose channels are samples.
    fn shape(&self) -> Shape {
        Shape {
            outer: self.axes.channels,
            channels: self.axes.inner,
            inner: 1,
        }
    }

    fn sample_len(&self) -> usize {
        self.axes.channels * self.axes.inner
    }

    fn forward_of<T: Native>(&self, x: Arg) -> Result<Forward<CpuStorage, Scanned>> {
        let x = elements::<T>(x)?;
        let (shape, order) = (self.shape(), Order::ChannelsFirst);
        let mut y = Vec::with_capacity(x.len());
        let mut saved = Scanned {
            stats: vec![],
            counts: vec![],
        };
        for (i, x) in x.chunks(self.sample_len()).enumerate() {
            let mut all = match &self.before {
                Some(before) => {
                    let Earlier {
                        count,
                        mean,
                        mean_error,
                        m2,
                    } = before[i];
                    Moments::from_parts(count, mean, mean_error, m2)
                }
                None => Moments::default(),
            };
            let mut counts = vec![];
            let stats = T::channel_moments(x, order, shape, true)
                .into_iter()
                .map(|position| {
                    all = all.merge(position);
                    counts.push(all.count());
                    let mean = Mean {
                        high: all.mean(),
                        low: all.mean_error(),
                    };
                    Stats::new(mean, all.var(), self.eps)
                });
            let stats: Vec<Stats> = stats.collect();
            let given = Statistics::Given(&stats);
            let plain = AffinePair {
                weight: None,
                bias: None,
            };
            y.extend(T::channels_forward(x, order, shape, plain, given).0);
            saved.stats.extend(stats);
            saved.counts = counts;
        }
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Scanned>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy) = (elements::<T>(from.x)?, elements::<T>(from.dy)?);
        let (shape, order, len) = (self.shape(), Order::ChannelsFirst, self.sample_len());
        let Scanned { stats, counts } = from.saved;
        let mut dx = Vec::with_capacity(x.len());
        let samples = x.chunks(len).zip(dy.chunks(len));
        for ((x, dy), stats) in samples.zip(stats.chunks(self.axes.inner)) {
            let [along, sums] = T::channel_grad_sums(x, order, dy, shape, stats);
            let means = means_of_later(stats, counts, &along, &sums);
            dx.extend(T::channel_grad_input(
                x, order, dy, shape, None, stats, &means,
            ));
        }
        Ok(Gradients {
            dx: T::to_cpu_storage_owned(dx),
            dweight: None,
            dbias: None,
        })
    }
}

/// The means of `dy · y` and of `dy` that the gradient of each position takes off, from their sums
/// at each position: see [`Cumulative::composed_gradients`](crate::computations::Computation).
fn means_of_later(stats: &[Stats], counts: &[f64], along: &[f64], sums: &[f64]) -> Vec<[f64; 2]> {
    let mut means = vec![[0.; 2]; stats.len()];
    let mut later = Later::default();
    let mut next: Option<Mean> = None;
    for t in (0..stats.len()).rev() {
        let Stats { mean, inv_std, .. } = stats[t];
        if let Some(next) = next {
            later.e += later.b * ((next.high - mean.high) + (next.low - mean.low));
        }
        later.a += inv_std * sums[t] / counts[t];
        later.b += inv_std * inv_std * along[t] / counts[t];
        next = Some(mean);
        means[t] = [later.b / (inv_std * inv_std), (later.a - later.e) / inv_std];
    }
    means
}

impl On<Cpu> for Cumulative {
    type Saved = Scanned;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Scanned>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args.x))
    }

    fn backward(&self, from: Backward<CpuStorage, Scanned>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
