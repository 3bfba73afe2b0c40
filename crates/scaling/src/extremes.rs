//! The least and the greatest value of a feature.

use candle_core::Result;

use super::State;
use super::check;

/// Least and greatest value; infinite, and in the wrong order, before there are any.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extremes {
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Extremes {
    /// Extremes of no values.
    pub(super) const NONE: Self = Self {
        min: f64::INFINITY,
        max: f64::NEG_INFINITY,
    };

    pub(super) fn take(&mut self, values: &[f64]) {
        for &value in values {
            self.merge(Self {
                min: value,
                max: value,
            });
        }
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    pub(super) fn save(state: State, statistics: &[Self]) -> Result<State> {
        let values = |of: fn(&Self) -> f64| statistics.iter().map(of).collect::<Vec<_>>();
        state
            .with_values("min", &values(|e| e.min))?
            .with_values("max", &values(|e| e.max))
    }

    pub(super) fn restore(state: &State) -> Result<Vec<Self>> {
        let len = state.seen().len();
        let (min, max) = (state.values("min", len)?, state.values("max", len)?);
        let mut statistics = Vec::with_capacity(len);
        for (i, seen) in state.seen().iter().enumerate() {
            let one = Self {
                min: min[i],
                max: max[i],
            };
            let holds = match seen.values {
                0 => one == Self::NONE,
                _ => one.min.is_finite() && one.max.is_finite() && one.min <= one.max,
            };
            let label = state.features().label(i);
            check::saved_value(state.kind(), "min and max", &label, one.min, holds)?;
            statistics.push(one);
        }
        Ok(statistics)
    }
}
