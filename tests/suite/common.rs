//! What every module of the suite shares: the device, seeded data, values as f64.

use candle_core::{DType, Device, Result, Tensor};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

/// Every dtype of x.
pub const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// The device under test: `CANDLE_NORM_TEST_DEVICE` is `cpu` (the default) or `cuda`.
///
/// One per process, since candle's CUDA devices differ from each other even on the same card.
pub fn device() -> &'static Device {
    let device = DEVICE.get_or_init(|| match std::env::var("CANDLE_NORM_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => Device::new_cuda(0).expect("CANDLE_NORM_TEST_DEVICE=cuda, and no CUDA device"),
        Ok(other) => panic!("CANDLE_NORM_TEST_DEVICE is {other:?}, expected cpu or cuda"),
    });
    // Not where the thread has come to its end.
    let _ = WAITS.try_with(|_| ());
    device
}

static DEVICE: OnceLock<Device> = OnceLock::new();

/// Waits for a thread's work on the device before the thread ends.
///
/// candle's stream is the calling thread's, and each test has a thread. On an H100 (driver 580) tests that end
/// without reading a result never came back, now these, now those; tests that read one did.
struct Waits;

thread_local! {
    static WAITS: Waits = const { Waits };
}

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(device) = DEVICE.get() {
            let _ = device.synchronize();
        }
    }
}

/// A recorded file. Cargo sets the variable when it runs tests; a program run without cargo, on another
/// machine, has it set to where the files are there.
pub fn golden(name: &str) -> String {
    let built = env!("CARGO_MANIFEST_DIR");
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| built.into());
    format!("{root}/tests/golden/{name}")
}

/// Whether the kernels under test are emulated, thousands of times slower than they run for real.
pub const EMULATED: bool = cfg!(feature = "cuda-emulation");

/// A number for the machine at hand: the second one where kernels are emulated.
pub fn sized(real: usize, emulated: usize) -> usize {
    if EMULATED {
        emulated
    } else {
        real
    }
}

/// Random cases per property: `PROPTEST_CASES`, or `default` (a tenth of it where emulated).
pub fn cases(default: u32) -> u32 {
    match std::env::var("PROPTEST_CASES") {
        Ok(cases) => cases.parse().expect("PROPTEST_CASES is a number"),
        Err(_) => sized(default as usize, (default as usize).div_ceil(10)) as u32,
    }
}

/// Numbers of `seed`'s own sequence with the given mean and standard deviation.
///
/// The scaled sum of four uniforms, which `tests/golden/generate.py` repeats to the bit: only
/// additions and multiplications of f64 in a fixed order.
pub fn data(seed: u64, len: usize, mean: f64, std: f64) -> Vec<f64> {
    let uniform = |i: u64| (splitmix(seed.wrapping_mul(0x1_0000_0000).wrapping_add(i)) >> 11) as f64;
    let unit = 1.0 / (1u64 << 53) as f64;
    let one = |i: u64| {
        let sum = uniform(4 * i) + uniform(4 * i + 1) + uniform(4 * i + 2) + uniform(4 * i + 3);
        // Four uniforms have mean 2 and variance 1/3; the constant is sqrt(3).
        (sum * unit - 2.0) * 1.7320508075688772 * std + mean
    };
    (0..len as u64).map(one).collect()
}

/// Steele, Lea and Flood's splittable generator, <https://doi.org/10.1145/2714064.2660195>.
fn splitmix(i: u64) -> u64 {
    let z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Elements in logical order; f64 holds all four dtypes exactly.
pub fn values(t: &Tensor) -> Vec<f64> {
    if t.elem_count() == 0 {
        // Candle's to_vec1 panics where a view of nothing starts beyond its storage.
        return vec![];
    }
    let flat = t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1());
    flat.expect("a readable tensor")
}

/// Bits of the elements in logical order: NaN payloads and signs of zero are part of a result.
pub fn bits(t: &Tensor) -> Vec<u64> {
    values(t).into_iter().map(f64::to_bits).collect()
}

/// A contiguous tensor on the device under test, each value rounded to `dtype` on the host, so that every
/// device has the same inputs.
pub fn tensor(values: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
    on_device(&Tensor::from_slice(values, dims, &Device::Cpu)?.to_dtype(dtype)?)
}

/// Ones, on the device under test.
pub fn ones(dims: &[usize], dtype: DType) -> Result<Tensor> {
    on_device(&Tensor::ones(dims, dtype, &Device::Cpu)?)
}

/// A tensor of the host, moved to the device under test.
///
/// On a GPU candle 0.11 keeps tensors without elements, copies them and computes with them, but fails at a
/// cast and a constant, which launch a kernel of no blocks: both are done on the host.
pub fn on_device(t: &Tensor) -> Result<Tensor> {
    match t.elem_count() {
        0 => Tensor::zeros(t.shape(), t.dtype(), device()),
        _ => t.to_device(device()),
    }
}

/// Says that a call is not run on the device under test, where candle fails around ours, and how many so far.
pub fn left_out(why: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = 1 + COUNT.fetch_add(1, Ordering::Relaxed);
    println!("not run on {:?}: {why}; {count} calls so far in this process", device().location());
}

/// Half the distance from 1 to the next number: the bound of one rounding, relatively.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 0.5 * f64::EPSILON,
        DType::F32 => 0.5 * f32::EPSILON as f64,
        DType::F16 => 0.5 * half::f16::EPSILON.to_f64(),
        DType::BF16 => 0.5 * half::bf16::EPSILON.to_f64(),
        other => panic!("no norm takes {other:?}"),
    }
}

/// What candle's own addition loses: 0.11.1's of bf16 on AArch64 drops bits where all others round.
pub fn lost_in_addition(dtype: DType) -> f64 {
    let drops = cfg!(target_arch = "aarch64") && dtype == DType::BF16;
    unit_roundoff(dtype) * if drops { 2.0 } else { 1.0 }
}

/// `a + b`, rounded to `dtype`, in one of the two that loses nothing that is seen there.
pub fn added(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    let wide = if [a.dtype(), b.dtype()].contains(&DType::F64) { DType::F64 } else { DType::F32 };
    (a.to_dtype(wide)? + b.to_dtype(wide)?)?.to_dtype(dtype)
}

/// Half the smallest positive number: the bound of one rounding among the subnormals.
pub fn underflow(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 5e-324,
        DType::F32 => f64::powi(2.0, -150),
        DType::F16 => f64::powi(2.0, -25),
        DType::BF16 => f64::powi(2.0, -134),
        other => panic!("no norm takes {other:?}"),
    }
}

/// dtype the norms promise to accumulate in.
pub fn accumulation(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

/// `|got - expected| / |expected|` in the 2-norm.
pub fn relative_l2(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(g, e)| g - e));
    error / norm(&mut expected.iter().copied())
}

/// One test of this program in a process of its own; through `CANDLE_NORM_RUNNER`, where this machine needs one for it
/// (`ci/arm.sh`).
pub fn process_for(test: &str) -> std::process::Command {
    let program = std::env::current_exe().unwrap();
    let runner = std::env::var("CANDLE_NORM_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace().map(Into::into).chain([program.into_os_string()]);
    let mut command = std::process::Command::new(words.next().unwrap());
    command.args(words).args(["--exact", test]);
    command
}
