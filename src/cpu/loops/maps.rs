//! Maps from x to y, from x and dy to dx, and between types: each element is written once, and what is `ahead` of what
//! is read is asked for.
#![allow(unsafe_code)]

use super::sums::{splat, starts};
use super::{each_span, each_strip, each_vector, get, pairwise, put};
use crate::cpu::element::{Element, Float, V};
use crate::cpu::vector::{Simd, Vector};
use crate::cpu::view::{Strided, To, AHEAD};
use crate::fusion::Activation;

/// The constants of row `r`, where `per_row` belong to each: all of them where there are no more.
#[inline(always)]
pub(super) fn of_row<C>(constants: &[C], per_row: usize, r: usize) -> &[C] {
    match constants.len() == per_row {
        true => constants,
        false => &constants[r * per_row..(r + 1) * per_row],
    }
}

/// Asks for the lines of two vectors from `at` on.
#[inline(always)]
fn ask_for_pair<S: Simd, T: Element, const N: usize>(s: S, starts: [*const T; N], at: usize) {
    let w = V::<S, T>::W;
    for start in starts {
        s.prefetch(start.wrapping_add(at));
        if 2 * w * size_of::<T>() > 64 {
            s.prefetch(start.wrapping_add(at + w));
        }
    }
}

/// `$one` for every vector of a range, two in a turn, each of which ends with `$asked`.
macro_rules! two_in_turn {
    ($w:expr, $range:expr, |$at:ident, $k:ident| $one:block, |$pair:ident| $asked:expr) => {
        pairwise!(
            $w,
            $range,
            |$pair| {
                {
                    let ($at, $k) = ($pair, $w);
                    $one
                }
                {
                    let ($at, $k) = ($pair + $w, $w);
                    $one
                }
                $asked
            },
            |$at, $k| $one
        )
    };
}

/// Where the last `k` elements of what begins at `start` are made along with those before, in a whole vector and without
/// masks: a map makes the same of an element twice. As they are, where all are fewer than a vector's.
#[inline(always)]
fn with_those_before(start: usize, at: usize, k: usize, w: usize) -> (usize, usize) {
    match at + k - start >= w {
        true => (at + k - w, w),
        false => (at, k),
    }
}

#[inline(always)]
pub(super) fn scale_spans<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    mut y: To<T>,
    span: usize,
    constants: &[[T::Acc; 3]],
    ahead: usize,
) {
    let w = V::<S, T>::W;
    let spans = x.n / span;
    assert!(y.n == x.n && y.rows == x.rows && spans * span == x.n);
    for r in 0..x.rows {
        let (x, constants, mut strips) = (x.row(r), of_row(constants, spans, r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            each_span!(strip, span, |i, part| {
                let [high, scale, bias] = constants[i].map(|c| splat::<S, T>(s, c));
                let start = part.start;
                // SAFETY: the spans lie within the blocks' rows, by the assertion, and the part within the strip.
                unsafe {
                    pairwise!(
                        w,
                        part,
                        |at| {
                            let p = x.add(at);
                            let [a, b] = T::load_pair(s, p);
                            let pair = [(a - high).fma(scale, bias), (b - high).fma(scale, bias)];
                            T::store_pair::<S>(pair, to.wrapping_add(at));
                            ask_for_pair::<S, T, 1>(s, [p], ahead);
                        },
                        |at, k| {
                            let (at, k) = with_those_before(start, at, k, w);
                            let v = get::<S, T>(s, x.add(at), k);
                            put::<S, T>((v - high).fma(scale, bias), to.wrapping_add(at), k);
                            s.prefetch(x.wrapping_add(at + ahead));
                        }
                    );
                }
            });
        });
    }
}

#[inline(always)]
pub(super) fn scale_columns<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    mut y: To<T>,
    weight: &[T::Acc],
    bias: Option<&[T::Acc]>,
    parted: bool,
    constants: &[[T::Acc; 3]],
    ahead: usize,
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(y.n == n && y.rows == x.rows && weight.len() >= n && bias.is_none_or(|b| b.len() >= n));
    let (weight, pairs) = (weight.as_ptr(), parted && T::parted::<S>());
    for r in 0..x.rows {
        let (x, mut strips) = (x.row(r), y.strips::<S>(r));
        let [high, rstd, shift] = of_row(constants, 1, r)[0].map(|c| splat::<S, T>(s, c));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which all have, and of the strip.
            unsafe {
                macro_rules! each {
                    (|$xhat:ident, $at:ident, $k:ident| $y:expr) => {{
                        let mut start = strip.start;
                        while pairs && start + 2 * w <= strip.end {
                            let p = x.add(start);
                            let [a, b] = T::load_pair(s, p);
                            let $k = w;
                            let ($at, $xhat) = (start, (a - high).fma(rstd, shift));
                            let a = $y;
                            let ($at, $xhat) = (start + w, (b - high).fma(rstd, shift));
                            T::store_pair::<S>([a, $y], to.wrapping_add(start));
                            ask_for_pair::<S, T, 1>(s, [p], ahead);
                            start += 2 * w;
                        }
                        each_vector!(w, start..strip.end, |$at, $k| {
                            let $xhat = (get::<S, T>(s, x.add($at), $k) - high).fma(rstd, shift);
                            put::<S, T>($y, to.wrapping_add($at), $k);
                            s.prefetch(x.wrapping_add($at + ahead));
                        })
                    }};
                }
                match bias {
                    Some(bias) => {
                        let bias = bias.as_ptr();
                        each!(|xhat, at, k| xhat.fma(
                            get::<S, T::Acc>(s, weight.add(at), k),
                            get::<S, T::Acc>(s, bias.add(at), k)
                        ))
                    }
                    None => each!(|xhat, at, k| xhat * get::<S, T::Acc>(s, weight.add(at), k)),
                }
            }
        });
    }
}

#[inline(always)]
pub(super) fn part<S: Simd, T: Element>(_: S, x: &[T::Acc], y: &mut Vec<T::Acc>) {
    if !T::parted::<S>() {
        return;
    }
    for pair in x.chunks(2 * V::<S, T>::W) {
        match pair.len() == 2 * V::<S, T>::W {
            true => [0, 1].into_iter().for_each(|first| y.extend(pair.iter().skip(first).step_by(2))),
            false => y.extend_from_slice(pair),
        }
    }
}

#[inline(always)]
pub(super) fn scale_each<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    mut y: To<T>,
    constants: [&[T::Acc]; 3],
    rows: Option<[&[T::Acc]; 2]>,
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(y.n == n && y.rows == x.rows && constants.iter().all(|c| c.len() >= n));
    let [high, scale, bias] = starts(constants);
    for r in 0..x.rows {
        let later = x.ahead(r);
        let ahead = [later, y.ahead(r).unwrap_or(later)];
        let (x, mut strips) = (x.row(r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which all have, and of the strip.
            unsafe {
                macro_rules! each {
                    (|$v:ident| $finished:expr) => {
                        two_in_turn!(
                            w,
                            strip,
                            |at, k| {
                                let d = get::<S, T>(s, x.add(at), k) - get::<S, T::Acc>(s, high.add(at), k);
                                let scale = get::<S, T::Acc>(s, scale.add(at), k);
                                let $v = d.fma(scale, get::<S, T::Acc>(s, bias.add(at), k));
                                put::<S, T>($finished, to.wrapping_add(at), k);
                            },
                            |pair| ask_for_pair::<S, T, 2>(s, ahead, pair)
                        )
                    };
                }
                match rows {
                    None => each!(|v| v),
                    Some([weight, bias]) => {
                        let (weight, bias) = (splat::<S, T>(s, weight[r]), splat::<S, T>(s, bias[r]));
                        each!(|v| v.fma(weight, bias))
                    }
                }
            }
        });
    }
}

#[inline(always)]
pub(super) fn gradient_spans<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    mut dx: To<T>,
    span: usize,
    constants: &[[T::Acc; 4]],
    ahead: usize,
) {
    let w = V::<S, T>::W;
    let spans = x.n / span;
    assert!(dy.n == x.n && dy.rows == x.rows && dx.n == x.n && dx.rows == x.rows && spans * span == x.n);
    for r in 0..x.rows {
        let (x, dy, mut strips) = (x.row(r), dy.row(r), dx.strips::<S>(r));
        let constants = of_row(constants, spans, r);
        each_strip!(s, strips, |to, strip| {
            each_span!(strip, span, |i, part| {
                let [high, x_scale, shift, weight] = constants[i].map(|c| splat::<S, T>(s, c));
                let start = part.start;
                // SAFETY: the spans lie within the blocks' rows, by the assertion, and the part within the strip.
                unsafe {
                    pairwise!(
                        w,
                        part,
                        |at| {
                            let (px, pdy) = (x.add(at), dy.add(at));
                            let ([xa, xb], [a, b]) = (T::load_pair(s, px), T::load_pair(s, pdy));
                            let a = a.fma(weight, (xa - high).fma(x_scale, shift));
                            let b = b.fma(weight, (xb - high).fma(x_scale, shift));
                            T::store_pair::<S>([a, b], to.wrapping_add(at));
                            ask_for_pair::<S, T, 2>(s, [px, pdy], ahead);
                        },
                        |at, k| {
                            let (at, k) = with_those_before(start, at, k, w);
                            let line = (get::<S, T>(s, x.add(at), k) - high).fma(x_scale, shift);
                            let dy = get::<S, T>(s, dy.add(at), k);
                            put::<S, T>(dy.fma(weight, line), to.wrapping_add(at), k);
                        }
                    );
                }
            });
        });
    }
}

#[inline(always)]
pub(super) fn gradient_columns<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    mut dx: To<T>,
    weight: &[T::Acc],
    parted: bool,
    constants: &[[T::Acc; 4]],
    ahead: usize,
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && dy.rows == x.rows && dx.n == n && dx.rows == x.rows && weight.len() >= n);
    let (weight, pairs) = (weight.as_ptr(), parted && T::parted::<S>());
    for r in 0..x.rows {
        let (x, dy, mut strips) = (x.row(r), dy.row(r), dx.strips::<S>(r));
        let [high, x_scale, shift, rstd] = of_row(constants, 1, r)[0].map(|c| splat::<S, T>(s, c));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which all have, and of the strip.
            unsafe {
                let mut start = strip.start;
                while pairs && start + 2 * w <= strip.end {
                    let (px, pdy) = (x.add(start), dy.add(start));
                    let ([xa, xb], [a, b]) = (T::load_pair(s, px), T::load_pair(s, pdy));
                    let wa = get::<S, T::Acc>(s, weight.add(start), w);
                    let wb = get::<S, T::Acc>(s, weight.add(start + w), w);
                    let a = (a * rstd).fma(wa, (xa - high).fma(x_scale, shift));
                    let b = (b * rstd).fma(wb, (xb - high).fma(x_scale, shift));
                    T::store_pair::<S>([a, b], to.wrapping_add(start));
                    ask_for_pair::<S, T, 2>(s, [px, pdy], ahead);
                    start += 2 * w;
                }
                each_vector!(w, start..strip.end, |at, k| {
                    let (d, dy_at) = (get::<S, T>(s, x.add(at), k) - high, get::<S, T>(s, dy.add(at), k));
                    let weight = get::<S, T::Acc>(s, weight.add(at), k);
                    let v = (dy_at * rstd).fma(weight, d.fma(x_scale, shift));
                    put::<S, T>(v, to.wrapping_add(at), k);
                    s.prefetch(x.wrapping_add(at + ahead));
                    s.prefetch(dy.wrapping_add(at + ahead));
                })
            }
        });
    }
}

#[inline(always)]
pub(super) fn gradient_each<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    mut dx: To<T>,
    constants: [&[T::Acc]; 4],
    weight: Option<&[T::Acc]>,
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && dy.rows == x.rows && dx.n == n && dx.rows == x.rows);
    assert!(constants.iter().all(|c| c.len() >= n));
    let [high, x_scale, shift, scale] = starts(constants);
    for r in 0..x.rows {
        let later = x.ahead(r);
        let ahead = [later, dy.ahead(r), dx.ahead(r).unwrap_or(later)];
        let (x, dy, mut strips) = (x.row(r), dy.row(r), dx.strips::<S>(r));
        let weight = splat::<S, T>(s, weight.map_or(T::Acc::ONE, |w| w[r]));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which all have, and of the strip.
            unsafe {
                two_in_turn!(
                    w,
                    strip,
                    |at, k| {
                        let d = get::<S, T>(s, x.add(at), k) - get::<S, T::Acc>(s, high.add(at), k);
                        let x_scale = get::<S, T::Acc>(s, x_scale.add(at), k);
                        let line = d.fma(x_scale, get::<S, T::Acc>(s, shift.add(at), k));
                        let g = get::<S, T>(s, dy.add(at), k) * weight;
                        let v = g.fma(get::<S, T::Acc>(s, scale.add(at), k), line);
                        put::<S, T>(v, to.wrapping_add(at), k);
                    },
                    |pair| ask_for_pair::<S, T, 3>(s, ahead, pair)
                )
            }
        });
    }
}

#[inline(always)]
pub(super) fn widen<S: Simd, T: Element>(s: S, x: Strided<T>, y: &mut [T::Acc]) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(y.len() >= x.rows * n);
    for r in 0..x.rows {
        let p = x.row(r);
        // SAFETY: all places are below `n`, which the row and its place in y have.
        unsafe {
            let y = y.as_mut_ptr().add(r * n);
            each_vector!(w, 0..n, |at, k| {
                put::<S, T::Acc>(get::<S, T>(s, p.add(at), k), y.add(at), k);
                s.prefetch(p.wrapping_add(at + AHEAD));
            })
        }
    }
}

#[inline(always)]
pub(super) fn gated<S: Simd, T: Element>(s: S, x: Strided<T>, gate: Strided<T>, y: &mut [T::Acc]) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(gate.n == n && gate.rows == x.rows && y.len() >= x.rows * n);
    for r in 0..x.rows {
        let (p, gate) = (x.row(r), gate.row(r));
        // SAFETY: all places are below `n`, which the rows and their place in y have.
        unsafe {
            let y = y.as_mut_ptr().add(r * n);
            each_vector!(w, 0..n, |at, k| {
                let by = T::Acc::value(s, Activation::Silu, get::<S, T>(s, gate.add(at), k));
                put::<S, T::Acc>(get::<S, T>(s, p.add(at), k) * by, y.add(at), k);
                s.prefetch(p.wrapping_add(at + AHEAD));
                s.prefetch(gate.wrapping_add(at + AHEAD));
            })
        }
    }
}

#[inline(always)]
pub(super) fn narrow<S: Simd, T: Element>(s: S, x: Strided<T::Acc>, mut y: To<T>) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(y.n == n && y.rows == x.rows);
    for r in 0..x.rows {
        let (p, mut strips) = (x.row(r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which both have, and of the strip.
            unsafe {
                each_vector!(w, strip, |at, k| {
                    put::<S, T>(get::<S, T::Acc>(s, p.add(at), k), to.wrapping_add(at), k);
                })
            }
        });
    }
}

#[inline(always)]
pub(super) fn add<S: Simd, T: Element>(s: S, x: Strided<T>, b: Strided<T>, mut y: To<T>) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(b.n == n && b.rows == x.rows && y.n == n && y.rows == x.rows);
    for r in 0..x.rows {
        let (x, b, mut strips) = (x.row(r), b.row(r), y.strips::<S>(r));
        each_strip!(s, strips, |to, strip| {
            // SAFETY: all places are below `n`, which all have, and of the strip.
            unsafe {
                pairwise!(
                    w,
                    strip,
                    |at| {
                        let (x, b) = (x.add(at), b.add(at));
                        let ([xa, xb], [ba, bb]) = (T::load_pair(s, x), T::load_pair(s, b));
                        T::store_pair::<S>([xa + ba, xb + bb], to.wrapping_add(at));
                        ask_for_pair::<S, T, 2>(s, [x, b], AHEAD);
                    },
                    |at, k| {
                        let v = get::<S, T>(s, x.add(at), k) + get::<S, T>(s, b.add(at), k);
                        put::<S, T>(v, to.wrapping_add(at), k);
                    }
                );
            }
        });
    }
}
