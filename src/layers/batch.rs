//! Statistics of training batches, as running statistics take them.

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::BatchStatistics;

/// The statistics of one training batch, or of several pooled.
#[derive(Clone)]
pub(crate) struct Batch {
    /// None where a layer does not subtract it.
    pub(super) mean: Option<Tensor>,
    pub(super) var: Tensor,
    pub(super) kind: Kind,
    /// Size of the batch: values of a channel, or samples.
    count: f64,
}

/// Rule by which the variances of two batches make that of both.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Kind {
    /// A variance of n values was divided by n less this.
    correction: f64,
    /// Whether there are means, and whether the distance of two of them counts.
    has_mean: bool,
    about_mean: bool,
}

/// Way in which the statistics of a batch were taken.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Taken {
    /// Over all values of a channel: the variance of n values is divided by n less `correction`.
    OverValues { correction: usize },
    /// Over all values of a channel, without a mean: the variance is an unbiased mean square.
    AboutZero,
    /// Averages over samples of the statistics of each.
    OfSamples,
}

impl Batch {
    /// The `statistics` of the training batch `x`.
    pub(super) fn new(x: &Tensor, statistics: BatchStatistics, taken: Taken) -> Self {
        let count = match taken {
            Taken::OfSamples => x.dims()[0],
            _ => x.elem_count() / statistics.mean.elem_count().max(1),
        };
        Self::of(count as f64, statistics, taken)
    }

    /// The `statistics` of a training batch with `count` values of a channel, or samples where they
    /// were taken of these.
    pub(super) fn of(count: f64, statistics: BatchStatistics, taken: Taken) -> Self {
        let (correction, has_mean, about_mean) = match taken {
            Taken::OverValues { correction } => (correction, true, true),
            Taken::AboutZero => (1, false, false),
            Taken::OfSamples => (0, true, false),
        };
        Self {
            mean: has_mean.then_some(statistics.mean),
            var: statistics.var,
            kind: Kind {
                correction: correction as f64,
                has_mean,
                about_mean,
            },
            count,
        }
    }

    /// In the widest dtype of the device.
    pub(super) fn wide(mut self) -> Result<Self> {
        let widen = |t: &Tensor| match t.device() {
            Device::Metal(_) => Ok(t.detach()),
            _ => t.detach().to_dtype(DType::F64),
        };
        self.mean = self.mean.as_ref().map(widen).transpose()?;
        self.var = widen(&self.var)?;
        Ok(self)
    }

    /// The statistics of this and `other` as one batch (Chan, Golub and LeVeque, 1979).
    pub(super) fn pooled(&self, other: &Self) -> Result<Self> {
        let count = self.count + other.count;
        let correction = self.kind.correction;
        let share = |batch: &Self| (batch.count - correction) / (count - correction);
        let mut var = ((&self.var * share(self))? + (&other.var * share(other))?)?;
        let mut mean = None;
        if let (Some(first), Some(second)) = (&self.mean, &other.mean) {
            let distance = (second - first)?;
            mean = Some((first + (&distance * (other.count / count))?)?);
            if self.kind.about_mean {
                let between = self.count * (other.count / count) / (count - correction);
                var = (var + (distance.sqr()? * between)?)?;
            }
        }
        Ok(Self {
            mean,
            var,
            count,
            ..*self
        })
    }
}
