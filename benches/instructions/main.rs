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

/// Norms with what stands around them, in f32 and bf16: a row's name, the shapes of x and of the weight, and the call on x, a
/// second tensor like it and the weight.
type Fused = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
const FUSED: [(&str, &[usize], &[usize], Fused); 8] = [
    ("group-norm-silu", &[2, 320, 32, 32], &[320], |x, _, w| {
        fused::group_norm_act(x, 32, Some(w), Some(w), 1e-5, None, Activation::Silu)
    }),
    ("group-norm-gelu", &[2, 320, 32, 32], &[320], |x, _, w| {
        fused::group_norm_act(x, 32, Some(w), Some(w), 1e-5, None, Activation::Gelu)
    }),
    ("group-norm-gelu-tanh", &[2, 320, 32, 32], &[320], |x, _, w| {
        fused::group_norm_act(x, 32, Some(w), Some(w), 1e-5, None, Activation::NewGelu)
    }),
    ("layer-norm-channels", &[2, 256, 32, 32], &[256], |x, _, w| {
        functional::layer_norm_channels(x, Some(w), Some(w), 1e-5)
    }),
    ("gated-rms-norm", &[128, 4096], &[4096], |x, gate, w| {
        fused::gated_rms_norm(x, gate, w.dims(), Some(w), 1e-5, false)
    }),
    ("add-layer-norm", &[128, 4096], &[4096], |x, residual, w| {
        Ok(fused::add_layer_norm(x, residual, w.dims(), Some(w), Some(w), 1e-5)?.normed)
    }),
    ("modulated-layer-norm", &[2, 256, 1152], &[2, 1152], |x, _, w| {
        fused::modulated_layer_norm(x, &w.dims()[1..], w, Some(w), 1e-5)
    }),
    ("batch-norm-skip-relu", &[32, 64, 28, 28], &[64], |x, skip, w| {
        let (w, act) = (Some(w), Activation::Relu);
        fused::batch_norm_act(x, None, None, w, w, true, 0.1, 1e-5, Some(skip), act)
    }),
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
    let (name, dims) = (name(op), by_x(shape));
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

/// Forward alone: candle's own additions are most of a backward behind several inputs.
fn fused_row(name: &str, shape: &[usize], params: &[usize], call: Fused, dtype: DType) -> Result<()> {
    let (x, other, w) = (numbers(shape, dtype, 1)?, numbers(shape, dtype, 3)?, numbers(params, dtype, 2)?);
    println!("{name} {} {} forward", by_x(shape), dtype.as_str());
    counted(&|| call(&x, &other, &w).map(drop))
}

fn by_x(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
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
    FUSED.into_iter().try_for_each(|(name, shape, params, call)| {
        [F32, BF16].into_iter().try_for_each(|dtype| fused_row(name, shape, params, call, dtype))
    })
}
