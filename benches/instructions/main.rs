//! Instructions that the norms execute, for `ci/instructions.sh` to count under callgrind.
//!
//! Apart from the other benchmarks, because instructions repeat to a fraction of a percent where a shared
//! machine's times do not. One thread, and AVX2, which valgrind knows (it has no AVX-512).

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Activation;
use candle_norm::__bench::{Kind, RecordedOp};
use candle_norm::functional::{self, fused};
use std::hint::black_box;

/// What a row of the table runs.
#[derive(Clone, Copy)]
enum Op {
    LayerNorm,
    RmsNorm,
    GroupNorm(usize),
    InstanceNorm,
    BatchNorm,
    /// Batch norm with running statistics.
    Evaluation,
}

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;

const ROWS: [(Op, &[usize], DType); 18] = [
    (Op::LayerNorm, &[512, 768], F32),
    (Op::LayerNorm, &[512, 768], BF16),
    (Op::LayerNorm, &[4096, 128], F32),
    (Op::LayerNorm, &[4096, 128], BF16),
    (Op::LayerNorm, &[128, 4096], F32),
    (Op::LayerNorm, &[128, 4096], BF16),
    (Op::RmsNorm, &[128, 4096], F32),
    (Op::RmsNorm, &[128, 4096], BF16),
    (Op::GroupNorm(32), &[2, 320, 32, 32], F32),
    (Op::GroupNorm(32), &[2, 320, 32, 32], BF16),
    (Op::GroupNorm(32), &[2, 1280, 8, 8], F32),
    (Op::InstanceNorm, &[2, 64, 64, 64], F32),
    (Op::InstanceNorm, &[2, 64, 64, 64], BF16),
    (Op::BatchNorm, &[32, 64, 28, 28], F32),
    (Op::BatchNorm, &[32, 64, 28, 28], BF16),
    (Op::BatchNorm, &[32, 512, 7, 7], F32),
    (Op::BatchNorm, &[32, 512, 7, 7], BF16),
    (Op::Evaluation, &[64, 3, 32, 32], F32),
];

/// Norms with what stands around them.
#[derive(Clone, Copy)]
enum Fused {
    GroupNormSilu,
    GatedRmsNorm,
    AddLayerNorm,
    ModulatedLayerNorm,
    BatchNormSkipRelu,
}

const FUSED: [(Fused, &[usize], DType); 10] = [
    (Fused::GroupNormSilu, &[2, 320, 32, 32], F32),
    (Fused::GroupNormSilu, &[2, 320, 32, 32], BF16),
    (Fused::GatedRmsNorm, &[128, 4096], F32),
    (Fused::GatedRmsNorm, &[128, 4096], BF16),
    (Fused::AddLayerNorm, &[128, 4096], F32),
    (Fused::AddLayerNorm, &[128, 4096], BF16),
    (Fused::ModulatedLayerNorm, &[2, 256, 1152], F32),
    (Fused::ModulatedLayerNorm, &[2, 256, 1152], BF16),
    (Fused::BatchNormSkipRelu, &[32, 64, 28, 28], F32),
    (Fused::BatchNormSkipRelu, &[32, 64, 28, 28], BF16),
];

/// Numbers around 0.3 that cost few instructions to make.
fn numbers(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut state = seed;
    let n: usize = shape.iter().product();
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 0.7
    };
    let v: Vec<f32> = (0..n).map(|_| next()).collect();
    Tensor::from_vec(v, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// The functions whose instructions are counted, and after each of which callgrind writes its counts.
#[inline(never)]
fn counted(f: &dyn Fn() -> Result<()>) -> Result<()> {
    black_box(f)()
}

fn forward(op: Op, x: &Tensor, w: &Tensor, b: &Tensor, running: &[Var; 2]) -> Result<Tensor> {
    let [mean, var] = running;
    match op {
        Op::LayerNorm => functional::layer_norm(x, w.dims(), Some(w), Some(b), 1e-5),
        Op::RmsNorm => functional::rms_norm(x, w.dims(), Some(w), 1e-5),
        Op::GroupNorm(groups) => functional::group_norm(x, groups, Some(w), Some(b), 1e-5),
        Op::InstanceNorm => functional::instance_norm(x, None, None, Some(w), Some(b), true, 0.1, 1e-5),
        Op::BatchNorm => functional::batch_norm(x, Some(mean), Some(var), Some(w), Some(b), true, 0.1, 1e-5),
        Op::Evaluation => {
            functional::batch_norm(x, Some(mean), Some(var), Some(w), Some(b), false, 0.1, 1e-5)
        }
    }
}

fn kind(op: Op, channels: usize) -> Option<Kind> {
    match op {
        Op::LayerNorm => Some(Kind::Layer { center: true }),
        Op::RmsNorm => Some(Kind::Layer { center: false }),
        Op::GroupNorm(groups) => Some(Kind::Groups(groups)),
        Op::InstanceNorm => Some(Kind::Groups(channels)),
        Op::BatchNorm => Some(Kind::Batch),
        Op::Evaluation => None,
    }
}

fn row(op: Op, shape: &[usize], dtype: DType) -> Result<()> {
    let x = numbers(shape, dtype, 1)?;
    let channels = shape[1];
    let (w, b) = (numbers(&[channels], dtype, 2)?, numbers(&[channels], dtype, 3)?);
    let running = [Var::zeros(channels, F32, &Device::Cpu)?, Var::ones(channels, F32, &Device::Cpu)?];
    let (name, dims) = (name(op), shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"));
    let dtype_name = dtype.as_str();
    println!("{name} {dims} {dtype_name} forward");
    counted(&|| forward(op, &x, &w, &b, &running).map(drop))?;
    if let Some(kind) = kind(op, channels) {
        let dy = numbers(shape, dtype, 4)?;
        let vars = [Var::from_tensor(&x)?, Var::from_tensor(&w)?, Var::from_tensor(&b)?];
        let [x, w, b] = &vars;
        let b = (!matches!(op, Op::RmsNorm)).then_some(b.as_tensor());
        let op = RecordedOp::new(kind, x, Some(w), b, 1e-5)?;
        println!("{name} {dims} {dtype_name} backward");
        counted(&|| op.backward(&dy).map(drop))?;
    }
    Ok(())
}

fn fused_forward(op: Fused, x: &Tensor, other: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (n, some) = (w.dims(), Some(w));
    match op {
        Fused::GroupNormSilu => fused::group_norm_act(x, 32, some, some, 1e-5, None, Activation::Silu),
        Fused::GatedRmsNorm => fused::gated_rms_norm(x, other, n, some, 1e-5, false),
        Fused::AddLayerNorm => fused::add_layer_norm(x, other, n, some, some, 1e-5).map(|both| both.normed),
        Fused::ModulatedLayerNorm => fused::modulated_layer_norm(x, &n[1..], w, some, 1e-5),
        Fused::BatchNormSkipRelu => {
            let (skip, act) = (Some(other), Activation::Relu);
            fused::batch_norm_act(x, None, None, some, some, true, 0.1, 1e-5, skip, act)
        }
    }
}

/// Forward alone: candle's own additions are most of a backward behind several inputs.
fn fused_row(op: Fused, shape: &[usize], dtype: DType) -> Result<()> {
    let params = match op {
        Fused::ModulatedLayerNorm => vec![shape[0], shape[2]],
        _ => vec![shape[1]],
    };
    let (x, other, w) = (numbers(shape, dtype, 1)?, numbers(shape, dtype, 3)?, numbers(&params, dtype, 2)?);
    let dims = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    println!("{} {dims} {} forward", fused_name(op), dtype.as_str());
    counted(&|| fused_forward(op, &x, &other, &w).map(drop))
}

fn fused_name(op: Fused) -> &'static str {
    match op {
        Fused::GroupNormSilu => "group-norm-silu",
        Fused::GatedRmsNorm => "gated-rms-norm",
        Fused::AddLayerNorm => "add-layer-norm",
        Fused::ModulatedLayerNorm => "modulated-layer-norm",
        Fused::BatchNormSkipRelu => "batch-norm-skip-relu",
    }
}

fn name(op: Op) -> &'static str {
    match op {
        Op::LayerNorm => "layer-norm",
        Op::RmsNorm => "rms-norm",
        Op::GroupNorm(_) => "group-norm",
        Op::InstanceNorm => "instance-norm",
        Op::BatchNorm => "batch-norm",
        Op::Evaluation => "batch-norm-evaluation",
    }
}

fn main() -> Result<()> {
    ROWS.into_iter().try_for_each(|(op, shape, dtype)| row(op, shape, dtype))?;
    FUSED.into_iter().try_for_each(|(op, shape, dtype)| fused_row(op, shape, dtype))
}
