//! Numbers on their own: how an element widens into the type it is accumulated in, and how it rounds back.
//!
//! f16 and bf16 are converted by integer arithmetic, which the compiler can vectorize where a level has
//! no instruction for it; `half`'s scalar conversions would be calls.

use half::{bf16, f16};

/// An element that is accumulated in `A`.
pub(super) trait Number<A>: Copy {
    fn wide(self) -> A;
    /// To nearest, ties to even.
    fn rounded(x: A) -> Self;
}

macro_rules! number {
    ($t:ty, $a:ty, |$x:ident| $wide:expr, |$y:ident| $rounded:expr) => {
        impl Number<$a> for $t {
            #[inline(always)]
            fn wide(self) -> $a {
                let $x = self;
                $wide
            }
            #[inline(always)]
            fn rounded($y: $a) -> $t {
                $rounded
            }
        }
    };
}
number!(f32, f32, |x| x, |x| x);
number!(f64, f64, |x| x, |x| x);
number!(bf16, f32, |x| widen_bf16(x.to_bits()), |x| bf16::from_bits(narrow_bf16(x)));
number!(f16, f32, |x| widen_f16(x.to_bits()), |x| f16::from_bits(narrow_f16(x)));

#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[inline(always)]
fn narrow_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The exponents' biases differ by 112: shift the bits into place and multiply, which is exact and
/// normalizes subnormals; infinity and NaN get f32's exponent.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let magnitude = (bits as u32 & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | (bits as u32 & 0x8000) << 16)
}

/// Normal results: rebias and round the bits; a carry walks into the exponent and up to infinity.
/// Subnormal results: adding 0.5 leaves exactly the result's bits, rounded, at the end of the fraction.
#[inline(always)]
fn narrow_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    // 2^16 and above; what lies between 65520 and it has been rounded to infinity by the carry.
    let result = if magnitude >= 143 << 23 { special } else { finite };
    (result | (bits >> 16 & 0x8000)) as u16
}
