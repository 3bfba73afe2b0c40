//! The lines of the charts, computed from the records of the runs.

use crate::plot::Curve;
use crate::summary::{Spread, Variant};
use crate::train::Step;

/// Points of a smoothed curve at most.
const POINTS: usize = 50;

pub(crate) fn curve(class: usize, label: &str, points: Vec<(f64, f64)>) -> Curve {
    Curve {
        label: label.to_string(),
        class,
        points,
        band: vec![],
    }
}

/// Median and range over the seeds wherever the accuracy was measured.
pub(crate) fn accuracy(class: usize, variant: &Variant) -> Curve {
    let mut curve = curve(class, &variant.norm, vec![]);
    for index in 0..longest(variant) {
        let steps = || variant.runs.iter().filter_map(|run| run.steps.get(index));
        if let Some(spread) = Spread::of(steps().filter_map(|step| step.accuracy)) {
            let x = (index + 1) as f64;
            curve.points.push((x, spread.median));
            curve.band.push((x, spread.min, spread.max));
        }
    }
    curve
}

/// Medians over the seeds and a few neighboring steps, where they are above zero and finite.
pub(crate) fn smooth(variant: &Variant, of: impl Fn(&Step) -> f64) -> Vec<(f64, f64)> {
    let window = window(std::slice::from_ref(variant));
    let mut points = Vec::new();
    for start in (0..longest(variant)).step_by(window) {
        let steps = variant
            .runs
            .iter()
            .flat_map(|run| run.steps.iter().skip(start).take(window));
        let drawn = steps
            .map(&of)
            .filter(|value| value.is_finite() && *value > 0.);
        let end = (start + window).min(longest(variant));
        points
            .extend(Spread::of(drawn).map(|spread| ((start + 1 + end) as f64 / 2., spread.median)));
    }
    points
}

/// Steps that one point of a smoothed curve stands for.
pub(crate) fn window(variants: &[Variant]) -> usize {
    variants
        .iter()
        .map(longest)
        .max()
        .unwrap_or(1)
        .div_ceil(POINTS)
        .max(1)
}

pub(crate) fn longest(variant: &Variant) -> usize {
    variant
        .runs
        .iter()
        .map(|run| run.steps.len())
        .max()
        .unwrap_or(0)
}

/// The part of a line above a height, begun where the line crosses it.
pub(crate) fn above(floor: f64, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let first = points
        .iter()
        .rposition(|&(_, y)| y < floor)
        .map_or(0, |last_below| last_below + 1);
    let mut part = points[first..].to_vec();
    if let (Some(&(x0, y0)), Some(&(x1, y1))) =
        (first.checked_sub(1).map(|i| &points[i]), part.first())
    {
        part.insert(0, (x0 + (x1 - x0) * (floor - y0) / (y1 - y0), floor));
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Run;

    fn run(losses: &[f64]) -> Run {
        let step = |(index, &loss): (usize, &f64)| Step {
            step: index + 1,
            loss,
            layer_gradients: [3., 4., 0., 0.],
            milliseconds: 1.,
            accuracy: (index % 2 == 1).then_some(loss / 10.),
        };
        Run {
            seed: 0,
            steps: losses.iter().enumerate().map(step).collect(),
            diverged: false,
        }
    }

    #[test]
    fn seeds_are_joined_by_their_median() {
        let variant = Variant {
            norm: "batch".to_string(),
            runs: vec![run(&[1., 2., 3.]), run(&[5., 6., f64::NAN]), run(&[2., 9.])],
        };
        assert_eq!(
            smooth(&variant, |step| step.loss),
            [(1., 2.), (2., 6.), (3., 3.)]
        );
        let accuracy = accuracy(4, &variant);
        assert_eq!(
            (accuracy.class, accuracy.points, accuracy.band),
            (4, vec![(2., 0.6)], vec![(2., 0.2, 0.9)])
        );
    }

    #[test]
    fn long_runs_are_thinned() {
        let variant = Variant {
            norm: "none".to_string(),
            runs: vec![run(&[1.; 101])],
        };
        let points = smooth(&variant, Step::gradient);
        assert_eq!(
            (points.len(), points[0], points[33]),
            (34, (2., 5.), (100.5, 5.))
        );
    }

    #[test]
    fn a_line_begins_where_it_crosses_the_floor() {
        assert_eq!(
            above(0.5, &[(0., 0.), (1., 1.), (2., 0.9)]),
            [(0.5, 0.5), (1., 1.), (2., 0.9)]
        );
        assert_eq!(above(0.5, &[(0., 0.6)]), [(0., 0.6)]);
        assert_eq!(above(0.5, &[(0., 0.6), (1., 0.4)]), []);
    }
}
