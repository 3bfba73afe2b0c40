//! The figure of a claim: curves over the varied quantity, or a row of dots for each variant.

use std::fmt::Write;

use plotters::coord::ranged1d::{BoldPoints, Ranged};

use crate::axis::Axis;
use crate::claim::{Claim, place, show, steps};
use crate::lab::Measure;
use crate::palette;
use crate::plot::{Chart, Curve, escape};

/// Letter that the classes of the style sheet start with.
const FAMILY: char = 'a';
const WIDTH: f64 = 720.;
const FONT: &str = "font-family=\"sans-serif\" font-size=\"13\"";

/// The figure as an SVG file of its own, for light and dark mode.
pub(crate) fn svg(
    claim: &Claim,
    measures: &[Measure],
) -> Result<String, Box<dyn std::error::Error>> {
    let shown: Vec<&Measure> = measures
        .iter()
        .filter(|m| m.metric == claim.plot.metric)
        .collect();
    match claim.plot.x {
        Some(x) => curves(claim, &shown, x),
        None => Ok(dots(claim, &shown)),
    }
}

fn limits(values: impl Iterator<Item = f64>, log: bool) -> (f64, f64) {
    let fits = |v: &f64| v.is_finite() && (!log || *v > 0.);
    let (low, high) = values
        .filter(fits)
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
            (l.min(v), h.max(v))
        });
    match (low.is_finite(), log) {
        (false, _) => (0.1, 1.),
        (_, true) => (low / 1.3, high * 1.3),
        (_, false) => {
            let room = 0.06 * (high - low).max(1e-3 * high.abs()).max(1e-9);
            (low - room, high + room)
        }
    }
}

fn curves(
    claim: &Claim,
    shown: &[&Measure],
    x: &'static str,
) -> Result<String, Box<dyn std::error::Error>> {
    let plot = &claim.plot;
    let mut variants: Vec<&str> = vec![];
    for measure in shown {
        if !variants.contains(&measure.variant.as_str()) {
            variants.push(&measure.variant);
        }
    }
    let (low, high) = limits(
        shown.iter().flat_map(|m| m.values.iter().copied()),
        plot.log_y,
    );
    let within = |v: f64| if v.is_nan() { high } else { v.clamp(low, high) };
    let classes = palette::classes(&variants);
    let curve = |(variant, class): (&&str, &usize)| {
        let mine = || shown.iter().filter(|m| m.variant == **variant);
        Curve {
            label: variant.to_string(),
            class: *class,
            points: mine().map(|m| (m.x, within(m.median()))).collect(),
            band: mine()
                .map(|m| (m.x, within(m.low()), within(m.high())))
                .collect(),
        }
    };
    let chart = Chart {
        description: format!("{} over {x}, for each variant", plot.y),
        // Names of many variants need room beside each other.
        size: (WIDTH as u32, 358 + 15 * variants.len() as u32),
        x: Axis {
            label: x,
            range: bounds(limits(shown.iter().map(|m| m.x), plot.log_x)),
            log: plot.log_x,
            format: place,
        },
        y: Axis {
            label: plot.y,
            range: bounds((low, high)),
            log: plot.log_y,
            format: place,
        },
        title: claim.title.to_string(),
        legend: "",
        mark: None,
        markers: true,
        family: FAMILY,
        curves: variants.iter().zip(&classes).map(curve).collect(),
    };
    chart.standalone(&palette::style(FAMILY, &classes))
}

fn bounds((low, high): (f64, f64)) -> std::ops::Range<f64> {
    low..high
}

/// Round values between the limits. Where a logarithmic axis is too short for two of its own, those
/// of a linear one.
fn ticks(low: f64, high: f64, log: bool) -> Vec<f64> {
    let axis = |log| Axis {
        label: "",
        range: low..high,
        log,
        format: place,
    };
    let ticks = axis(log).key_points(BoldPoints(6));
    if ticks.len() > 1 {
        return ticks;
    }
    axis(false).key_points(BoldPoints(6))
}

/// For each variant the range of its seeds as a line, and its median as a dot with its figure.
fn dots(claim: &Claim, shown: &[&Measure]) -> String {
    let log = claim.plot.log_y;
    let (low, high) = limits(shown.iter().flat_map(|m| m.values.iter().copied()), log);
    let (left, right) = (230., WIDTH - 110.);
    let position = |v: f64| if log { v.max(low).log10() } else { v };
    let x = |v: f64| {
        let v = if v.is_nan() { high } else { v.clamp(low, high) };
        let share = (position(v) - position(low)) / (position(high) - position(low));
        left + share * (right - left)
    };
    let height = 26. * shown.len() as f64 + 92.;
    let description = escape(&format!("{}, for each variant", claim.plot.y));
    let variants: Vec<&str> = shown.iter().map(|m| m.variant.as_str()).collect();
    let classes = palette::classes(&variants);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"{description}\" {FONT}><style>{}</style>\
         <text x=\"12\" y=\"22\" font-size=\"15\" fill=\"currentColor\">{}</text>",
        palette::style(FAMILY, &classes),
        escape(claim.title),
    );
    let bottom = height - 34.;
    for tick in ticks(low, high, log) {
        let at = x(tick);
        let _ = write!(
            svg,
            "<line class=\"soft\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"36\" y2=\"{}\"/>\
             <text x=\"{at:.1}\" y=\"{bottom}\" text-anchor=\"middle\" fill=\"currentColor\" \
             opacity=\"0.7\">{}</text>",
            bottom - 14.,
            place(tick)
        );
    }
    for (row, measure) in shown.iter().enumerate() {
        let y = 50. + 26. * row as f64;
        let variant = escape(&measure.variant);
        let class = format!("{FAMILY}{}", classes[row]);
        let (from, to, at) = (x(measure.low()), x(measure.high()), x(measure.median()));
        let figure = match measure.metric.starts_with("steps") {
            true => steps(measure.median()),
            false => show(measure.median()),
        };
        // Writing to a String does not fail.
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"currentColor\">{variant}</text>\
             <line class=\"soft\" x1=\"{left}\" x2=\"{right}\" y1=\"{y}\" y2=\"{y}\"/>\
             <line class=\"line {class}\" style=\"stroke-dasharray:none\" x1=\"{from:.1}\" \
             x2=\"{to:.1}\" y1=\"{y}\" y2=\"{y}\" stroke-width=\"3\"/>\
             <circle class=\"area {class}\" cx=\"{at:.1}\" cy=\"{y}\" r=\"5\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"currentColor\">{figure}</text>",
            left - 12.,
            y + 4.,
            right + 14.,
            y + 4.,
        );
    }
    let label = escape(claim.plot.y);
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" \
         fill=\"currentColor\">{label}{}</text></svg>",
        (left + right) / 2.,
        height - 12.,
        if log { " (logarithmic)" } else { "" },
    );
    svg
}
