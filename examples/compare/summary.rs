//! The figures of all runs of one kind.

use crate::train::{Run, Step};

/// The test accuracy that a network is timed to.
pub(crate) const TARGET: f64 = 0.95;

/// All runs of one kind of norm.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    pub(crate) norm: String,
    pub(crate) runs: Vec<Run>,
}

/// Median and range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one value, none of them NaN.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let (below, above) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        let median = if below == above {
            below
        } else {
            (below + above) / 2.
        };
        Some(Self { median, min, max })
    }
}

/// A row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    pub(crate) norm: String,
    pub(crate) seeds: usize,
    /// Seeds that reached [`TARGET`] at all.
    pub(crate) reached: usize,
    /// Seeds whose loss stopped being a number.
    pub(crate) diverged: usize,
    /// Steps to [`TARGET`]; infinite for a seed that did not reach it.
    pub(crate) steps: Spread,
    /// Test accuracy after the last step.
    pub(crate) accuracy: Spread,
    /// Of all steps of all seeds, where it was a number.
    pub(crate) largest_gradient: Option<f64>,
    /// Of a step: median over all of them.
    pub(crate) milliseconds: f64,
}

impl Summary {
    /// None for a variant without a step.
    pub(crate) fn of(variant: &Variant) -> Option<Self> {
        let steps = || variant.runs.iter().flat_map(|run| &run.steps);
        let to_target: Vec<_> = variant
            .runs
            .iter()
            .map(|run| steps_to(TARGET, &run.steps))
            .collect();
        let last_accuracy = |run: &Run| run.steps.iter().rev().find_map(|step| step.accuracy);
        Some(Self {
            norm: variant.norm.clone(),
            seeds: variant.runs.len(),
            reached: to_target.iter().flatten().count(),
            diverged: variant.runs.iter().filter(|run| run.diverged).count(),
            steps: Spread::of(
                to_target
                    .iter()
                    .map(|step| step.map_or(f64::INFINITY, |step| step as f64)),
            )?,
            accuracy: Spread::of(variant.runs.iter().filter_map(last_accuracy))?,
            largest_gradient: steps()
                .map(Step::gradient)
                .filter(|norm| norm.is_finite())
                .reduce(f64::max),
            milliseconds: Spread::of(steps().map(|step| step.milliseconds))?.median,
        })
    }

    /// "40 (35–50)": the median over the seeds and their range.
    pub(crate) fn steps_text(&self) -> String {
        let Spread { median, min, max } = self.steps;
        let text = |steps: f64| {
            if steps.is_finite() {
                format!("{steps:.0}")
            } else {
                "never".to_string()
            }
        };
        if min == max {
            text(median)
        } else {
            format!("{} ({}–{})", text(median), text(min), text(max))
        }
    }

    /// "98.4 % (98.0–98.8)": the median over the seeds and their range.
    pub(crate) fn accuracy_text(&self) -> String {
        let Spread { median, min, max } = self.accuracy;
        let text = format!("{:.1}\u{a0}%", 100. * median);
        if min == max {
            text
        } else {
            format!("{text} ({:.1}–{:.1})", 100. * min, 100. * max)
        }
    }

    pub(crate) fn gradient_text(&self) -> String {
        self.largest_gradient
            .map_or("not finite".to_string(), three_digits)
    }

    pub(crate) fn milliseconds_text(&self) -> String {
        three_digits(self.milliseconds)
    }
}

/// The first step after which at least this accuracy was measured.
fn steps_to(target: f64, steps: &[Step]) -> Option<usize> {
    // Measured in f32, where 475 of 500 comes out a rounding below 0.95.
    steps
        .iter()
        .find(|step| {
            step.accuracy
                .is_some_and(|accuracy| accuracy > target - 1e-6)
        })
        .map(|step| step.step)
}

/// Three significant digits: 0.0123, 1.23, 12.3, 123, 1.23e6.
pub(crate) fn three_digits(value: f64) -> String {
    let digits = 2 - value.abs().max(1e-300).log10().floor() as i32;
    match digits {
        _ if value == 0. => "0".to_string(),
        0..=6 => format!("{value:.*}", digits as usize),
        -3..0 => format!("{value:.0}"),
        _ => format!("{value:.2e}"),
    }
}

/// Runs made up for tests.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    /// A run whose accuracy is measured after every second step.
    pub(crate) fn run(accuracies: &[f64], diverged: bool) -> Run {
        let step = |(index, &accuracy): (usize, &f64)| {
            let step = |step, accuracy| Step {
                step,
                loss: 1.,
                layer_gradients: [3., 0., 4., 0.],
                milliseconds: step as f64,
                accuracy,
            };
            [
                step(2 * index + 1, None),
                step(2 * index + 2, Some(accuracy)),
            ]
        };
        Run {
            seed: 0,
            steps: accuracies.iter().enumerate().flat_map(step).collect(),
            diverged,
        }
    }

    pub(crate) fn summary(norm: &str, runs: &[&[f64]]) -> Summary {
        Summary::of(&Variant {
            norm: norm.to_string(),
            runs: runs
                .iter()
                .map(|accuracies| run(accuracies, false))
                .collect(),
        })
        .unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::samples::summary;
    use super::*;

    #[test]
    fn medians_and_ranges() {
        assert_eq!(
            Spread::of([3., 1., 2.]),
            Some(Spread {
                median: 2.,
                min: 1.,
                max: 3.
            })
        );
        assert_eq!(
            Spread::of([4., 1., 2., 3.]),
            Some(Spread {
                median: 2.5,
                min: 1.,
                max: 4.
            })
        );
        assert_eq!(
            Spread::of([f64::INFINITY; 2]).map(|spread| spread.median),
            Some(f64::INFINITY)
        );
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_row_holds_what_its_runs_come_to() {
        let row = summary(
            "batch",
            &[&[0.5, 0.96, 0.94], &[0.95, 0.9, 0.98], &[0.2, 0.3, 0.97]],
        );
        assert_eq!(
            row.steps,
            Spread {
                median: 4.,
                min: 2.,
                max: 6.
            }
        );
        assert_eq!(
            row.accuracy,
            Spread {
                median: 0.97,
                min: 0.94,
                max: 0.98
            }
        );
        assert_eq!(
            (
                row.seeds,
                row.diverged,
                row.largest_gradient,
                row.milliseconds
            ),
            (3, 0, Some(5.), 3.5)
        );
        assert_eq!(
            (row.steps_text().as_str(), row.accuracy_text().as_str()),
            ("4 (2–6)", "97.0\u{a0}% (94.0–98.0)")
        );
    }

    #[test]
    fn a_target_that_was_not_reached_is_never() {
        assert_eq!(summary("none", &[&[0.1], &[0.2]]).steps_text(), "never");
        assert_eq!(
            summary("none", &[&[0.1], &[0.99], &[0.2]]).steps_text(),
            "never (2–never)"
        );
        assert_eq!(summary("none", &[&[0.95f32.into()]]).steps_text(), "2");
    }

    #[test]
    fn three_digits_at_any_size() {
        for (value, text) in [
            (0., "0"),
            (0.01234, "0.0123"),
            (1., "1.00"),
            (98.76, "98.8"),
            (1234.5, "1234"),
            (1.5e9, "1.50e9"),
            (2e-9, "2.00e-9"),
        ] {
            assert_eq!(three_digits(value), text);
        }
    }
}
