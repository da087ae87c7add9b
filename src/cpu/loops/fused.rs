//! What stands around a norm, on rows in the accumulation type.
#![allow(unsafe_code)]

use super::{each_vector, get, put};
use crate::cpu::element::{Float, V};
use crate::cpu::vector::{Simd, Vector};
use crate::fusion::Activation;

/// `$body` for every vector of `$z`, with what the other slices have there; it returns what each becomes.
macro_rules! in_place {
    ($s:expr, $T:ident, [$($z:ident),*], $body:block) => {{
        let n = [$($z.len()),*][0];
        $(assert!($z.len() == n);)*
        $(let $z = $z.as_ptr().cast_mut();)*
        each_vector!(V::<S, $T>::W, n, |at, k| {
            // SAFETY: all places are below `n`, which all have.
            unsafe {
                $(let p = $z.add(at); let $z = (get::<S, $T>($s, p, k), p);)*
                for (v, p) in $body {
                    put::<S, $T>(v, p, k, false);
                }
            }
        })
    }};
}

#[inline(always)]
pub(super) fn add<S: Simd, T: Float>(s: S, z: &mut [T], b: &[T]) {
    in_place!(s, T, [z, b], { [(z.0 + b.0, z.1)] })
}

/// `$go` with `$a` a constant.
macro_rules! by_activation {
    ($activation:expr, |$a:ident| $go:expr) => {
        match $activation {
            Activation::Relu => {
                let $a = Activation::Relu;
                $go
            }
            Activation::Relu6 => {
                let $a = Activation::Relu6;
                $go
            }
            Activation::LeakyRelu(slope) => {
                let $a = Activation::LeakyRelu(slope);
                $go
            }
            Activation::Silu => {
                let $a = Activation::Silu;
                $go
            }
            Activation::Sigmoid => {
                let $a = Activation::Sigmoid;
                $go
            }
            Activation::HardSwish => {
                let $a = Activation::HardSwish;
                $go
            }
            Activation::Gelu => {
                let $a = Activation::Gelu;
                $go
            }
            Activation::GeluTanh => {
                let $a = Activation::GeluTanh;
                $go
            }
        }
    };
}

#[inline(always)]
pub(super) fn activate<S: Simd, T: Float>(s: S, z: &mut [T], activation: Activation) {
    by_activation!(activation, |a| in_place!(s, T, [z], { [(T::value(s, a, z.0), z.1)] }))
}

#[inline(always)]
pub(super) fn slope<S: Simd, T: Float>(s: S, z: &[T], activation: Activation, dy: &mut [T]) {
    by_activation!(activation, |a| in_place!(s, T, [z, dy], { [(dy.0 * T::slope(s, a, z.0), dy.1)] }))
}

#[inline(always)]
pub(super) fn gate<S: Simd, T: Float>(s: S, z: &mut [T], gate: &[T]) {
    in_place!(s, T, [z, gate], { [(z.0 * T::value(s, Activation::Silu, gate.0), z.1)] })
}

#[inline(always)]
pub(super) fn gate_gradient<S: Simd, T: Float>(s: S, z: &mut [T], gate: &[T], dy: &mut [T]) {
    in_place!(s, T, [z, gate, dy], {
        let slope = T::slope(s, Activation::Silu, gate.0);
        [(dy.0 * z.0 * slope, z.1), (dy.0 * T::value(s, Activation::Silu, gate.0), dy.1)]
    })
}
