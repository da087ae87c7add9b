//! What stands around a norm, on rows in the accumulation type.
//!
//! Written once for whole vectors and rests, and matching the activation at every vector: both cost little beside an
//! exponential, and are code that is compiled once, not for each.
#![allow(unsafe_code)]

use super::finish::{by_two, worth_code};
use super::{get, put};
use crate::cpu::element::{Float, V};
use crate::cpu::vector::{Simd, Twice, Vector};
use crate::fusion::Activation;

/// Every vector of the slices `$z` becomes what `$values` makes of them and of those of `$b`.
macro_rules! in_place {
    ($s:expr, $T:ident, [$($z:ident),*], [$($b:ident),*], $values:expr) => {{
        let n = [$($z.len()),*][0];
        $(assert!($z.len() == n);)*
        $(assert!($b.len() == n);)*
        $(let $z = $z.as_mut_ptr();)*
        $(let $b = $b.as_ptr();)*
        let (w, mut at) = (V::<S, $T>::W, 0);
        while at < n {
            let k = w.min(n - at);
            // SAFETY: all places are below `n`, which all have.
            unsafe {
                let places = [$($z.add(at)),*];
                $(let $z = get::<S, $T>($s, $z.add(at), k);)*
                $(let $b = get::<S, $T>($s, $b.add(at), k);)*
                for (p, v) in places.into_iter().zip($values) {
                    put::<S, $T>(v, p, k);
                }
            }
            at += k;
        }
    }};
}

#[inline(always)]
pub(super) fn add<S: Simd, T: Float>(s: S, z: &mut [T], b: &[T]) {
    in_place!(s, T, [z], [b], [z + b])
}

#[inline(always)]
pub(super) fn slope<S: Simd, T: Float>(s: S, z: &[T], activation: Activation, dy: &mut [T]) {
    by_two!(S, T, |s| slopes(s, z, activation, dy))
}

#[inline(always)]
fn slopes<S: Simd, T: Float>(s: S, z: &[T], activation: Activation, dy: &mut [T]) {
    in_place!(s, T, [dy], [z], [dy * T::slope(s, activation, z)])
}

#[inline(always)]
pub(super) fn gate_gradient<S: Simd, T: Float>(s: S, z: &mut [T], gate: &[T], dy: &mut [T]) {
    by_two!(S, T, |s| gate_gradients(s, z, gate, dy))
}

#[inline(always)]
fn gate_gradients<S: Simd, T: Float>(s: S, z: &mut [T], gate: &[T], dy: &mut [T]) {
    in_place!(s, T, [z, dy], [gate], {
        let [value, slope] = T::silu_both(s, gate);
        [dy * z * slope, dy * value]
    })
}
