//! `cargo bench --bench sizes`: what an element costs, from a hundred elements to a billion.
//!
//! Where the cost of a norm is linear, nanoseconds per element are a level line: above it on the left what
//! a call costs by itself, and steps in it where a tensor no longer fits a cache. `-- --most 1e9` goes as
//! far as memory allows: the norm's own forward and backward hold x, y and their gradients. Contenders take
//! turns with a copy of x (`cases/rounds.rs`). Written to `target/sizes` or `CANDLE_NORM_BENCH_OUT`.

#[path = "../cases/mod.rs"]
#[allow(dead_code)] // the other benchmarks use the rest
mod cases;
mod chart;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_norm::__bench::{Kind, RecordedOp};
use candle_norm::functional as norm;
use cases::copy::Copy;
use cases::rounds::{self, Contender, Rounds, Settings};
use clap::Parser;
use std::fmt::Write;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Channels of the image norms, and length of a layer norm's row.
const CHANNELS: usize = 8;

#[derive(Parser)]
#[command(
    about = "What an element costs, by the size of the tensor",
    bin_name = "cargo bench --bench sizes --"
)]
struct Args {
    /// Elements of the largest tensor
    #[arg(long, default_value_t = 1e7)]
    most: f64,
    /// One round of the two smallest sizes
    #[arg(long)]
    test: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Op {
    LayerNorm,
    GroupNorm,
    BatchNorm,
}

impl Op {
    const ALL: [Op; 3] = [Op::LayerNorm, Op::GroupNorm, Op::BatchNorm];

    /// About `elements` of them, in samples that grow with the tensor: 1 to 1000.
    fn shape(self, elements: usize) -> Vec<usize> {
        match self {
            Op::LayerNorm => {
                let row = if elements < 10_000 { 64 } else { 1024 };
                vec![elements.div_ceil(row), row]
            }
            Op::GroupNorm | Op::BatchNorm => {
                let samples = (elements / 100_000).clamp(1, 1000);
                vec![samples, CHANNELS, elements.div_ceil(samples * CHANNELS)]
            }
        }
    }

    fn kind(self) -> Kind {
        match self {
            Op::LayerNorm => Kind::Layer { center: true },
            Op::GroupNorm => Kind::Groups(2),
            Op::BatchNorm => Kind::Batch,
        }
    }

    fn forward(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> candle_core::Result<Tensor> {
        let (weight, bias) = (Some(weight), Some(bias));
        match self {
            Op::LayerNorm => norm::layer_norm(x, &x.dims()[1..], weight, bias, 1e-5),
            Op::GroupNorm => norm::group_norm(x, 2, weight, bias, 1e-5),
            Op::BatchNorm => norm::batch_norm(x, None, None, weight, bias, true, 0.1, 1e-5),
        }
    }
}

/// A measured size.
pub struct Point {
    pub op: Op,
    pub elements: usize,
    pub rounds: Rounds,
}

pub const CONTENDERS: [&str; 3] = ["forward", "forward+backward", "copy"];

fn main() -> Result<()> {
    let args = Args::parse();
    let test = args.test || !args.bench;
    let most = if test { 200 } else { args.most as usize };
    let rounds = if test { 1 } else { 7 };
    let mut points = vec![];
    println!("nanoseconds per element, f32: median of the rounds\n");
    println!("{:<10} {:>12} {:>10} {:>17} {:>10}", "norm", "elements", "forward", "forward+backward", "copy");
    for op in Op::ALL {
        for elements in sizes(most) {
            let point = measure(op, elements, rounds)?;
            let cells = CONTENDERS.map(|name| {
                let time = point.rounds.time(name);
                time.map_or("-".into(), |time| format!("{:.3}", time.median / point.elements as f64))
            });
            let [forward, both, copy] = cells;
            println!("{:<10} {:>12} {forward:>10} {both:>17} {copy:>10}", format!("{op:?}"), point.elements);
            points.push(point);
        }
    }
    if test {
        return Ok(());
    }
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let target = || tmp.parent().unwrap_or(tmp).join("sizes");
    let out = std::env::var_os("CANDLE_NORM_BENCH_OUT").map_or_else(target, PathBuf::from);
    std::fs::create_dir_all(&out)?;
    std::fs::write(out.join("sizes.csv"), csv(&points))?;
    std::fs::write(out.join("sizes.svg"), chart::svg(&points))?;
    println!("\nwritten: {0}/sizes.csv, {0}/sizes.svg", out.display());
    Ok(())
}

/// 100, 200, 500, 1000 and so on.
fn sizes(most: usize) -> impl Iterator<Item = usize> {
    let decades = (2..10).map(|power| 10usize.pow(power));
    decades.flat_map(|ten| [1, 2, 5].map(|digit| digit * ten)).filter(move |&n| n <= most)
}

fn measure(op: Op, elements: usize, rounds: usize) -> Result<Point> {
    let shape = op.shape(elements);
    let elements: usize = shape.iter().product();
    // Two of the four tensors are there already when the memory is asked for; the copy's come and go.
    let settings = Settings { rounds, block: Duration::from_millis(12) };
    let bytes = elements * 4;
    let x = Var::from_tensor(&random(&shape, 0.25)?)?;
    let params = random(&[*shape.get(1).unwrap_or(&1)], 1.0)?;
    let (weight, bias) = (Var::from_tensor(&params)?, Var::from_tensor(&params.affine(0.5, 0.1)?)?);
    let untracked = x.as_detached_tensor();
    let forward = || {
        black_box(op.forward(&untracked, &weight.as_detached_tensor(), &bias.as_detached_tensor())?);
        Ok(())
    };
    if available() < 5 * bytes {
        // Too large for gradients and for a copy beside it.
        let rounds = rounds::measure(&mut [Contender::new("forward", forward)], settings)?;
        return Ok(Point { op, elements, rounds });
    }
    let dy = random(&shape, 0.1)?;
    let alone = RecordedOp::new(op.kind(), &x, Some(&weight), Some(&bias), 1e-5)?;
    let both = || {
        let y = op.forward(&untracked, &weight.as_detached_tensor(), &bias.as_detached_tensor())?;
        black_box((alone.backward(&dy)?, y));
        Ok(())
    };
    let mut copy = Copy::of(bytes);
    let mut contenders = [
        Contender::new("forward", forward),
        Contender::new("forward+backward", both),
        Contender::new("copy", move || {
            copy.run();
            Ok(())
        }),
    ];
    Ok(Point { op, elements, rounds: rounds::measure(&mut contenders, settings)? })
}

/// Uneven values: a pattern of a prime length, so that no set is like another.
fn random(shape: &[usize], mean: f32) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let pattern = Tensor::randn(mean, 1.5, 9973, &Device::Cpu)?.to_vec1::<f32>()?;
    let values: Vec<f32> = pattern.iter().copied().cycle().take(n).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?)
}

/// Bytes that programs may still take; without a word from the system, all that anyone asks for.
fn available() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("MemAvailable"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok());
    kib.map_or(usize::MAX, |kib| kib * 1024)
}

fn csv(points: &[Point]) -> String {
    let mut out = String::from("norm,elements,forward_ns,forward_backward_ns,copy_ns\n");
    for point in points {
        let cells = CONTENDERS
            .map(|name| point.rounds.time(name).map_or(String::new(), |t| format!("{:.1}", t.median)));
        let _ = writeln!(out, "{:?},{},{}", point.op, point.elements, cells.join(","));
    }
    out
}
