//! The report: one HTML file that needs no other file.

use crate::common::ROUGH;
use crate::data::{TEST_SIZE, TRAIN_SIZE};
use crate::figures::{Figure, layer_panels, overview};
use crate::findings::findings;
use crate::model::{CHANNELS, LAYERS};
use crate::plot::escape;
use crate::summary::{Summary, TARGET, Variant};
use crate::train::Settings;
use std::error::Error;

const STYLE: &str = include_str!("report.css");
/// Kinds that have a color of their own in the style sheet, with the dashes that tell them apart
/// without it.
const DASHES: [(&str, &str); 7] = [
    ("none", "1 15"),
    ("batch", "none"),
    ("layer", "32 18"),
    ("group", "10 17"),
    ("instance", "32 16 1 16"),
    ("rms", "22 15"),
    ("weight", "28 15 1 15 1 15"),
];
/// Dashes of a kind that is there for a second time, such as with another number of groups.
const MORE_DASHES: [&str; 3] = ["60 14", "1 11", "24 14 1 14 1 14 1 14"];

/// The whole page. `command` is what repeats the run, `workers` the number of networks that trained
/// side by side.
pub(crate) fn html(
    variants: &[Variant],
    rows: &[Summary],
    settings: &Settings,
    command: &str,
    quick: bool,
    workers: usize,
) -> Result<String, Box<dyn Error>> {
    let sentences: String = findings(rows)
        .iter()
        .map(|sentence| format!("<li>{}</li>\n", escape(sentence)))
        .collect();
    let figures = overview(variants)
        .iter()
        .map(figure)
        .collect::<Result<String, _>>()?;
    let panels = layer_panels(variants)
        .iter()
        .map(figure)
        .collect::<Result<String, _>>()?;
    let rough = match quick {
        true => format!("<p class=\"warning\">{ROUGH}</p>\n"),
        false => String::new(),
    };
    let (seeds, steps, batch, lr) = (
        settings.seeds,
        settings.steps(),
        settings.batch_size,
        settings.lr,
    );
    let (version, kinds) = (env!("CARGO_PKG_VERSION"), variants.len());
    let plural = |count: usize, one: &str, many: &str| {
        format!("{count} {}", if count == 1 { one } else { many })
    };
    let subtitle = format!(
        "The same small convolutional network, trained on {TRAIN_SIZE} handwritten digits with {} \
        of normalization: {} each, {} of {} at a learning rate that falls from {lr} to zero. \
        candle-norm {version}.",
        plural(kinds, "kind", "kinds"),
        plural(seeds, "seed", "seeds"),
        plural(steps, "step", "steps"),
        plural(batch, "image", "images"),
    );
    let side_by_side = match workers {
        1 => "one network at a time, on one thread".to_string(),
        _ => format!("one thread a network, {workers} networks side by side"),
    };
    Ok(format!(
        r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Normalization layers compared</title>
<style>
{STYLE}{rules}</style>
</head>
<body>
<header>
<h1>Normalization layers compared</h1>
<p class="soft">{subtitle}</p>
{rough}</header>
<main>
<ul class="findings">
{sentences}</ul>
<div class="scroll">
{table}</div>
<h2>Over the steps</h2>
{legend}<div class="figures">
{figures}</div>
<h2>Gradient norm of each layer</h2>
<p>One panel a kind of normalization, all on the same scale. {first} sees the pixels, {last} gives the classes.</p>
<div class="figures panels">
{panels}</div>
<h2>How it was run</h2>
<dl>
<dt>Network</dt><dd>Three 3×3 convolutions ({channels} channels), each followed by its norm (weight norm goes around it) and ReLU; average pooling after the first and the third; a linear layer without norm. A convolution has a bias where its norm has none.</dd>
<dt>Norms</dt><dd>With their default options. Layer and RMS norm run over the channels of each pixel.</dd>
<dt>Training</dt><dd>Plain stochastic gradient descent, without momentum, weight decay or adaptation: each update is the gradient times the learning rate. The rate falls in a straight line from {lr} to zero, the same for every kind. Another rate can turn the order around: try <code>--lr</code>.</dd>
<dt>What is equal</dt><dd>With the same seed all kinds start from the same weights (He-normal, biases zero) and see the same images in the same order. The {TEST_SIZE} test digits are the same for all.</dd>
<dt>Steps to {target:.0}&nbsp;%</dt><dd>The first step after which at least that share of the test digits was classified rightly. Measured every 5 steps up to step 150, then every 25.</dd>
<dt>Gradient norm</dt><dd>Euclidean norm of the gradient of the parameters that train, before each update.</dd>
<dt>Time a step</dt><dd>Forward, backward and update: median over all steps, {side_by_side}. What else the machine does slows a step; the kinds take turns, so that it slows all alike.</dd>
<dt>Command</dt><dd><code>{command}</code></dd>
<dt>Data</dt><dd>Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0; 8×8 pixels, standardized with the mean and deviation of the training images.</dd>
</dl>
</main>
</body>
</html>
"#,
        subtitle = escape(&subtitle),
        rules = rules(variants),
        table = table(rows),
        legend = legend(variants),
        first = LAYERS[0],
        last = LAYERS[LAYERS.len() - 1],
        channels = CHANNELS[1..]
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
        target = 100. * TARGET,
        command = escape(command),
    ))
}

/// The color, the dashes and the switch of each variant, then the lines of the layers.
fn rules(variants: &[Variant]) -> String {
    let kind = |variant: &Variant| {
        variant
            .norm
            .split(':')
            .next()
            .unwrap_or_default()
            .to_string()
    };
    let mut css = String::new();
    for (index, variant) in variants.iter().enumerate() {
        let kind_of_variant = kind(variant);
        let before = variants[..index]
            .iter()
            .filter(|other| kind(other) == kind_of_variant)
            .count();
        let own = DASHES
            .iter()
            .find(|(name, _)| *name == kind_of_variant)
            .map_or("none", |(_, dash)| dash);
        let dash = if before == 0 {
            own
        } else {
            MORE_DASHES[(before - 1) % MORE_DASHES.len()]
        };
        css += &format!(".s{index} {{ --color: var(--{kind_of_variant}); --dash: {dash}; }}\n");
        css += &format!(
            "body:has(#show{index}:not(:checked)) figure .s{index} {{ visibility: hidden; }}\n"
        );
    }
    for (layer, dash) in ["none", "28 17", "12 15", "1 13"].into_iter().enumerate() {
        css += &format!(".l{layer} {{ --color: var(--layer{layer}); --dash: {dash}; }}\n");
    }
    css
}

fn swatch(class: usize) -> String {
    format!(
        "<svg class=\"swatch\" viewBox=\"0 0 160 48\" aria-hidden=\"true\">\
         <line class=\"line s{class}\" x1=\"0\" y1=\"24\" x2=\"160\" y2=\"24\" \
         stroke-width=\"12\"/></svg>"
    )
}

fn legend(variants: &[Variant]) -> String {
    let mut html = "<fieldset class=\"legend\" aria-label=\"Lines shown\">\n".to_string();
    for (class, variant) in variants.iter().enumerate() {
        let (swatch, norm) = (swatch(class), escape(&variant.norm));
        html += &format!(
            "<label><input type=\"checkbox\" id=\"show{class}\" checked> {swatch}{norm}</label>\n"
        );
    }
    html + "</fieldset>\n"
}

fn table(rows: &[Summary]) -> String {
    let best = |key: fn(&Summary) -> f64| rows.iter().map(key).fold(f64::INFINITY, f64::min);
    let cell = |row: &Summary, key: fn(&Summary) -> f64, text: String| {
        let class = if rows.len() > 1 && key(row) == best(key) && key(row).is_finite() {
            " class=\"best\""
        } else {
            ""
        };
        format!("<td{class}>{text}</td>")
    };
    let mut html = format!(
        "<table>\n<caption>Median over the seeds, with the lowest and the highest in brackets. \
         Bold: the best of a column. Never: not within the run.</caption>\n\
         <thead><tr><th scope=\"col\">Norm</th><th scope=\"col\">Steps to {:.0}\u{a0}% test \
         accuracy</th><th scope=\"col\">Final test accuracy</th>\
         <th scope=\"col\">Largest gradient norm</th><th scope=\"col\">Time a step \
         (ms)</th></tr></thead>\n<tbody>\n",
        100. * TARGET
    );
    for (class, row) in rows.iter().enumerate() {
        html += &format!(
            "<tr><th scope=\"row\">{}{}</th>{}{}<td>{}</td>{}</tr>\n",
            swatch(class),
            escape(&row.norm),
            cell(row, |row| row.steps.median, ranged(&row.steps_text())),
            cell(
                row,
                |row| -row.accuracy.median,
                ranged(&row.accuracy_text())
            ),
            row.gradient_text(),
            cell(row, |row| row.milliseconds, row.milliseconds_text()),
        );
    }
    html + "</tbody>\n</table>\n"
}

/// The range in brackets after a value, smaller.
fn ranged(text: &str) -> String {
    escape(text)
        .replace('(', "<small>(")
        .replace(')', ")</small>")
}

fn figure(figure: &Figure) -> Result<String, Box<dyn Error>> {
    let svg = figure.chart.svg()?;
    let note = match figure.note.as_str() {
        "" => String::new(),
        note => format!("<figcaption>{}</figcaption>\n", escape(note)),
    };
    Ok(format!(
        "<figure>\n<h3>{}</h3>\n{svg}\n{note}</figure>\n",
        escape(&figure.title)
    ))
}
