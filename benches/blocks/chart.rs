//! The run as a chart: bars as long as the block takes, of which the norms and their neighbours are dark.
//!
//! Written by hand, as the other benchmarks' charts are: rectangles and words.

use crate::norms::Way;
use crate::{mode_name, Line, Run};
use std::fmt::Write;

const LEFT: f64 = 400.0;
const WIDTH: f64 = 400.0;
const TOP: f64 = 84.0;
const BAR: f64 = 15.0;
const GAP: f64 = 16.0;

/// Of each way, the block's bar and that of its norms.
fn colors(way: Way) -> [&'static str; 2] {
    match way {
        Way::CandleNn => ["#d0d0d0", "#777"],
        Way::Plain => ["#bcd7ee", "#1f77b4"],
        Way::Fused => ["#f9cdb4", "#d9480f"],
    }
}

pub fn svg(run: &Run, lines: &[Line]) -> String {
    let longest = lines.iter().flat_map(|line| Way::ALL.map(|way| line.relative(way))).fold(1.0, f64::max);
    let height = TOP + lines.len() as f64 * (3.0 * BAR + GAP) + 20.0;
    let width = LEFT + WIDTH + 230.0;
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="20" y="28" font-size="17" font-weight="bold">{}: time beside candle-nn's norms</text>
<text x="20" y="50">Shorter is faster. Dark: the norms and what stands around them (sum, SiLU, skip and ReLU, scale and shift). step: forward and loss.backward().</text>
"##,
        run.title()
    );
    for (i, line) in lines.iter().enumerate() {
        let y = TOP + i as f64 * (3.0 * BAR + GAP);
        let (at, middle) = (LEFT - 90.0, y + 1.5 * BAR + 4.0);
        let _ = writeln!(
            out,
            r#"<text x="{at}" y="{middle}" text-anchor="end">{}, {}</text>"#,
            line.block,
            mode_name(line.mode)
        );
        for (j, way) in Way::ALL.into_iter().enumerate() {
            out += &bar(line, way, y + j as f64 * BAR, WIDTH / longest);
        }
    }
    out + "</svg>\n"
}

fn bar(line: &Line, way: Way, y: f64, scale: f64) -> String {
    let [light, dark] = colors(way);
    let whole = line.relative(way) * scale;
    let norms = whole * line.share(way).unwrap_or(0.0).min(1.0);
    let (name, ms) = (way.name(), line.ms(way));
    let share = line.share(way).map_or(String::new(), |share| format!(", norms {:.1}%", 100.0 * share));
    let (high, text, before, after) = (BAR - 2.0, y + BAR - 4.0, LEFT - 6.0, LEFT + whole + 6.0);
    format!(
        r##"<rect x="{LEFT}" y="{y}" width="{whole:.1}" height="{high}" fill="{light}"/>
<rect x="{LEFT}" y="{y}" width="{norms:.1}" height="{high}" fill="{dark}"/>
<text x="{before}" y="{text}" text-anchor="end" font-size="11">{name}</text>
<text x="{after:.1}" y="{text}" font-size="11">{ms:.1} ms{share}</text>
"##
    )
}
