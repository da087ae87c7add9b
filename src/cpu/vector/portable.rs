//! Vectors that the compiler makes of small arrays: SSE2 on x86-64, NEON on aarch64.
//!
//! Sixteen bytes, as both have; nothing here is particular to either.

use super::{Convert, Simd, Vector};
use crate::cpu::element::{Element, Float};
use std::mem::MaybeUninit;
use std::ops::{Add, Mul, Sub};

/// aarch64 has fused multiply-add in its baseline; x86-64 would call a library function for it.
const FMA: bool = cfg!(target_arch = "aarch64");

/// What the target guarantees.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable;

impl Simd for Portable {
    type F32 = Lanes<f32, 4>;
    type F64 = Lanes<f64, 2>;

    fn prefetch<T>(_: *const T) {}
}

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Lanes<A, const W: usize>([A; W]);

impl<A: Float, const W: usize> Lanes<A, W> {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(A, A) -> A) -> Self {
        Lanes(std::array::from_fn(|l| f(self.0[l], other.0[l])))
    }
}

impl<A: Float, const W: usize> Add for Lanes<A, W> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
}

impl<A: Float, const W: usize> Sub for Lanes<A, W> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
}

impl<A: Float, const W: usize> Mul for Lanes<A, W> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
}

impl<A: Float, const W: usize> Vector for Lanes<A, W> {
    type Lane = A;
    const W: usize = W;

    #[inline(always)]
    fn splat(x: A) -> Self {
        Lanes([x; W])
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Lanes(std::array::from_fn(|l| match FMA {
            true => self.0[l].fused(b.0[l], c.0[l]),
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
        Lanes(std::array::from_fn(|l| if l < n { self.0[l] } else { A::ZERO }))
    }

    #[inline(always)]
    fn write(self, y: &mut [A]) {
        y.iter_mut().zip(self.0).for_each(|(y, x)| *y = x);
    }
}

impl<T: Element<Acc = A>, A: Float, const W: usize> Convert<T, A> for Lanes<A, W> {
    #[inline(always)]
    fn load(x: &[T]) -> Self {
        let x = &x[..W];
        Lanes(std::array::from_fn(|l| x[l].widen()))
    }

    #[inline(always)]
    fn load_part(x: &[T]) -> Self {
        Lanes(std::array::from_fn(|l| x.get(l).map_or(A::ZERO, |x| x.widen())))
    }

    #[inline(always)]
    fn store(self, y: &mut [MaybeUninit<T>]) {
        let y = &mut y[..W];
        for l in 0..W {
            y[l].write(T::narrow(self.0[l]));
        }
    }

    #[inline(always)]
    fn store_part(self, y: &mut [MaybeUninit<T>]) {
        for (y, x) in y.iter_mut().zip(self.0) {
            y.write(T::narrow(x));
        }
    }
}
