//! The run as a chart: how many times as fast as candle-nn, a line per shape, a mark per figure.
//!
//! Written by hand, since a dot plot over a logarithmic axis is fifty lines of SVG.

use crate::cases::contenders::Mode;
use crate::table::{mode_name, Line};
use candle_core::DType;
use std::fmt::Write;

const LEFT: f64 = 250.0;
const WIDTH: f64 = 640.0;
const TOP: f64 = 84.0;
const STEP: f64 = 20.0;
const GAP: f64 = 10.0;

pub fn svg(lines: &[Line]) -> String {
    let ratios: Vec<f64> = lines.iter().filter_map(Line::ratio).collect();
    let low = ratios.iter().fold(1.0f64, |a, &b| a.min(b)).log10().min(-0.15);
    let high = ratios.iter().fold(10.0f64, |a, &b| a.max(b)).log10() + 0.08;
    let x = |ratio: f64| LEFT + (ratio.log10() - low) / (high - low) * WIDTH;

    let mut body = String::new();
    let (mut y, mut last_norm, mut last_label) = (TOP, String::new(), String::new());
    for line in lines {
        let norm = line.row.case.norm.to_string();
        let label = format!("{norm} {}", line.row.shape());
        if label != last_label {
            y += STEP + if norm != last_norm && !last_norm.is_empty() { GAP } else { 0.0 };
            let (end, at) = (LEFT + WIDTH, LEFT - 10.0);
            let _ = writeln!(body, r##"<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>"##);
            let _ = writeln!(body, r#"<text x="{at}" y="{}" text-anchor="end">{label}</text>"#, y + 4.0);
        }
        if let Some(ratio) = line.ratio() {
            body += &mark(x(ratio), y, line.mode, line.row.dtype);
        }
        (last_norm, last_label) = (norm, label);
    }
    let bottom = y + STEP;
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="20" y="28" font-size="17" font-weight="bold">candle-norm on the CPU: times as fast as candle-nn</text>
"##,
        w = LEFT + WIDTH + 30.0,
        h = bottom + 34.0,
    );
    out += &legend();
    for tick in [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0] {
        if (low..=high).contains(&f64::log10(tick)) {
            let (at, one) = (x(tick), tick == 1.0);
            let (color, width) = if one { ("#222", 1.5) } else { ("#d0d0d0", 1.0) };
            let top = TOP + 4.0;
            let _ = writeln!(
                out,
                r#"<line x1="{at:.1}" x2="{at:.1}" y1="{top}" y2="{bottom}" stroke="{color}" stroke-width="{width}"/>"#
            );
            let _ = writeln!(
                out,
                r#"<text x="{at:.1}" y="{}" text-anchor="middle">{tick}x</text>"#,
                bottom + 16.0
            );
        }
    }
    out + &body + "</svg>\n"
}

fn mark(x: f64, y: f64, mode: Mode, dtype: DType) -> String {
    let color = match mode {
        Mode::Forward => "#1f77b4",
        Mode::ForwardBackward => "#d9480f",
    };
    let fill = if dtype == DType::BF16 { "#fff" } else { color };
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y}\" r=\"5\" fill=\"{fill}\" stroke=\"{color}\" stroke-width=\"2\"/>\n"
    )
}

fn legend() -> String {
    let mut out = String::new();
    let mut x = 30.0;
    for mode in [Mode::Forward, Mode::ForwardBackward] {
        for dtype in [DType::F32, DType::BF16] {
            out += &mark(x, 54.0, mode, dtype);
            let text = format!("{}, {}", mode_name(mode), dtype.as_str());
            let _ = writeln!(out, r#"<text x="{}" y="58">{text}</text>"#, x + 11.0);
            x += 40.0 + 6.6 * text.len() as f64;
        }
    }
    let _ = writeln!(out, r##"<text x="{x}" y="58" fill="#777">no mark: candle-nn cannot run it</text>"##);
    out
}
