//! The table that a run ends with, for a terminal and as CSV.

use crate::cases::contenders::Mode;
use crate::cases::Row;
use crate::compare::Errors;
use std::fmt::Write;

/// One measured row.
pub struct Line {
    pub row: Row,
    pub mode: Mode,
    /// Nanoseconds a call.
    pub ours: f64,
    /// `None` where candle-nn cannot run the row.
    pub theirs: Option<f64>,
    pub errors: Errors,
    /// Bytes that the op cannot avoid moving, by its time: GB/s.
    pub bandwidth: f64,
    /// GB/s of a copy of as many bytes as x has.
    pub copy_bandwidth: f64,
}

impl Line {
    /// How many times as fast as candle-nn.
    pub fn ratio(&self) -> Option<f64> {
        self.theirs.map(|theirs| theirs / self.ours)
    }
}

pub fn render(lines: &[Line]) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<14} {:<13} {:<5} {:<16} {:>11} {:>11} {:>9} {:>6} {:>8}",
        "norm", "shape", "dtype", "mode", "candle-norm", "candle-nn", "times as", "GB/s", "share of"
    );
    let _ = writeln!(out, "{:>84} {:>15}", "fast", "a copy's");
    for line in lines {
        let _ = writeln!(
            out,
            "{:<14} {:<13} {:<5} {:<16} {:>11} {:>11} {:>9} {:>6.1} {:>7.0}%",
            line.row.case.norm.to_string(),
            line.row.shape(),
            line.row.dtype.as_str(),
            mode_name(line.mode),
            time(line.ours),
            line.theirs.map_or("n/a".into(), time),
            line.ratio().map_or("n/a".into(), |r| format!("{r:.1}")),
            line.bandwidth,
            100.0 * line.bandwidth / line.copy_bandwidth,
        );
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
        "norm,shape,model,dtype,mode,candle_norm_ns,candle_nn_ns,times_as_fast,gb_per_s,\
         copy_gb_per_s,share_of_copy,candle_norm_error,candle_nn_error\n",
    );
    let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.4}"));
    for line in lines {
        let _ = writeln!(
            out,
            "{},{},\"{}\",{},{},{:.1},{},{},{:.3},{:.3},{:.4},{:.2e},{}",
            line.row.case.norm,
            line.row.shape(),
            line.row.case.model,
            line.row.dtype.as_str(),
            mode_name(line.mode),
            line.ours,
            line.theirs.map_or(String::new(), |v| format!("{v:.1}")),
            number(line.ratio()),
            line.bandwidth,
            line.copy_bandwidth,
            line.bandwidth / line.copy_bandwidth,
            line.errors.ours,
            line.errors.theirs.map_or(String::new(), |v| format!("{v:.2e}")),
        );
    }
    out
}

/// As the table, the chart and Criterion call a mode.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Forward => "forward",
        Mode::ForwardBackward => "forward+backward",
    }
}
