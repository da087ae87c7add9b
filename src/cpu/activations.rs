//! Activations and their slopes: in vectors of f32, lane by lane of f64.
//!
//! Over all of f32 a value is at most 2 units in the last place from the exact one, where it is subnormal, too. A
//! sigmoid's error is that of an exponential, a sum and a quotient, each rounded; far below zero that of one rounding.

#![allow(clippy::excessive_precision, unsafe_code)]

use super::vector::{Convert, Functions, Simd, Vector, MOST_LANES as LANES};
use crate::fusion::Activation;
use candle_core::cpu::erf::erfc_f64;

/// A vector of f32 of a level.
type F<S> = <S as Simd>::F32;

#[inline(always)]
fn c<S: Simd>(s: S, x: f32) -> F<S> {
    F::<S>::splat(s, x)
}

/// As above, of f64.
#[inline(always)]
fn d<S: Simd>(s: S, x: f64) -> S::F64 {
    <S::F64 as Vector<S, f64>>::splat(s, x)
}

/// `sqrt(8 / pi)`.
const GELU_K: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::SQRT_2;

/// Below it `x e^x` is zero in f32. An exponent may have been kept from falling further beside a v that has not.
const FAR: f32 = -112.0;

/// Above it `e^-x` is below `2^23.5`: beside it 1 is not lost.
const NEAR: f32 = -16.0;

/// Added to a number it rounds that to an integer, and leaves it where an exponent wants it: beside a sign.
const MAGIC: f32 = 12_582_912.0 + 256.0 + 127.0;

/// `ln 2` in two numbers: products of the first and a small integer are exact.
const LN_2_HIGH: f32 = 0.693_359_375;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// A vector's lanes; zero in those that it does not have.
#[inline(always)]
fn lanes<S: Simd>(v: F<S>) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: no level has more.
    unsafe { Convert::<S, f32, f32>::store(v, lanes.as_mut_ptr()) };
    lanes
}

#[inline(always)]
fn vector<S: Simd>(s: S, lanes: &[f32; LANES]) -> F<S> {
    // SAFETY: no level has more.
    unsafe { Convert::<S, f32, f32>::load(s, lanes.as_ptr()) }
}

/// `v / (1 + e^-(x + more))`, exact where the quotient is small, too; v is x or about as large, or 1.
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, v: F<S>, x: F<S>, more: Option<F<S>>) -> F<S> {
    let near = times_near_sigmoid(s, v, x, more);
    if x.above(c(s, NEAR)) {
        return near;
    }
    let more = lanes::<S>(more.unwrap_or(c(s, 0.0)));
    let mut all = lanes::<S>(near);
    times_far_sigmoid(&mut all, [lanes::<S>(v), lanes::<S>(x), more]);
    vector(s, &all)
}

/// Of those x that are not above `NEAR`: what norms leave is hardly ever. By lane: bits of an element may not depend on
/// its neighbours.
#[cold]
#[inline(never)]
fn times_far_sigmoid(all: &mut [f32; LANES], [v, x, more]: [[f32; LANES]; 3]) {
    for l in (0..LANES).filter(|l| x[*l] <= NEAR) {
        let power = match x[l] <= FAR {
            true => 0.0,
            false => (f64::from(x[l]) + f64::from(more[l])).exp(),
        };
        all[l] = (f64::from(v[l]) * (power / (1.0 + power))) as f32;
    }
}

/// Of x above `NEAR`: `1 + 2^n` loses nothing that matters there, so that a power of two is enough.
#[inline(always)]
fn times_near_sigmoid<S: Simd>(s: S, v: F<S>, x: F<S>, more: Option<F<S>>) -> F<S> {
    let [minus_pow2, r] = power_and_rest(s, c(s, 80.0).min(x));
    let t = lost_to_power(s, more.map_or(r, |more| r + more));
    v.div(t.fma(minus_pow2, c(s, 1.0) - minus_pow2))
}

/// `-2^n` and n, of the power of two nearest to `e^-x`.
#[inline(always)]
fn power<S: Simd>(s: S, x: F<S>) -> [F<S>; 2] {
    let magic = c(s, MAGIC);
    let shifted = x.fma(c(s, -std::f32::consts::LOG2_E), magic);
    [shifted.exponent(), shifted - magic]
}

/// `-2^n` and r, of which `2^n e^-r` is `e^-x`.
#[inline(always)]
fn power_and_rest<S: Simd>(s: S, x: F<S>) -> [F<S>; 2] {
    let [minus_pow2, n] = power(s, x);
    [minus_pow2, n.fma(c(s, LN_2_LOW), n.fma(c(s, LN_2_HIGH), x))]
}

/// `1 - e^-r`.
#[inline(always)]
fn lost_to_power<S: Simd>(s: S, r: F<S>) -> F<S> {
    (r * r).fma(lost_beyond_line(s, r), r)
}

/// q of `1 - e^-r = r + r^2 q`: minimax, off by 3e-9 on [-ln 2 / 2, ln 2 / 2].
#[inline(always)]
fn lost_beyond_line<S: Simd>(s: S, r: F<S>) -> F<S> {
    let square = r * r;
    let high = c(s, -1.381_454_1e-3).fma(square, c(s, 8.368_745_4e-3).fma(r, c(s, -4.166_839e-2)));
    high.fma(square, c(s, 1.666_652_1e-1).fma(r, c(s, -0.499_999_94)))
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: F<S>) -> F<S> {
    times_sigmoid(s, c(s, 1.0), x, None)
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: F<S>) -> F<S> {
    times_sigmoid(s, x, x, None)
}

/// `silu(x)`, for gradients, and its derivative: one sigmoid makes both.
#[inline(always)]
pub(super) fn silu_both<S: Simd>(s: S, x: F<S>) -> [F<S>; 2] {
    let (one, y) = (c(s, 1.0), sigmoid(s, x));
    [x * y, y * (x * (one - y) + one)]
}

/// `$values` that an expression makes of all lanes of `$x`, in vectors of f64.
macro_rules! in_f64 {
    ($s:expr, $x:expr, |$wide:ident| $values:expr) => {{
        let (x, mut wide) = (lanes::<S>($x), [0f64; LANES]);
        for l in 0..F::<S>::W {
            wide[l] = f64::from(x[l]);
        }
        let mut all = [wide; 2];
        for at in (0..F::<S>::W).step_by(S::F64::W) {
            // SAFETY: no level has vectors of more than `LANES`.
            unsafe {
                let $wide = <S::F64 as Convert<S, f64, f64>>::load($s, wide.as_ptr().add(at));
                for (all, values) in all.iter_mut().zip($values) {
                    Convert::<S, f64, f64>::store(values, all.as_mut_ptr().add(at));
                }
            }
        }
        all
    }};
}

/// Lanes rounded.
#[inline(always)]
fn narrowed<S: Simd>(s: S, wide: &[f64; LANES]) -> F<S> {
    let mut narrow = [0.0; LANES];
    for l in 0..F::<S>::W {
        narrow[l] = wide[l] as f32;
    }
    vector(s, &narrow)
}

/// Above it `gelu(z)` is z.
const GELU_FAR: f32 = 5.5;

/// What is not above it is made lane by lane.
const GELU_LEAST: f32 = -5.25;

/// Where the polynomial below is about: far from zero, where the power is that of a larger number, errors count most.
const GELU_CENTRE: f32 = 3.0;

/// `-ln(erfc(a / sqrt(2)) e^(a^2 / 2)) / a` of `GELU_CENTRE + d` in powers of d: minimax, off by `2^-29 / a` on
/// [0, `GELU_FAR`].
const GELU_TAIL: [f64; 12] = [
    0.471_526_347_021_880_9,
    -0.062_809_228_235_610_37,
    0.009_176_544_492_356_423,
    -0.001_310_487_163_761_238_4,
    0.000_173_905_655_796_352_98,
    -2.023_899_883_940_969e-5,
    1.806_028_245_049_917e-6,
    -5.534_130_803_520_259e-8,
    -2.456_408_494_790_487_5e-8,
    8.968_803_015_912_711e-9,
    -1.912_838_816_518_537e-9,
    1.863_522_753_076_304_4e-10,
];

/// The polynomial at `$d`, less its first term, over `$d`, with numbers as `$k` makes them. Powers in pairs, and pairs of
/// those: one behind the other they take longer than all else.
macro_rules! gelu_tail {
    ($s:expr, $d:expr, $k:ident) => {{
        let (d, square) = ($d, $d * $d);
        let mut k = [d; GELU_TAIL.len()];
        for i in 0..k.len() {
            k[i] = $k($s, GELU_TAIL[i] as _);
        }
        let first = k[4].fma(d, k[3]).fma(square, k[2].fma(d, k[1]));
        let second = k[8].fma(d, k[7]).fma(square, k[6].fma(d, k[5]));
        let third = k[11].fma(square, k[10].fma(d, k[9]));
        let fourth = square * square;
        third.fma(fourth, second).fma(fourth, first)
    }};
}

/// `-ln(erfc(a / sqrt(2)))`, in one number as `$k` makes them.
macro_rules! gelu_exponent {
    ($s:expr, $a:expr, $k:ident) => {{
        let a = $a;
        let d = a - $k($s, GELU_CENTRE as _);
        gelu_tail!($s, d, $k).fma(d, a.fma($k($s, 0.5), $k($s, GELU_TAIL[0] as _))) * a
    }};
}

/// The normal distribution's tail, `erfc(a / sqrt(2)) / 2`, times v, which is z or 1; a is in [0, `GELU_FAR`]. Of an exponent
/// of 15 half a unit in the last place is eight of the power: it is made in two numbers where a product's error can be had
/// from `fma`, and in f64 elsewhere.
#[inline(always)]
fn times_tail<S: Simd>(s: S, v: F<S>, a: F<S>) -> F<S> {
    if const { S::FMA } {
        times_tail_in_two(s, v, a)
    } else {
        times_tail_in_f64(s, v, a)
    }
}

#[inline(always)]
fn times_tail_in_two<S: Simd>(s: S, v: F<S>, a: F<S>) -> F<S> {
    let zero = c(s, 0.0);
    let first = c(s, GELU_TAIL[0] as f32);
    let first_lost = c(s, (GELU_TAIL[0] - (GELU_TAIL[0] as f32) as f64) as f32);
    let d = a - c(s, GELU_CENTRE);
    let bent = gelu_tail!(s, d, c);
    let slope = d.fma(bent, first);
    let slope_lost = d.fma(bent, first - slope) + first_lost;
    let half = a * c(s, 0.5);
    let (square, line) = (half * a, a * slope);
    let line_lost = a.fma(slope_lost, a.fma(slope, zero - line));
    let lost = half.fma(a, zero - square) + line_lost;
    // The exponent is square + line + lost, all positive but the last.
    let [minus_pow2, n] = power(s, square + line);
    let rest = n.fma(c(s, LN_2_HIGH), square) + line;
    let more = n.fma(c(s, LN_2_LOW), lost);
    let r = rest + more;
    let lost = (r * r).fma(lost_beyond_line(s, r), more) + rest;
    times_half_power(s, v, [minus_pow2, lost])
}

#[inline(always)]
fn times_tail_in_f64<S: Simd>(s: S, v: F<S>, a: F<S>) -> F<S> {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let [n, r] = in_f64!(s, a, |a| {
        let x = gelu_exponent!(s, a, d);
        let n = x.fma(d(s, -std::f64::consts::LOG2_E), d(s, ROUND)) - d(s, ROUND);
        [n, n.fma(d(s, std::f64::consts::LN_2), x)]
    });
    let minus_pow2 = (narrowed(s, &n) + c(s, MAGIC)).exponent();
    times_half_power(s, v, [minus_pow2, lost_to_power(s, narrowed(s, &r))])
}

/// The same all in f32, off by 2^-18 of itself: what is rounded to 16 bits next hardly shows it.
#[inline(always)]
fn times_rough_tail<S: Simd>(s: S, v: F<S>, a: F<S>) -> F<S> {
    let [minus_pow2, r] = power_and_rest(s, gelu_exponent!(s, a, c));
    times_half_power(s, v, [minus_pow2, lost_to_power(s, r)])
}

/// `v / 2 * 2^n (1 - lost)`.
#[inline(always)]
fn times_half_power<S: Simd>(s: S, v: F<S>, [minus_pow2, lost]: [F<S>; 2]) -> F<S> {
    let half = v * c(s, 0.5);
    lost.fma(half, c(s, 0.0) - half) * minus_pow2
}

/// `z * erfc(-z / sqrt(2)) / 2`; `rough`: to be rounded to 16 bits.
#[inline(always)]
fn gelu<S: Simd>(s: S, z: F<S>, rough: bool) -> F<S> {
    let (zero, far) = (c(s, 0.0), c(s, GELU_FAR));
    let a = z.le(zero, zero - z, z).min(far);
    let tail = if rough { times_rough_tail(s, z, a) } else { times_tail(s, z, a) };
    let near = far.le(z, z, z.le(zero, tail, z - tail));
    or_by_lane(s, z, near, |z| value_f64(Activation::Gelu, z))
}

/// GELU's derivative, the normal distribution and z times its density.
#[inline(always)]
fn gelu_slope<S: Simd>(s: S, z: F<S>) -> F<S> {
    let (zero, one) = (c(s, 0.0), c(s, 1.0));
    let a = z.le(zero, zero - z, z).min(c(s, 13.0));
    let tail = times_tail(s, one, a.min(c(s, GELU_FAR)));
    // e^(-a^2 / 2), off by as much as the square is rounded: beside the distribution nothing.
    let [minus_pow2, r] = power_and_rest(s, a * a * c(s, 0.5));
    let density = (lost_to_power(s, r) - one) * minus_pow2 * c(s, 0.398_942_28);
    let bent = a * density;
    let near = z.le(zero, tail - bent, (one - tail) + bent);
    or_by_lane(s, z, near, |z| slope_f64(Activation::Gelu, z))
}

/// `near`, but `f` of the lanes of z that are not above `GELU_LEAST`: what norms leave is hardly ever.
#[inline(always)]
fn or_by_lane<S: Simd>(s: S, z: F<S>, near: F<S>, f: fn(f64) -> f64) -> F<S> {
    if z.above(c(s, GELU_LEAST)) {
        return near;
    }
    let mut all = lanes::<S>(near);
    far_lanes(&mut all, lanes::<S>(z), f);
    vector(s, &all)
}

#[cold]
#[inline(never)]
fn far_lanes(all: &mut [f32; LANES], z: [f32; LANES], f: fn(f64) -> f64) {
    for (near, z) in all.iter_mut().zip(z) {
        if z.is_nan() || z <= GELU_LEAST {
            *near = f(f64::from(z)) as f32;
        }
    }
}

/// Twice what GELU's approximation takes the hyperbolic tangent of, `(1 + tanh(u)) / 2 = sigmoid(2 u)`, and what rounding
/// left of it: of an exponent near 100 half a unit in the last place is 60 of the power.
#[inline(always)]
fn gelu_twice_u<S: Simd>(s: S, x: F<S>) -> [F<S>; 2] {
    // Beyond, the sigmoid is 0 or 1.
    let (least, most) = (c(s, -12.0), c(s, 12.0));
    let x = x.le(least, least, most.le(x, most, x));
    let [exact, _] = in_f64!(s, x, |x| [x * (x * x).fma(d(s, GELU_K * 0.044715), d(s, GELU_K))]);
    let (u, mut more) = (narrowed(s, &exact), exact);
    let rounded = lanes::<S>(u);
    for l in 0..F::<S>::W {
        more[l] -= f64::from(rounded[l]);
    }
    [u, narrowed(s, &more)]
}

/// `activation(z)`, to be rounded to 16 bits.
#[inline(always)]
pub(super) fn rough_value<S: Simd>(s: S, activation: Activation, z: F<S>) -> F<S> {
    match activation {
        Activation::Gelu => gelu(s, z, true),
        _ => value(s, activation, z),
    }
}

/// `activation(z)`.
#[inline(always)]
pub(super) fn value<S: Simd>(s: S, activation: Activation, z: F<S>) -> F<S> {
    let zero = c(s, 0.0);
    match activation {
        Activation::Relu => z.le(zero, zero, z),
        Activation::Relu6 => c(s, 6.0).le(z, c(s, 6.0), z.le(zero, zero, z)),
        Activation::LeakyRelu(slope) => z.le(zero, z * c(s, slope as f32), z),
        Activation::Silu => silu(s, z),
        Activation::Sigmoid => sigmoid(s, z),
        Activation::HardSwish => {
            let between = z * (z + c(s, 3.0)).div(c(s, 6.0));
            c(s, 3.0).le(z, z, z.le(c(s, -3.0), zero, between))
        }
        Activation::Gelu => gelu(s, z, false),
        Activation::GeluTanh => {
            let [u, more] = gelu_twice_u(s, z);
            times_sigmoid(s, z, u, Some(more))
        }
    }
}

/// The activation's derivative at `z`; at corners PyTorch's.
#[inline(always)]
pub(super) fn slope<S: Simd>(s: S, activation: Activation, z: F<S>) -> F<S> {
    let (zero, one) = (c(s, 0.0), c(s, 1.0));
    match activation {
        Activation::Relu => z.le(zero, zero, one),
        Activation::Relu6 => c(s, 6.0).le(z, zero, z.le(zero, zero, one)),
        Activation::LeakyRelu(slope) => z.le(zero, c(s, slope as f32), one),
        Activation::Silu => silu_both(s, z)[1],
        Activation::Sigmoid => {
            let y = sigmoid(s, z);
            y * (one - y)
        }
        Activation::HardSwish => {
            let between = z.div(c(s, 3.0)) + c(s, 0.5);
            c(s, 3.0).le(z, one, z.le(c(s, -3.0), zero, between))
        }
        Activation::Gelu => gelu_slope(s, z),
        Activation::GeluTanh => {
            let [u, more] = gelu_twice_u(s, z);
            let y = times_sigmoid(s, one, u, Some(more));
            let inner = c(s, GELU_K as f32) * (z * z).fma(c(s, 3.0 * 0.044715), one);
            // Where the sigmoid is 1 or 0 the cube may be infinite.
            let bent = y * times_sigmoid(s, one, zero - u, Some(zero - more));
            y + bent.le(zero, zero, bent * z * inner)
        }
    }
}

/// `f` of each lane of a vector of f64.
macro_rules! by_lane_f64 {
    ($s:expr, $z:expr, $f:expr) => {{
        let mut lanes = [0f64; LANES / 2];
        // SAFETY: no level has more lanes.
        unsafe {
            Convert::<S, f64, f64>::store($z, lanes.as_mut_ptr());
            lanes.iter_mut().take(<S::F64 as Vector<S, f64>>::W).for_each(|z| *z = $f(*z));
            <S::F64 as Convert<S, f64, f64>>::load($s, lanes.as_ptr())
        }
    }};
}

/// `activation(z)`.
#[inline(always)]
pub(super) fn values_f64<S: Simd>(s: S, activation: Activation, z: S::F64) -> S::F64 {
    by_lane_f64!(s, z, |z| value_f64(activation, z))
}

/// The activation's derivative.
#[inline(always)]
pub(super) fn slopes_f64<S: Simd>(s: S, activation: Activation, z: S::F64) -> S::F64 {
    by_lane_f64!(s, z, |z| slope_f64(activation, z))
}

/// SiLU and its derivative.
#[inline(always)]
pub(super) fn silus_f64<S: Simd>(s: S, z: S::F64) -> [S::F64; 2] {
    [values_f64(s, Activation::Silu, z), slopes_f64(s, Activation::Silu, z)]
}

/// `activation(z)` in f64, by the standard library.
pub(super) fn value_f64(activation: Activation, z: f64) -> f64 {
    let sigmoid = |x: f64| match x < 0.0 {
        true => x.exp() / (1.0 + x.exp()),
        false => 1.0 / (1.0 + (-x).exp()),
    };
    match activation {
        Activation::Relu if z <= 0.0 => 0.0,
        Activation::Relu => z,
        Activation::Relu6 if z <= 0.0 => 0.0,
        Activation::Relu6 if z >= 6.0 => 6.0,
        Activation::Relu6 => z,
        Activation::LeakyRelu(slope) if z <= 0.0 => z * slope,
        Activation::LeakyRelu(_) => z,
        Activation::Silu => z * sigmoid(z),
        Activation::Sigmoid => sigmoid(z),
        Activation::HardSwish if z <= -3.0 => 0.0,
        Activation::HardSwish if z >= 3.0 => z,
        Activation::HardSwish => z * (z + 3.0) / 6.0,
        // The complement keeps its digits where 1 + erf would lose them.
        Activation::Gelu => 0.5 * z * erfc_f64(-z * std::f64::consts::FRAC_1_SQRT_2),
        Activation::GeluTanh => z * sigmoid(GELU_K * (z + 0.044715 * z * z * z)),
    }
}

/// The activation's derivative in f64.
pub(super) fn slope_f64(activation: Activation, z: f64) -> f64 {
    let sigmoid = |x| value_f64(Activation::Sigmoid, x);
    match activation {
        Activation::Relu => (z > 0.0 || z.is_nan()) as u8 as f64,
        Activation::Relu6 => ((z > 0.0 && z < 6.0) || z.is_nan()) as u8 as f64,
        Activation::LeakyRelu(slope) if z <= 0.0 => slope,
        Activation::LeakyRelu(_) => 1.0,
        Activation::Silu => sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z))),
        Activation::Sigmoid => sigmoid(z) * (1.0 - sigmoid(z)),
        Activation::HardSwish if z <= -3.0 => 0.0,
        Activation::HardSwish if z >= 3.0 => 1.0,
        Activation::HardSwish => z / 3.0 + 0.5,
        Activation::Gelu => {
            let density = (-0.5 * z * z).exp() * (0.5 / std::f64::consts::PI).sqrt();
            let bent = if density == 0.0 { 0.0 } else { z * density };
            0.5 * erfc_f64(-z * std::f64::consts::FRAC_1_SQRT_2) + bent
        }
        Activation::GeluTanh => {
            let k = GELU_K;
            let y = sigmoid(k * (z + 0.044715 * z * z * z));
            let bent = y * (1.0 - y);
            let bent = if bent == 0.0 { 0.0 } else { bent * z * k * (1.0 + 3.0 * 0.044715 * z * z) };
            y + bent
        }
    }
}
