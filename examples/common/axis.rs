//! Linear and logarithmic axes, with round values at their ticks.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use std::ops::Range;

/// An axis: its label, its range, and how its values are shown.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    /// Above zero where the axis is logarithmic.
    pub(crate) range: Range<f64>,
    pub(crate) log: bool,
    pub(crate) format: fn(f64) -> String,
}

impl Axis {
    fn position(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    fn linear(&self) -> RangedCoordf64 {
        (self.position(self.range.start)..self.position(self.range.end)).into()
    }

    /// The multiples of powers of ten within the range.
    fn multiples(&self, digits: &[f64]) -> Vec<f64> {
        let Range { start, end } = self.range;
        let decades = start.log10().floor() as i32..=end.log10().floor() as i32;
        let all = decades.flat_map(|decade| {
            digits
                .iter()
                .map(move |digit| rounded(digit * 10f64.powi(decade)))
        });
        all.filter(|tick| (start..=end).contains(tick)).collect()
    }
}

/// Without the last bits that 2 times 10 to the -1 differs in from 0.2.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limits: (i32, i32)) -> i32 {
        self.linear().map(&self.position(*value), limits)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if !self.log {
            return self.linear().key_points(hint);
        }
        let choices = [&[1., 2., 5.][..], &[1., 3.], &[1.]].map(|digits| self.multiples(digits));
        let [.., powers] = &choices;
        let most = hint.max_num_points();
        let fitting = choices.iter().find(|ticks| ticks.len() <= most);
        let stride = powers.len().div_ceil(most.max(1));
        fitting.map_or_else(
            || powers.iter().step_by(stride).copied().collect(),
            Vec::clone,
        )
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.format)(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plotters::coord::ranged1d::BoldPoints;

    fn axis(range: Range<f64>, log: bool) -> Axis {
        Axis {
            label: "an axis",
            range,
            log,
            format: |value| format!("{value}"),
        }
    }

    #[test]
    fn ticks_are_round_and_within_the_range() {
        let ticks = |range, count| axis(range, true).key_points(BoldPoints(count));
        assert_eq!(ticks(0.15..12., 8), [0.2, 0.5, 1., 2., 5., 10.]);
        assert_eq!(ticks(0.15..12., 4), [0.3, 1., 3., 10.]);
        assert_eq!(ticks(1e-12..0.1, 4), [1e-12, 1e-9, 1e-6, 1e-3]);
        assert_eq!(ticks(0.5e-3..2e3, 8), [1e-3, 1e-2, 0.1, 1., 10., 100., 1e3]);
    }

    #[test]
    fn a_decade_is_as_long_everywhere() {
        let positions = [0.1, 1., 10.].map(|value| axis(0.1..10., true).map(&value, (0, 1000)));
        assert_eq!(positions, [0, 500, 1000]);
        assert_eq!(axis(0.0..4., false).map(&1., (1000, 0)), 750);
    }
}
