//! The mixture of switchable norm: a few numbers for each plane, on one thread.

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::{Arg, Cpu, elements, parameter, widened};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Batch, Gradients, Mixture, argument};
use candle_norm_kernels::Stats;
use candle_norm_support::messages;

/// A mean and a variance.
type Pair = [f64; 2];

/// The normalization of a plane.
#[derive(Debug, Clone, Copy)]
struct Normal {
    mean: f64,
    var: f64,
    inv_std: f64,
}

/// The mixture as a backward finds it. Means are less an offset of their sample.
pub(crate) struct Mixed {
    /// Shares of the means and of the variances.
    mixing_weights: [Vec<f64>; 2],
    instance: bool,
    /// Moments of the planes, the variances times their factor.
    planes: Vec<Pair>,
    /// Moments of each sample.
    layers: Vec<Pair>,
    /// Moments of each channel, or none; the means are less an offset if they are the batch's own.
    batch: Vec<Pair>,
    /// Offset of each sample that the means of the batch still have.
    batch_offsets: Vec<f64>,
    /// Normalization of each plane.
    normal: Vec<Normal>,
    /// Statistics of the batch, where they are its own.
    statistics: Option<Vec<Stats>>,
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|v| (v - highest).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Values of a vector in `f64`.
fn vector(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.to_vec1()
}

/// The moments of the union of the planes of each sample, and of each channel over the samples.
fn unions(planes: &[Pair], channels: usize) -> [Vec<Pair>; 2] {
    let samples = planes.len() / channels;
    let (mut layers, mut batch) = (vec![[0.; 2]; samples], vec![[0.; 2]; channels]);
    for (layer, sample) in layers.iter_mut().zip(planes.chunks(channels)) {
        for (channel, [mean, _]) in batch.iter_mut().zip(sample) {
            layer[0] += mean;
            channel[0] += mean;
        }
        layer[0] /= channels as f64;
    }
    batch.iter_mut().for_each(|b| b[0] /= samples as f64);
    for (layer, sample) in layers.iter_mut().zip(planes.chunks(channels)) {
        for (channel, [mean, var]) in batch.iter_mut().zip(sample) {
            layer[1] += var + (mean - layer[0]).powi(2);
            channel[1] += var + (mean - channel[0]).powi(2);
        }
        layer[1] /= channels as f64;
    }
    batch.iter_mut().for_each(|b| b[1] /= samples as f64);
    [layers, batch]
}

fn scaled(pairs: Vec<Pair>, factor: f64) -> Vec<Pair> {
    let scaled = pairs.into_iter().map(|[mean, var]| [mean, var * factor]);
    scaled.collect()
}

impl Mixed {
    /// The moments that are mixed for a plane, in the order of the mixing weights.
    fn terms(&self, sample: usize, channel: usize) -> impl Iterator<Item = Pair> {
        let plane = self.planes[sample * self.channels() + channel];
        let batch = self.batch.get(channel);
        let batch = batch.map(|[mean, var]| [mean - self.batch_offsets[sample], *var]);
        let plane = self.instance.then_some(plane);
        plane.into_iter().chain([self.layers[sample]]).chain(batch)
    }

    fn channels(&self) -> usize {
        self.planes.len() / self.layers.len()
    }

    fn normal(&self, sample: usize, channel: usize, eps: f64) -> Normal {
        let (mut mean, mut var) = (0., 0.);
        let mixing_weights = self.mixing_weights[0].iter().zip(&self.mixing_weights[1]);
        for ([m, v], (of_mean, of_var)) in self.terms(sample, channel).zip(mixing_weights) {
            mean += of_mean * m;
            var += of_var * v;
        }
        Normal {
            mean,
            var,
            inv_std: 1. / (var + eps).sqrt(),
        }
    }
}

impl Mixture {
    /// A value near the means of each sample, so that differences have all their digits; see
    /// [`offset`](Mixture::offset).
    fn offsets(&self, means: &[f64]) -> Vec<f64> {
        let finite = |v: f64| if v.is_finite() { v } else { 0. };
        let first = means.iter().step_by(self.axes.channels);
        first
            .map(|first| {
                finite(if self.samples_are_apart() {
                    *first
                } else {
                    means[0]
                })
            })
            .collect()
    }

    fn mix(&self, moments: &[f64], logits: &[f64]) -> Result<Mixed> {
        let (channels, factors) = (self.axes.channels, self.factors());
        let (means, vars) = moments.split_at(moments.len() / 2);
        let offsets = self.offsets(means);
        let pairs = means.iter().zip(vars).enumerate();
        let planes: Vec<Pair> = pairs
            .map(|(i, (mean, var))| [mean - offsets[i / channels], var * factors.plane])
            .collect();
        let [layers, batch] = unions(&planes, channels);
        let (of_means, of_vars) = logits.split_at(self.sources());
        let none = vec![0.; offsets.len()];
        let mut statistics = None;
        let (batch, batch_offsets) = match &self.batch {
            Batch::Joint { .. } => messages::internal(self.layer, "a composed mixture")?,
            Batch::Absent => (vec![], none),
            Batch::Own => {
                let batch = scaled(batch, factors.batch);
                let stats = batch
                    .iter()
                    .map(|[mean, var]| Stats::new((mean + offsets[0]).into(), *var, self.eps));
                statistics = Some(stats.collect());
                (batch, none)
            }
            Batch::Given { mean, var } => {
                let pairs = vector(mean)?.into_iter().zip(vector(var)?);
                (pairs.map(|(mean, var)| [mean, var]).collect(), offsets)
            }
        };
        let mut mixed = Mixed {
            mixing_weights: [of_means, of_vars].map(softmax),
            instance: self.instance,
            layers: scaled(layers, factors.layer),
            planes,
            batch,
            batch_offsets,
            normal: vec![],
            statistics,
        };
        let places = (0..means.len()).map(|i| (i / channels, i % channels));
        let normal = places.map(|(sample, channel)| mixed.normal(sample, channel, self.eps));
        mixed.normal = normal.collect();
        Ok(mixed)
    }
}

impl On<Cpu> for Mixture {
    type Saved = Mixed;

    fn statistics(saved: &Mixed) -> Option<&dyn Statistics> {
        saved.statistics.as_ref().map(|s| s as &dyn Statistics)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Mixed>> {
        let moments = elements::<f64>(args.x)?;
        let (weight, logits) = (parameter::<f64>(args.weight)?, argument(self, args.bias)?);
        let saved = self.mix(moments, &widened::<f64>(logits)?)?;
        let planes = saved.planes.len();
        let mut y = Vec::with_capacity(3 * planes);
        for sample in saved.normal.chunks(self.axes.channels) {
            y.extend(sample.iter().enumerate().map(|(channel, normal)| {
                normal.inv_std * weight.as_ref().map_or(1., |w| w[channel])
            }));
        }
        // About the mean of its own plane, which cancels: large means cost no digits.
        for i in 0..planes {
            y.push((saved.planes[i][0] - saved.normal[i].mean) * y[i]);
        }
        y.extend_from_slice(&moments[..planes]);
        Ok(Forward {
            y: CpuStorage::F64(y),
            saved,
        })
    }

    fn backward(&self, from: Backward<CpuStorage, Mixed>) -> Result<Gradients<CpuStorage>> {
        let (mixed, dy) = (from.saved, elements::<f64>(from.dy)?);
        let weight = parameter::<f64>(from.weight)?;
        let (samples, channels) = (self.axes.outer, self.axes.channels);
        let (planes, sources) = (samples * channels, self.sources());
        let (dscale, dshift) = dy.split_at(planes);
        let mut dweight = vec![0.; channels];
        let mut dlogits = vec![0.; 2 * sources];
        // Gradients of the mixed mean and variance of each plane, and their sums.
        let mut grads = Vec::with_capacity(planes);
        let (mut by_sample, mut by_channel) = (vec![[0.; 2]; samples], vec![[0.; 2]; channels]);
        for (i, normal) in mixed.normal.iter().enumerate() {
            let (sample, channel) = (i / channels, i % channels);
            let Normal { mean, var, inv_std } = *normal;
            let weight = weight.as_ref().map_or(1., |w| w[channel]);
            let dscale = dscale[i] + dshift[i] * (mixed.planes[i][0] - mean);
            let dmean = -(dshift[i] * (inv_std * weight));
            let dvar = dscale * weight * (-0.5 * inv_std.powi(3));
            dweight[channel] += dscale * inv_std;
            // The softmax takes its own mean off, which is the mixture.
            for (k, [m, v]) in mixed.terms(sample, channel).enumerate() {
                dlogits[k] += dmean * (m - mean);
                dlogits[sources + k] += dvar * (v - var);
            }
            for (sum, d) in [0, 1].into_iter().zip([dmean, dvar]) {
                by_sample[sample][sum] += d;
                by_channel[channel][sum] += d;
            }
            grads.push([dmean, dvar]);
        }
        for (d, share) in dlogits
            .iter_mut()
            .zip(mixed.mixing_weights.iter().flatten())
        {
            *d *= share;
        }
        let factors = self.factors();
        let [of_means, of_vars] = &mixed.mixing_weights;
        let layer = usize::from(self.instance);
        let through = |place: usize, count: usize, factor: f64| {
            let n = count as f64;
            [of_means[place] / n, of_vars[place] / n * factor]
        };
        let through_layer = through(layer, channels, factors.layer);
        let through_batch = match self.batch {
            Batch::Own => Some(through(layer + 1, samples, factors.batch)),
            Batch::Absent | Batch::Given { .. } | Batch::Joint { .. } => None,
        };
        let mut dx = vec![0.; 2 * planes];
        let (dmeans, dvars) = dx.split_at_mut(planes);
        for (i, [dmean, dvar]) in grads.into_iter().enumerate() {
            let (sample, channel) = (i / channels, i % channels);
            let mean = mixed.planes[i][0];
            let mut add = |[share_mean, share_var]: Pair, [sum_mean, sum_var]: Pair, of: f64| {
                let dvar = share_var * sum_var;
                dmeans[i] += share_mean * sum_mean + 2. * dvar * (mean - of);
                dvars[i] += dvar;
            };
            add(through_layer, by_sample[sample], mixed.layers[sample][0]);
            if let Some(through) = through_batch {
                add(through, by_channel[channel], mixed.batch[channel][0]);
            }
            if self.instance {
                dmeans[i] += of_means[0] * dmean;
                dvars[i] += of_vars[0] * dvar;
            }
            dvars[i] *= factors.plane;
        }
        Ok(Gradients {
            dx: CpuStorage::F64(dx),
            dweight: Some(CpuStorage::F64(dweight)),
            dbias: Some(CpuStorage::F64(dlogits)),
        })
    }
}
