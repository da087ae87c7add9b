//! Vectors that the compiler makes of small arrays: SSE2 on x86-64, NEON on aarch64.
//!
//! Sixteen bytes, as both have; nothing here is particular to either.
#![allow(unsafe_code)]

use super::{Convert, Functions, Simd, Vector};
use crate::cpu::scalar::{Number, Real};
use std::array::from_fn;
use std::ops::{Add, Mul, Sub};

/// aarch64 has fused multiply-add in its baseline; x86-64 would call a library function for it.
const FMA: bool = cfg!(target_arch = "aarch64");

/// What the target guarantees.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable;

impl Simd for Portable {
    type F32 = Lanes<f32, 4>;
    type F64 = Lanes<f64, 2>;

    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
}

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Lanes<A, const W: usize>([A; W]);

macro_rules! operator {
    ($trait:ident, $method:ident, $operator:tt) => {
        impl<A: Real, const W: usize> $trait for Lanes<A, W> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Lanes(from_fn(|l| self.0[l] $operator other.0[l]))
            }
        }
    };
}
operator!(Add, add, +);
operator!(Sub, sub, -);
operator!(Mul, mul, *);

impl<A: Real, const W: usize> Vector<Portable, A> for Lanes<A, W> {
    const W: usize = W;

    #[inline(always)]
    fn splat(_: Portable, x: A) -> Self {
        Lanes([x; W])
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Lanes(from_fn(|l| match FMA {
            true => self.0[l].mul_add(b.0[l], c.0[l]),
            false => self.0[l] * b.0[l] + c.0[l],
        }))
    }

    #[inline(always)]
    fn sum(self) -> A {
        let mut sum = self.0;
        let mut half = W / 2;
        while half > 0 {
            for l in 0..half {
                sum[l] += sum[l + half];
            }
            half /= 2;
        }
        sum[0]
    }

    #[inline(always)]
    fn keep(self, n: usize) -> Self {
        Lanes(from_fn(|l| if l < n { self.0[l] } else { A::ZERO }))
    }
}

impl Functions<Portable> for Lanes<f32, 4> {
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Lanes(from_fn(|l| self.0[l] / b.0[l]))
    }

    #[inline(always)]
    fn le(self, b: Self, yes: Self, no: Self) -> Self {
        Lanes(from_fn(|l| if self.0[l] <= b.0[l] { yes.0[l] } else { no.0[l] }))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Lanes(from_fn(|l| if self.0[l] < b.0[l] { self.0[l] } else { b.0[l] }))
    }

    #[inline(always)]
    fn above(self, b: Self) -> bool {
        (0..4).fold(true, |all, l| all & (self.0[l] > b.0[l]))
    }

    #[inline(always)]
    fn exponent(self) -> Self {
        Lanes(from_fn(|l| f32::from_bits(self.0[l].to_bits() << 23)))
    }
}

// SAFETY of the blocks below: the caller's, for the elements that the method names.
impl<T: Number<A>, A: Real, const W: usize> Convert<Portable, T, A> for Lanes<A, W> {
    #[inline(always)]
    unsafe fn load(_: Portable, p: *const T) -> Self {
        // SAFETY: as above.
        Lanes(from_fn(|l| unsafe { p.add(l).read() }.wide()))
    }

    #[inline(always)]
    unsafe fn load_pair(s: Portable, p: *const T) -> [Self; 2] {
        // SAFETY: as above.
        unsafe { [Self::load(s, p), Self::load(s, p.add(W))] }
    }

    #[inline(always)]
    unsafe fn load_part(_: Portable, p: *const T, n: usize) -> Self {
        let mut lanes = [A::ZERO; W];
        for (l, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: as above.
            *lane = unsafe { p.add(l).read() }.wide();
        }
        Lanes(lanes)
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut T, _: bool) {
        for (l, x) in self.0.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { p.add(l).write(T::rounded(x)) };
        }
    }

    #[inline(always)]
    unsafe fn store_pair([a, b]: [Self; 2], p: *mut T, past: bool) {
        // SAFETY: as above.
        unsafe {
            Convert::<_, T, A>::store(a, p, past);
            Convert::<_, T, A>::store(b, p.add(W), past);
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, p: *mut T, n: usize) {
        for (l, x) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: as above.
            unsafe { p.add(l).write(T::rounded(x)) };
        }
    }
}
