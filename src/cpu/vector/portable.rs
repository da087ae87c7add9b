//! Vectors that the compiler makes of small arrays: SSE2 on x86-64, NEON on aarch64.
//!
//! Sixteen bytes, as both have; nothing here is particular to either.
#![allow(unsafe_code)]

use super::{Convert, Functions, Simd, Vector};
use crate::cpu::scalar::Number;
use std::ops::{Add, Mul, Sub};

/// What the target guarantees.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable;

impl Simd for Portable {
    type F32 = Lanes<f32, 4>;
    type F64 = Lanes<f64, 2>;

    /// On x86-64 few machines come this low.
    const FINISHES_IN_REGISTERS: bool = cfg!(not(target_arch = "x86_64"));
    /// aarch64 has fused multiply-add in its baseline; x86-64 would call a library function for it.
    const FMA: bool = cfg!(target_arch = "aarch64");
    const STREAMS: bool = false;

    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}

    #[inline(always)]
    unsafe fn stream(self, from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: the caller's.
        unsafe { from.copy_to_nonoverlapping(to, bytes) }
    }
}

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Lanes<A, const W: usize>([A; W]);

/// Lanes one by one: what `std::array::from_fn` makes of this costs the compiler three times as much.
macro_rules! lanes {
    ($a:ty: $($l:literal)*) => {
        lanes!(@operator Add, add, +, $a: $($l)*);
        lanes!(@operator Sub, sub, -, $a: $($l)*);
        lanes!(@operator Mul, mul, *, $a: $($l)*);

        impl Vector<Portable, $a> for Lanes<$a, { [$($l),*].len() }> {
            const W: usize = [$($l),*].len();

            #[inline(always)]
            fn splat(_: Portable, x: $a) -> Self {
                Lanes([x; { [$($l),*].len() }])
            }

            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                match Portable::FMA {
                    true => Lanes([$(self.0[$l].mul_add(b.0[$l], c.0[$l])),*]),
                    false => self * b + c,
                }
            }

            #[inline(always)]
            fn sum(self) -> $a {
                let mut sum = self.0;
                let mut half = sum.len() / 2;
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
                let mut kept = self.0;
                for lane in kept.iter_mut().skip(n) {
                    *lane = 0.0;
                }
                Lanes(kept)
            }
        }

        // SAFETY of the blocks below: the caller's, for the elements that the method names.
        impl<T: Number<$a>> Convert<Portable, T, $a> for Lanes<$a, { [$($l),*].len() }> {
            #[inline(always)]
            unsafe fn load(_: Portable, p: *const T) -> Self {
                // SAFETY: as above.
                Lanes([$(unsafe { p.add($l).read() }.wide()),*])
            }

            #[inline(always)]
            unsafe fn load_pair(s: Portable, p: *const T) -> [Self; 2] {
                // SAFETY: as above.
                unsafe { [Self::load(s, p), Self::load(s, p.add([$($l),*].len()))] }
            }

            #[inline(always)]
            unsafe fn load_part(_: Portable, p: *const T, n: usize) -> Self {
                let mut lanes = [0.0; [$($l),*].len()];
                for (l, lane) in lanes.iter_mut().enumerate().take(n) {
                    // SAFETY: as above.
                    *lane = unsafe { p.add(l).read() }.wide();
                }
                Lanes(lanes)
            }

            #[inline(always)]
            unsafe fn store(self, p: *mut T) {
                // SAFETY: as above.
                unsafe { $(p.add($l).write(T::rounded(self.0[$l]));)* }
            }

            #[inline(always)]
            unsafe fn store_pair([a, b]: [Self; 2], p: *mut T) {
                // SAFETY: as above.
                unsafe {
                    Convert::<_, T, $a>::store(a, p);
                    Convert::<_, T, $a>::store(b, p.add([$($l),*].len()));
                }
            }

            #[inline(always)]
            unsafe fn store_part(self, p: *mut T, n: usize) {
                for (l, lane) in self.0.iter().enumerate().take(n) {
                    // SAFETY: as above.
                    unsafe { p.add(l).write(T::rounded(*lane)) };
                }
            }
        }
    };
    (@operator $trait:ident, $method:ident, $operator:tt, $a:ty: $($l:literal)*) => {
        impl $trait for Lanes<$a, { [$($l),*].len() }> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Lanes([$(self.0[$l] $operator other.0[$l]),*])
            }
        }
    };
}
lanes!(f32: 0 1 2 3);
lanes!(f64: 0 1);

/// Each of four lanes.
macro_rules! four {
    (|$l:ident| $lane:expr) => {
        [four!($l, 0, $lane), four!($l, 1, $lane), four!($l, 2, $lane), four!($l, 3, $lane)]
    };
    ($l:ident, $n:literal, $lane:expr) => {{
        let $l = $n;
        $lane
    }};
}

impl Functions<Portable> for Lanes<f32, 4> {
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Lanes(four!(|l| self.0[l] / b.0[l]))
    }

    #[inline(always)]
    fn le(self, b: Self, yes: Self, no: Self) -> Self {
        Lanes(four!(|l| if self.0[l] <= b.0[l] { yes.0[l] } else { no.0[l] }))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Lanes(four!(|l| if self.0[l] < b.0[l] { self.0[l] } else { b.0[l] }))
    }

    #[inline(always)]
    fn above(self, b: Self) -> bool {
        four!(|l| self.0[l] > b.0[l]) == [true; 4]
    }

    #[inline(always)]
    fn exponent(self) -> Self {
        Lanes(four!(|l| f32::from_bits(self.0[l].to_bits() << 23)))
    }
}
