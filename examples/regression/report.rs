//! The printed output and the figures.

use crate::axis::Axis;
use crate::palette;
use crate::plot::{Chart, Curve};
use crate::scheme::Scheme;
use crate::train::{GOAL, Run, Settings};
use std::error::Error;

/// A way, and a run of it for each seed.
pub(crate) struct Variant {
    pub(crate) scheme: Scheme,
    pub(crate) runs: Vec<Run>,
}

impl Variant {
    /// The median over the seeds.
    pub(crate) fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        median(self.runs.iter().map(of).collect())
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn table(variants: &[Variant], settings: Settings) -> String {
    let head = [
        "inputs",
        "targets",
        "first loss",
        "steps to R² 0.9",
        "R²",
        "RMSE",
        "MAE",
        "spread",
        "RMSE, one by one",
        "spread, one by one",
    ];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    for variant in variants {
        let steps = variant.median(|r| r.reached.map_or(f64::INFINITY, |s| s as f64));
        let dollars = |v: f64| format!("${v:.0}");
        rows.push(vec![
            variant.scheme.inputs().to_string(),
            variant.scheme.targets().to_string(),
            format!("{:.3e}", variant.median(|r| r.first_loss)),
            match steps.is_finite() {
                true => format!("{steps}"),
                false => format!("not in {}", settings.steps),
            },
            format!("{:.3}", variant.median(|r| r.together.r2)),
            dollars(variant.median(|r| r.together.rmse)),
            dollars(variant.median(|r| r.together.mae)),
            format!("{:.3}", variant.median(|r| r.together.spread)),
            dollars(variant.median(|r| r.alone.rmse)),
            format!("{:.3}", variant.median(|r| r.alone.spread)),
        ]);
    }
    aligned(&rows)
}

/// Words to the left, numbers to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line += &match column < 2 {
                true => format!("{cell:<width$}  "),
                false => format!("{cell:>width$}  "),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// The error of the test against the steps, a line for each way.
///
/// The height of one price for all cars is marked.
pub(crate) fn chart(
    variants: &[Variant],
    settings: Settings,
    price_std: f64,
) -> Result<String, Box<dyn Error>> {
    let names: Vec<String> = variants
        .iter()
        .map(|variant| format!("{} → {}", variant.scheme.inputs(), variant.scheme.targets()))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let classes = palette::classes(&names);
    let curves = variants.iter().enumerate().map(|(i, variant)| {
        let points = variant.runs[0].curve.iter().enumerate();
        let points = points.map(|(point, &(step, _))| {
            let rmse = variant.median(|run| run.curve[point].1);
            // The axis ends there; a line that begins above it comes in from its top.
            (step as f64, rmse.min(TOP))
        });
        Curve {
            label: names[i].to_string(),
            class: classes[i],
            points: points.collect(),
            band: vec![],
        }
    });
    let chart = Chart {
        description: format!(
            "Root mean squared error of the test in dollars against training steps, for {} ways to \
            scale",
            variants.len()
        ),
        size: (860, 440),
        x: Axis {
            label: "training steps",
            range: 0.0..settings.steps as f64,
            log: false,
            format: |step| format!("{step:.0}"),
        },
        y: Axis {
            label: "test RMSE, dollars",
            range: 1000.0..TOP,
            log: true,
            format: |dollars| format!("{dollars:.0}"),
        },
        title: "Test error of one network on car prices, scaled in eight ways".to_string(),
        legend: "inputs → prices",
        mark: Some((price_std, "one price for all cars")),
        markers: false,
        family: 'r',
        curves: curves.collect(),
    };
    chart.standalone(&palette::style('r', &classes))
}

const TOP: f64 = 40_000.;

/// The goal in dollars.
pub(crate) fn goal(price_std: f64) -> String {
    format!(
        "R² {GOAL} of the test is an RMSE of ${:.0}; one price for all cars is R² 0 and \
        ${price_std:.0}.",
        price_std * (1. - GOAL).sqrt()
    )
}
