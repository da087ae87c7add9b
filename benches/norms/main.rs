//! `cargo bench`: every norm of candle-norm beside candle-nn's, on shapes that real models have.
//!
//! Criterion takes the times. Before it does, both crates' results are compared with f32 arithmetic
//! on the same inputs. A copy of the same bytes is timed beside each row, as the floor. The run ends
//! with one table, which it also writes as CSV and as a chart.
//!
//! `-- --quick` takes fewer samples of fewer shapes, `-- --test` runs everything once and times
//! nothing, `-- LayerNorm` measures the rows whose name has that in it. The files go to
//! `target/norms`, or to the folder that `CANDLE_NORM_BENCH_OUT` names.

#[path = "../cases/mod.rs"]
mod cases;
mod chart;
mod compare;
mod table;

use anyhow::{Context, Result};
use cases::contenders::{self, Layer, Mode};
use cases::copy::Copy;
use cases::inputs::Inputs;
use cases::{Norm, Row};
use criterion::{BenchmarkId, Criterion, SamplingMode};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use table::Line;

fn main() -> Result<()> {
    let asked = Asked::from_args();
    let times = target().join("criterion");
    let mut criterion =
        Criterion::default().without_plots().nresamples(1000).output_directory(&times).configure_from_args();
    let mut lines = vec![];
    for row in Row::all().filter(|row| asked.wants(row)) {
        let inputs = Inputs::new(&row)?;
        let mut copy = Copy::of(row.bytes());
        for &mode in modes(&row) {
            let mut bench = Bench { criterion: &mut criterion, times: &times, row, mode, inputs: &inputs };
            lines.extend(bench.run(&mut copy).with_context(|| bench.name())?);
        }
    }
    criterion.final_summary();
    if lines.is_empty() {
        return Ok(());
    }
    print!("\n{}", table::render(&lines));
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(|| target().join("norms"), PathBuf::from);
    std::fs::create_dir_all(&out)?;
    std::fs::write(out.join("norms.csv"), table::csv(&lines))?;
    std::fs::write(out.join("norms.svg"), chart::svg(&lines))?;
    println!("\nwritten: {0}/norms.csv, {0}/norms.svg", out.display());
    Ok(())
}

/// Evaluation is not trained through: one mode is enough.
fn modes(row: &Row) -> &'static [Mode] {
    match row.case.norm {
        Norm::BatchNormEval => &[Mode::Forward],
        _ => &[Mode::Forward, Mode::ForwardBackward],
    }
}

fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp).to_path_buf()
}

/// What of the command line matters before Criterion reads it: which rows to prepare and compare.
struct Asked {
    quick: bool,
    filter: Option<String>,
}

impl Asked {
    fn from_args() -> Self {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let is_flag = |a: &str| {
            ["--bench", "--test", "--quick", "--list", "--exact", "--noplot", "--verbose", "-n", "-v"]
                .contains(&a)
        };
        // A bare word is the filter unless an option before it takes it as its value.
        let filter = args.iter().enumerate().find(|(i, a)| {
            let before = i.checked_sub(1).map(|i| args[i].as_str());
            !a.starts_with('-') && before.is_none_or(|b| is_flag(b) || !b.starts_with('-'))
        });
        Self { quick: args.iter().any(|a| a == "--quick"), filter: filter.map(|(_, a)| a.clone()) }
    }

    /// A quick run leaves out the largest tensors, which take most of the time.
    fn wants(&self, row: &Row) -> bool {
        let size = !self.quick || row.elements() < 3_000_000;
        size && self.filter.as_ref().is_none_or(|filter| row.to_string().contains(filter))
    }
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    times: &'a Path,
    row: Row,
    mode: Mode,
    inputs: &'a Inputs,
}

impl Bench<'_> {
    /// Also a folder's name in Criterion's output: no character in it needs replacing.
    fn name(&self) -> String {
        format!("{} {}", self.row, table::mode_name(self.mode))
    }

    /// Compares, then times; `None` where Criterion was not asked for times.
    fn run(&mut self, copy: &mut Copy) -> Result<Option<Line>> {
        let ours = contenders::candle_norm(&self.row, self.inputs, self.mode);
        let theirs = contenders::candle_nn(&self.row, self.inputs, self.mode)?;
        let errors = compare::both(&self.row, self.inputs, self.mode, &ours, &theirs)?;
        let x = contenders::input(self.inputs, self.mode);
        let (mode, dy) = (self.mode, &self.inputs.dy);
        let step = |layer: &Layer| -> candle_core::Result<()> {
            let y = layer(&x)?;
            match mode {
                Mode::Forward => drop(black_box(y)),
                Mode::ForwardBackward => drop(black_box(contenders::backward(&y, dy)?)),
            }
            Ok(())
        };
        let ran = "an op that ran when it was compared";
        let ours = self.time("candle-norm", || step(&ours).expect(ran))?;
        let theirs = match errors.theirs {
            Some(_) => self.time("candle-nn", || step(&theirs).expect(ran))?,
            None => None,
        };
        let copy_time = self.time("copy", || copy.run())?;
        let (Some(ours), Some(copy_time)) = (ours, copy_time) else { return Ok(None) };
        let tensors = match mode {
            Mode::Forward => 2,
            // The forward, then x and dy read and dx written.
            Mode::ForwardBackward => 5,
        };
        Ok(Some(Line {
            row: self.row,
            mode,
            ours,
            theirs,
            errors,
            bandwidth: (tensors * self.row.bytes()) as f64 / ours,
            copy_bandwidth: (2 * self.row.bytes()) as f64 / copy_time,
        }))
    }

    /// Nanoseconds that Criterion estimates for one call.
    fn time(&mut self, function: &str, mut work: impl FnMut()) -> Result<Option<f64>> {
        let name = self.name();
        let file = self.times.join(&name).join(function).join("new/estimates.json");
        // What is read back must be of this run.
        let _ = std::fs::remove_file(&file);
        let start = Instant::now();
        work();
        let once = start.elapsed();
        let mut group = self.criterion.benchmark_group(&name);
        // Calls of half a second get ten samples of one call; the rest shares a quarter second.
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(10)
            .warm_up_time(Duration::from_millis(60))
            .measurement_time(Duration::from_millis(240).max(once * 12));
        group.bench_function(BenchmarkId::from_parameter(function), |b| b.iter(&mut work));
        group.finish();
        let Ok(text) = std::fs::read_to_string(&file) else { return Ok(None) };
        let estimates: serde_json::Value = serde_json::from_str(&text)?;
        let median = estimates["median"]["point_estimate"].as_f64();
        Ok(Some(median.with_context(|| format!("no median in {}", file.display()))?))
    }
}
