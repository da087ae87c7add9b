//! `cargo bench --bench blocks`: whole blocks of models, or models, with candle-nn's norms, candle-norm's, and all fused.
//!
//! A transformer block of Llama's shape, a residual block of a UNet, a ResNet's bottleneck and a DiT block, in f32,
//! forward and a training step. Each is written once and asks for its norms, which are written three ways. Outputs and
//! every gradient are compared with candle-nn's in f64 before anything is timed, in turns (`cases/rounds.rs`). The norms
//! and their neighbours by themselves, on the tensors that they get in the block, are timed in the same rounds: their
//! time over the block's is their share. Written to `target/blocks` or `CANDLE_NORM_BENCH_OUT`. With feature `cuda` all
//! of it runs on the first GPU. `--models` takes three whole models instead (`models.rs`), without the shares.

mod blocks;
#[path = "../cases/mod.rs"]
#[allow(dead_code)] // the other benchmarks use the rest
mod cases;
mod chart;
mod models;
mod norms;

use anyhow::{ensure, Context, Result};
use blocks::{Block, Maker};
use candle_core::{DType, Device, Tensor};
use cases::contenders::{self, Mode};
use cases::device::{self, Place};
use cases::inputs::Random;
use cases::memory;
use cases::rounds::{self, Contender, Rounds, Settings, Spread};
use clap::{Parser, ValueEnum};
use models::Size;
use norms::{Alone, Norms, Way};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Whole blocks of models, on the CPU or a GPU", bin_name = "cargo bench --bench blocks --")]
struct Args {
    /// Words that a line must have, such as Llama step
    words: Vec<String>,
    /// Three rounds
    #[arg(long)]
    quick: bool,
    /// Compares, and times nothing
    #[arg(long)]
    test: bool,
    /// Three whole models instead of the blocks
    #[arg(long)]
    models: bool,
    /// Of what is timed; compared is f32
    #[arg(long, default_value = "f32")]
    dtype: Precision,
    /// Rounds [default: 11, quick 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    F32,
    Bf16,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// What a run measures: blocks or models, where, and in what.
pub struct Run {
    place: Place,
    models: bool,
    dtype: DType,
}

impl Run {
    /// What to make, by name.
    fn all(&self) -> Vec<(&'static str, Makes)> {
        let size = if self.place.device.is_cuda() { Size::Large } else { Size::Small };
        let model = |(name, make): (&'static str, models::Make)| -> (&'static str, Makes) {
            (name, Box::new(move |m| make(m, size)))
        };
        let block =
            |(name, make): (&'static str, blocks::Make)| -> (&'static str, Makes) { (name, Box::new(make)) };
        match self.models {
            true => models::ALL.into_iter().map(model).collect(),
            false => blocks::ALL.into_iter().map(block).collect(),
        }
    }

    fn maker(&self, dtype: DType) -> Maker {
        Maker::new(dtype, &self.place.device)
    }

    /// Of its files.
    fn name(&self) -> String {
        let what = if self.models { "models" } else { "blocks" };
        let place = if self.place.device.is_cuda() { "-gpu" } else { "" };
        let dtype = if self.dtype == DType::F32 { "" } else { "-bf16" };
        format!("{what}{place}{dtype}")
    }

    /// What the chart and the table are about.
    pub fn title(&self) -> String {
        let what = if self.models { "Whole models" } else { "Whole blocks of models" };
        format!("{what} on {} in {}", self.place.name, self.dtype.as_str())
    }
}

/// A block or a model from the maker's numbers.
type Makes = Box<dyn Fn(Maker) -> candle_core::Result<Block>>;

/// One block in one mode.
pub struct Line {
    pub block: &'static str,
    pub mode: Mode,
    /// Of each way's outputs and gradients, the largest relative L2 error; of a model's gradients, that of all.
    errors: Vec<f64>,
    rounds: Rounds,
}

impl Line {
    fn time(&self, name: &str) -> f64 {
        self.rounds.time(name).map_or(f64::NAN, |time| time.median)
    }

    /// Milliseconds of a call.
    pub fn ms(&self, way: Way) -> f64 {
        self.time(way.name()) / 1e6
    }

    fn over(&self, over: &str, under: &str) -> Spread {
        self.rounds.ratio(over, under).expect("all were timed")
    }

    /// The part of the block's time that its norms and their neighbours take, where they were timed.
    pub fn share(&self, way: Way) -> Option<f64> {
        self.rounds.ratio(way.alone(), way.name()).map(|ratio| ratio.median)
    }

    /// In parts of the time with candle-nn.
    pub fn relative(&self, way: Way) -> f64 {
        self.over(way.name(), Way::CandleNn.name()).median
    }
}

pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Forward => "forward",
        Mode::ForwardBackward => "step",
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 11 }).max(1);
    let settings = Settings { rounds, block: Duration::from_millis(30) };
    let test = args.test || !args.bench;
    let run = Run { place: Place::find(test)?, models: args.models, dtype: args.dtype.dtype() };
    memory::settle();
    if !test {
        print!("{}", head(&run));
    }
    let mut lines = vec![];
    for (name, make) in run.all() {
        let modes = [Mode::Forward, Mode::ForwardBackward].into_iter().filter(|mode| {
            let line = format!("{name} {}", mode_name(*mode));
            args.words.iter().all(|word| line.contains(word.as_str()))
        });
        lines.extend(measure_block(&run, &make, modes.collect(), (!test).then_some(settings)).context(name)?);
    }
    if lines.is_empty() {
        return Ok(());
    }
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(target, PathBuf::from);
    std::fs::create_dir_all(&out)?;
    let file = out.join(run.name());
    std::fs::write(file.with_extension("csv"), csv(&run, &lines))?;
    std::fs::write(file.with_extension("svg"), chart::svg(&run, &lines))?;
    println!("\nwritten: {0}.csv, {0}.svg", file.display());
    Ok(())
}

/// Compares in every mode, and times where that is asked for.
fn measure_block(run: &Run, make: &Makes, modes: Vec<Mode>, timed: Option<Settings>) -> Result<Vec<Line>> {
    if modes.is_empty() {
        return Ok(vec![]);
    }
    // Models are made when they are needed, and one at a time: in f64 one takes gigabytes.
    let keep = !run.models || run.place.device.is_cuda();
    let mut kept = None;
    let mut errors = vec![];
    // The forward first, before training moves running statistics.
    for mode in &modes {
        let expected = results(&make(run.maker(DType::F64))?, Way::CandleNn, *mode)?;
        let block = kept.take().map_or_else(|| make(run.maker(DType::F32)), Ok)?;
        errors.push(compare(run, &block, &expected, *mode)?);
        kept = keep.then_some(block);
    }
    let Some(settings) = timed else {
        return Ok(vec![]);
    };
    let kept = kept.filter(|_| run.dtype == DType::F32);
    let block = kept.map_or_else(|| make(run.maker(run.dtype)), Ok)?;
    let mut lines = vec![];
    for (mode, errors) in modes.into_iter().zip(errors) {
        // In f32 it ran just now.
        let refused = if run.dtype == DType::F32 { None } else { refused(&block, mode) };
        if let Some((way, error)) = refused {
            let error = error.to_string();
            let error = error.lines().next().unwrap_or_default();
            println!("{}, {}: not timed, because with {}: {error}", block.name, mode_name(mode), way.name());
            continue;
        }
        let rounds = measure(run, &block, mode, settings)?;
        lines.push(Line { block: block.name, mode, errors, rounds });
        print!("{}", render(&lines[lines.len() - 1]));
    }
    Ok(lines)
}

/// The first that cannot run the block in its dtype: candle-nn's batch norm cannot in bf16.
fn refused(block: &Block, mode: Mode) -> Option<(Way, anyhow::Error)> {
    let run = |way| results(block, way, mode).map(drop);
    Way::ALL.into_iter().find_map(|way| run(way).err().map(|error| (way, error)))
}

fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp).join("blocks")
}

/// The gradient of a block's outputs.
fn gradient(shape: &[usize], dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    Random::new(41).tensor(shape, 0.1, 0.8)?.to_device(device)?.to_dtype(dtype)
}

/// Everything a block computes: outputs, and in training the gradient of each variable.
fn results(block: &Block, way: Way, mode: Mode) -> Result<Vec<(String, Tensor)>> {
    let outputs = (block.forward)(&Norms::new(way, mode))?;
    let mut all = vec![("y".to_string(), outputs.y.clone())];
    all.extend(outputs.sum.clone().map(|sum| ("sum".to_string(), sum)));
    if mode == Mode::ForwardBackward {
        let y = &outputs.y;
        let gradients = contenders::backward(&outputs, &gradient(y.dims(), y.dtype(), y.device())?)?;
        for (name, var) in &block.vars {
            let gradient = gradients.get(var).with_context(|| format!("no gradient for {name}"))?;
            all.push((name.clone(), gradient.clone()));
        }
    }
    Ok(all.into_iter().map(|(name, t)| (name, t.detach())).collect())
}

/// Each way's largest relative L2 error against candle-nn's norms in f64, printed.
fn compare(run: &Run, block: &Block, expected: &[(String, Tensor)], mode: Mode) -> Result<Vec<f64>> {
    let mut errors: Vec<f64> = vec![];
    for way in Way::ALL {
        let squares = squares(&results(block, way, mode)?, expected)?;
        let most = match (run.models, errors.first()) {
            (false, _) => tolerance(block),
            (true, None) => f64::INFINITY,
            (true, Some(candle_nn)) => 3.0 * candle_nn + tolerance(block),
        };
        errors.push(worst(&squares, run.models, most).with_context(|| way.name())?);
    }
    let shown: Vec<String> = errors.iter().map(|error| format!("{error:.1e}")).collect();
    println!("{}, {}: off by {}", block.name, mode_name(mode), shown.join(", "));
    Ok(errors)
}

/// Of a result, the squares of its difference from what is expected, added up, and of what is expected.
struct Squares {
    name: String,
    difference: f64,
    expected: f64,
}

fn squares(got: &[(String, Tensor)], expected: &[(String, Tensor)]) -> Result<Vec<Squares>> {
    let sum = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    let of = |((name, got), (_, expected)): (&(String, Tensor), &(String, Tensor))| {
        let difference = sum(&(got.to_dtype(DType::F64)? - expected)?)?;
        Ok(Squares { name: name.clone(), difference, expected: sum(expected)? })
    };
    ensure!(got.len() == expected.len(), "{} results, expected {}", got.len(), expected.len());
    got.iter().zip(expected).map(of).collect()
}

/// The largest relative L2 error, which `most` bounds. A model's gradients count as one vector: some of them nearly
/// vanish, such as that of a bias before a norm.
fn worst(squares: &[Squares], together: bool, most: f64) -> Result<f64> {
    let error = |of: &[Squares]| {
        let sum = |part: fn(&Squares) -> f64| of.iter().map(part).sum::<f64>();
        (sum(|s| s.difference) / sum(|s| s.expected)).sqrt()
    };
    let (outputs, gradients) = squares.split_at(if together { 1 } else { squares.len() });
    let mut worst = 0.0;
    let gradients = (!gradients.is_empty()).then_some(gradients);
    for part in outputs.chunks(1).chain(gradients) {
        let (name, error) = (&part[0].name, error(part));
        ensure!(error.is_finite() && error <= most, "{name} is off by {error:e}, more than {most:e}");
        worst = f64::max(worst, error);
    }
    Ok(worst)
}

/// A sum of n terms in f32 drifts like a random walk of n roundings. A gradient comes through a dozen of them one
/// after the other, each at most as long as the longest. At a corner a gradient is all or nothing: of normal values a
/// part of 2^-20 lies so close to it that either is right.
fn tolerance(block: &Block) -> f64 {
    let corner = if block.corners { 2f64.powi(-10) } else { 0.0 };
    12.0 * (block.longest as f64).sqrt() * 2f64.powi(-24) + corner
}

/// A contender's call, wherever it is timed.
type Call<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// Of a model the norms alone are not timed: their tensors would take as much memory as the model's step.
fn measure(run: &Run, block: &Block, mode: Mode, settings: Settings) -> Result<Rounds> {
    let (sites, outputs) = match run.models {
        true => (vec![], (block.forward)(&Norms::new(Way::Plain, mode))?),
        false => Norms::of(&block.forward, mode)?,
    };
    let dy = gradient(outputs.y.dims(), outputs.y.dtype(), outputs.y.device())?;
    let alone = Alone::new(sites, |shape, dtype| gradient(shape, dtype, &run.place.device))?;
    drop(outputs);
    let mut calls: Vec<(&'static str, Call)> = vec![];
    for way in Way::ALL {
        let (alone, dy) = (&alone, &dy);
        let whole = move || Ok(mode.finish((block.forward)(&Norms::new(way, mode))?, dy)?);
        calls.push((way.name(), Box::new(whole)));
        if !run.models {
            calls.push((way.alone(), Box::new(move || Ok(alone.run(&Norms::new(way, mode))?))));
        }
    }
    if !run.place.device.is_cuda() {
        let mut contenders: Vec<_> =
            calls.into_iter().map(|(name, call)| Contender::new(name, call)).collect();
        return rounds::measure(&mut contenders, settings);
    }
    let mut contenders = vec![];
    for (name, call) in calls {
        contenders.push(device::Contender::new(name, Box::new(move |_| call().map(|()| vec![]))));
    }
    device::measure(&run.place, 1, &mut contenders, settings)
}

fn head(run: &Run) -> String {
    let columns = Way::ALL.map(|way| format!("{:>20}", way.name())).concat();
    format!(
        "{}: milliseconds, and in brackets the share of the norms and what stands around them;\n\
         times as fast as with candle-nn: median (least-most) of the rounds' ratios\n\n\
         {:<44} {:<8}{columns}   plain norms           fused\n",
        run.title(),
        "block",
        "mode"
    )
}

fn render(line: &Line) -> String {
    let columns = Way::ALL.map(|way| {
        let share = line.share(way).map_or(String::new(), |share| format!(" ({:.1}%)", 100.0 * share));
        let cell = format!("{:.*}{share}", if line.ms(way) < 10.0 { 3 } else { 1 }, line.ms(way));
        format!("{cell:>20}")
    });
    let faster = [Way::Plain, Way::Fused].map(|way| {
        let r = line.over(Way::CandleNn.name(), way.name());
        let cell = format!("{:.2} ({:.2}-{:.2})", r.median, r.low, r.high);
        format!("{cell:<21} ")
    });
    let doubt = if line.over(Way::CandleNn.name(), Way::Fused.name()).agrees() { "" } else { "?" };
    format!(
        "{:<44} {:<8}{}   {}{doubt}\n",
        line.block,
        mode_name(line.mode),
        columns.concat(),
        faster.concat()
    )
}

fn csv(run: &Run, lines: &[Line]) -> String {
    let mut out = String::from(
        "block,mode,way,device,dtype,ns,norms_ns,norms_share,times_as_fast,least,most,norms_times_as_fast,error\n",
    );
    for line in lines {
        for (way, error) in Way::ALL.into_iter().zip(&line.errors) {
            let faster = line.over(Way::CandleNn.name(), way.name());
            let _ = writeln!(
                out,
                "\"{}\",{},{},{},{},{:.0},{:.0},{:.4},{:.3},{:.3},{:.3},{:.2},{error:.1e}",
                line.block,
                mode_name(line.mode),
                way.name(),
                run.place.name,
                run.dtype.as_str(),
                line.time(way.name()),
                line.time(way.alone()),
                line.share(way).unwrap_or(f64::NAN),
                faster.median,
                faster.low,
                faster.high,
                line.rounds.ratio(Way::CandleNn.alone(), way.alone()).map_or(f64::NAN, |ratio| ratio.median),
            );
        }
    }
    out
}
