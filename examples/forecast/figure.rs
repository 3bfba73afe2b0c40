//! The series with its alarms, and the errors over time, as SVG.

use std::error::Error;
use std::ops::Range;

use candle_norm::scaling::DriftEvent;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::axis::Axis;
use crate::scales::Scaling;
use crate::series::Series;
use crate::walk::Outcome;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Told apart also by eyes that see fewer colors.
const COLORS: [RGBColor; 4] = [
    RGBColor(0, 82, 165),
    RGBColor(229, 49, 26),
    RGBColor(17, 141, 85),
    RGBColor(135, 126, 31),
];
const ALARM: RGBColor = RGBColor(166, 60, 133);
const INK: RGBColor = RGBColor(28, 30, 33);
/// Rows that an error is averaged over.
const SMOOTH: usize = 60;

/// A line with its name.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

pub(crate) fn svg(
    series: &Series,
    outcomes: &[Outcome],
    alarms: &[DriftEvent],
) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (1000, 760)).into_drawing_area();
        root.fill(&WHITE)?;
        let (upper, lower) = root.split_vertically(400);
        levels(&upper, series, alarms)?;
        errors(&lower, series, outcomes, alarms)?;
        root.present()?;
    }
    Ok(text)
}

/// The rows at which there were alarms, counted from the first row of the series.
fn rows_of(series: &Series, alarms: &[DriftEvent]) -> Vec<f64> {
    let mut rows: Vec<u64> = alarms.iter().map(|event| event.step).collect();
    rows.dedup();
    let at = |step: u64| (series.train as u64 + step - 1) as f64;
    rows.into_iter().map(at).collect()
}

/// The series in standard deviations of the rows that train.
fn levels(area: &Area, series: &Series, alarms: &[DriftEvent]) -> Result<(), Box<dyn Error>> {
    let scales = Scaling::Static.scales(series)?;
    let width = series.width();
    let line = |s: usize| Line {
        name: series.names[s].clone(),
        points: (0..series.rows())
            .map(|row| {
                let at = row * width + s;
                let level = (series.values[at] - scales.center[at]) / scales.scale[at];
                (row as f64, level)
            })
            .collect(),
    };
    let lines: Vec<Line> = (0..width).map(line).collect();
    let title = format!(
        "{}: level in standard deviations of the rows that train, and alarms",
        series.name
    );
    draw(area, &title, series, alarms, &lines, false)
}

fn errors(
    area: &Area,
    series: &Series,
    outcomes: &[Outcome],
    alarms: &[DriftEvent],
) -> Result<(), Box<dyn Error>> {
    let shown = [
        Scaling::Static,
        Scaling::Adaptive,
        Scaling::Sliding,
        Scaling::Reversible,
    ];
    let found = shown
        .iter()
        .filter_map(|s| outcomes.iter().find(|o| o.scaling == *s));
    let line = |outcome: &Outcome| Line {
        name: outcome.scaling.name().to_string(),
        points: (outcome.errors.windows(SMOOTH).enumerate())
            .map(|(i, errors)| {
                let mean = errors.iter().sum::<f64>() / SMOOTH as f64;
                ((series.train + i + SMOOTH) as f64, mean)
            })
            .collect(),
    };
    let lines: Vec<Line> = found.map(line).collect();
    let title = format!(
        "error over that of repeating the last value, mean of {SMOOTH} {}s",
        series.row
    );
    draw(area, &title, series, alarms, &lines, true)
}

/// The range that all lines are within, with some room.
fn heights(lines: &[Line], log: bool) -> Range<f64> {
    let all = || {
        lines
            .iter()
            .flat_map(|line| line.points.iter().map(|p| p.1))
    };
    let (low, high) = (
        all().fold(f64::INFINITY, f64::min),
        all().fold(f64::NEG_INFINITY, f64::max),
    );
    match log {
        true => low.max(1e-3) / 1.2..high.max(2e-3) * 1.2,
        false => low - 0.05 * (high - low)..high + 0.05 * (high - low),
    }
}

/// Lines over the rows of the series, with the first row of the test and the alarms.
fn draw(
    area: &Area,
    title: &str,
    series: &Series,
    alarms: &[DriftEvent],
    lines: &[Line],
    log: bool,
) -> Result<(), Box<dyn Error>> {
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let format: fn(f64) -> String = |value| format!("{value}");
    let x = Axis {
        label: series.row,
        range: 0.0..series.rows() as f64,
        log: false,
        format,
    };
    let y = Axis {
        label: "",
        range: heights(lines, log),
        log,
        format,
    };
    let Range { start, end } = y.range;
    let rows = format!("{} of the series", x.label);
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(17))
        .margin(10)
        .margin_right(120)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(INK.mix(0.12))
        .max_light_lines(0)
        .label_style(text(13))
        .axis_desc_style(text(14))
        .x_labels(8)
        .y_labels(7)
        .x_desc(rows)
        .draw()?;
    let upright = |at: f64| vec![(at, start), (at, end)];
    for alarm in rows_of(series, alarms) {
        let line = PathElement::new(upright(alarm), ALARM.mix(0.6).stroke_width(1));
        chart.draw_series([line])?;
    }
    let test = upright(series.train as f64);
    let dashed = DashedLineSeries::new(test, 6, 4, INK.mix(0.7).stroke_width(1));
    chart.draw_series(dashed)?;
    let mut ends = vec![];
    for (i, line) in lines.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let points = line.points.iter().copied();
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        if let Some(end) = line.points.last() {
            ends.push((chart.backend_coord(end).1, &line.name, color));
        }
    }
    drop(chart);
    legend(area, !alarms.is_empty())?;
    names(area, ends)
}

/// Names of the upright lines, below the axis to its left and right.
fn legend(area: &Area, alarms: bool) -> Result<(), Box<dyn Error>> {
    let (columns, rows) = area.dim_in_pixel();
    let (right, height) = (columns as i32 - 330, rows as i32 - 20);
    let style = text_of(&INK).pos(Pos::new(HPos::Left, VPos::Center));
    let name = |text, x| area.draw(&Text::new(text, (x + 8, height), style.clone()));
    if alarms {
        let line = vec![(70, height - 8), (70, height + 8)];
        area.draw(&PathElement::new(line, ALARM.mix(0.6).stroke_width(2)))?;
        name("alarm of the drift monitor", 70)?;
    }
    for from in (height - 8..height + 8).step_by(6) {
        let dash = vec![(right, from), (right, from + 3)];
        area.draw(&PathElement::new(dash, INK.mix(0.7).stroke_width(1)))?;
    }
    name("end of the training rows", right)?;
    Ok(())
}

/// Names stand at the ends of their lines, apart from each other.
fn names(area: &Area, mut ends: Vec<(i32, &String, RGBColor)>) -> Result<(), Box<dyn Error>> {
    ends.sort_by_key(|end| end.0);
    let (columns, rows) = area.get_pixel_range();
    let right = columns.end - columns.start - 115;
    let mut free = i32::MIN;
    for (height, name, color) in ends {
        let height = (height - rows.start).max(free);
        free = height + 17;
        let style = text_of(&color).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(name.clone(), (right, height), style))?;
    }
    Ok(())
}

fn text_of(color: &RGBColor) -> TextStyle<'_> {
    ("sans-serif", 14).into_font().color(color)
}
