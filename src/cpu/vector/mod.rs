//! Vectors of a level's width, as kernels see them.
//!
//! Kernels are generic over `Simd`, and each operation below is one or two instructions of the level.
//! Explicit vectors rather than loops for the compiler to vectorize: it does so for a sum in sixteen
//! lanes only while nothing around the loop changes.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

use half::{bf16, f16};
use std::mem::MaybeUninit;
use std::ops::{Add, Mul, Sub};

/// The vectors of a level.
///
/// Methods are called within `Level::run` of that level alone: only there do its instructions exist.
pub(super) trait Simd: Copy + 'static {
    type F32: Vector<Lane = f32> + Convert<f32, f32> + Convert<bf16, f32> + Convert<f16, f32>;
    type F64: Vector<Lane = f64> + Convert<f64, f64>;

    /// Asks for the cache line of `p`, which may lie anywhere: nothing is read.
    fn prefetch<T>(p: *const T);
}

/// `W` numbers.
pub(super) trait Vector: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    type Lane: Copy;
    const W: usize;

    fn splat(x: Self::Lane) -> Self;

    /// `self * b + c`; rounded once where the level has an instruction for that.
    fn fma(self, b: Self, c: Self) -> Self;

    /// The sum of all lanes, in an order of halves.
    fn sum(self) -> Self::Lane;

    /// The first `n` lanes, and zero in the others.
    fn keep(self, n: usize) -> Self;

    /// Overwrites `y` with the first lanes; it has at most `W`.
    fn write(self, y: &mut [Self::Lane]);
}

/// Reading and writing elements of type `T`, which are widened and rounded on the way.
pub(super) trait Convert<T, A>: Vector<Lane = A> {
    /// `x` has `W` elements.
    fn load(x: &[T]) -> Self;

    /// `x` has `2 * W` elements, which come in an order of the type's own.
    #[inline(always)]
    fn load_pair(x: &[T]) -> [Self; 2] {
        [Self::load(&x[..Self::W]), Self::load(&x[Self::W..])]
    }

    /// `x` has at most `W` elements; zero in the other lanes.
    fn load_part(x: &[T]) -> Self;

    /// `y` has room for `W` elements.
    fn store(self, y: &mut [MaybeUninit<T>]);

    /// The same past the caches, where `y` is aligned to 16 bytes: not to be waited for by this thread, nor
    /// seen by others before a fence (`OutTile` has it).
    #[inline(always)]
    fn stream(self, y: &mut [MaybeUninit<T>]) {
        self.store(y);
    }

    /// `y` has room for `2 * W` elements, which come in the order of `load_pair`.
    #[inline(always)]
    fn store_pair([a, b]: [Self; 2], y: &mut [MaybeUninit<T>]) {
        let (first, second) = y.split_at_mut(Self::W);
        a.store(first);
        b.store(second);
    }

    #[inline(always)]
    fn stream_pair([a, b]: [Self; 2], y: &mut [MaybeUninit<T>]) {
        let (first, second) = y.split_at_mut(Self::W);
        a.stream(first);
        b.stream(second);
    }

    /// `y` has room for at most `W` elements.
    fn store_part(self, y: &mut [MaybeUninit<T>]);
}
