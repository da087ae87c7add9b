//! The sizes as a chart: nanoseconds per element over elements, both logarithmic, the caches marked.

use crate::{Op, Point, CONTENDERS};
use std::fmt::Write;

const LEFT: f64 = 80.0;
const WIDTH: f64 = 700.0;
const TOP: f64 = 90.0;
const HEIGHT: f64 = 380.0;
const COLORS: [&str; 3] = ["#0072b2", "#d55e00", "#009e73"];
const DASHES: [&str; 3] = ["", "7 3", "2 3"];

struct Scale {
    x: (f64, f64),
    y: (f64, f64),
}

impl Scale {
    fn of(points: &[Point]) -> Self {
        let times = || points.iter().flat_map(costs).map(|(_, cost)| cost.log10());
        let sizes = || points.iter().map(|point| (point.elements as f64).log10());
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
        Self {
            x: (least(&mut sizes()) - 0.1, most(&mut sizes()) + 0.1),
            y: (least(&mut times()) - 0.1, most(&mut times()) + 0.1),
        }
    }

    fn at(&self, elements: f64, cost: f64) -> (f64, f64) {
        let part = |value: f64, (low, high): (f64, f64)| (value.log10() - low) / (high - low);
        (LEFT + WIDTH * part(elements, self.x), TOP + HEIGHT * (1.0 - part(cost, self.y)))
    }
}

/// Nanoseconds per element of each contender that ran, by its number.
fn costs(point: &Point) -> Vec<(usize, f64)> {
    let cost = |name| point.rounds.time(name).map(|time| time.median / point.elements as f64);
    CONTENDERS.iter().enumerate().filter_map(|(i, name)| Some((i, cost(name)?))).collect()
}

pub fn svg(points: &[Point]) -> String {
    let scale = Scale::of(points);
    let (width, height) = (LEFT + WIDTH + 40.0, TOP + HEIGHT + 60.0);
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>
<text x="20" y="28" font-size="17" font-weight="bold">What an element costs, by the size of the tensor (f32, nanoseconds per element)</text>
"##
    );
    out += &grid(&scale);
    out += &caches(&scale);
    for (o, op) in Op::ALL.iter().enumerate() {
        let of = |point: &&Point| format!("{:?}", point.op) == format!("{op:?}");
        for (c, _) in CONTENDERS.iter().enumerate().filter(|(c, _)| *c < 2 || o == 0) {
            let place = |point: &Point| {
                let cost = costs(point).into_iter().find(|(i, _)| *i == c)?.1;
                let (x, y) = scale.at(point.elements as f64, cost);
                Some(format!("{x:.1},{y:.1}"))
            };
            let line: Vec<String> = points.iter().filter(of).filter_map(place).collect();
            let color = if c == 2 { "#777" } else { COLORS[o] };
            let _ = writeln!(
                out,
                r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{}"/>"#,
                line.join(" "),
                DASHES[c]
            );
        }
    }
    out + &legend() + "</svg>\n"
}

fn grid(scale: &Scale) -> String {
    let mut out = String::new();
    let (bottom, right) = (TOP + HEIGHT, LEFT + WIDTH);
    for power in scale.x.0.ceil() as i32..=scale.x.1.floor() as i32 {
        let (x, _) = scale.at(10f64.powi(power), 1.0);
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{bottom}" stroke="#e4e4e4"/>
<text x="{x:.1}" y="{}" text-anchor="middle">10<tspan dy="-5" font-size="9">{power}</tspan></text>"##,
            bottom + 18.0
        );
    }
    for power in scale.y.0.floor() as i32..=scale.y.1.ceil() as i32 {
        for digit in [1.0, 2.0, 5.0] {
            let cost = digit * 10f64.powi(power);
            if !(scale.y.0..=scale.y.1).contains(&cost.log10()) {
                continue;
            }
            let (_, y) = scale.at(100.0, cost);
            let _ = writeln!(
                out,
                r##"<line x1="{LEFT}" x2="{right}" y1="{y:.1}" y2="{y:.1}" stroke="#e4e4e4"/>
<text x="{}" y="{:.1}" text-anchor="end">{}</text>"##,
                LEFT - 8.0,
                y + 4.0,
                (cost * 1e6).round() / 1e6
            );
        }
    }
    let _ = writeln!(
        out,
        r#"<text x="{}" y="{}" text-anchor="middle">elements of x</text>"#,
        LEFT + WIDTH / 2.0,
        bottom + 42.0
    );
    out
}

/// Where x and y together fill a cache, as Linux tells the caches of the first core.
fn caches(scale: &Scale) -> String {
    let mut out = String::new();
    for index in 0..8 {
        let of = |what: &str| {
            std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{what}"))
        };
        let (Ok(kind), Ok(level), Ok(size)) = (of("type"), of("level"), of("size")) else { continue };
        let Ok(kib) = size.trim().trim_end_matches('K').parse::<f64>() else { continue };
        let (x, _) = scale.at(kib * 1024.0 / 8.0, 1.0);
        if kind.trim() == "Instruction" || x > LEFT + WIDTH {
            continue;
        }
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{}" stroke="#999" stroke-dasharray="4 4"/>
<text x="{:.1}" y="{}" fill="#666">x and y fill L{} ({} KiB)</text>"##,
            TOP + HEIGHT,
            x + 4.0,
            TOP + 14.0 + 14.0 * level.trim().parse::<f64>().unwrap_or(0.0),
            level.trim(),
            kib
        );
    }
    out
}

fn legend() -> String {
    let mut out = String::new();
    let mut x = 30.0;
    for (o, op) in Op::ALL.iter().enumerate() {
        let _ = writeln!(
            out,
            r#"<rect x="{x}" y="44" width="14" height="5" fill="{}"/><text x="{}" y="51">{op:?}</text>"#,
            COLORS[o],
            x + 20.0
        );
        x += 120.0;
    }
    let words = ["forward", "the norm's own forward and backward", "a copy of x, for comparison"];
    x = 30.0;
    for (c, words) in words.iter().enumerate() {
        let _ = writeln!(
            out,
            r##"<line x1="{x}" x2="{}" y1="68" y2="68" stroke="{}" stroke-width="2" stroke-dasharray="{}"/><text x="{}" y="72">{words}</text>"##,
            x + 30.0,
            if c == 2 { "#777" } else { "#222" },
            DASHES[c],
            x + 36.0
        );
        x += 70.0 + 6.5 * words.len() as f64;
    }
    out
}
