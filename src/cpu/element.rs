//! Element types: how each widens into the type it is accumulated in, and how it rounds back.
//!
//! f16 and bf16 are converted by integer arithmetic, which the compiler can vectorize where a level has
//! no instruction for it; `half`'s scalar conversions would be calls.
#![allow(unsafe_code)]

use super::functions;
use super::level::Level;
use super::loops::{Conversions, Fused, Loops};
use super::vector::{Convert, Simd, Vector};
use crate::fusion::Activation;
use candle_core::{bail, CpuStorage, Result, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Neg;

/// Vectors of a panel: few enough elements for the first-level cache to keep them between two passes, and
/// for a lane's sum of a quarter of them to stay exact to a few roundings before it goes on in f64.
pub(super) const PANEL: usize = 256;

/// The vector in which elements of type `T` are computed with.
pub(super) type V<S, T> = <<T as Element>::Acc as Float>::V<S>;

/// A type that sums are made in: f32, or f64 for f64 elements.
pub(super) trait Float: Walked<Acc = Self> + Neg<Output = Self> {
    type V<S: Simd>: Vector<S, Self>;
    const ZERO: Self;
    const ONE: Self;
    fn mul_add(self, b: Self, c: Self) -> Self;
    fn root(self) -> Self;
    fn to64(self) -> f64;
    fn from64(x: f64) -> Self;
    fn fused(level: Level) -> &'static Fused<Self>;
    /// `activation(z)`.
    fn value<S: Simd>(s: S, activation: Activation, z: Self::V<S>) -> Self::V<S>;
    /// Its derivative.
    fn slope<S: Simd>(s: S, activation: Activation, z: Self::V<S>) -> Self::V<S>;
}

/// A type of tensor elements. Its vectors' methods are those of `Convert`, by the same names and contracts.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Element: WithDType {
    type Acc: Float;
    /// What it is walked as.
    type Walk: Walked<Acc = Self::Acc>;
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(x: Self::Acc) -> Self;
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> V<S, Self>;
    unsafe fn load_pair<S: Simd>(s: S, p: *const Self) -> [V<S, Self>; 2];
    unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> V<S, Self>;
    unsafe fn store<S: Simd>(v: V<S, Self>, p: *mut Self, past: bool);
    unsafe fn store_pair<S: Simd>(v: [V<S, Self>; 2], p: *mut Self, past: bool);
    unsafe fn store_part<S: Simd>(v: V<S, Self>, p: *mut Self, n: usize);
    fn conversions(level: Level) -> &'static Conversions<Self>;
}

/// A type that kernels walk as it is. f16 is not: it is widened into f32 tile by tile.
pub(super) trait Walked: Element<Walk = Self> {
    fn loops(level: Level) -> &'static Loops<Self>;
}

/// The vectors' part of `Element`, and the loops made for a type.
macro_rules! through_vectors {
    ($vector:ident) => {
        #[inline(always)]
        unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::$vector {
            // SAFETY: the caller's, here and below.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::load(s, p) }
        }
        #[inline(always)]
        unsafe fn load_pair<S: Simd>(s: S, p: *const Self) -> [S::$vector; 2] {
            // SAFETY: as above.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::load_pair(s, p) }
        }
        #[inline(always)]
        unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> S::$vector {
            // SAFETY: as above.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::load_part(s, p, n) }
        }
        #[inline(always)]
        unsafe fn store<S: Simd>(v: S::$vector, p: *mut Self, past: bool) {
            // SAFETY: as above.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::store(v, p, past) }
        }
        #[inline(always)]
        unsafe fn store_pair<S: Simd>(v: [S::$vector; 2], p: *mut Self, past: bool) {
            // SAFETY: as above.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::store_pair(v, p, past) }
        }
        #[inline(always)]
        unsafe fn store_part<S: Simd>(v: S::$vector, p: *mut Self, n: usize) {
            // SAFETY: as above.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::store_part(v, p, n) }
        }
        fn conversions(level: Level) -> &'static Conversions<Self> {
            Conversions::of(level)
        }
    };
}

macro_rules! float {
    ($t:ty, $vector:ident, $of:ident, $value:path, $slope:path) => {
        impl Float for $t {
            type V<S: Simd> = S::$vector;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                <$t>::mul_add(self, b, c)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn to64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn from64(x: f64) -> Self {
                x as $t
            }
            fn fused(level: Level) -> &'static Fused<Self> {
                Fused::$of(level)
            }
            #[inline(always)]
            fn value<S: Simd>(s: S, activation: Activation, z: S::$vector) -> S::$vector {
                $value(s, activation, z)
            }
            #[inline(always)]
            fn slope<S: Simd>(s: S, activation: Activation, z: S::$vector) -> S::$vector {
                $slope(s, activation, z)
            }
        }

        impl Element for $t {
            type Acc = $t;
            type Walk = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(x: $t) -> $t {
                x
            }
            through_vectors!($vector);
        }
    };
}

float!(f32, F32, of, functions::value, functions::slope);
float!(f64, F64, of_at_most_avx2, functions::values_f64, functions::slopes_f64);

impl Walked for f32 {
    fn loops(level: Level) -> &'static Loops<f32> {
        Loops::of(level)
    }
}

impl Walked for bf16 {
    fn loops(level: Level) -> &'static Loops<bf16> {
        Loops::of(level)
    }
}

impl Walked for f64 {
    /// AVX2's at AVX-512, too: f64 is not worth more code.
    fn loops(level: Level) -> &'static Loops<f64> {
        Loops::of_at_most_avx2(level)
    }
}

macro_rules! half {
    ($t:ty, $walk:ty, $widen:ident, $narrow:ident) => {
        impl Element for $t {
            type Acc = f32;
            type Walk = $walk;
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self.to_bits())
            }
            #[inline(always)]
            fn narrow(x: f32) -> $t {
                <$t>::from_bits($narrow(x))
            }
            through_vectors!(F32);
        }
    };
}

half!(bf16, bf16, widen_bf16, narrow_bf16);
half!(f16, f32, widen_f16, narrow_f16);

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

/// `len` values of a parameter or statistics argument in the accumulation type; borrowed if they are
/// of it already.
pub(super) fn converted<'a, A: Float>(
    arg: &crate::request::Arg<'a, CpuStorage>,
    len: usize,
) -> Result<Cow<'a, [A]>> {
    fn wide<T: Element, A: Float>(x: &[T]) -> Vec<A> {
        x.iter().map(|x| A::from64(x.widen().to64())).collect()
    }
    let at = arg.offset..arg.offset + len;
    if arg.storage.dtype_is::<A>() {
        return Ok(Cow::Borrowed(&A::cpu_storage_as_slice(arg.storage)?[at]));
    }
    Ok(Cow::Owned(match arg.storage {
        CpuStorage::F64(x) => wide(&x[at]),
        CpuStorage::F32(x) => wide(&x[at]),
        CpuStorage::F16(x) => wide(&x[at]),
        CpuStorage::BF16(x) => wide(&x[at]),
        _ => bail!("expected one of f16, bf16, f32, f64"),
    }))
}

trait DTypeIs {
    fn dtype_is<A: Float>(&self) -> bool;
}

impl DTypeIs for CpuStorage {
    fn dtype_is<A: Float>(&self) -> bool {
        use candle_core::backend::BackendStorage;
        self.dtype() == A::DTYPE
    }
}
