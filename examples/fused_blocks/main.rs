//! Blocks of well-known models with the norm alone and with all around it in one visit: same numbers, less time.
//!
//! ```text
//! cargo run --release --example fused_blocks
//! ```
//!
//! Each line is one block in one dtype, forward and forward with backward. Both ways use this crate's norms; what
//! differs is whether addition, activation, skip or modulation is candle's own operation. They take turns, as in the
//! benchmarks (`benches/cases/rounds.rs`), and the ratio is the median of the rounds' ratios. `--chart FILE` says where
//! the chart goes. Whole blocks, with attention, MLPs and convolutions: `cargo bench --bench blocks`.
//!
//! The last column is the largest difference of outputs and gradients over the largest value. In bf16 it is that
//! of the separate way, which rounds after each operation, sums gradients over tokens in bf16, and whose `relu` has
//! a slope of 1 where a rounded sum is exactly 0.

mod chart;
#[path = "../../benches/cases/rounds.rs"]
#[allow(dead_code)] // the benchmarks use the rest
mod rounds;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Activation, Module};
use candle_norm::functional::{self as f, fused};
use clap::Parser;
use rounds::{Contender, Rounds, Settings, Spread};
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

type Run = fn(&[Tensor]) -> Result<Tensor>;

struct Block {
    name: &'static str,
    /// Shapes of the arguments: x first.
    shapes: &'static [&'static [usize]],
    separate: Run,
    fused: Run,
}

const EPS: f64 = 1e-6;

const BLOCKS: [Block; 8] = [
    Block {
        name: "Llama: RMSNorm of a residual sum",
        shapes: &[&[512, 4096], &[512, 4096], &[4096]],
        separate: |a| {
            let sum = (&a[0] + &a[1])?;
            f::rms_norm(&sum, &[4096], Some(&a[2]), EPS)? + sum
        },
        fused: |a| {
            let both = fused::add_rms_norm(&a[0], &a[1], &[4096], Some(&a[2]), 0.0, EPS)?;
            both.normed + both.sum
        },
    },
    Block {
        name: "UNet: GroupNorm and SiLU",
        shapes: &[&[1, 320, 64, 64], &[320], &[320]],
        separate: |a| Activation::Silu.forward(&f::group_norm(&a[0], 32, Some(&a[1]), Some(&a[2]), EPS)?),
        fused: |a| fused::group_norm_act(&a[0], 32, Some(&a[1]), Some(&a[2]), EPS, None, Activation::Silu),
    },
    Block {
        name: "ResNet: BatchNorm, skip and ReLU",
        shapes: &[&[8, 256, 28, 28], &[256], &[256], &[8, 256, 28, 28]],
        separate: |a| {
            let y = f::batch_norm(&a[0], None, None, Some(&a[1]), Some(&a[2]), true, 0.1, EPS)?;
            (y + &a[3])?.relu()
        },
        fused: |a| {
            let (w, b) = (Some(&a[1]), Some(&a[2]));
            fused::batch_norm_act(&a[0], None, None, w, b, true, 0.1, EPS, Some(&a[3]), Activation::Relu)
        },
    },
    Block {
        name: "DiT: LayerNorm and modulation",
        shapes: &[&[2, 1024, 1152], &[2, 1, 1152], &[2, 1, 1152]],
        separate: |a| {
            let y = f::layer_norm(&a[0], &[1152], None, None, EPS)?;
            y.broadcast_mul(&(&a[1] + 1.0)?)?.broadcast_add(&a[2])
        },
        fused: |a| fused::modulated_layer_norm(&a[0], &[1152], &a[1], Some(&a[2]), EPS),
    },
    Block {
        name: "Gemma: RMSNorm with 1 + weight",
        shapes: &[&[512, 2304], &[2304]],
        separate: |a| f::rms_norm(&a[0], &[2304], Some(&(&a[1] + 1.0)?), EPS),
        fused: |a| fused::offset_rms_norm(&a[0], &[2304], &a[1], 1.0, EPS),
    },
    Block {
        name: "Mamba 2: RMSNorm behind a gate",
        shapes: &[&[512, 4096], &[512, 4096], &[4096]],
        separate: |a| f::rms_norm(&(&a[0] * a[1].silu()?)?, &[4096], Some(&a[2]), EPS),
        fused: |a| fused::gated_rms_norm(&a[0], &a[1], &[4096], Some(&a[2]), EPS, false),
    },
    Block {
        name: "SAM: LayerNorm over channels",
        shapes: &[&[2, 256, 64, 64], &[256], &[256]],
        separate: |a| {
            let last = a[0].permute((0, 2, 3, 1))?.contiguous()?;
            f::layer_norm(&last, &[256], Some(&a[1]), Some(&a[2]), EPS)?.permute((0, 3, 1, 2))?.contiguous()
        },
        fused: |a| f::layer_norm_channels(&a[0], Some(&a[1]), Some(&a[2]), EPS),
    },
    Block {
        name: "QK-norm: RMSNorm of heads in place",
        shapes: &[&[1, 1024, 3, 16, 64], &[64]],
        separate: |a| {
            let q = a[0].narrow(2, 0, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous()?;
            f::rms_norm(&q, &[64], Some(&a[1]), EPS)
        },
        fused: |a| f::rms_norm(&a[0].narrow(2, 0, 1)?.squeeze(2)?.transpose(1, 2)?, &[64], Some(&a[1]), EPS),
    },
];

/// Variables as tensors: x and what else the block has.
fn arguments(block: &Block, dtype: DType) -> Result<Vec<Tensor>> {
    let new = |dims: &&[usize]| {
        let numbers = Tensor::randn(0.5f32, 1., *dims, &Device::Cpu)?.to_dtype(dtype)?;
        Ok(Var::from_tensor(&numbers)?.into_inner())
    };
    block.shapes.iter().map(new).collect()
}

/// Both ways in turns: the forward that nobody tracks, or the forward and the gradients.
fn measure(block: &Block, args: &[Tensor], gradients: bool, rounds: usize) -> anyhow::Result<Rounds> {
    let args: Vec<Tensor> = args.iter().map(|t| if gradients { t.clone() } else { t.detach() }).collect();
    let contender = |name, run: Run| {
        let args = &args;
        Contender::new(name, move || {
            let y = run(args)?;
            if gradients {
                black_box(y.backward()?);
            }
            drop(black_box(y));
            Ok(())
        })
    };
    let mut ways = [contender("separate", block.separate), contender("fused", block.fused)];
    rounds::measure(&mut ways, Settings { rounds, block: Duration::from_millis(12) })
}

/// The largest difference of outputs and gradients, over the largest value.
fn difference(block: &Block, args: &[Tensor]) -> Result<f64> {
    let (a, b) = ((block.separate)(args)?, (block.fused)(args)?);
    let dy = a.randn_like(0., 1.)?;
    let (da, db) = ((&a * &dy)?.backward()?, (&b * &dy)?.backward()?);
    let mut worst = off(&a, &b)?;
    for arg in args {
        if let (Some(a), Some(b)) = (da.get(arg), db.get(arg)) {
            worst = worst.max(off(a, b)?);
        }
    }
    Ok(worst)
}

fn off(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(DType::F64)?.flatten_all()?, b.to_dtype(DType::F64)?.flatten_all()?);
    let largest = |t: &Tensor| t.abs()?.max(0)?.to_scalar::<f64>();
    Ok(largest(&(&a - b)?)? / largest(&a)?.max(f64::MIN_POSITIVE))
}

#[derive(Parser)]
struct Options {
    /// Rounds of each line
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// Where the chart goes
    #[arg(long, default_value = "target/fused-blocks.svg")]
    chart: PathBuf,
}

/// Times as fast as the separate way, of a block in one dtype.
pub struct Line {
    name: &'static str,
    dtype: DType,
    /// Of the forward, and of it with gradients.
    faster: [Spread; 2],
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    println!("{:36} {:5} {:>25}   {:>25}   largest", "", "", "forward, ms", "with gradients, ms");
    println!(
        "{:36} {:5} {:>9} {:>7} {:>7}   {:>9} {:>7} {:>7}   difference",
        "", "", "separate", "fused", "ratio", "separate", "fused", "ratio"
    );
    let mut lines = vec![];
    for block in &BLOCKS {
        for dtype in [DType::F32, DType::BF16] {
            let args = arguments(block, dtype)?;
            let difference = difference(block, &args)?;
            print!("{:36} {:5}", block.name, dtype.as_str());
            let mut faster = vec![];
            for gradients in [false, true] {
                let rounds = measure(block, &args, gradients, options.rounds.max(1))?;
                let ms = |way| rounds.time(way).map_or(f64::NAN, |time| time.median / 1e6);
                let ratio = rounds.ratio("separate", "fused").expect("both ran");
                print!(" {:9.2} {:7.2} {:6.1}x  ", ms("separate"), ms("fused"), ratio.median);
                faster.push(ratio);
            }
            println!(" {difference:.0e}");
            lines.push(Line { name: block.name, dtype, faster: [faster[0], faster[1]] });
        }
    }
    std::fs::write(&options.chart, chart::svg(&lines))?;
    println!("\nwritten: {}", options.chart.display());
    Ok(())
}
