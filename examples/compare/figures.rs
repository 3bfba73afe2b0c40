//! The charts of the report.

use crate::axis::Axis;
use crate::curves::{above, accuracy, curve, longest, smooth, window};
use crate::model::LAYERS;
use crate::palette;
use crate::plot::{Chart, Curve};
use crate::summary::{Spread, TARGET, Variant};
use crate::train::Step;
use std::error::Error;

const FIGURE: (u32, u32) = (480, 350);
const PANEL: (u32, u32) = (400, 290);

/// A drawing with its heading and what is to be said below it.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) chart: Chart,
}

/// Accuracy, its last percents, loss and gradient norm, one line a variant.
pub(crate) fn overview(variants: &[Variant]) -> Vec<Figure> {
    let accuracy: Vec<_> = variants
        .iter()
        .enumerate()
        .map(|(class, variant)| accuracy(class, variant))
        .collect();
    let smoothed = |of: fn(&Step) -> f64| -> Vec<_> {
        variants
            .iter()
            .enumerate()
            .map(|(class, variant)| curve(class, &variant.norm, smooth(variant, of)))
            .collect()
    };
    let window = match window(variants) {
        1 => "median over the seeds".to_string(),
        steps => format!("each point is the median over the seeds and {steps} steps"),
    };
    let x = steps_axis(variants);
    let figure = |title: &str, note: String, y: Axis, mark, curves| Figure {
        title: title.to_string(),
        note,
        chart: Chart {
            description: format!("{title} against training steps"),
            size: FIGURE,
            x: x.clone(),
            y,
            title: String::new(),
            legend: "",
            mark,
            markers: false,
            family: 's',
            curves,
        },
    };
    let share = |range| Axis {
        label: "test accuracy (%)",
        range,
        log: false,
        format: |share| format!("{:.0}", 100. * share),
    };
    let target = format!("The rule marks {:.0}\u{a0}%.", 100. * TARGET);
    let mut figures = vec![figure(
        "Test accuracy",
        format!("Median over the seeds; the band reaches from the lowest to the highest. {target}"),
        share(0.0..1.),
        Some((TARGET, "")),
        accuracy.clone(),
    )];
    let lowest_end = accuracy
        .iter()
        .filter_map(|curve| Some(curve.points.last()?.1))
        .reduce(f64::min);
    if let Some(floor) = lowest_end
        .map(|end| ((end - 0.04) * 20.).floor() / 20.)
        .filter(|floor| *floor >= 0.5)
    {
        let above = accuracy.into_iter().map(|curve| Curve {
            points: above(floor, &curve.points),
            band: vec![],
            ..curve
        });
        let note = format!(
            "The same medians from {:.0}\u{a0}% up. {target}",
            100. * floor
        );
        figures.push(figure(
            "Test accuracy, the last percents",
            note,
            share(floor..1.),
            Some((TARGET, "")),
            above.collect(),
        ));
    }
    let loss = smoothed(|step| step.loss);
    let y = log_axis("cross-entropy of a training batch (nats)", &loss);
    figures.push(figure(
        "Training loss",
        format!("Logarithmic scale; {window}."),
        y,
        None,
        loss,
    ));
    let gradient = smoothed(Step::gradient);
    let y = log_axis("norm of the gradient", &gradient);
    let note = format!("Of all parameters together. Logarithmic scale; {window}.");
    figures.push(figure("Gradient norm", note, y, None, gradient));
    figures
}

/// The curves of accuracy in a file of their own.
pub(crate) fn accuracy_file(variants: &[Variant]) -> Result<String, Box<dyn Error>> {
    let names: Vec<&str> = variants
        .iter()
        .map(|variant| variant.norm.as_str())
        .collect();
    let classes = palette::classes(&names);
    let curves = variants.iter().zip(&classes);
    let curves = curves.map(|(variant, class)| Curve {
        band: vec![],
        ..accuracy(*class, variant)
    });
    let chart = Chart {
        description: "Test accuracy against training steps, one line a norm".to_string(),
        size: (760, 400),
        x: steps_axis(variants),
        y: Axis {
            label: "test accuracy (%)",
            range: 0.0..1.,
            log: false,
            format: |share| format!("{:.0}", 100. * share),
        },
        title: "The same network on handwritten digits, one line a norm (median of its seeds)"
            .to_string(),
        legend: "norm",
        mark: None,
        markers: false,
        family: 's',
        curves: curves.collect(),
    };
    chart.standalone(&palette::style('s', &classes))
}

/// The gradient norm of each layer, one panel a variant, all on the same scale.
pub(crate) fn layer_panels(variants: &[Variant]) -> Vec<Figure> {
    let layers = |variant: &Variant| -> Vec<Curve> {
        let of = |layer: usize| {
            curve(
                layer,
                LAYERS[layer],
                smooth(variant, |step| step.layer_gradients[layer]),
            )
        };
        (0..LAYERS.len()).map(of).collect()
    };
    let panels: Vec<_> = variants
        .iter()
        .map(|variant| (variant.norm.clone(), layers(variant)))
        .collect();
    let all: Vec<_> = panels
        .iter()
        .flat_map(|(_, curves)| curves.clone())
        .collect();
    let (x, y) = (steps_axis(variants), log_axis("norm of the gradient", &all));
    let figure = |(title, curves): (String, Vec<Curve>)| {
        let description =
            format!("Gradient norm of each layer with {title} against training steps");
        let chart = Chart {
            description,
            size: PANEL,
            x: x.clone(),
            y: y.clone(),
            title: String::new(),
            legend: "",
            mark: None,
            markers: false,
            family: 'l',
            curves,
        };
        Figure {
            title,
            note: String::new(),
            chart,
        }
    };
    panels.into_iter().map(figure).collect()
}

fn steps_axis(variants: &[Variant]) -> Axis {
    let steps = variants.iter().map(longest).max().unwrap_or(1).max(2);
    Axis {
        label: "training steps",
        range: 0.0..steps as f64,
        log: false,
        format: |step| format!("{step:.0}"),
    }
}

fn log_axis(label: &'static str, curves: &[Curve]) -> Axis {
    let heights = Spread::of(
        curves
            .iter()
            .flat_map(|curve| &curve.points)
            .map(|&(_, y)| y),
    );
    let range = heights.map_or(0.1..10., |Spread { min, max, .. }| min / 1.25..max * 1.25);
    Axis {
        label,
        range,
        log: true,
        format: |value| format!("{value}"),
    }
}
