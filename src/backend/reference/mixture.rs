//! The mixture of switchable norm.

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::normalization::Stats;
use super::{Arg, Reference, Sum, parameter, values};
use crate::backend::{Backward, Forward, On, Statistics};
use crate::computations::{Args, Batch, Gradients, Mixture, argument};
use candle_norm_support::messages;

/// A kind of statistics that is mixed in, for each plane. Means are less the origin of the sample.
#[derive(Debug, Clone)]
struct Source {
    mean: Vec<f64>,
    var: Vec<f64>,
    of: Of,
    /// Factor of the variance.
    factor: f64,
}

/// Planes that a source is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    Plane,
    Sample,
    Channel,
    Nothing,
}

impl Of {
    /// The group of a plane.
    fn group(self, plane: usize, channels: usize) -> usize {
        match self {
            Of::Plane | Of::Nothing => plane,
            Of::Sample => plane / channels,
            Of::Channel => plane % channels,
        }
    }
}

pub(crate) struct Mixed {
    /// Means of the planes, each less the origin of its sample.
    mean: Vec<f64>,
    sources: Vec<Source>,
    /// Shares of the means, and of the variances.
    mixing_weights: [Vec<f64>; 2],
    statistics: Option<Vec<Stats>>,
}

/// For each plane, the mean of `values` over the planes of its group.
fn means(values: &[f64], of: Of, channels: usize) -> Vec<f64> {
    let mut sums = vec![(Sum::default(), 0.); values.len()];
    for (plane, v) in values.iter().enumerate() {
        let (sum, count) = &mut sums[of.group(plane, channels)];
        sum.add(*v);
        *count += 1.;
    }
    let groups = (0..values.len()).map(|plane| sums[of.group(plane, channels)]);
    groups.map(|(sum, count)| sum.value() / count).collect()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let highest = logits.iter().fold(f64::MIN, |highest, v| highest.max(*v));
    let mut sum = Sum::default();
    logits.iter().for_each(|v| sum.add((v - highest).exp()));
    let mixing_weights = logits.iter().map(|v| (v - highest).exp() / sum.value());
    mixing_weights.collect()
}

impl Mixture {
    fn union(&self, mean: &[f64], var: &[f64], of: Of, factor: f64) -> Source {
        let channels = self.axes.channels;
        let whole = means(mean, of, channels);
        let pairs = mean.iter().zip(var).zip(&whole);
        let squares: Vec<f64> = pairs.map(|((m, v), w)| v + (m - w).powi(2)).collect();
        let var = means(&squares, of, channels);
        Source {
            mean: whole,
            var: var.into_iter().map(|v| v * factor).collect(),
            of,
            factor,
        }
    }

    fn plain(&self, moments: &[f64], logits: &[f64]) -> Result<Mixed> {
        let channels = self.axes.channels;
        let (mean, var) = moments.split_at(moments.len() / 2);
        let origin = |plane: usize| {
            let first = match self.batch {
                Batch::Own => 0,
                _ => plane / channels * channels,
            };
            Some(mean[first]).filter(|v| v.is_finite()).unwrap_or(0.)
        };
        let factors = self.factors();
        let near: Vec<f64> = (0..mean.len()).map(|i| mean[i] - origin(i)).collect();
        let var: Vec<f64> = var.iter().map(|v| v * factors.plane).collect();
        let mut sources = vec![];
        if self.instance {
            sources.push(Source {
                mean: near.clone(),
                var: var.clone(),
                of: Of::Plane,
                factor: 1.,
            });
        }
        sources.push(self.union(&near, &var, Of::Sample, factors.layer));
        let mut statistics = None;
        match &self.batch {
            Batch::Joint { .. } => messages::internal(self.layer, "a composed mixture")?,
            Batch::Absent => {}
            Batch::Own => {
                let batch = self.union(&near, &var, Of::Channel, factors.batch);
                let stats = (0..channels)
                    .map(|c| Stats::new(batch.mean[c] + origin(c), 0., batch.var[c], self.eps));
                statistics = Some(stats.collect());
                sources.push(batch);
            }
            Batch::Given { mean, var } => {
                let vector = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
                let (mean, var) = (vector(mean)?, vector(var)?);
                let planes = || 0..near.len();
                sources.push(Source {
                    mean: planes().map(|i| mean[i % channels] - origin(i)).collect(),
                    var: planes().map(|i| var[i % channels]).collect(),
                    of: Of::Nothing,
                    factor: 1.,
                });
            }
        }
        let (of_means, of_vars) = logits.split_at(sources.len());
        Ok(Mixed {
            mean: near,
            sources,
            mixing_weights: [softmax(of_means), softmax(of_vars)],
            statistics,
        })
    }
}

impl Mixed {
    /// The mixed mean and variance of a plane.
    fn mixed(&self, plane: usize) -> [f64; 2] {
        let (mut mean, mut var) = (Sum::default(), Sum::default());
        for (k, source) in self.sources.iter().enumerate() {
            mean.add(self.mixing_weights[0][k] * source.mean[plane]);
            var.add(self.mixing_weights[1][k] * source.var[plane]);
        }
        [mean.value(), var.value()]
    }
}

/// The gradient of logits from that of their softmax.
fn softmax_backward(mixing_weights: &[f64], grads: &[f64]) -> Vec<f64> {
    let mut along = Sum::default();
    for (share, grad) in mixing_weights.iter().zip(grads) {
        along.add(share * grad);
    }
    let pairs = mixing_weights.iter().zip(grads);
    pairs.map(|(s, g)| s * (g - along.value())).collect()
}

impl On<Reference> for Mixture {
    type Saved = Mixed;

    fn statistics(saved: &Mixed) -> Option<&dyn Statistics> {
        saved.statistics.as_ref().map(|s| s as &dyn Statistics)
    }

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Mixed>> {
        let (moments, weight) = (values(args.x)?, parameter(args.weight)?);
        let saved = self.plain(&moments, &values(argument(self, args.bias)?)?)?;
        let planes = saved.mean.len();
        let mut y = vec![0.; 3 * planes];
        for plane in 0..planes {
            let [mean, var] = saved.mixed(plane);
            let weight = weight
                .as_ref()
                .map_or(1., |w| w[plane % self.axes.channels]);
            let scale = weight / (var + self.eps).sqrt();
            y[plane] = scale;
            y[planes + plane] = (saved.mean[plane] - mean) * scale;
            y[2 * planes + plane] = moments[plane];
        }
        Ok(Forward {
            y: CpuStorage::F64(y),
            saved,
        })
    }

    /// With `dscale` and `dshift` of a plane: `scale = w · r` and `shift = (μ_plane − μ) · scale`,
    /// where `r = (σ² + eps)^(−1/2)` and `dr/dσ² = −r³ / 2`.
    fn backward(&self, from: Backward<CpuStorage, Mixed>) -> Result<Gradients<CpuStorage>> {
        let (saved, dy, weight) = (from.saved, values(from.dy)?, parameter(from.weight)?);
        let (planes, channels) = (saved.mean.len(), self.axes.channels);
        let mut dweight = vec![Sum::default(); channels];
        let (mut dmean, mut dvar) = (vec![], vec![]);
        for plane in 0..planes {
            let [mean, var] = saved.mixed(plane);
            let weight = weight.as_ref().map_or(1., |w| w[plane % channels]);
            let r = 1. / (var + self.eps).sqrt();
            let (dscale, dshift) = (dy[plane], dy[planes + plane]);
            let dscale = dscale + dshift * (saved.mean[plane] - mean);
            dweight[plane % channels].add(dscale * r);
            dmean.push(-dshift * weight * r);
            dvar.push(-dscale * weight * r * r * r / 2.);
        }
        let dmixing_weights = |grads: &[f64], of: fn(&Source) -> &[f64]| -> Vec<f64> {
            let sources = saved.sources.iter();
            let along = sources.map(|source| {
                let mut sum = Sum::default();
                grads
                    .iter()
                    .zip(of(source))
                    .for_each(|(g, v)| sum.add(g * v));
                sum.value()
            });
            along.collect()
        };
        let mut dlogits = softmax_backward(
            &saved.mixing_weights[0],
            &dmixing_weights(&dmean, |s| &s.mean),
        );
        let of_vars = dmixing_weights(&dvar, |s| &s.var);
        dlogits.extend(softmax_backward(&saved.mixing_weights[1], &of_vars));
        let mut dx = vec![0.; 2 * planes];
        for (k, source) in saved.sources.iter().enumerate() {
            if source.of == Of::Nothing {
                continue;
            }
            // A plane has one of the `count` equal parts of its group.
            let to_mean = means(&dmean, source.of, channels);
            let to_var = means(&dvar, source.of, channels);
            for plane in 0..planes {
                let dvar = saved.mixing_weights[1][k] * source.factor * to_var[plane];
                let away = saved.mean[plane] - source.mean[plane];
                dx[plane] += saved.mixing_weights[0][k] * to_mean[plane] + 2. * dvar * away;
                dx[planes + plane] += dvar * self.factors().plane;
            }
        }
        Ok(Gradients {
            dx: CpuStorage::F64(dx),
            dweight: Some(CpuStorage::F64(
                dweight.into_iter().map(Sum::value).collect(),
            )),
            dbias: Some(CpuStorage::F64(dlogits)),
        })
    }
}
