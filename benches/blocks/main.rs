//! `cargo bench --bench blocks`: whole blocks of models with candle-nn's norms, candle-norm's, and all fused.
//!
//! A transformer block of Llama's shape, a residual block of a UNet, a ResNet's bottleneck and a DiT block, in f32,
//! forward and a training step. Each is written once and asks for its norms, which are written three ways. Outputs and
//! every gradient are compared with candle-nn's in f64 before anything is timed, in turns (`cases/rounds.rs`). The norms
//! and their neighbours by themselves, on the tensors that they get in the block, are timed in the same rounds: their
//! time over the block's is their share. Written to `target/blocks` or `CANDLE_NORM_BENCH_OUT`.

mod blocks;
#[path = "../cases/mod.rs"]
#[allow(dead_code)] // the other benchmarks use the rest
mod cases;
mod chart;
mod norms;

use anyhow::{ensure, Context, Result};
use blocks::{Block, Make};
use candle_core::{DType, Tensor};
use cases::contenders::{self, Mode};
use cases::inputs::Random;
use cases::memory;
use cases::rounds::{self, Contender, Rounds, Settings, Spread};
use clap::Parser;
use norms::{Alone, Norms, Way};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Whole blocks of models on the CPU", bin_name = "cargo bench --bench blocks --")]
struct Args {
    /// Words that a line must have, such as Llama step
    words: Vec<String>,
    /// Three rounds
    #[arg(long)]
    quick: bool,
    /// Compares, and times nothing
    #[arg(long)]
    test: bool,
    /// Rounds [default: 11, quick 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// One block in one mode.
pub struct Line {
    pub block: &'static str,
    pub mode: Mode,
    /// Of each way's outputs and gradients, the largest relative L2 error.
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

    /// The part of the block's time that its norms and their neighbours take.
    pub fn share(&self, way: Way) -> f64 {
        self.over(way.alone(), way.name()).median
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
    memory::settle();
    if !test {
        print!("{}", head());
    }
    let mut lines = vec![];
    for (name, make) in blocks::ALL {
        let modes = [Mode::Forward, Mode::ForwardBackward].into_iter().filter(|mode| {
            let line = format!("{name} {}", mode_name(*mode));
            args.words.iter().all(|word| line.contains(word.as_str()))
        });
        let modes: Vec<Mode> = modes.collect();
        if modes.is_empty() {
            continue;
        }
        let block = make(DType::F32).context(name)?;
        // Before training moves running statistics.
        let errors = modes
            .iter()
            .map(|mode| compare(&block, make, *mode))
            .collect::<Result<Vec<_>>>()
            .context(name)?;
        for (mode, errors) in modes.into_iter().zip(errors) {
            if test {
                let errors: Vec<String> = errors.iter().map(|error| format!("{error:.1e}")).collect();
                println!("{name}, {}: off by {}", mode_name(mode), errors.join(", "));
                continue;
            }
            let rounds = measure(&block, mode, settings).context(name)?;
            lines.push(Line { block: block.name, mode, errors, rounds });
            print!("{}", render(&lines[lines.len() - 1]));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(target, PathBuf::from);
    std::fs::create_dir_all(&out)?;
    std::fs::write(out.join("blocks.csv"), csv(&lines))?;
    std::fs::write(out.join("blocks.svg"), chart::svg(&lines))?;
    println!("\nwritten: {0}/blocks.csv, {0}/blocks.svg", out.display());
    Ok(())
}

fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp).join("blocks")
}

/// The gradient of a block's outputs.
fn gradient(shape: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
    Random::new(41).tensor(shape, 0.1, 0.8)?.to_dtype(dtype)
}

/// Everything a block computes, in f64: outputs, and in training the gradient of each variable.
fn results(block: &Block, way: Way, mode: Mode) -> Result<Vec<(String, Tensor)>> {
    let outputs = (block.forward)(&Norms::new(way, mode))?;
    let mut all = vec![("y".to_string(), outputs.y.clone())];
    all.extend(outputs.sum.clone().map(|sum| ("sum".to_string(), sum)));
    if mode == Mode::ForwardBackward {
        let gradients = contenders::backward(&outputs, &gradient(outputs.y.dims(), outputs.y.dtype())?)?;
        for (name, var) in &block.vars {
            let gradient = gradients.get(var).with_context(|| format!("no gradient for {name}"))?;
            all.push((name.clone(), gradient.clone()));
        }
    }
    all.into_iter().map(|(name, t)| Ok((name, t.detach().to_dtype(DType::F64)?))).collect()
}

/// Each way's largest relative L2 error against candle-nn's norms in f64.
fn compare(block: &Block, make: Make, mode: Mode) -> Result<Vec<f64>> {
    let expected = results(&make(DType::F64)?, Way::CandleNn, mode)?;
    let error = |way: Way| {
        let mut worst = 0.0;
        for ((name, got), (_, expected)) in results(block, way, mode)?.iter().zip(&expected) {
            let norm = |t: Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
            let error = (norm((got - expected)?)? / norm(expected.clone())?).sqrt();
            ensure!(error <= tolerance(block), "{}: {name} is off by {error:e}", way.name());
            worst = f64::max(worst, error);
        }
        Ok(worst)
    };
    Way::ALL.into_iter().map(error).collect()
}

/// A sum of n terms in f32 drifts like a random walk of n roundings. A gradient comes through a dozen of them one
/// after the other, each at most as long as the longest. At a corner a gradient is all or nothing: of normal values a
/// part of 2^-20 lies so close to it that either is right.
fn tolerance(block: &Block) -> f64 {
    let corner = if block.corners { 2f64.powi(-10) } else { 0.0 };
    12.0 * (block.longest as f64).sqrt() * 2f64.powi(-24) + corner
}

fn measure(block: &Block, mode: Mode, settings: Settings) -> Result<Rounds> {
    let (sites, outputs) = Norms::of(&block.forward, mode)?;
    let dy = gradient(outputs.y.dims(), outputs.y.dtype())?;
    let alone = Alone::new(sites, gradient)?;
    drop(outputs);
    let mut contenders = vec![];
    for way in Way::ALL {
        let (alone, dy) = (&alone, &dy);
        contenders.push(Contender::new(way.name(), move || {
            let outputs = (block.forward)(&Norms::new(way, mode))?;
            Ok(mode.finish(outputs, dy)?)
        }));
        contenders.push(Contender::new(way.alone(), move || Ok(alone.run(&Norms::new(way, mode))?)));
    }
    rounds::measure(&mut contenders, settings)
}

fn head() -> String {
    let columns = Way::ALL.map(|way| format!("{:>20}", way.name())).concat();
    format!(
        "milliseconds, and in brackets the share of the norms and what stands around them;\n\
         times as fast as with candle-nn: median (least-most) of the rounds' ratios\n\n\
         {:<44} {:<8}{columns}   plain norms           fused\n",
        "block", "mode"
    )
}

fn render(line: &Line) -> String {
    let columns = Way::ALL.map(|way| {
        let cell = format!("{:.1} ({:.1}%)", line.ms(way), 100.0 * line.share(way));
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

fn csv(lines: &[Line]) -> String {
    let mut out = String::from(
        "block,mode,way,ns,norms_ns,norms_share,times_as_fast,least,most,norms_times_as_fast,error\n",
    );
    for line in lines {
        for (way, error) in Way::ALL.into_iter().zip(&line.errors) {
            let faster = line.over(Way::CandleNn.name(), way.name());
            let _ = writeln!(
                out,
                "\"{}\",{},{},{:.0},{:.0},{:.4},{:.3},{:.3},{:.3},{:.2},{error:.1e}",
                line.block,
                mode_name(line.mode),
                way.name(),
                line.time(way.name()),
                line.time(way.alone()),
                line.share(way),
                faster.median,
                faster.low,
                faster.high,
                line.over(Way::CandleNn.alone(), way.alone()).median,
            );
        }
    }
    out
}
