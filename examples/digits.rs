//! Trains a small convolutional network on handwritten digits, once with each norm, and draws the curves.
//!
//! ```text
//! cargo run --release --example digits                         # every norm: loss and accuracy
//! cargo run --release --example digits -- --norm group,none    # some norms
//! cargo run --release --example digits -- --sweep batch-size   # batch norm and group norm, batches of 2 to 32
//! ```

#[path = "digits/chart.rs"]
mod chart;
#[path = "digits/data.rs"]
mod data;
#[path = "digits/net.rs"]
mod net;

use anyhow::Result;
use candle_core::{DType, Device, ModuleT, D};
use candle_nn::{Optimizer, VarBuilder, VarMap, SGD};
use chart::{Axes, Line, Scale};
use clap::{Parser, ValueEnum};
use data::Digits;
use indicatif::{ProgressBar, ProgressStyle};
use net::{draw_weights, Net, NormKind};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Trains a small convolutional network on handwritten digits, once with each norm")]
struct Args {
    /// Norms to train with, separated by commas [default: all, or batch,group in a sweep]
    #[arg(long, value_enum, value_delimiter = ',')]
    norm: Vec<NormKind>,
    /// Train at several values of this instead of one
    #[arg(long, value_enum)]
    sweep: Option<Sweep>,
    /// Passes over the training images
    #[arg(long, default_value_t = 15)]
    epochs: usize,
    /// Images in a step
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Step of the gradient descent at 32 images; scaled with the batch size, halved cosine over the epochs
    #[arg(long, default_value_t = 0.1)]
    learning_rate: f64,
    /// First seed of the split, the initial weights and the order of the images
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds, over whose trainings the curves and errors are averaged
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Folder for the pictures
    #[arg(long, default_value = "target/digits")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sweep {
    BatchSize,
}

/// One training.
struct Run<'a> {
    kind: NormKind,
    blocks: usize,
    batch_size: usize,
    seed: u64,
    args: &'a Args,
}

/// Mean loss over the training images and accuracy on the test images, in percent, after each epoch.
struct Curves {
    loss: Vec<f64>,
    accuracy: Vec<f64>,
}

impl Run<'_> {
    fn name(&self) -> String {
        format!("{:>8}, batch {:2}, seed {}", self.kind.name(), self.batch_size, self.seed)
    }

    fn train(&self) -> Result<Curves> {
        let (train, test) = Digits::load(self.seed)?;
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let net = Net::new(self.kind, self.blocks, vb)?;
        let mut rng = StdRng::seed_from_u64(self.seed);
        draw_weights(&vars, &mut rng)?;
        let rate = self.args.learning_rate * self.batch_size as f64 / 32.;
        let mut optimizer = SGD::new(vars.all_vars(), rate)?;

        let mut order: Vec<u32> = (0..train.len()? as u32).collect();
        let steps = order.len() / self.batch_size;
        anyhow::ensure!(steps > 0, "a batch of {} of {} training images", self.batch_size, order.len());
        let bar = ProgressBar::new((self.args.epochs * steps) as u64).with_message(self.name());
        bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} steps, {eta} left")?);
        let mut curves = Curves { loss: vec![], accuracy: vec![] };
        for epoch in 0..self.args.epochs {
            optimizer.set_learning_rate(rate * cosine(epoch, self.args.epochs));
            order.shuffle(&mut rng);
            let mut loss = 0.;
            for which in order.chunks_exact(self.batch_size) {
                let batch = train.select(which)?;
                let logits = net.forward_t(&batch.images, true)?;
                let step = candle_nn::loss::cross_entropy(&logits, &batch.labels)?;
                optimizer.backward_step(&step)?;
                loss += f64::from(step.to_scalar::<f32>()?) / steps as f64;
                bar.inc(1);
            }
            let accuracy = accuracy(&net, &test)?;
            let line = format!(
                "{}, epoch {:2}: loss {loss:.4}, test accuracy {accuracy:.2}%",
                self.name(),
                epoch + 1
            );
            bar.suspend(|| println!("{line}"));
            curves.loss.push(loss);
            curves.accuracy.push(accuracy);
        }
        bar.finish_and_clear();
        Ok(curves)
    }
}

/// Learning rate of an epoch as a part of the first: half a cosine.
fn cosine(epoch: usize, epochs: usize) -> f64 {
    0.5 * (1. + (std::f64::consts::PI * epoch as f64 / epochs as f64).cos())
}

/// Percentage of `digits` that the network names right, in evaluation mode.
fn accuracy(net: &Net, digits: &Digits) -> Result<f64> {
    let named = net.forward_t(&digits.images, false)?.argmax(D::Minus1)?;
    let right = named.eq(&digits.labels)?.to_dtype(DType::F32)?.mean_all()?;
    Ok(100. * f64::from(right.to_scalar::<f32>()?))
}

/// Trains with every norm; the charts show loss and accuracy over the epochs.
fn every_norm(args: &Args) -> Result<()> {
    let (mut losses, mut accuracies) = (vec![], vec![]);
    for &kind in or(&args.norm, NormKind::value_variants()) {
        let (mut loss, mut accuracy) = (vec![0.; args.epochs], vec![0.; args.epochs]);
        for seed in args.seed..args.seed + args.seeds {
            let curves = Run { kind, blocks: 3, batch_size: args.batch_size, seed, args }.train()?;
            add(&mut loss, &curves.loss, args.seeds);
            add(&mut accuracy, &curves.accuracy, args.seeds);
        }
        let last = accuracy.last().copied().unwrap_or(0.);
        println!("{}: test accuracy {last:.2}%, mean of {} seeds", kind.name(), args.seeds);
        let line = |values: Vec<f64>| {
            let points = values.into_iter().enumerate().map(|(i, y)| (i as f64 + 1., y)).collect();
            Line { name: kind.name().to_string(), points }
        };
        losses.push(line(loss));
        accuracies.push(line(accuracy));
    }
    let every = args.epochs.div_ceil(8);
    let ticks: Vec<_> = (1..=args.epochs).step_by(every).map(|e| (e as f64, e.to_string())).collect();
    let title = &format!("Handwritten digits, one network with each norm, {}", seeds(args));
    let axes = Axes { title, x: "epoch", y: "training loss, logarithmic", ticks, scale: Scale::Logarithmic };
    write(args, "loss", &axes, &losses)?;
    let axes = Axes { y: "test accuracy (%)", scale: Scale::Linear, ..axes };
    write(args, "accuracy", &axes, &accuracies)
}

/// Adds a training's part to the mean over the seeds.
fn add(mean: &mut [f64], values: &[f64], seeds: u64) {
    mean.iter_mut().zip(values).for_each(|(mean, value)| *mean += value / seeds as f64);
}

fn seeds(args: &Args) -> String {
    match args.seeds {
        1 => format!("seed {}", args.seed),
        n => format!("mean of {n} seeds"),
    }
}

/// Trains at several batch sizes; the chart shows the error after the last epoch.
///
/// A fourth block leaves one pixel, so that batch norm's statistics there come from as few values as
/// there are images in the batch. See figure 1 of <https://arxiv.org/abs/1803.08494>.
fn sweep(args: &Args) -> Result<()> {
    let mut lines = vec![];
    let sizes = [32, 16, 8, 4, 2];
    for &kind in or(&args.norm, &[NormKind::Batch, NormKind::Group]) {
        let mut points = vec![];
        for (i, &batch_size) in sizes.iter().enumerate() {
            let mut error = 0.;
            for seed in args.seed..args.seed + args.seeds {
                let curves = Run { kind, blocks: 4, batch_size, seed, args }.train()?;
                error += (100. - curves.accuracy.last().copied().unwrap_or(0.)) / args.seeds as f64;
            }
            println!("{} norm, batches of {batch_size}: error {error:.2}%", kind.name());
            points.push((i as f64, error));
        }
        lines.push(Line { name: format!("{} norm", kind.name()), points });
    }
    let ticks = sizes.iter().enumerate().map(|(i, size)| (i as f64, size.to_string())).collect();
    let title = &format!("Handwritten digits, error by batch size, {}", seeds(args));
    let axes = Axes { title, x: "images in a batch", y: "test error (%)", ticks, scale: Scale::FromZero };
    write(args, "batch-size", &axes, &lines)
}

fn or<'a, T>(asked: &'a [T], default: &'a [T]) -> &'a [T] {
    if asked.is_empty() {
        default
    } else {
        asked
    }
}

fn write(args: &Args, name: &str, axes: &Axes, lines: &[Line]) -> Result<()> {
    std::fs::create_dir_all(&args.out)?;
    let path = args.out.join(format!("{name}.svg"));
    chart::draw(&path, axes, lines)?;
    println!("written: {}", path.display());
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.epochs > 0 && args.seeds > 0, "at least one epoch and one seed");
    match args.sweep {
        None => every_norm(&args),
        Some(Sweep::BatchSize) => sweep(&args),
    }
}
