//! Line charts as SVG, for a person to read.
//!
//! Apart, because drawing is no part of what the example shows.

use anyhow::Result;
use plotters::prelude::*;
use std::path::Path;

/// Okabe and Ito's colours, which colour-blind readers tell apart.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(90, 90, 90),
];
const INK: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(228, 228, 228);

/// One line of a chart.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What a chart says about its axes.
pub struct Axes<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    /// Ticks of the x axis, and their labels.
    pub ticks: Vec<(f64, String)>,
    /// Decimals of the y axis.
    pub decimals: usize,
}

/// Draws `lines` into an SVG file at `path`; each line's name stands at its right end.
pub fn draw(path: &Path, axes: &Axes, lines: &[Line]) -> Result<()> {
    let (xs, ys) = (bounds(lines, |p| p.0), bounds(lines, |p| p.1));
    let root = SVGBackend::new(path, (720, 440)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: u32, colour: &RGBColor| ("sans-serif", size).into_font().color(colour);
    root.draw(&Text::new(axes.title, (20, 14), text(20, &INK)))?;
    root.draw(&Text::new(axes.y, (20, 46), text(14, &INK)))?;
    let body = root.margin(70, 14, 16, 130);
    let mut chart = ChartBuilder::on(&body)
        .set_label_area_size(LabelAreaPosition::Left, 48)
        .set_label_area_size(LabelAreaPosition::Bottom, 42)
        .build_cartesian_2d(xs.0..xs.1, ys.0..ys.1)?;
    let decimals = axes.decimals;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(TRANSPARENT)
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.decimals$}"))
        .label_style(text(13, &INK))
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS) {
        chart.draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(line.points.iter().map(|&p| Circle::new(p, 3, colour.filled())))?;
    }
    let at = |x: f64, y: f64| chart.backend_coord(&(x, y));
    for (x, label) in &axes.ticks {
        let (px, py) = at(*x, ys.0);
        let centred = text(13, &INK).pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Center,
            plotters::style::text_anchor::VPos::Top,
        ));
        root.draw(&PathElement::new(vec![(px, py), (px, py + 5)], INK.stroke_width(1)))?;
        root.draw(&Text::new(label.clone(), (px, py + 9), centred))?;
    }
    let (left, bottom) = at(xs.0, ys.0);
    root.draw(&PathElement::new(vec![(left, bottom), (at(xs.1, ys.0).0, bottom)], INK.stroke_width(1)))?;
    let middle = (left + at(xs.1, ys.0).0) / 2;
    root.draw(&Text::new(axes.x, (middle - 4 * axes.x.len() as i32, bottom + 32), text(14, &INK)))?;
    for (name, colour, y) in apart(lines, |y| at(xs.1, y).1) {
        root.draw(&Text::new(name, (at(xs.1, ys.0).0 + 12, y - 8), text(15, &colour)))?;
    }
    root.present()?;
    Ok(())
}

/// Smallest and largest value, with a little room.
fn bounds(lines: &[Line], value: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(&value));
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let room = if high > low { 0.04 * (high - low) } else { 0.5 };
    (low - room, high + room)
}

/// The lines' names at the heights of their last points, moved apart where they would overlap.
fn apart(lines: &[Line], height: impl Fn(f64) -> i32) -> Vec<(String, RGBColor, i32)> {
    let mut names: Vec<_> = lines
        .iter()
        .zip(COLOURS)
        .filter_map(|(line, colour)| Some((line.name.clone(), colour, height(line.points.last()?.1))))
        .collect();
    names.sort_by_key(|name| name.2);
    for i in 1..names.len() {
        names[i].2 = names[i].2.max(names[i - 1].2 + 17);
    }
    // The lowest name may have been pushed below the axis: then the pile moves up.
    if let (Some(last), Some(limit)) = (names.last().map(|name| name.2), lowest(lines, &height)) {
        let over = (last - limit).max(0);
        let mut ceiling = last - over;
        for name in names.iter_mut().rev() {
            name.2 = name.2.min(ceiling);
            ceiling = name.2 - 17;
        }
    }
    names
}

fn lowest(lines: &[Line], height: &impl Fn(f64) -> i32) -> Option<i32> {
    lines.iter().flat_map(|line| &line.points).map(|point| height(point.1)).max()
}
