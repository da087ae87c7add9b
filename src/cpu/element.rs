//! Element types, and the vectors in which each is computed with.
#![allow(unsafe_code)]

use super::activations;
use super::scalar::Number;
use super::vector::{Convert, Simd, Vector};
use crate::fusion::Activation;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, Result, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Neg;

/// Vectors of a panel, which is of one set: few enough elements for the first-level cache to keep them between two passes,
/// and for a lane's sum of a quarter of them to stay exact to a few roundings before it goes on in f64. Where sets are
/// walked side by side (`walks/rows.rs`) a panel has a quarter of that of each, and the second-level cache keeps it.
pub(super) const PANEL: usize = 256;

/// The vector in which elements of type `T` are computed with.
pub(super) type V<S, T> = <<T as Element>::Acc as Float>::V<S>;

/// A type that sums are made in: f32, or f64 for f64 elements.
pub(super) trait Float: Element<Acc = Self> + Neg<Output = Self> {
    type V<S: Simd>: Vector<S, Self>;
    const ZERO: Self;
    const ONE: Self;
    fn root(self) -> Self;
    fn to64(self) -> f64;
    fn from64(x: f64) -> Self;
    /// `activation(z)`.
    fn value<S: Simd>(s: S, activation: Activation, z: Self::V<S>) -> Self::V<S>;
    /// The same, to be rounded to 16 bits.
    fn rough_value<S: Simd>(s: S, activation: Activation, z: Self::V<S>) -> Self::V<S>;
    /// Its derivative.
    fn slope<S: Simd>(s: S, activation: Activation, z: Self::V<S>) -> Self::V<S>;
    /// `silu(z)`, for gradients, and its derivative.
    fn silu_both<S: Simd>(s: S, z: Self::V<S>) -> [Self::V<S>; 2];
}

/// A type of tensor elements. Its vectors' methods are those of `Convert`, by the same names and contracts.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Element: WithDType {
    type Acc: Float;
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(x: Self::Acc) -> Self;
    /// Of its pairs.
    fn parted<S: Simd>() -> bool;
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> V<S, Self>;
    unsafe fn load_pair<S: Simd>(s: S, p: *const Self) -> [V<S, Self>; 2];
    unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> V<S, Self>;
    unsafe fn store<S: Simd>(v: V<S, Self>, p: *mut Self);
    unsafe fn store_pair<S: Simd>(v: [V<S, Self>; 2], p: *mut Self);
    unsafe fn store_part<S: Simd>(v: V<S, Self>, p: *mut Self, n: usize);
}

macro_rules! element {
    ($t:ty, $acc:ty, $vector:ident) => {
        impl Element for $t {
            type Acc = $acc;
            #[inline(always)]
            fn widen(self) -> $acc {
                self.wide()
            }
            #[inline(always)]
            fn narrow(x: $acc) -> $t {
                Number::rounded(x)
            }
            #[inline(always)]
            fn parted<S: Simd>() -> bool {
                <S::$vector as Convert<S, Self, $acc>>::PARTED
            }
            element! { $vector:
            load(s: S, p: *const Self) -> S::$vector;
            load_pair(s: S, p: *const Self) -> [S::$vector; 2];
            load_part(s: S, p: *const Self, n: usize) -> S::$vector;
            store(v: S::$vector, p: *mut Self) -> ();
            store_pair(v: [S::$vector; 2], p: *mut Self) -> ();
            store_part(v: S::$vector, p: *mut Self, n: usize) -> ();
            }
        }
    };
    ($vector:ident: $($name:ident($($arg:ident: $type:ty),*) -> $return:ty;)*) => {
        $(#[inline(always)]
        unsafe fn $name<S: Simd>($($arg: $type),*) -> $return {
            // SAFETY: the caller's.
            unsafe { <S::$vector as Convert<S, Self, Self::Acc>>::$name($($arg),*) }
        })*
    };
}

macro_rules! float {
    ($t:ty, $vector:ident, $value:path, $rough:path, $slope:path, $silu_both:path) => {
        impl Float for $t {
            type V<S: Simd> = S::$vector;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
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
            #[inline(always)]
            fn value<S: Simd>(s: S, activation: Activation, z: S::$vector) -> S::$vector {
                $value(s, activation, z)
            }
            #[inline(always)]
            fn rough_value<S: Simd>(s: S, activation: Activation, z: S::$vector) -> S::$vector {
                $rough(s, activation, z)
            }
            #[inline(always)]
            fn slope<S: Simd>(s: S, activation: Activation, z: S::$vector) -> S::$vector {
                $slope(s, activation, z)
            }
            #[inline(always)]
            fn silu_both<S: Simd>(s: S, z: S::$vector) -> [S::$vector; 2] {
                $silu_both(s, z)
            }
        }
    };
}

float!(f32, F32, activations::value, activations::rough_value, activations::slope, activations::silu_both);
float!(
    f64,
    F64,
    activations::values_f64,
    activations::values_f64,
    activations::slopes_f64,
    activations::silus_f64
);
element!(f32, f32, F32);
element!(f64, f64, F64);
element!(bf16, f32, F32);
element!(f16, f32, F32);

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
    if arg.storage.dtype() == A::DTYPE {
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
