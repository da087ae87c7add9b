//! Two vectors of a level as one.
//!
//! For loops that wait: an activation is some eighty dependent operations, of which a processor sees hardly two vectors'
//! worth ahead. Of two vectors side by side it has twice as much to do meanwhile, and constants are loaded once for both.
#![allow(unsafe_code)]

use super::{Convert, Functions, Simd, Vector};
use std::ops::{Add, Mul, Sub};

/// A level whose vectors are two of `S`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Twice<S>(pub S);

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Two<V>(V, V);

impl<S: Simd> Simd for Twice<S> {
    type F32 = Two<S::F32>;
    type F64 = Two<S::F64>;

    const FINISHES_IN_REGISTERS: bool = S::FINISHES_IN_REGISTERS;
    const FMA: bool = S::FMA;
    const STREAMS: bool = S::STREAMS;

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        self.0.prefetch(p);
    }

    #[inline(always)]
    unsafe fn stream(self, from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: the caller's.
        unsafe { self.0.stream(from, to, bytes) }
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident) => {
        impl<V: $trait<Output = V>> $trait for Two<V> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Two(self.0.$method(other.0), self.1.$method(other.1))
            }
        }
    };
}
operator!(Add, add);
operator!(Sub, sub);
operator!(Mul, mul);

impl<S: Simd, A: Copy, V: Vector<S, A>> Vector<Twice<S>, A> for Two<V> {
    const W: usize = 2 * V::W;

    #[inline(always)]
    fn splat(s: Twice<S>, x: A) -> Self {
        Two(V::splat(s.0, x), V::splat(s.0, x))
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Two(self.0.fma(b.0, c.0), self.1.fma(b.1, c.1))
    }

    #[inline(always)]
    fn sum(self) -> A {
        (self.0 + self.1).sum()
    }

    #[inline(always)]
    fn keep(self, n: usize) -> Self {
        Two(self.0.keep(n.min(V::W)), self.1.keep(n.saturating_sub(V::W)))
    }
}

impl<S: Simd, V: Functions<S>> Functions<Twice<S>> for Two<V> {
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Two(self.0.div(b.0), self.1.div(b.1))
    }

    #[inline(always)]
    fn le(self, b: Self, yes: Self, no: Self) -> Self {
        Two(self.0.le(b.0, yes.0, no.0), self.1.le(b.1, yes.1, no.1))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Two(self.0.min(b.0), self.1.min(b.1))
    }

    #[inline(always)]
    fn above(self, b: Self) -> bool {
        self.0.above(b.0) & self.1.above(b.1)
    }

    #[inline(always)]
    fn exponent(self) -> Self {
        Two(self.0.exponent(), self.1.exponent())
    }
}

// SAFETY of the blocks below: the caller's, for the elements that the method names.
impl<S: Simd, T, A: Copy, V: Vector<S, A> + Convert<S, T, A>> Convert<Twice<S>, T, A> for Two<V> {
    #[inline(always)]
    unsafe fn load(s: Twice<S>, p: *const T) -> Self {
        // SAFETY: as above.
        unsafe { Two(V::load(s.0, p), V::load(s.0, p.add(V::W))) }
    }

    #[inline(always)]
    unsafe fn load_pair(s: Twice<S>, p: *const T) -> [Self; 2] {
        // SAFETY: as above.
        unsafe { [Self::load(s, p), Self::load(s, p.add(2 * V::W))] }
    }

    #[inline(always)]
    unsafe fn load_part(s: Twice<S>, p: *const T, n: usize) -> Self {
        // SAFETY: as above.
        unsafe {
            match n < V::W {
                true => Two(V::load_part(s.0, p, n), V::load_part(s.0, p, 0)),
                false => Two(V::load(s.0, p), V::load_part(s.0, p.add(V::W), n - V::W)),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut T) {
        // SAFETY: as above.
        unsafe {
            self.0.store(p);
            self.1.store(p.add(V::W));
        }
    }

    #[inline(always)]
    unsafe fn store_pair([a, b]: [Self; 2], p: *mut T) {
        // SAFETY: as above.
        unsafe {
            Convert::<Twice<S>, T, A>::store(a, p);
            Convert::<Twice<S>, T, A>::store(b, p.add(2 * V::W));
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, p: *mut T, n: usize) {
        // SAFETY: as above.
        unsafe {
            match n < V::W {
                true => self.0.store_part(p, n),
                false => {
                    self.0.store(p);
                    self.1.store_part(p.add(V::W), n - V::W);
                }
            }
        }
    }
}
