//! The table of a run, for a terminal and as CSV.

use crate::cases::contenders::Mode;
use crate::cases::memory::Memory;
use crate::cases::rounds::{Rounds, Spread};
use crate::cases::{Row, BESIDE_CANDLE, LIMITS};
use crate::compare::Errors;
use candle_core::DType;
use std::fmt::Write;

/// One measured row.
pub struct Line {
    pub row: Row,
    pub mode: Mode,
    pub errors: Errors,
    /// Of a training step, candle-norm's and candle-nn's.
    pub memory: [Option<Memory>; 2],
    pub rounds: Rounds,
}

impl Line {
    /// How many times as fast as candle-nn; `None` where that cannot run the row.
    pub fn ratio(&self) -> Option<Spread> {
        self.rounds.ratio("candle-nn", "candle-norm")
    }

    /// Bytes that the op cannot avoid moving, in bytes that the copy moves: it reads x and writes as much.
    fn moved(&self) -> f64 {
        let [forward, backward] = self.row.case.norm.tensors();
        let tensors = match self.mode {
            Mode::Forward => forward,
            Mode::ForwardBackward => forward + backward,
        };
        tensors as f64 / 2.0
    }

    /// Bandwidth as a share of the copy's.
    pub fn share(&self) -> Spread {
        self.rounds.ratio("copy", "candle-norm").expect("both ran").times(self.moved())
    }

    /// Of a row with more than a norm: the time over that of the norm and a copy for each further tensor.
    pub fn of_plain(&self) -> Option<Spread> {
        let copies = self.row.case.norm.further_tensors(self.mode == Mode::ForwardBackward);
        self.rounds.ratio_to_sum("candle-norm", "plain", copies as f64, "copy")
    }

    fn limit(&self) -> f64 {
        LIMITS[(self.mode == Mode::ForwardBackward) as usize]
    }

    /// Which of its goals a row with more than a norm misses.
    fn misses(&self) -> Vec<String> {
        let Some(of_plain) = self.of_plain() else { return vec![] };
        let mut misses = vec![];
        if of_plain.median > self.limit() {
            misses.push(format!("{:.2} times the norm, limit {}", of_plain.median, self.limit()));
        }
        if let Some(ratio) = self.ratio().filter(|ratio| ratio.median < BESIDE_CANDLE) {
            misses.push(format!("{:.1} times as fast as candle-nn, goal {BESIDE_CANDLE}", ratio.median));
        }
        misses
    }

    pub fn agrees(&self) -> bool {
        self.share().agrees() && self.ratio().is_none_or(|ratio| ratio.agrees())
    }

    fn time(&self, contender: &str) -> Option<f64> {
        self.rounds.time(contender).map(|time| time.median)
    }

    /// Gigabytes a second, of the op and of the copy.
    fn bandwidths(&self) -> (f64, f64) {
        let bytes = 2.0 * self.row.bytes() as f64;
        let of = |contender| bytes / self.time(contender).unwrap_or(f64::NAN);
        (self.moved() * of("candle-norm"), of("copy"))
    }
}

pub fn head() -> String {
    format!(
        "times: median of the rounds; times as fast as candle-nn: median (least-most) of the rounds' ratios\n\n\
         {:<20} {:<13} {:<5} {:<16} {:>11} {:>11}   {:<18} {:>6} {:>10} {:>8}\n",
        "norm", "shape", "dtype", "mode", "candle-norm", "candle-nn", "times as fast", "GB/s", "of a copy's", "of plain"
    )
}

pub fn render(line: &Line) -> String {
    let ratio =
        line.ratio().map_or("n/a".into(), |r| format!("{:.1} ({:.1}-{:.1})", r.median, r.low, r.high));
    format!(
        "{:<20} {:<13} {:<5} {:<16} {:>11} {:>11}   {:<18} {:>6.1} {:>9.0}% {:>8} {}{}\n",
        line.row.case.norm.to_string(),
        line.row.shape(),
        line.row.dtype.as_str(),
        mode_name(line.mode),
        line.time("candle-norm").map_or(String::new(), time),
        line.time("candle-nn").map_or("n/a".into(), time),
        ratio,
        line.bandwidths().0,
        100.0 * line.share().median,
        line.of_plain().map_or(String::new(), |r| format!("{:.2}", r.median)),
        if line.agrees() { "" } else { "?" },
        if line.misses().is_empty() { "" } else { "!" },
    )
}

/// A line for each mode and dtype: the rows' median, least and most.
pub fn summary(lines: &[Line]) -> String {
    let mut out = String::from("\ntimes as fast as candle-nn, over the rows:\n");
    for mode in [Mode::Forward, Mode::ForwardBackward] {
        for dtype in [DType::F32, DType::BF16] {
            let of = lines.iter().filter(|line| (line.mode, line.row.dtype) == (mode, dtype));
            let mut ratios: Vec<f64> = of.filter_map(|line| line.ratio().map(|r| r.median)).collect();
            ratios.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (ratios.first(), ratios.last()) else { continue };
            let (median, rows) = (ratios[ratios.len() / 2], ratios.len());
            let (mode, dtype) = (mode_name(mode), dtype.as_str());
            let _ = writeln!(out, "{mode:<16} {dtype:<5} {median:.1} ({least:.1}-{most:.1}) in {rows} rows");
        }
    }
    out += &memory(lines);
    out += &goals(lines);
    let disagree = lines.iter().filter(|line| !line.agrees()).count();
    if disagree > 0 {
        let _ = writeln!(
            out,
            "{disagree} rows are marked '?': their rounds leave the median in doubt by more than a quarter, after more of them too"
        );
    }
    out
}

/// The rows with more than a norm that miss a goal.
fn goals(lines: &[Line]) -> String {
    let fused = lines.iter().filter(|line| line.of_plain().is_some()).count();
    let missed: Vec<&Line> = lines.iter().filter(|line| !line.misses().is_empty()).collect();
    if fused == 0 {
        return String::new();
    }
    let mut out = format!(
        "\nof {fused} rows with more than a norm {} miss a goal (of plain: the time over that of the norm alone and a copy for each \
         further tensor):\n",
        missed.len()
    );
    for line in missed {
        let _ = writeln!(out, "{} {}: {}", line.row, mode_name(line.mode), line.misses().join("; "));
    }
    out
}

/// What a training step keeps and its peak, for the largest row of each norm and dtype.
fn memory(lines: &[Line]) -> String {
    let mut largest: Vec<&Line> = vec![];
    for line in lines.iter().filter(|line| line.memory[0].is_some()) {
        let kind = |line: &Line| (line.row.case.norm.to_string(), line.row.dtype);
        match largest.iter_mut().find(|known| kind(known) == kind(line)) {
            Some(known) if known.row.elements() < line.row.elements() => *known = line,
            Some(_) => {}
            None => largest.push(line),
        }
    }
    let mut out = String::from("\nkept after the forward, and at most, of a training step, in sizes of x:\n");
    for line in &largest {
        let of = |memory: Option<Memory>| {
            let sizes = |bytes: usize| bytes as f64 / line.row.bytes() as f64;
            memory.map_or("n/a".into(), |m| format!("{:.2} and {:.2}", sizes(m.kept), sizes(m.peak)))
        };
        let [ours, theirs] = line.memory.map(of);
        let _ = writeln!(out, "{:<40} candle-norm {ours:<14} candle-nn {theirs}", line.row.to_string());
    }
    if largest.is_empty() {
        out.clear();
    }
    out
}

/// Nanoseconds for people.
fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.2} us", ns / 1e3),
        ns => format!("{:.2} ms", ns / 1e6),
    }
}

pub fn csv(lines: &[Line]) -> String {
    let mut out = String::from(
        "norm,shape,model,dtype,mode,candle_norm_ns,candle_nn_ns,times_as_fast,least,most,gb_per_s,\
         copy_gb_per_s,share_of_copy,rounds_agree,candle_norm_error,candle_nn_error,candle_norm_kept,candle_norm_peak,candle_nn_kept,candle_nn_peak,plain_ns,of_plain,limit,misses\n",
    );
    let spread =
        |s: Option<Spread>| s.map_or(",,".into(), |s| format!("{:.3},{:.3},{:.3}", s.median, s.low, s.high));
    let plain = |line: &Line| match (line.time("plain"), line.of_plain()) {
        (Some(ns), Some(of)) => format!("{ns:.1},{:.3},{},{}", of.median, line.limit(), line.misses().len()),
        _ => ",,,".into(),
    };
    let memory = |m: Option<Memory>| m.map_or(",".into(), |m| format!("{},{}", m.kept, m.peak));
    for line in lines {
        let (bandwidth, copy) = line.bandwidths();
        let _ = writeln!(
            out,
            "{},{},\"{}\",{},{},{:.1},{},{},{bandwidth:.3},{copy:.3},{:.4},{},{:.2e},{},{},{},{}",
            line.row.case.norm,
            line.row.shape(),
            line.row.case.model,
            line.row.dtype.as_str(),
            mode_name(line.mode),
            line.time("candle-norm").unwrap_or(f64::NAN),
            line.time("candle-nn").map_or(String::new(), |v| format!("{v:.1}")),
            spread(line.ratio()),
            line.share().median,
            if line.agrees() { "yes" } else { "no" },
            line.errors.ours,
            line.errors.theirs.map_or(String::new(), |v| format!("{v:.2e}")),
            memory(line.memory[0]),
            memory(line.memory[1]),
            plain(line),
        );
    }
    out
}

/// As the table, the chart and a filter call a mode.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Forward => "forward",
        Mode::ForwardBackward => "forward+backward",
    }
}
