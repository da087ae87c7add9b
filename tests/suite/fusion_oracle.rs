//! What stands around a norm, in f64, with bounds: the oracle of a plain norm is asked in between.
//!
//! Separate from `oracle.rs` because nothing here knows what a set is: before the norm an element becomes
//! another, behind it too, and its gradient on the way back.

use crate::case::{Arguments, Case, Gate};
use crate::common::{device, lost_in_addition, unit_roundoff};
use crate::oracle::{arithmetic, Approx};
use candle_core::DType;
use candle_nn::Activation;
use half::{bf16, f16};

/// Abramowitz and Stegun 7.1.5 and a continued fraction: within a few units of f64.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 2.5 {
        // erf x = 2/sqrt(pi) exp(-x^2) sum 2^k x^(2k+1) / (2k+1)!!: all terms positive.
        let (mut term, mut sum, mut k) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            k += 1.0;
            term *= 2.0 * x * x / (2.0 * k + 1.0);
            sum += term;
        }
        return 2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum;
    }
    if a > 6.0 {
        return x.signum();
    }
    // erfc x = exp(-x^2) / sqrt(pi) / (x + 1/2 / (x + 1 / (x + 3/2 / (x + ..)))).
    let fraction = (1..=60).rev().fold(a, |f, k| a + 0.5 * k as f64 / f);
    x.signum() * (1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / fraction)
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Value and slope, as PyTorch defines them: at a corner the slope is that of the flat side.
pub fn activation(kind: Activation, z: f64) -> (f64, f64) {
    use std::f64::consts::{FRAC_1_SQRT_2, PI};
    match kind {
        Activation::Relu => (if z <= 0.0 { 0.0 } else { z }, f64::from(z > 0.0)),
        Activation::Relu6 => (z.clamp(0.0, 6.0), f64::from(z > 0.0 && z < 6.0)),
        Activation::LeakyRelu(_) if z > 0.0 => (z, 1.0),
        Activation::LeakyRelu(slope) => (z * slope, slope),
        Activation::Sigmoid => (sigmoid(z), sigmoid(z) * sigmoid(-z)),
        Activation::Silu | Activation::Swish => {
            let s = sigmoid(z);
            (z * s, s * (1.0 + z * sigmoid(-z)))
        }
        Activation::HardSwish if z <= -3.0 => (0.0, 0.0),
        Activation::HardSwish if z >= 3.0 => (z, 1.0),
        Activation::HardSwish => (z * (z + 3.0) / 6.0, z / 3.0 + 0.5),
        Activation::Gelu => {
            let phi = 0.5 * (1.0 + erf(z * FRAC_1_SQRT_2));
            (z * phi, phi + z * (-0.5 * z * z).exp() / (2.0 * PI).sqrt())
        }
        Activation::NewGelu | Activation::GeluPytorchTanh => {
            let k = (2.0 / PI).sqrt();
            let t = (k * (z + 0.044715 * z * z * z)).tanh();
            let inner = k * (1.0 + 3.0 * 0.044715 * z * z);
            (0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
        }
        other => panic!("no oracle for {other:?}"),
    }
}

/// An exact function of an inexact argument, whose own evaluation is off by `own`.
fn through(f: impl Fn(f64) -> f64, z: Approx, own: f64) -> Approx {
    let value = f(z.value);
    let off = |at: f64| (f(at) - value).abs();
    Approx { value, bound: off(z.value - z.bound).max(off(z.value + z.bound)) + own }
}

/// `silu(gate)` and its slope, as a few operations in arithmetic of roundoff `u` give them.
fn silu(gate: f64, u: f64) -> [Approx; 2] {
    let (value, slope) = activation(Activation::Silu, gate);
    // `sigmoid(-z)` is `1 - sigmoid(z)` in some evaluations.
    let slope_bound = 16.0 * u * (slope.abs() + gate.abs().min(1.0));
    [Approx { value, bound: 8.0 * u * value.abs() }, Approx { value: slope, bound: slope_bound }]
}

fn times(a: Approx, b: Approx) -> Approx {
    let bound = a.value.abs() * b.bound + b.value.abs() * a.bound + a.bound * b.bound;
    Approx { value: a.value * b.value, bound }
}

fn exact(value: f64) -> Approx {
    Approx { value, bound: 0.0 }
}

/// As an addition in f32 (or f64) that is stored as `dtype`.
fn stored(sum: f64, wide: bool, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => sum,
        DType::F32 => f64::from(sum as f32),
        DType::F16 if !wide => f16::from_f32(sum as f32).to_f64(),
        DType::BF16 if !wide => bf16::from_f32(sum as f32).to_f64(),
        // A GPU rounds once, by cvt.rn of CUDA's own headers.
        DType::F16 if device().is_cuda() => f16::from_f32(to_odd(sum)).to_f64(),
        DType::BF16 if device().is_cuda() => bf16::from_f32(to_odd(sum)).to_f64(),
        // As candle converts on the CPU: `half` drops bits of an f64 before it rounds.
        DType::F16 => f16::from_f64(sum).to_f64(),
        DType::BF16 => bf16::from_f64(sum).to_f64(),
        other => panic!("no norm takes {other:?}"),
    }
}

/// An f32 that any rounding to fewer bits takes to where it would take `x`: cut off, and made odd where that
/// lost something (Boldo and Melquiond, <https://doi.org/10.1109/TC.2007.70819>).
fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || !near.is_finite() {
        return near;
    }
    let away = f64::from(near).abs() > x.abs();
    f32::from_bits((near.to_bits() - u32::from(away)) | 1)
}

/// What is normalized.
pub fn before(case: &Case, args: &Arguments) -> Vec<Approx> {
    let u = arithmetic(case.dtype);
    let one = |i: usize| {
        if let (Some(residual), Some(dtype)) = (&args.residual, case.fusion.residual) {
            let wide = [dtype, case.dtype].contains(&DType::F64);
            return exact(stored(args.x[i] + residual[i], wide, dtype));
        }
        match (&args.gate, case.fusion.gate) {
            (Some(gate), Some(Gate::Before)) => times(exact(args.x[i]), silu(gate[i], 2.0 * u)[0]),
            _ => exact(args.x[i]),
        }
    };
    (0..args.x.len()).map(one).collect()
}

/// What comes behind the norm, and back to it.
pub struct After {
    pub y: Vec<Approx>,
    /// Gradient of the norm's own output, and of a skip.
    pub dz: Vec<Approx>,
    pub dgate: Vec<Approx>,
}

pub fn after(case: &Case, args: &Arguments, z: Vec<Approx>) -> After {
    let u = arithmetic(case.dtype);
    let mut all = After { y: vec![], dz: vec![], dgate: vec![] };
    for (i, mut z) in z.into_iter().enumerate() {
        let dy = exact(args.dy[i]);
        if let Some(skip) = &args.skip {
            z.value += skip[i];
            z.bound += 2.0 * u * (z.value.abs() + skip[i].abs());
        }
        let (mut y, mut dz) = (z, dy);
        if let Some(kind) = case.fusion.activation {
            // Few operations on numbers of the size of z; the error function cancels against one.
            y = through(|z| activation(kind, z).0, z, 8.0 * u * z.value.abs());
            let slope = through(|z| activation(kind, z).1, z, 24.0 * u * (1.0 + z.value.abs()));
            dz = times(dy, slope);
        }
        if let (Some(gate), Some(Gate::After)) = (&args.gate, case.fusion.gate) {
            let [value, slope] = silu(gate[i], u);
            y = times(z, value);
            dz = times(dy, value);
            let mut dgate = times(times(dy, z), slope);
            dgate.bound += 4.0 * u * dgate.value.abs();
            all.dgate.push(dgate);
        }
        y.bound += 2.0 * u * y.value.abs();
        dz.bound += 2.0 * u * dz.value.abs();
        all.y.push(y);
        all.dz.push(dz);
    }
    all
}

/// Gradients of what was there before the norm.
pub struct Before {
    pub dx: Vec<Approx>,
    pub dresidual: Vec<Approx>,
    pub dgate: Vec<Approx>,
}

pub fn back(case: &Case, args: &Arguments, dx: Vec<Approx>) -> Before {
    let u = arithmetic(case.dtype);
    let mut all = Before { dx: vec![], dresidual: vec![], dgate: vec![] };
    for (i, d) in dx.into_iter().enumerate() {
        let mut dx = d;
        if let (Some(dsum), Some(dtype)) = (&args.dsum, case.fusion.residual) {
            // The norm's part is rounded to the sum's dtype, and so is its sum with what came from outside.
            let value = d.value + dsum[i];
            let lost = unit_roundoff(dtype) * d.value.abs() + lost_in_addition(dtype) * value.abs();
            dx = Approx { value, bound: d.bound + 1.01 * lost };
            all.dresidual.push(dx);
        }
        if let (Some(gate), Some(Gate::Before)) = (&args.gate, case.fusion.gate) {
            let [value, slope] = silu(gate[i], 2.0 * u);
            dx = times(d, value);
            dx.bound += 2.0 * u * dx.value.abs();
            let mut dgate = times(times(d, exact(args.x[i])), slope);
            dgate.bound += 4.0 * u * dgate.value.abs();
            all.dgate.push(dgate);
        }
        all.dx.push(dx);
    }
    all
}

#[test]
fn the_error_function_is_its_own_integral() {
    assert_eq!(erf(0.0), 0.0);
    // Tabulated to fifteen digits in Abramowitz and Stegun, table 7.1.
    for (x, expected) in [(0.5, 0.520499877813047), (1.0, 0.842700792949715), (2.0, 0.995322265018953)] {
        assert!((erf(x) - expected).abs() < 1e-15, "{x}: {}", erf(x));
    }
    // Both expansions, where they meet; and Simpson's rule over the derivative between.
    for x in [2.4, 2.49, 2.5, 2.51, 3.0, 5.9] {
        let (h, d) = (1e-3, |t: f64| 2.0 / std::f64::consts::PI.sqrt() * (-t * t).exp());
        let step = h / 3.0 * (d(x - h) + 4.0 * d(x) + d(x + h));
        assert!((erf(x + h) - erf(x - h) - step).abs() < 1e-15, "{x}");
    }
}

/// Against the nearest of all finite numbers of 16 bits, on values that lie between two of them to the last bit.
#[test]
fn a_number_cut_off_to_odd_is_rounded_once() {
    let half = |bits: u16| [f16::from_bits(bits).to_f64(), bf16::from_bits(bits).to_f64()];
    for bits in 0..0x7bff_u16 {
        for (i, rounded) in [|x| f16::from_f32(to_odd(x)).to_bits(), |x| bf16::from_f32(to_odd(x)).to_bits()]
            .into_iter()
            .enumerate()
        {
            let (low, high) = (half(bits)[i], half(bits + 1)[i]);
            let middle = 0.5 * (low + high);
            let even = bits + (bits & 1);
            assert_eq!([rounded(low), rounded(middle)], [bits, even], "{low:e}");
            let (down, up) = (f64::from_bits(middle.to_bits() - 1), f64::from_bits(middle.to_bits() + 1));
            assert_eq!([rounded(down), rounded(up)], [bits, bits + 1], "{middle:e}");
            assert_eq!([rounded(-down), rounded(-up)].map(|b| b & 0x7fff), [bits, bits + 1]);
        }
    }
}
