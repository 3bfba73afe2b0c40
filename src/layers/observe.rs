//! Statistics of training batches taken into running statistics, as the scopes of the thread say.

use candle_core::{Result, Tensor};

use super::batch::{Batch, Taken};
use super::running_stats::RunningStats;
use super::updates::{self, Scope};
use crate::ops::{BatchStatistics, GhostStatistics, JointStatistics, check};

impl RunningStats {
    /// Takes in the mean and the unbiased variance of each channel of the training batch `x`, as
    /// [`ops::batch_norm`](crate::ops::batch_norm) returns them: for a norm of your own.
    ///
    /// [`without_updates`](crate::without_updates) and [`pool_updates`](crate::pool_updates) act
    /// here. An empty batch has no statistics, and changes nothing.
    ///
    /// # Errors
    /// Statistics of another number of channels; those that are not finite, if they are refused.
    /// Nothing is changed then.
    pub fn observe(&self, x: &Tensor, statistics: Option<BatchStatistics>) -> Result<()> {
        for (name, value) in statistics
            .iter()
            .flat_map(|s| [("mean", &s.mean), ("var", &s.var)])
        {
            if value.elem_count() != self.mean().elem_count() {
                check::shape(self.layer(), name, value, self.mean().dims())?;
            }
        }
        self.observe_as(x, statistics, Taken::OverValues { correction: 1 })
    }

    /// Takes in the statistics of the training batch `x`, as the [scopes](updates) of this thread
    /// say. An empty batch has none, and a layer that tracks none takes none.
    pub(crate) fn observe_as(
        &self,
        x: &Tensor,
        statistics: Option<BatchStatistics>,
        taken: Taken,
    ) -> Result<()> {
        let Some(statistics) = statistics.filter(|_| self.are_tracked()) else {
            return Ok(());
        };
        let batch = Batch::new(x, statistics, taken);
        self.observe_batch(batch, || format!("input size {:?}", x.dims()))
    }

    /// Takes in the statistics of the parts of the training batch `x`, one after the other; none if
    /// one of them is refused.
    pub(super) fn observe_parts(
        &self,
        x: &Tensor,
        parts: Vec<GhostStatistics>,
        taken: Taken,
    ) -> Result<()> {
        if !self.are_tracked() {
            return Ok(());
        }
        let mut all = vec![];
        for GhostStatistics { count, statistics } in parts {
            let batch = Batch::of(count as f64, statistics, taken);
            let fitted = self.fitted(batch.clone(), || format!("input size {:?}", x.dims()))?;
            all.push((batch, fitted));
        }
        for (batch, fitted) in all {
            if updates::offer(self, batch)?.is_some() {
                self.update(&fitted)?;
            }
        }
        Ok(())
    }

    /// Takes in the statistics of the batches of all ranks, which are the same on each.
    pub(super) fn observe_joint(
        &self,
        statistics: Option<JointStatistics>,
        taken: Taken,
    ) -> Result<()> {
        let Some(joint) = statistics.filter(|_| self.are_tracked()) else {
            return Ok(());
        };
        let here = |t: Tensor| t.to_device(self.mean().device());
        let BatchStatistics { mean, var } = joint.statistics;
        let statistics = BatchStatistics {
            mean: here(mean)?,
            var: here(var)?,
        };
        let batch = Batch::of(joint.count, statistics, taken);
        self.observe_batch(batch, || "the batches of all ranks".to_string())
    }

    fn observe_batch(&self, batch: Batch, of: impl Fn() -> String) -> Result<()> {
        let fitted = self.fitted(batch.clone(), of)?;
        match updates::offer(self, batch)? {
            Some(_) => self.update(&fitted),
            None => Ok(()),
        }
    }
}

/// Puts the cumulative average in force until it is dropped, also when the model panics.
pub(crate) struct Recalibrating<'a> {
    stats: &'a [&'a RunningStats],
    _scope: Scope,
}

impl<'a> Recalibrating<'a> {
    pub(crate) fn start(stats: &'a [&'a RunningStats]) -> Self {
        for s in stats {
            s.start_recalibration();
        }
        Self {
            stats,
            _scope: Scope::applying(),
        }
    }
}

impl Drop for Recalibrating<'_> {
    fn drop(&mut self) {
        for s in self.stats {
            s.end_recalibration();
        }
    }
}
