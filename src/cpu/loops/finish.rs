//! What stands behind a norm, done to z on its way into y.
//!
//! Apart from plain maps, which stay free of the question what follows. What models have most is done in registers along
//! with the map that makes z, in f32; the rest to a tile of z, with the activation matched at every vector: as much code
//! for each as for those would be the larger half of the kernels.
#![allow(unsafe_code)]

use super::maps::of_row;
use super::sums::{splats, starts};
use super::{each_span, each_strip, each_vector, get, put, Stored};
use crate::cpu::element::{Element, Float, V};
use crate::cpu::simd_level::Level;
use crate::cpu::vector::{Simd, Twice, Vector, MOST_LANES};
use crate::cpu::view::{Strided, To, AHEAD};
use crate::fusion::Activation;

/// What makes z of x.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Line<'a, A> {
    /// `(x - high) * scale + bias` by spans of `span` columns: `[high, scale, bias]` of every span of a row, or of every
    /// span of every row.
    Spans { span: usize, constants: &'a [[A; 3]], ahead: usize },
    /// `((x - high) * rstd + shift) * weight + bias` by columns: `[high, rstd, shift]` of all rows, or of every row.
    Columns { weight: &'a [A], bias: Option<&'a [A]>, parted: bool, constants: &'a [[A; 3]], ahead: usize },
    /// `(x - high) * scale + bias`, `[high, scale, bias]` of every column; then that times the row's weight, plus its
    /// bias.
    Each { constants: [&'a [A]; 3], rows: Option<[&'a [A]; 2]> },
}

impl<A> Line<'_, A> {
    /// Asserts that there are constants for `n` columns; once, as `Behind::assert_fits` is.
    #[inline(never)]
    fn assert_fits(&self, n: usize) {
        assert!(match self {
            Line::Spans { span, .. } => n.is_multiple_of(*span),
            Line::Columns { weight, bias, .. } => weight.len() >= n && bias.is_none_or(|b| b.len() >= n),
            Line::Each { constants, .. } => constants.iter().all(|c| c.len() >= n),
        });
    }
}

/// What is done to z, in this order; each `B` a tile or block of y's shape.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Behind<B> {
    /// Added to z.
    pub skip: Option<B>,
    pub activation: Option<Activation>,
    /// z is multiplied by `silu(gate)`.
    pub gate: Option<B>,
}

/// What is done in registers.
const SKIP: u8 = 0;
const RELU: u8 = 1;
const SKIP_RELU: u8 = 2;
const SILU: u8 = 3;
const GATE: u8 = 4;
const GELU: u8 = 5;
/// What is not.
const OTHER: u8 = 6;

/// Whether what stands around a norm is worth more code at a level, for what is computed with in `A`: it is done in registers,
/// and activations take two vectors at a time.
pub(super) const fn worth_code<S: Simd, A>() -> bool {
    S::FINISHES_IN_REGISTERS && size_of::<A>() == size_of::<f32>()
}

/// `$call` at a level of twice `$s`'s vectors, where that is worth its code.
macro_rules! by_two {
    ($S:ty, $A:ty, |$s:ident| $call:expr) => {
        if const { worth_code::<$S, $A>() } {
            let $s = Twice($s);
            $call
        } else {
            $call
        }
    };
}
pub(super) use by_two;

impl<B: Copy> Behind<B> {
    pub fn map<C>(&self, f: impl Fn(B) -> C) -> Behind<C> {
        Behind { skip: self.skip.map(&f), activation: self.activation, gate: self.gate.map(&f) }
    }

    fn kind(&self) -> u8 {
        match (self.skip, self.activation, self.gate) {
            (Some(_), None, None) => SKIP,
            (None, Some(Activation::Relu), None) => RELU,
            (Some(_), Some(Activation::Relu), None) => SKIP_RELU,
            (None, Some(Activation::Silu), None) => SILU,
            (None, Some(Activation::Gelu), None) => GELU,
            (None, None, Some(_)) => GATE,
            _ => OTHER,
        }
    }

    /// Whether `finish_line` has it, at a level, for elements that are computed with in `A`.
    pub fn in_registers<A: Float>(&self, level: Level) -> bool {
        size_of::<A>() == size_of::<f32>() && level.finishes_in_registers() && self.kind() != OTHER
    }
}

impl<T: Element> Behind<Strided<'_, T>> {
    /// Asserts that the blocks are of `rows` times `n` elements. Once, and apart from loops: out of these the compiler takes
    /// the comparison ahead of the question whether there is a block, harmlessly, which memcheck cannot know.
    #[inline(never)]
    fn assert_fits(&self, rows: usize, n: usize) {
        for block in [&self.skip, &self.gate].into_iter().flatten() {
            assert!(block.rows == rows && block.n == n);
        }
    }

    /// Row `r`.
    #[inline(always)]
    fn row(&self, r: usize) -> Behind<*const T> {
        let [mut skip, mut gate] = [None; 2];
        if let Some(b) = self.skip {
            skip = Some(b.row(r));
        }
        if let Some(b) = self.gate {
            gate = Some(b.row(r));
        }
        Behind { skip, activation: self.activation, gate }
    }
}

/// `activation(z)`, as exact as it can be seen in `T`.
#[inline(always)]
fn value_for<S: Simd, T: Element>(s: S, activation: Activation, z: V<S, T>) -> V<S, T> {
    match size_of::<T>() == 2 {
        true => T::Acc::rough_value(s, activation, z),
        false => T::Acc::value(s, activation, z),
    }
}

impl<T: Element> Behind<*const T> {
    /// What becomes of z, which is of `k` elements from `at` on.
    ///
    /// # Safety
    /// The rows have them.
    #[inline(always)]
    unsafe fn of<S: Simd, const KIND: u8>(&self, s: S, z: V<S, T>, at: usize, k: usize) -> V<S, T> {
        let z = match (KIND, self.skip) {
            (SKIP | SKIP_RELU | OTHER, Some(skip)) => {
                s.prefetch(skip.wrapping_add(at + AHEAD));
                // SAFETY: the caller's.
                z + unsafe { get::<S, T>(s, skip.add(at), k) }
            }
            _ => z,
        };
        let z = match (KIND, self.activation) {
            (RELU | SKIP_RELU, _) => T::Acc::value(s, Activation::Relu, z),
            (SILU, _) => T::Acc::value(s, Activation::Silu, z),
            (GELU, _) => value_for::<S, T>(s, Activation::Gelu, z),
            (OTHER, Some(activation)) => value_for::<S, T>(s, activation, z),
            _ => z,
        };
        match (KIND, self.gate) {
            (GATE | OTHER, Some(gate)) => {
                s.prefetch(gate.wrapping_add(at + AHEAD));
                // SAFETY: the caller's.
                z * T::Acc::value(s, Activation::Silu, unsafe { get::<S, T>(s, gate.add(at), k) })
            }
            _ => z,
        }
    }
}

#[inline(always)]
pub(super) fn finish<S: Simd, T: Element>(s: S, z: Strided<T::Acc>, y: To<T>, behind: Behind<Strided<T>>) {
    by_two!(S, T::Acc, |s| finished::<_, T>(s, z, y, behind))
}

#[inline(always)]
fn finished<S: Simd, T: Element>(s: S, z: Strided<T::Acc>, mut y: To<T>, behind: Behind<Strided<T>>) {
    let (w, n) = (V::<S, T>::W, z.n);
    assert!(y.n == n && y.rows == z.rows);
    behind.assert_fits(z.rows, n);
    for r in 0..z.rows {
        let (p, row, mut strips) = (z.row(r), behind.row(r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            let mut at = strip.start;
            while at < strip.end {
                let k = w.min(strip.end - at);
                // SAFETY: all places are below `n`, which all have, and of the strip.
                unsafe {
                    let z = get::<S, T::Acc>(s, p.add(at), k);
                    put::<S, T>(row.of::<S, OTHER>(s, z, at, k), to.wrapping_add(at), k);
                }
                at += k;
            }
        });
    }
}

#[inline(always)]
pub(super) fn finish_line<S: Simd, T: Stored>(
    s: S,
    x: Strided<T::WalkedAs>,
    y: To<T>,
    line: &Line<T::Acc>,
    behind: Behind<Strided<T>>,
) {
    if const { worth_code::<S, T::Acc>() } {
        return of_any::<S, T>(s, x, y, line, behind);
    }
    unreachable!("finished in registers where there is nothing that does")
}

#[inline(always)]
fn of_any<S: Simd, T: Stored>(
    s: S,
    x: Strided<T::WalkedAs>,
    y: To<T>,
    line: &Line<T::Acc>,
    behind: Behind<Strided<T>>,
) {
    match behind.kind() {
        SKIP => of_kind::<S, T, SKIP>(s, x, y, line, behind),
        RELU => of_kind::<S, T, RELU>(s, x, y, line, behind),
        SKIP_RELU => of_kind::<S, T, SKIP_RELU>(s, x, y, line, behind),
        SILU => of_kind::<Twice<S>, T, SILU>(Twice(s), x, y, line, behind),
        GELU => of_kind::<Twice<S>, T, GELU>(Twice(s), x, y, line, behind),
        GATE => of_kind::<Twice<S>, T, GATE>(Twice(s), x, y, line, behind),
        _ => unreachable!("no kind of what is in registers"),
    }
}

#[inline(always)]
fn of_kind<S: Simd, T: Stored, const KIND: u8>(
    s: S,
    x: Strided<T::WalkedAs>,
    mut y: To<T>,
    line: &Line<T::Acc>,
    behind: Behind<Strided<T>>,
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(y.n == n && y.rows == x.rows);
    behind.assert_fits(x.rows, n);
    line.assert_fits(n);
    for r in 0..x.rows {
        let (p, row, mut strips) = (x.row(r), behind.row(r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            match *line {
                Line::Spans { span, constants, ahead } => {
                    let constants = of_row(constants, n / span, r);
                    each_span!(strip, span, |i, part| {
                        let [high, scale, bias] = splats::<S, T, _>(s, &constants[i]);
                        // SAFETY: the spans lie within the blocks' rows, by the assertions, and the part within the strip.
                        unsafe {
                            each_vector!(w, part, |at, k| {
                                let z = (get::<S, T::WalkedAs>(s, p.add(at), k) - high).fma(scale, bias);
                                put::<S, T>(row.of::<S, KIND>(s, z, at, k), to.wrapping_add(at), k);
                                s.prefetch(p.wrapping_add(at + ahead));
                            })
                        }
                    });
                }
                Line::Columns { weight, bias, constants, ahead, parted: _ } => {
                    let [high, rstd, shift] = splats::<S, T, _>(s, &of_row(constants, 1, r)[0]);
                    // Of no bias, the number that changes no bit: one loop for both, and every kind.
                    let none = [-T::Acc::ZERO; MOST_LANES];
                    let (bias, step) = bias.map_or((none.as_ptr(), 0), |b| (b.as_ptr(), 1));
                    let weight = weight.as_ptr();
                    // SAFETY: all places are below `n`, which all have, and of the strip; `none` has those of a vector.
                    unsafe {
                        each_vector!(w, strip, |at, k| {
                            let xhat = (get::<S, T::WalkedAs>(s, p.add(at), k) - high).fma(rstd, shift);
                            let weight = get::<S, T::Acc>(s, weight.add(at), k);
                            let z = xhat.fma(weight, get::<S, T::Acc>(s, bias.add(at * step), k));
                            put::<S, T>(row.of::<S, KIND>(s, z, at, k), to.wrapping_add(at), k);
                            s.prefetch(p.wrapping_add(at + ahead));
                        })
                    }
                }
                Line::Each { constants, rows } => {
                    let [high, scale, bias] = starts(constants);
                    let of_row = match rows {
                        Some([weight, bias]) => [weight[r], bias[r]],
                        None => [T::Acc::ONE, -T::Acc::ZERO],
                    };
                    let [row_weight, row_bias] = splats::<S, T, _>(s, &of_row);
                    // SAFETY: all places are below `n`, which all have, and of the strip.
                    unsafe {
                        each_vector!(w, strip, |at, k| {
                            let d =
                                get::<S, T::WalkedAs>(s, p.add(at), k) - get::<S, T::Acc>(s, high.add(at), k);
                            let scale = get::<S, T::Acc>(s, scale.add(at), k);
                            let z =
                                d.fma(scale, get::<S, T::Acc>(s, bias.add(at), k)).fma(row_weight, row_bias);
                            put::<S, T>(row.of::<S, KIND>(s, z, at, k), to.wrapping_add(at), k);
                        })
                    }
                }
            }
        });
    }
}
