//! The run as a chart: how many times as fast as the separate way each block is when fused.
//!
//! A dot plot over a logarithmic axis, written by hand.

use crate::Line;
use candle_core::DType;
use std::fmt::Write;

const LEFT: f64 = 270.0;
const WIDTH: f64 = 560.0;
const TOP: f64 = 92.0;
const STEP: f64 = 34.0;
/// Of the forward, and of the forward with gradients.
const COLORS: [&str; 2] = ["#1f77b4", "#d9480f"];

pub fn svg(lines: &[Line]) -> String {
    let most = lines.iter().flat_map(|line| line.faster.map(|f| f.high)).fold(10.0, f64::max).log10() + 0.05;
    let least = lines.iter().flat_map(|line| line.faster.map(|f| f.low)).fold(0.9, f64::min).log10() - 0.05;
    let x = |ratio: f64| LEFT + (ratio.log10() - least) / (most - least) * WIDTH;
    // Two lines, f32 and bf16, are a block.
    let bottom = TOP + STEP * (lines.len() / 2) as f64;
    let (width, height) = (LEFT + WIDTH + 30.0, bottom + 40.0);
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="20" y="28" font-size="17" font-weight="bold">How many times as fast a norm is with its neighbours in the same visit</text>
<text x="20" y="50">Beside candle-norm's norm and candle's operations, on the CPU. A mark is the median of the rounds, its line their range.</text>
"##
    );
    for (i, (text, step, dtype)) in [
        ("forward, f32", 0, DType::F32),
        ("forward, bf16", 0, DType::BF16),
        ("forward and backward, f32", 1, DType::F32),
        ("forward and backward, bf16", 1, DType::BF16),
    ]
    .into_iter()
    .enumerate()
    {
        let at = 30.0 + 180.0 * i as f64;
        out += &dot(at, 68.0, step, dtype);
        let _ = writeln!(out, r#"<text x="{}" y="72">{text}</text>"#, at + 9.0);
    }
    for tick in [0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0] {
        if (least..=most).contains(&f64::log10(tick)) {
            let (at, color) = (x(tick), if tick == 1.0 { "#222" } else { "#d0d0d0" });
            let _ = writeln!(
                out,
                r#"<line x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{bottom}" stroke="{color}"/>
<text x="{at:.1}" y="{}" text-anchor="middle">{tick}x</text>"#,
                bottom + 16.0
            );
        }
    }
    for (i, pair) in lines.chunks(2).enumerate() {
        let y = TOP + STEP * (i as f64 + 0.5);
        let _ = writeln!(
            out,
            r#"<text x="{}" y="{}" text-anchor="end">{}</text>"#,
            LEFT - 10.0,
            y + 4.0,
            pair[0].name
        );
        for (j, line) in pair.iter().enumerate() {
            for (step, faster) in line.faster.iter().enumerate() {
                let y = y + 6.0 * (step as f64 * 2.0 + j as f64 - 1.5);
                let (from, to, color) = (x(faster.low), x(faster.high), COLORS[step]);
                let _ = writeln!(
                    out,
                    r#"<line x1="{from:.1}" x2="{to:.1}" y1="{y:.1}" y2="{y:.1}" stroke="{color}" stroke-opacity="0.45" stroke-width="2"/>"#
                );
                out += &dot(x(faster.median), y, step, line.dtype);
            }
        }
    }
    out + "</svg>\n"
}

fn dot(x: f64, y: f64, step: usize, dtype: DType) -> String {
    let color = COLORS[step];
    let fill = if dtype == DType::BF16 { "#fff" } else { color };
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.8\" fill=\"{fill}\" stroke=\"{color}\" stroke-width=\"1.3\"/>\n"
    )
}
