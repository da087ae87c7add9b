//! `cargo bench`: every norm of candle-norm beside candle-nn's, on shapes that real models have.
//!
//! Both crates' results are compared with f32 arithmetic on the same inputs, and the memory of a training
//! step is counted, before they are timed, in turns (`cases/rounds.rs`), together with a copy of the same
//! bytes. Rows whose rounds disagree are measured again at the end. The table is also written as CSV and
//! as a chart, to `target/norms` or to the folder that `CANDLE_NORM_BENCH_OUT` names.

#[path = "../cases/mod.rs"]
mod cases;
mod chart;
mod compare;
mod table;

use anyhow::{ensure, Context, Result};
use cases::contenders::{self, Layer, Mode, Outputs};
use cases::copy::Copy;
use cases::inputs::Inputs;
use cases::memory::{self, Counting, Memory};
use cases::rounds::{self, Contender, Rounds, Settings};
use cases::{Norm, Row};
use clap::Parser;
use compare::Errors;
use std::path::{Path, PathBuf};
use std::time::Duration;
use table::Line;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Parser)]
#[command(about = "candle-norm beside candle-nn on the CPU", bin_name = "cargo bench --")]
struct Args {
    /// Words that a row's name must have, such as LayerNorm bf16 backward
    words: Vec<String>,
    /// Fewer rounds, and no tensor of 3 million elements or more
    #[arg(long)]
    quick: bool,
    /// Runs and compares everything once, and times nothing
    #[arg(long)]
    test: bool,
    /// Names the rows
    #[arg(long)]
    list: bool,
    /// Rounds of each row [default: 11, quick 5]
    #[arg(long)]
    rounds: Option<usize>,
    /// Marks rows whose rounds disagree, and does not measure them again
    #[arg(long)]
    once: bool,
    /// Given by cargo: whoever starts the program without it gets `--test`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// A quick run leaves out the largest tensors, which take most of the time.
    fn wants(&self, row: &Row, mode: Mode) -> bool {
        let name = name(row, mode);
        (!self.quick || row.elements() < 3_000_000) && self.words.iter().all(|word| name.contains(word))
    }

    fn settings(&self) -> Settings {
        let (rounds, block) = if self.quick { (5, 8) } else { (11, 12) };
        Settings { rounds: self.rounds.unwrap_or(rounds).max(1), block: Duration::from_millis(block) }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let asked = Row::all().flat_map(|row| modes(&row).iter().map(move |&mode| (row, mode)));
    let asked: Vec<(Row, Mode)> = asked.filter(|(row, mode)| args.wants(row, *mode)).collect();
    if args.list {
        asked.iter().for_each(|(row, mode)| println!("{}: benchmark", name(row, *mode)));
        return Ok(());
    }
    if args.test || !args.bench {
        for (row, mode) in &asked {
            Bench::new(*row, *mode).and_then(|bench| bench.try_once()).with_context(|| name(row, *mode))?;
        }
        println!(
            "{} rows run, agree with f32 arithmetic, and keep x and the statistics, no more{}",
            asked.len(),
            if args.quick { "; those of 3 million elements and more are left out (--quick)" } else { "" }
        );
        return Ok(());
    }
    memory::settle();
    let lines = measure(&asked, args.settings(), if args.once { 0 } else { 2 })?;
    if lines.is_empty() {
        println!("no row has these words in its name; --list names them");
        return Ok(());
    }
    print!("{}", table::summary(&lines));
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(target, PathBuf::from);
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

fn name(row: &Row, mode: Mode) -> String {
    format!("{row} {}", table::mode_name(mode))
}

fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp).join("norms")
}

/// Measures and prints, row by row; what disagrees is measured some times more, at another time.
fn measure(asked: &[(Row, Mode)], settings: Settings, more: usize) -> Result<Vec<Line>> {
    print!("{}", table::head());
    let mut lines = vec![];
    for &(row, mode) in asked {
        lines.push(run(row, mode, settings)?);
        print!("{}", table::render(&lines[lines.len() - 1]));
    }
    for _ in 0..more {
        let disagree: Vec<&mut Line> = lines.iter_mut().filter(|line| !line.agrees()).collect();
        if !disagree.is_empty() {
            println!("\nwhere rounds disagreed (?), with more of them:");
        }
        for line in disagree {
            let longer = Settings { rounds: 2 * settings.rounds, ..settings };
            line.rounds.extend(run(line.row, line.mode, longer)?.rounds);
            print!("{}", table::render(line));
        }
    }
    Ok(lines)
}

fn run(row: Row, mode: Mode, settings: Settings) -> Result<Line> {
    Bench::new(row, mode).and_then(|bench| bench.line(settings)).with_context(|| name(&row, mode))
}

/// A row that is ready to run.
struct Bench {
    row: Row,
    mode: Mode,
    inputs: Inputs,
    ours: Layer,
    /// `None` where candle-nn cannot run the row.
    theirs: Option<Layer>,
    /// The norm alone, of a row with more.
    plain: Option<Layer>,
    errors: Errors,
}

impl Bench {
    fn new(row: Row, mode: Mode) -> Result<Self> {
        let inputs = Inputs::new(&row)?;
        let ours = contenders::candle_norm(&row, &inputs, mode);
        let theirs = contenders::candle_nn(&row, &inputs, mode)?;
        let errors = compare::both(&row, &inputs, mode, &ours, &theirs)?;
        let theirs = errors.theirs.map(|_| theirs);
        let plain = contenders::plain(&row, &inputs, mode);
        Ok(Self { row, mode, inputs, ours, theirs, plain, errors })
    }

    fn step(&self, layer: &Layer) -> Result<()> {
        let outputs = layer(&contenders::input(&self.inputs, self.mode))?;
        Ok(self.mode.finish(outputs, &self.inputs.dy)?)
    }

    /// The step's memory; candle-norm's is checked.
    fn try_once(&self) -> Result<[Option<Memory>; 2]> {
        self.plain.as_ref().map(|plain| self.step(plain)).transpose()?;
        let Mode::ForwardBackward = self.mode else {
            self.step(&self.ours)?;
            return Ok([None, None]);
        };
        let of = |layer: &Layer| {
            let backward = |y: &Outputs| {
                contenders::backward(y, &self.inputs.dy)?;
                Ok(())
            };
            memory::of(|| Ok(layer(&contenders::input(&self.inputs, self.mode))?), backward)
        };
        let ours = of(&self.ours)?;
        // x the graph keeps too, but it was there before. Weight and bias may stand in one tensor; the rest
        // is candle's nodes.
        let most = self.row.kept() + 2 * self.inputs.weight.elem_count() * 4 + 4096;
        ensure!(ours.kept <= most, "candle-norm keeps {} bytes, expected at most {most}", ours.kept);
        Ok([Some(ours), self.theirs.as_ref().map(of).transpose()?])
    }

    fn line(&self, settings: Settings) -> Result<Line> {
        let memory = self.try_once()?;
        let rounds = self.measure(settings)?;
        Ok(Line { row: self.row, mode: self.mode, errors: self.errors, memory, rounds })
    }

    fn measure(&self, settings: Settings) -> Result<Rounds> {
        let mut copy = Copy::of(self.row.bytes());
        let mut contenders = vec![Contender::new("candle-norm", || self.step(&self.ours))];
        if let Some(theirs) = &self.theirs {
            contenders.push(Contender::new("candle-nn", || self.step(theirs)));
        }
        if let Some(plain) = &self.plain {
            contenders.push(Contender::new("plain", || self.step(plain)));
        }
        contenders.push(Contender::new("copy", || {
            copy.run();
            Ok(())
        }));
        rounds::measure(&mut contenders, settings)
    }
}
