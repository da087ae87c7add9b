//! Blocks of well-known models with the norm alone and with all around it in one visit: same numbers, less time.
//!
//! ```text
//! cargo run --release --example fused_blocks [-- ROUNDS]
//! ```
//!
//! Each line is one block in one dtype, forward and forward with backward. Both ways use this crate's norms; what
//! differs is whether addition, activation, skip or modulation is candle's own operation. They take turns, round
//! by round, and the ratio is the median of the rounds' ratios.
//!
//! The last column is the largest difference of outputs and gradients over the largest value. In bf16 it is that
//! of the separate way, which rounds after each operation, sums gradients over tokens in bf16, and whose `relu` has
//! a slope of 1 where a rounded sum is exactly 0.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Activation, Module};
use candle_norm::functional::{self as f, fused};
use std::time::Instant;

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

/// Milliseconds of a call that nobody tracks.
fn forward(run: Run, args: &[Tensor]) -> Result<f64> {
    let args: Vec<Tensor> = args.iter().map(Tensor::detach).collect();
    let start = Instant::now();
    run(&args)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Milliseconds of a call and its gradients.
fn step(run: Run, args: &[Tensor]) -> Result<f64> {
    let start = Instant::now();
    run(args)?.backward()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Medians of both times, and of the ratio within a round.
fn compare(
    time: fn(Run, &[Tensor]) -> Result<f64>,
    block: &Block,
    args: &[Tensor],
    rounds: usize,
) -> Result<[f64; 3]> {
    let mut times = vec![];
    for round in 0..=rounds {
        let (mut separate, mut fused) = (0.0, 0.0);
        for first in [round % 2 == 0, round % 2 == 1] {
            if first {
                separate = time(block.separate, args)?;
            } else {
                fused = time(block.fused, args)?;
            }
        }
        times.push((separate, fused));
    }
    let of = |f: fn(&(f64, f64)) -> f64| median(times[1..].iter().map(f).collect());
    Ok([of(|t| t.0), of(|t| t.1), of(|t| t.0 / t.1)])
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

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).map_or(15, |n| n.parse().expect("ROUNDS is a number"));
    println!("{:36} {:5} {:>25}   {:>25}   largest", "", "", "forward, ms", "with gradients, ms");
    println!(
        "{:36} {:5} {:>9} {:>7} {:>7}   {:>9} {:>7} {:>7}   difference",
        "", "", "separate", "fused", "ratio", "separate", "fused", "ratio"
    );
    for block in &BLOCKS {
        for dtype in [DType::F32, DType::BF16] {
            let args = arguments(block, dtype)?;
            let [fs, ff, fr] = compare(forward, block, &args, rounds)?;
            let [ss, sf, sr] = compare(step, block, &args, rounds)?;
            let difference = difference(block, &args)?;
            let dtype = format!("{dtype:?}").to_lowercase();
            println!(
                "{:36} {dtype:5} {fs:9.2} {ff:7.2} {fr:6.1}x   {ss:9.2} {sf:7.2} {sr:6.1}x   {difference:.0e}",
                block.name
            );
        }
    }
    Ok(())
}
