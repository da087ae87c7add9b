//! Vectors of a level's width, as loops see them.
//!
//! Loops are generic over `Simd`, and each operation below is one or two instructions of the level.
//! Explicit vectors rather than loops for the compiler to vectorize: it does so for a sum in sixteen
//! lanes only while nothing around the loop changes.
#![allow(unsafe_code)]

mod portable;
mod twice;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use portable::Portable;
pub(super) use twice::Twice;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

use half::{bf16, f16};
use std::ops::{Add, Mul, Sub};

/// No level has more lanes of f32, nor two vectors of one (`Twice`), nor half as many of f64.
pub(super) const MOST_LANES: usize = 32;

/// The vectors of a level. A value proves that this machine has the level's instructions, and every
/// vector is made from one: `Level` alone makes those of levels that a machine may lack.
pub(super) trait Simd: Copy + 'static {
    type F32: Functions<Self> + Convert<Self, bf16, f32> + Convert<Self, f16, f32>;
    type F64: Vector<Self, f64>;

    /// Whether what stands behind a norm is done in registers where it can be. Elsewhere it takes a tile of scratch:
    /// slower, and an eighth of all machine code less.
    const FINISHES_IN_REGISTERS: bool;

    /// Whether `fma` rounds once.
    const FMA: bool;

    /// Whether it has stores past the caches.
    const STREAMS: bool;

    /// Asks for the cache line of `p`, which may lie anywhere: nothing is read.
    fn prefetch<T>(self, p: *const T);

    /// Copies past the caches, in stores as wide as there are: each costs the same, some 5 cycles on a Zen 4. `to` is
    /// aligned to 16 bytes. Not to be waited for by this thread, nor seen by others before a fence (`OutTile` has it).
    ///
    /// # Safety
    /// There are as many bytes to be read, and to be written.
    unsafe fn stream(self, from: *const u8, to: *mut u8, bytes: usize);
}

/// `W` numbers.
pub(super) trait Vector<S, A>:
    Convert<S, A, A> + Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self>
{
    const W: usize;

    fn splat(s: S, x: A) -> Self;

    /// `self * b + c`; rounded once where the level has an instruction for that (`Simd::FMA`).
    fn fma(self, b: Self, c: Self) -> Self;

    /// The sum of all lanes, in an order of halves.
    fn sum(self) -> A;

    /// The first `n` lanes, and zero in the others.
    fn keep(self, n: usize) -> Self;
}

/// What functions of f32 need besides.
pub(super) trait Functions<S>: Vector<S, f32> {
    fn div(self, b: Self) -> Self;

    /// `yes` in the lanes where `self` is at most `b`, else `no`: with NaN, too.
    fn le(self, b: Self, yes: Self, no: Self) -> Self;

    /// The smaller; `b` where either is NaN.
    fn min(self, b: Self) -> Self;

    /// Whether all lanes are above those of `b`, and none is NaN.
    fn above(self, b: Self) -> bool;

    /// The last nine bits alone, where sign and exponent are.
    fn exponent(self) -> Self;
}

/// Reading and writing `W` elements of type `T`, which are widened and rounded on the way.
///
/// # Safety
/// Of every method: the elements that it names lie in memory that may be read, or written.
pub(super) trait Convert<S, T, A>: Sized {
    unsafe fn load(s: S, p: *const T) -> Self;

    /// Whether a pair has the elements at even places, and those at odd ones; neighbours otherwise.
    const PARTED: bool = false;

    /// `2 * W` elements, which come in an order of the type's own.
    unsafe fn load_pair(s: S, p: *const T) -> [Self; 2];

    /// `n < W` elements; zero in the other lanes.
    unsafe fn load_part(s: S, p: *const T, n: usize) -> Self;

    unsafe fn store(self, p: *mut T);

    /// `2 * W` elements in the order of `load_pair`.
    unsafe fn store_pair(pair: [Self; 2], p: *mut T);

    /// The first `n < W` lanes.
    unsafe fn store_part(self, p: *mut T, n: usize);
}
