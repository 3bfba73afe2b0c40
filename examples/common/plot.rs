//! Line charts as SVG. A style sheet sets the colors, so one drawing works in light mode, in dark
//! mode and in print.
#![allow(dead_code)] // Each example uses some of it.

use crate::axis::Axis;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;
use std::ops::Range;

/// Drawn larger by this much than shown, since plotters draws on whole pixels.
const FINE: u32 = 4;
/// Black stands for the color of the text around the figure.
const INK: RGBColor = BLACK;

/// A line, and the band that its seeds lie in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    pub(crate) label: String,
    /// Number of its class in the style sheet, which begins with the letter of the chart.
    pub(crate) class: usize,
    pub(crate) points: Vec<(f64, f64)>,
    /// x, lowest, highest.
    pub(crate) band: Vec<(f64, f64, f64)>,
}

/// A chart before it is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    /// Read out instead of the picture.
    pub(crate) description: String,
    pub(crate) size: (u32, u32),
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    /// Above the chart; none where a page has one.
    pub(crate) title: String,
    /// Above the names of the curves.
    pub(crate) legend: &'static str,
    /// A height that is marked across the chart, and its name.
    pub(crate) mark: Option<(f64, &'static str)>,
    /// Whether each point is shown as a dot.
    pub(crate) markers: bool,
    /// Letter that the classes of the curves start with.
    pub(crate) family: char,
    pub(crate) curves: Vec<Curve>,
}

impl Chart {
    /// The chart as an SVG element.
    pub(crate) fn svg(&self) -> Result<String, Box<dyn Error>> {
        let (width, height) = (self.size.0 * FINE, self.size.1 * FINE);
        let mut svg = String::new();
        self.draw(SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area())?;
        let body = svg
            .split_once("<svg")
            .and_then(|(_, rest)| rest.split_once('>'))
            .map_or("", |(_, body)| body);
        let description = escape(&self.description);
        let head = format!(
            r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{description}">"#
        );
        let mut svg = (head + body).replace(r##"="#000000""##, r#"="currentColor""#);
        for curve in &self.curves {
            let (color, class) = (
                placeholder(curve.class),
                format!("{}{}", self.family, curve.class),
            );
            let RGBColor(red, green, blue) = color;
            let hex = format!("#{red:02X}{green:02X}{blue:02X}");
            svg = svg.replace(
                &format!(r#"stroke="{hex}""#),
                &format!(r#"class="line {class}""#),
            );
            svg = svg.replace(
                &format!(r#"fill="{hex}""#),
                &format!(r#"class="area {class}""#),
            );
        }
        Ok(svg)
    }

    /// The chart as a file of its own, with a style sheet for its classes.
    pub(crate) fn standalone(&self, style: &str) -> Result<String, Box<dyn Error>> {
        let (width, height) = self.size;
        let head =
            format!(r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}""#);
        let (first, rest) = self
            .svg()?
            .split_once('>')
            .map_or_else(Default::default, |(f, r)| {
                (f.replacen("<svg", &head, 1), r.to_string())
            });
        Ok(format!("{first}><style>{style}</style>{rest}"))
    }

    fn draw(&self, root: DrawingArea<SVGBackend, Shift>) -> Result<(), Box<dyn Error>> {
        let unit = FINE as i32;
        let text = |size: i32| {
            ("sans-serif", f64::from(size * unit) * 1.24)
                .into_font()
                .color(&INK)
        };
        let widest = self
            .curves
            .iter()
            .map(|curve| curve.label.chars().count() as i32)
            .max()
            .unwrap_or(0);
        let labels = if widest == 0 { 12 } else { 30 + 8 * widest };
        let top = if self.title.is_empty() { 8 } else { 36 };
        if !self.title.is_empty() {
            let title = text(15).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(
                self.title.clone(),
                (10 * unit, 18 * unit),
                title,
            ))?;
        }
        let mut chart = ChartBuilder::on(&root)
            .margin_top(top * unit)
            .margin_right(labels * unit)
            .x_label_area_size(46 * unit)
            .y_label_area_size(58 * unit)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .bold_line_style(INK.mix(0.12).stroke_width(FINE))
            .max_light_lines(0)
            .axis_style(INK.mix(0.5).stroke_width(FINE))
            .label_style(text(13))
            .axis_desc_style(text(14))
            .x_labels(8)
            .y_labels(6)
            .x_desc(self.x.label)
            .y_desc(self.y.label)
            .draw()?;
        for curve in &self.curves {
            let lower = curve.band.iter().map(|&(x, low, _)| (x, low));
            let upper = curve.band.iter().rev().map(|&(x, _, high)| (x, high));
            let outline: Vec<_> = lower.chain(upper).collect();
            if !outline.is_empty() {
                chart.draw_series([Polygon::new(outline, placeholder(curve.class).mix(0.1))])?;
            }
        }
        if let Some((mark, name)) = self.mark {
            let ends = [self.x.range.start, self.x.range.end].map(|x| (x, mark));
            chart.draw_series([PathElement::new(
                ends.to_vec(),
                INK.mix(0.6).stroke_width(FINE),
            )])?;
            let (right, height) = chart.backend_coord(&ends[1]);
            let style = text(12).pos(Pos::new(HPos::Right, VPos::Bottom));
            root.draw(&Text::new(
                name,
                (right - 4 * unit, height - 2 * unit),
                style,
            ))?;
        }
        let mut ends = Vec::new();
        for curve in &self.curves {
            let style = placeholder(curve.class).stroke_width(2 * FINE);
            ends.extend(
                curve
                    .points
                    .last()
                    .map(|end| (curve, chart.backend_coord(end))),
            );
            chart.draw_series([PathElement::new(curve.points.clone(), style)])?;
            if self.markers {
                let dot = placeholder(curve.class).filled();
                let points = curve.points.iter();
                chart.draw_series(points.map(|point| Circle::new(*point, 4 * unit, dot)))?;
            }
        }
        drop(chart);
        // Each line is named at its end; where ends crowd, names move apart and a short stroke
        // leads to them.
        ends.sort_by_key(|(_, (_, y))| *y);
        let heights: Vec<_> = ends.iter().map(|(_, (_, y))| *y).collect();
        let mut first = top + 2;
        if !self.legend.is_empty() {
            let at = (self.size.0 as i32 - labels + 14, first + 6);
            let style = text(13).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(self.legend, (at.0 * unit, at.1 * unit), style))?;
            first += 24;
        }
        let limits = first * unit..(self.size.1 as i32 - 54) * unit;
        for ((curve, (x, y)), height) in ends.into_iter().zip(apart(&heights, 15 * unit, limits)) {
            if curve.label.is_empty() {
                continue;
            }
            let column = (self.size.0 as i32 - labels) * unit;
            let leader = vec![
                (x + 2 * unit, y),
                (column + 14 * unit, height),
                (column + 20 * unit, height),
            ];
            root.draw(&PathElement::new(
                leader,
                placeholder(curve.class).stroke_width(FINE),
            ))?;
            let color = placeholder(curve.class);
            let style = text(13).color(&color);
            let style = style.pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(
                curve.label.clone(),
                (column + 24 * unit, height),
                style,
            ))?;
        }
        root.present()?;
        Ok(())
    }
}

/// A color that no other part of a chart has, to be found again in the SVG.
fn placeholder(class: usize) -> RGBColor {
    RGBColor(255, (class / 256) as u8, (class % 256) as u8)
}

/// Ascending positions moved as little as keeps them a gap apart and, where they all fit, within
/// the limits.
fn apart(wanted: &[i32], gap: i32, limits: Range<i32>) -> Vec<i32> {
    let mut placed = wanted.to_vec();
    let mut floor = limits.start;
    for position in &mut placed {
        *position = (*position).max(floor);
        floor = *position + gap;
    }
    let mut ceiling = limits.end;
    for position in placed.iter_mut().rev() {
        *position = (*position).min(ceiling);
        ceiling = *position - gap;
    }
    placed
}

/// Text that HTML and SVG show as it is.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_apart_and_within_the_limits() {
        assert_eq!(apart(&[10, 50], 15, 0..100), [10, 50]);
        assert_eq!(apart(&[10, 12, 13], 15, 0..100), [10, 25, 40]);
        assert_eq!(apart(&[90, 95, 99], 15, 0..100), [70, 85, 100]);
    }

    #[test]
    fn colors_are_left_to_the_style_sheet() {
        let curve = Curve {
            label: "a < b".to_string(),
            class: 3,
            points: vec![(0., 0.), (1., 1.)],
            band: vec![(0., 0., 0.5), (1., 0.5, 1.)],
        };
        let axis = Axis {
            label: "an axis",
            range: 0.0..1.,
            log: false,
            format: |value| format!("{value}"),
        };
        let chart = Chart {
            description: "\"quoted\"".to_string(),
            size: (400, 300),
            x: axis.clone(),
            y: axis,
            title: "A title".to_string(),
            legend: "names",
            mark: Some((0.5, "half")),
            markers: true,
            family: 's',
            curves: vec![curve],
        };
        let svg = chart.svg().unwrap();
        assert!(
            svg.starts_with("<svg viewBox")
                && svg.contains("&quot;quoted&quot;")
                && svg.contains("a &lt; b")
        );
        assert!(svg.contains(r#"class="line s3""#) && svg.contains(r#"class="area s3""#));
        assert!(!svg.contains(r##""#"##), "{svg}");

        assert_eq!(svg.matches("<circle").count(), 2);

        let file = chart.standalone(".line.s3{stroke:#0b5cad}").unwrap();
        assert!(file.starts_with(
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="400" height="300" viewBox"#
        ));
        assert!(
            file.contains(".line.s3{stroke:#0b5cad}") && file.ends_with("</svg>\n"),
            "{file}"
        );
    }
}
