//! The series with its alarms, and the errors along the way, as SVG.

use std::error::Error;
use std::ops::Range;

use candle_norm::scaling::DriftEvent;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::data::Series;
use crate::scales::Scaling;
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
/// Errors beyond this, in those of repeating the last value, are cut.
const MOST: f64 = 30.;

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
    let lines: Vec<Line> = (0..width)
        .map(|s| Line {
            name: series.names[s].clone(),
            points: (0..series.rows())
                .map(|row| {
                    let at = row * width + s;
                    (
                        row as f64,
                        (series.values[at] - scales.center[at]) / scales.scale[at],
                    )
                })
                .collect(),
        })
        .collect();
    let title = format!(
        "{}, in standard deviations of the rows that train; alarms of the monitor",
        series.name
    );
    let axis = format!("{} of the series", series.row);
    draw(
        area,
        &title,
        &axis,
        &lines,
        0.0..series.rows() as f64,
        Some(series.train as f64),
        &rows_of(series, alarms),
    )
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
    let lines: Vec<Line> = (shown.iter())
        .filter_map(|scaling| outcomes.iter().find(|o| o.scaling == *scaling))
        .map(|outcome| Line {
            name: outcome.scaling.name().to_string(),
            points: (outcome.errors.windows(SMOOTH).enumerate())
                .map(|(i, errors)| {
                    let mean = errors.iter().sum::<f64>() / SMOOTH as f64;
                    ((series.train + i + SMOOTH) as f64, mean.min(MOST))
                })
                .collect(),
        })
        .collect();
    let title = format!(
        "error of the forecasts, over that of repeating the last value: mean of {SMOOTH} {}s",
        series.row
    );
    let axis = format!("{} of the series", series.row);
    draw(
        area,
        &title,
        &axis,
        &lines,
        0.0..series.rows() as f64,
        Some(series.train as f64),
        &rows_of(series, alarms),
    )
}

fn draw(
    area: &Area,
    title: &str,
    axis: &str,
    lines: &[Line],
    x: Range<f64>,
    split: Option<f64>,
    alarms: &[f64],
) -> Result<(), Box<dyn Error>> {
    let heights = || {
        lines
            .iter()
            .flat_map(|line| line.points.iter().map(|p| p.1))
    };
    let (low, high) = (heights().fold(0., f64::min), heights().fold(0., f64::max));
    let room = 0.05 * (high - low);
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(17))
        .margin(10)
        .margin_right(120)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(x, (low - room)..(high + room))?;
    chart
        .configure_mesh()
        .bold_line_style(INK.mix(0.12))
        .max_light_lines(0)
        .label_style(text(13))
        .axis_desc_style(text(14))
        .x_labels(8)
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&|v| format!("{v:.0}"))
        .x_desc(axis)
        .draw()?;
    let upright = |at: f64| vec![(at, low - room), (at, high + room)];
    for &alarm in alarms {
        chart.draw_series([PathElement::new(
            upright(alarm),
            ALARM.mix(0.6).stroke_width(1),
        )])?;
    }
    if let Some(split) = split {
        chart.draw_series(DashedLineSeries::new(
            upright(split),
            6,
            4,
            INK.mix(0.7).stroke_width(1),
        ))?;
    }
    let mut ends = vec![];
    for (i, line) in lines.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        chart.draw_series(LineSeries::new(
            line.points.iter().copied(),
            color.stroke_width(2),
        ))?;
        if let Some(end) = line.points.last() {
            ends.push((chart.backend_coord(end).1, &line.name, color));
        }
    }
    drop(chart);
    // Names stand at the ends of their lines, apart from each other.
    ends.sort_by_key(|end| end.0);
    let right = area.get_pixel_range().0.end - area.get_pixel_range().0.start - 115;
    let mut free = i32::MIN;
    let top = area.get_pixel_range().1.start;
    for (height, name, color) in ends {
        let height = (height - top).max(free);
        free = height + 17;
        let style = text(14)
            .color(&color)
            .pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(name.clone(), (right, height), style))?;
    }
    Ok(())
}
