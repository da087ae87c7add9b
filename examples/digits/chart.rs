//! Line charts as SVG, for a person to read.
//!
//! Apart, because drawing is no part of what the example shows.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// Okabe and Ito's colours, which colour-blind readers tell apart.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
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
    pub scale: Scale,
}

/// What the y axis is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Linear, with the line of zero at its bottom.
    FromZero,
    Logarithmic,
}

/// Draws `lines` into an SVG file at `path`; each line's name stands at its right end.
pub fn draw(path: &Path, axes: &Axes, lines: &[Line]) -> Result<()> {
    let log = axes.scale == Scale::Logarithmic;
    let height = |y: f64| if log { y.log10() } else { y };
    let (xs, mut ys) = (bounds(lines, |p| p.0), bounds(lines, |p| height(p.1)));
    if axes.scale == Scale::FromZero {
        ys.0 = 0.;
    }
    let root = SVGBackend::new(path, (720, 440)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: u32, colour: &RGBColor| ("sans-serif", size).into_font().color(colour);
    let aligned = |h, v| text(13, &INK).pos(Pos::new(h, v));
    root.draw(&Text::new(axes.title, (20, 14), text(20, &INK)))?;
    root.draw(&Text::new(axes.y, (20, 46), text(14, &INK)))?;
    let body = root.margin(74, 56, 64, 130);
    let mut chart = ChartBuilder::on(&body).build_cartesian_2d(xs.0..xs.1, ys.0..ys.1)?;
    let (left, bottom) = chart.backend_coord(&(xs.0, ys.0));
    let (right, _) = chart.backend_coord(&(xs.1, ys.0));

    for (y, label) in y_ticks(ys, log) {
        let (_, py) = chart.backend_coord(&(xs.0, height(y)));
        root.draw(&PathElement::new(vec![(left, py), (right, py)], GRID.stroke_width(1)))?;
        root.draw(&Text::new(label, (left - 8, py), aligned(HPos::Right, VPos::Center)))?;
    }
    root.draw(&PathElement::new(vec![(left, bottom), (right, bottom)], INK.stroke_width(1)))?;
    for (x, label) in &axes.ticks {
        let (px, _) = chart.backend_coord(&(*x, ys.0));
        root.draw(&PathElement::new(vec![(px, bottom), (px, bottom + 5)], INK.stroke_width(1)))?;
        root.draw(&Text::new(label.clone(), (px, bottom + 9), aligned(HPos::Center, VPos::Top)))?;
    }
    root.draw(&Text::new(axes.x, ((left + right) / 2, bottom + 30), aligned(HPos::Center, VPos::Top)))?;

    for (line, colour) in lines.iter().zip(COLOURS) {
        let points = || line.points.iter().map(|&(x, y)| (x, height(y)));
        chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
        chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    for (name, colour, end, py) in names(lines, |(x, y)| chart.backend_coord(&(x, height(y)))) {
        let leader = vec![end, (right + 2, end.1), (right + 22, py), (right + 28, py)];
        root.draw(&PathElement::new(leader, colour.mix(0.5).stroke_width(1)))?;
        let centred = text(15, &colour).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(name, (right + 32, py), centred))?;
    }
    root.present()?;
    Ok(())
}

/// Round numbers between the bounds, at most eight, and their labels.
fn y_ticks((low, high): (f64, f64), log: bool) -> Vec<(f64, String)> {
    let label = |y: f64| (y, format!("{}", (y * 1e6).round() / 1e6));
    if log {
        let decades = low.floor() as i32..=high.ceil() as i32;
        let all = decades.flat_map(|d| [1., 2., 5.].map(|digit| digit * 10f64.powi(d)));
        return all.filter(|y| (low..=high).contains(&y.log10())).map(label).collect();
    }
    let unit = 10f64.powf((high - low).log10().floor() - 1.);
    let fits = |step: &f64| (high - low) / step <= 8.;
    let step = [1., 2., 5., 10., 20.].map(|digit| digit * unit).into_iter().find(fits).unwrap_or(high - low);
    ((low / step).ceil() as i64..=(high / step).floor() as i64).map(|i| label(i as f64 * step)).collect()
}

/// Smallest and largest value, with a little room.
fn bounds(lines: &[Line], value: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(&value));
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let room = if high > low { 0.04 * (high - low) } else { 0.5 };
    (low - room, high + room)
}

/// The lines' names, where each line ends, and a height for its name: the end's, moved where names would
/// overlap.
fn names(
    lines: &[Line],
    place: impl Fn((f64, f64)) -> (i32, i32),
) -> Vec<(String, RGBColor, (i32, i32), i32)> {
    const APART: i32 = 17;
    let end = |line: &Line| line.points.last().map(|&point| place(point));
    let mut names: Vec<_> = lines
        .iter()
        .zip(COLOURS)
        .filter_map(|(line, colour)| {
            let end = end(line)?;
            Some((line.name.clone(), colour, end, end.1))
        })
        .collect();
    names.sort_by_key(|name| name.3);
    // Each pass moves every overlapping pair apart, half the way each.
    for _ in 0..100 {
        for i in 1..names.len() {
            let overlap = (names[i - 1].3 + APART - names[i].3).max(0);
            names[i - 1].3 -= overlap / 2;
            names[i].3 += overlap - overlap / 2;
        }
    }
    names
}
