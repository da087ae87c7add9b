//! The run as a chart: how many times as fast as candle-nn, a line per shape, a mark per figure.
//!
//! Written by hand, since a dot plot over a logarithmic axis is sixty lines of SVG.

use crate::cases::contenders::Mode;
use crate::cases::device::Place;
use crate::cases::rounds::Spread;
use crate::table::{mode_name, Line};
use candle_core::DType;
use std::fmt::Write;

const LEFT: f64 = 270.0;
const WIDTH: f64 = 640.0;
const TOP: f64 = 96.0;
const STEP: f64 = 32.0;
const GAP: f64 = 8.0;

/// What has a mark, from the top of a line to its bottom: no mark hides another.
const FIGURES: [(Mode, DType); 4] = [
    (Mode::Forward, DType::F32),
    (Mode::Forward, DType::BF16),
    (Mode::ForwardBackward, DType::F32),
    (Mode::ForwardBackward, DType::BF16),
];

/// Decimal logarithms of the least and the most that is drawn, over which marks are spread.
struct Scale(f64, f64);

impl Scale {
    /// Wide enough for every range, and for 1.
    fn of(lines: &[Line]) -> Self {
        let spreads = || lines.iter().filter_map(Line::ratio);
        let low = spreads().fold(1.0f64, |a, s| a.min(s.low)).log10() - 0.08;
        let high = spreads().fold(10.0f64, |a, s| a.max(s.high)).log10() + 0.08;
        Self(low, high)
    }

    fn x(&self, ratio: f64) -> f64 {
        LEFT + (ratio.log10() - self.0) / (self.1 - self.0) * WIDTH
    }

    fn has(&self, ratio: f64) -> bool {
        (self.0..=self.1).contains(&ratio.log10())
    }
}

pub fn svg(lines: &[Line], place: &Place) -> String {
    let scale = Scale::of(lines);
    let (labels, marks, bottom) = rows(lines, &scale);
    let (width, height) = (LEFT + WIDTH + 150.0, bottom + 48.0);
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="20" y="28" font-size="17" font-weight="bold">How many times as fast as candle-nn candle-norm is, on {}</text>
<text x="20" y="50">Right of 1x: candle-norm is faster. Marks: medians of the rounds, lines: their range; none where candle-nn cannot run it. Behind: % of a copy, in the order of the marks.</text>
"##,
        place.name
    );
    out += &legend();
    out += &labels;
    for tick in [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0] {
        if scale.has(tick) {
            let (at, one) = (scale.x(tick), tick == 1.0);
            let (color, width) = if one { ("#222", 2.0) } else { ("#d0d0d0", 1.0) };
            let (top, below) = (TOP + 4.0, bottom + 16.0);
            let _ = writeln!(
                out,
                r#"<line x1="{at:.1}" x2="{at:.1}" y1="{top}" y2="{bottom}" stroke="{color}" stroke-width="{width}"/>
<text x="{at:.1}" y="{below}" text-anchor="middle">{tick}x</text>"#
            );
        }
    }
    let (at, below) = (scale.x(1.0), bottom + 34.0);
    let _ = writeln!(out, r#"<text x="{at:.1}" y="{below}">candle-norm is faster &#8594;</text>"#);
    out + &marks + "</svg>\n"
}

/// What lies under the scale, what lies over it, and where the last line ends.
fn rows(lines: &[Line], scale: &Scale) -> (String, String, f64) {
    let (mut labels, mut marks) = (String::new(), String::new());
    let (mut y, mut last_norm, mut last_label) = (TOP - STEP / 2.0, String::new(), String::new());
    for line in lines {
        let norm = line.row.case.norm.to_string();
        let label = format!("{norm} {}", line.row.shape());
        if label != last_label {
            y += STEP + if norm != last_norm && !last_norm.is_empty() { GAP } else { 0.0 };
            let (end, at, middle) = (LEFT + WIDTH, LEFT - 10.0, y + 4.0);
            let _ = writeln!(
                labels,
                r##"<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}" stroke="#f0f0f0" stroke-width="27"/>
<text x="{at}" y="{middle}" text-anchor="end">{label}</text>"##
            );
        }
        if let Some(ratio) = line.ratio() {
            marks += &mark(ratio, y, line, scale);
        }
        marks += &share(y, line);
        (last_norm, last_label) = (norm, label);
    }
    (labels, marks, y + STEP / 2.0 + 4.0)
}

/// The median on the range, at the height of its figure.
fn mark(ratio: Spread, y: f64, line: &Line, scale: &Scale) -> String {
    let figure = (line.mode, line.row.dtype);
    let which = FIGURES.iter().position(|f| *f == figure).unwrap_or_default() as f64;
    let y = y + 6.4 * (which - 1.5);
    let (from, to, color) = (scale.x(ratio.low), scale.x(ratio.high), color(line.mode));
    let range = format!(
        "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{color}\" \
         stroke-opacity=\"0.45\" stroke-width=\"2\"/>\n"
    );
    range + &dot(scale.x(ratio.median), y, figure)
}

/// The share of a copy's bandwidth behind the end of the line, in its figure's place.
fn share(y: f64, line: &Line) -> String {
    let figure = FIGURES.iter().position(|f| *f == (line.mode, line.row.dtype)).unwrap_or_default();
    let (at, y, color) = (LEFT + WIDTH + 34.0 * (figure + 1) as f64, y + 4.0, color(line.mode));
    let share = 100.0 * line.share().median;
    format!("<text x=\"{at}\" y=\"{y}\" text-anchor=\"end\" fill=\"{color}\">{share:.0}</text>\n")
}

fn color(mode: Mode) -> &'static str {
    match mode {
        Mode::Forward => "#1f77b4",
        Mode::ForwardBackward => "#d9480f",
    }
}

fn dot(x: f64, y: f64, (mode, dtype): (Mode, DType)) -> String {
    let color = color(mode);
    let fill = if dtype == DType::BF16 { "#fff" } else { color };
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{fill}\" stroke=\"{color}\" stroke-width=\"1.3\"/>\n"
    )
}

fn legend() -> String {
    let mut out = String::new();
    let mut x = 30.0;
    for (mode, dtype) in FIGURES {
        out += &dot(x, 68.0, (mode, dtype));
        let text = match mode {
            Mode::Forward => format!("{}, {}", mode_name(mode), dtype.as_str()),
            Mode::ForwardBackward => format!("forward and loss.backward(), {}", dtype.as_str()),
        };
        let _ = writeln!(out, r#"<text x="{}" y="72">{text}</text>"#, x + 9.0);
        x += 36.0 + 6.4 * text.len() as f64;
    }
    out
}
