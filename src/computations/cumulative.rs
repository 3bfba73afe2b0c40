//! Positions of a sequence, each normalized by the statistics of those up to it.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::composed;
use super::{Args, ChannelAxes, Composed, Computation, Gradients};

/// Moments of the part of a stream that came before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Earlier {
    pub(crate) count: f64,
    pub(crate) mean: f64,
    /// Rounding error of the mean.
    pub(crate) mean_error: f64,
    /// The sum of squared distances from the mean.
    pub(crate) m2: f64,
}

/// `y = (x − μ) / √(σ² + ε)` of `x` `[N, C, T]`, with μ and σ² (biased) of position t taken over
/// all channels of the positions up to t, and over what came `before` the first.
#[derive(Debug, Clone)]
pub(crate) struct Cumulative {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
    /// For each sample, the moments of the part of its stream before this one, all of one count.
    pub(crate) before: Option<Arc<Vec<Earlier>>>,
}

/// Statistics of each position.
struct Standardized {
    /// Positions of all samples as rows of channels, less the origin, `[N · T, C]`.
    rows: Tensor,
    /// The distance of the mean from the origin, `[N, T]`.
    mean: Tensor,
    /// `1 / √(σ² + ε)`, `[N, T]`.
    inv_std: Tensor,
    /// The number of values, by position.
    counts: Vec<f64>,
}

/// Moments of runs of positions that end at each position, about an origin of the sample.
struct Runs {
    counts: Vec<f64>,
    /// `[N, L]` each.
    mean: Tensor,
    m2: Tensor,
}

/// A number for each position, `[1, L]`, like `t`.
fn line(numbers: impl Iterator<Item = f64>, t: &Tensor) -> Result<Tensor> {
    let numbers: Vec<f64> = numbers.collect();
    let len = numbers.len();
    Tensor::from_vec(numbers, (1, len), &candle_core::Device::Cpu)?
        .to_dtype(t.dtype())?
        .to_device(t.device())
}

impl Runs {
    /// Runs of all positions from the first on, by runs that double in length: two that follow each
    /// other are merged as Chan, Golub and LeVeque do.
    fn all(mut self) -> Result<Self> {
        let len = self.counts.len();
        let mut step = 1;
        while step < len {
            let rest = len - step;
            let early = |t: &Tensor| t.narrow(1, 0, rest);
            let late = |t: &Tensor| t.narrow(1, step, rest);
            let pairs = || self.counts[..rest].iter().zip(&self.counts[step..]);
            let share = line(pairs().map(|(a, b)| b / (a + b)), &self.mean)?;
            let between = line(pairs().map(|(a, b)| a / (a + b) * b), &self.mean)?;
            let distance = (late(&self.mean)? - early(&self.mean)?)?;
            let mean = (early(&self.mean)? + distance.broadcast_mul(&share)?)?;
            let within = (early(&self.m2)? + late(&self.m2)?)?;
            let m2 = (within + distance.sqr()?.broadcast_mul(&between)?)?;
            let joined = |t: &Tensor, new| Tensor::cat(&[&t.narrow(1, 0, step)?, new], 1);
            let counts = pairs().map(|(a, b)| a + b);
            let counts = self.counts[..step].iter().copied().chain(counts).collect();
            self = Self {
                counts,
                mean: joined(&self.mean, &mean)?,
                m2: joined(&self.m2, &m2)?,
            };
            step *= 2;
        }
        Ok(self)
    }
}

/// The sum of `t` `[N, T]` over each position and those after it.
fn from_each_on(t: Tensor) -> Result<Tensor> {
    let (samples, len) = t.dims2()?;
    let (mut sums, mut step) = (t, 1);
    while step < len {
        let none = Tensor::zeros((samples, step), sums.dtype(), sums.device())?;
        let later = Tensor::cat(&[&sums.narrow(1, step, len - step)?, &none], 1)?;
        sums = (sums + later)?;
        step *= 2;
    }
    Ok(sums)
}

impl Cumulative {
    /// `x` `[N, C, T]` with its positions as rows.
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        let planes = x.reshape((outer, channels, inner))?.transpose(1, 2)?;
        planes.contiguous()?.reshape((outer * inner, channels))
    }

    /// The inverse of [`rows`](Self::rows).
    fn planes(&self, rows: &Tensor) -> Result<Tensor> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        let rows = rows.reshape((outer, inner, channels))?;
        rows.transpose(1, 2)?.contiguous()
    }

    /// A number near the values of each sample, known before the first of them has any effect.
    fn origin(&self, x: &Tensor) -> Result<Tensor> {
        let samples = self.axes.outer;
        match &self.before {
            Some(before) => {
                let means = line(before.iter().map(|m| m.mean), x)?;
                means.reshape((samples, 1, 1))
            }
            None => {
                let first = x.detach().reshape((samples, ()))?.narrow(1, 0, 1)?;
                first.reshape((samples, 1, 1))
            }
        }
    }

    fn standardized(&self, x: &Tensor) -> Result<Standardized> {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        let x = x.reshape((outer, channels, inner))?;
        let rows = self.rows(&x.broadcast_sub(&self.origin(&x)?)?)?;
        let cut = composed::Rows::new(&rows)?;
        let mean = cut.mean()?;
        let m2 = cut.minus(&mean)?.sqr()?.sum()?;
        let by_sample = |t: Tensor| t.reshape((outer, inner));
        let mut runs = Runs {
            counts: vec![channels as f64; inner],
            mean: by_sample(mean)?,
            m2: by_sample(m2)?,
        };
        if let Some(before) = &self.before {
            // What the origin, their mean, was rounded by.
            let wide = x.dtype() == candle_core::DType::F64;
            let low = |m: &Earlier| match wide {
                true => m.mean_error,
                false => m.mean - f64::from(m.mean as f32) + m.mean_error,
            };
            let low = line(before.iter().map(low), &x)?.reshape((outer, 1))?;
            let m2 = line(before.iter().map(|m| m.m2), &x)?.reshape((outer, 1))?;
            runs.counts.insert(0, before[0].count);
            runs.mean = Tensor::cat(&[&low, &runs.mean], 1)?;
            runs.m2 = Tensor::cat(&[&m2, &runs.m2], 1)?;
        }
        let runs = runs.all()?;
        let skipped = runs.counts.len() - inner;
        let counts = runs.counts[skipped..].to_vec();
        let here = |t: &Tensor| t.narrow(1, skipped, inner)?.contiguous();
        let inverse = line(counts.iter().map(|n| 1. / n), &x)?;
        let var = here(&runs.m2)?.broadcast_mul(&inverse)?;
        Ok(Standardized {
            rows,
            mean: here(&runs.mean)?,
            inv_std: (var + self.eps)?.sqrt()?.recip()?,
            counts,
        })
    }
}

impl Computation for Cumulative {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let acc = composed::accumulator(args.x.dtype());
        let x = composed::unshared(args.x)?.to_dtype(acc)?;
        let Standardized {
            rows,
            mean,
            inv_std,
            ..
        } = self.standardized(&x)?;
        let rows = composed::Rows::new(&rows)?.minus(&mean.flatten_all()?)?;
        let rows = rows.times(&inv_std.flatten_all()?)?.join()?;
        let y = self.planes(&rows)?.reshape(args.x.shape())?;
        Ok(y.to_dtype(args.x.dtype())?.into())
    }

    /// With `r = 1 / √(σ² + ε)`, n values up to a position, and the sums `G` of dy and `H` of
    /// dy · y over its channels: `dx = r · dy − A − (x − μ) · B + E` at a position, where over it
    /// and all after it `A = Σ r · G / n`, `B = Σ r² · H / n` and `E = Σ (μ′ − μ) · r′² · H′ / n′`.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let wide = |t: &Tensor| t.contiguous()?.to_dtype(acc);
        let s = self.standardized(&wide(args.x)?)?;
        let (samples, len) = s.mean.dims2()?;
        let dims = (samples, len, self.axes.channels);
        let x = s.rows.reshape(dims)?;
        let dy = self.rows(&wide(dy)?)?.reshape(dims)?;
        let (mean, r) = (s.mean.unsqueeze(2)?, s.inv_std.unsqueeze(2)?);
        let centered = x.broadcast_sub(&mean)?;
        let g = dy.sum(2)?;
        let h = (&dy * centered.broadcast_mul(&r)?)?.sum(2)?;
        let inverse = line(s.counts.iter().map(|n| 1. / n), &x)?;
        let a = (g * &s.inv_std)?.broadcast_mul(&inverse)?;
        let b = (h * s.inv_std.sqr()?)?.broadcast_mul(&inverse)?;
        let moved = from_each_on((&b * &s.mean)?)?;
        let (a, b) = (from_each_on(a)?, from_each_on(b)?);
        let e = (moved - (&b * &s.mean)?)?;
        let common = (e - a)?.unsqueeze(2)?;
        let along = centered.broadcast_mul(&b.unsqueeze(2)?)?;
        let dx = (dy.broadcast_mul(&r)? - along)?.broadcast_add(&common)?;
        Ok(Gradients {
            dx: self.planes(&dx)?,
            dweight: None,
            dbias: None,
        })
    }
}
