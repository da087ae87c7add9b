//! `cargo bench`: every norm of candle-norm beside candle-nn's, on shapes that real models have, on the CPU, or with
//! `--features cuda` on a GPU (`cases/device.rs`).
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
use cases::device::{self, Place};
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

/// A quick run's tensors have fewer elements. An emulated one takes a second for a million.
const QUICK: usize = if cfg!(feature = "cuda-emulation") { 400_000 } else { 3_000_000 };

#[derive(Parser)]
#[command(about = "candle-norm beside candle-nn", bin_name = "cargo bench --")]
struct Args {
    /// Words that a row's name must have, such as LayerNorm bf16 backward
    words: Vec<String>,
    /// Fewer rounds, and no tensor of 3 million elements or more (400000 in the emulation)
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
    /// Leaves glibc's malloc as it comes, which gives large blocks back and has them mapped anew
    #[arg(long)]
    default_malloc: bool,
    /// Given by cargo: whoever starts the program without it gets `--test`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// A quick run leaves out the largest tensors, which take most of the time.
    fn wants(&self, row: &Row, mode: Mode) -> bool {
        let name = name(row, mode);
        (!self.quick || row.elements() < QUICK) && self.words.iter().all(|word| name.contains(word))
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
    let test = args.test || !args.bench;
    let place = Place::find(test)?;
    if test {
        for (row, mode) in &asked {
            Bench::new(*row, *mode, &place)
                .and_then(|bench| bench.test())
                .with_context(|| name(row, *mode))?;
        }
        let kept = if place.is_device() { "" } else { ", and keep x and the statistics, no more" };
        let quick = format!("; those of {QUICK} elements and more are left out (--quick)");
        let left_out = if args.quick { &quick[..] } else { "" };
        println!("{} rows run on {}, agree with f32 arithmetic{kept}{left_out}", asked.len(), place.name);
        return Ok(());
    }
    memory::settle();
    let kept = if !args.default_malloc && memory::keep_freed() { ", what is freed is kept" } else { "" };
    println!("on {}{kept}", place.name);
    let lines = measure(&asked, args.settings(), if args.once { 0 } else { 2 }, &place)?;
    if lines.is_empty() {
        println!("no row has these words in its name; --list names them");
        return Ok(());
    }
    print!("{}", table::summary(&lines));
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(target, PathBuf::from);
    std::fs::create_dir_all(&out)?;
    std::fs::write(out.join("norms.csv"), table::csv(&lines))?;
    std::fs::write(out.join("norms.svg"), chart::svg(&lines, &place))?;
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
fn measure(asked: &[(Row, Mode)], settings: Settings, more: usize, place: &Place) -> Result<Vec<Line>> {
    print!("{}", table::head());
    let mut lines = vec![];
    for &(row, mode) in asked {
        lines.push(run(row, mode, settings, place)?);
        print!("{}", table::render(&lines[lines.len() - 1]));
    }
    for _ in 0..more {
        let disagree: Vec<&mut Line> = lines.iter_mut().filter(|line| !line.agrees()).collect();
        if !disagree.is_empty() {
            println!("\nwhere rounds disagreed (?), with more of them:");
        }
        for line in disagree {
            let longer = Settings { rounds: 2 * settings.rounds, ..settings };
            line.rounds.extend(run(line.row, line.mode, longer, place)?.rounds);
            print!("{}", table::render(line));
        }
    }
    Ok(lines)
}

fn run(row: Row, mode: Mode, settings: Settings, place: &Place) -> Result<Line> {
    Bench::new(row, mode, place).and_then(|bench| bench.line(settings)).with_context(|| name(&row, mode))
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
    place: Place,
}

impl Bench {
    fn new(row: Row, mode: Mode, place: &Place) -> Result<Self> {
        let mut inputs = Inputs::new(&row)?;
        if place.is_device() {
            inputs = inputs.copied(&place.device)?;
        }
        let ours = contenders::candle_norm(&row, &inputs, mode);
        let theirs = contenders::candle_nn(&row, &inputs, mode)?;
        let errors = compare::both(&row, &inputs, mode, &ours, &theirs)?;
        let theirs = errors.theirs.map(|_| theirs);
        let plain = contenders::plain(&row, &inputs, mode);
        Ok(Self { row, mode, inputs, ours, theirs, plain, errors, place: place.clone() })
    }

    fn step(&self, layer: &Layer) -> Result<()> {
        let outputs = layer(&contenders::input(&self.inputs, self.mode))?;
        Ok(self.mode.finish(outputs, &self.inputs.dy)?)
    }

    /// All that is done where times are taken, once.
    fn test(&self) -> Result<()> {
        self.try_once()?;
        if self.place.is_device() {
            self.measure_on_device(Settings { rounds: 1, block: Duration::ZERO })?;
        }
        Ok(())
    }

    /// The step's memory; candle-norm's is checked. A device's is not counted.
    fn try_once(&self) -> Result<[Option<Memory>; 2]> {
        self.plain.as_ref().map(|plain| self.step(plain)).transpose()?;
        if self.mode == Mode::Forward || self.place.is_device() {
            self.step(&self.ours)?;
            return Ok([None, None]);
        }
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
        if self.place.is_device() {
            return self.measure_on_device(settings);
        }
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
    fn measure_on_device(&self, settings: Settings) -> Result<Rounds> {
        let (row, mode, place) = (&self.row, self.mode, &self.place);
        let slots = place.slots(row.bytes());
        let copies: Result<Vec<Inputs>, _> = (0..slots).map(|_| self.inputs.copied(&place.device)).collect();
        let copies = copies?;
        // Each input has a layer of its own, since a layer holds what stands beside x.
        let calls = |layers: Vec<Layer>| -> device::Call {
            let copies = &copies;
            Box::new(move |i| {
                let (inputs, layer) = (&copies[i % slots], &layers[i % slots]);
                let outputs = layer(&contenders::input(inputs, mode))?;
                let mut written = vec![outputs.y.detach()];
                written.extend(outputs.sum.as_ref().map(|sum| sum.detach()));
                if mode == Mode::ForwardBackward {
                    let mut gradients = contenders::backward(&outputs, &inputs.dy)?;
                    written.extend(gradients.remove(inputs.x.as_tensor()));
                }
                Ok(written)
            })
        };
        let ours = copies.iter().map(|inputs| contenders::candle_norm(row, inputs, mode)).collect();
        let mut all = vec![device::Contender::new("candle-norm", calls(ours))];
        if self.theirs.is_some() {
            let theirs: Result<Vec<Layer>, _> =
                copies.iter().map(|inputs| contenders::candle_nn(row, inputs, mode)).collect();
            all.push(device::Contender::new("candle-nn", calls(theirs?)));
        }
        let copy = |i: usize| Ok(vec![copies[i % slots].x.as_detached_tensor().copy()?]);
        all.push(device::Contender::new("copy", Box::new(copy)));
        device::measure(place, slots, &mut all, settings)
    }
}
