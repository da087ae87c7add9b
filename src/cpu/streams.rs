//! Loops over neighbouring elements: sums in several vectors at once, and maps that write each element once.
//!
//! The inner loops of the kernels. Apart, because here each instruction counts: sums have `UNROLL` chains,
//! so that the processor need not wait for one addition before the next, and rests of less than a vector
//! are masked.
//!
//! All are `#[inline(always)]`, and none takes a closure: a closure may be compiled apart, for the baseline.

use super::element::{Element, Float, V};
use super::gradient::Slope;
use super::moments::Stat;
use super::vector::{Simd, Vector};
use std::mem::MaybeUninit;

/// Short sets and rows that are worked on side by side: their latencies overlap, and they share each
/// column's weight in a register.
pub(super) const ABREAST: usize = 4;
/// Vectors of partial sums per sum. An addition takes 3 to 5 cycles, and 1 or 2 start in each.
const UNROLL: usize = 4;

/// The same with two sums.
macro_rules! each_pair {
    ($w:expr, $n:expr, |$u:ident, $at:ident| $body:block) => {{
        use $crate::cpu::streams::At;
        let (w, n) = ($w, $n);
        let mut from = 0;
        while from + 2 * w <= n {
            {
                let ($u, $at) = (0, At { from, to: from + w, part: false });
                $body
            }
            {
                let ($u, $at) = (1, At { from: from + w, to: from + 2 * w, part: false });
                $body
            }
            from += 2 * w;
        }
        if from + w <= n {
            let ($u, $at) = (0, At { from, to: from + w, part: false });
            $body
            from += w;
        }
        if from < n {
            let ($u, $at) = (1, At { from, to: n, part: true });
            $body
        }
    }};
}
pub(super) use each_pair;

/// Where a vector's elements lie: `W` of them, or a part.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub from: usize,
    pub to: usize,
    pub part: bool,
}

impl At {
    /// The same, `n` elements further.
    #[inline(always)]
    pub fn after(self, n: usize) -> At {
        At { from: self.from + n, to: self.to + n, part: self.part }
    }

    /// Zero in the lanes without an element.
    #[inline(always)]
    pub fn keep<V: Vector>(self, v: V) -> V {
        match self.part {
            true => v.keep(self.to - self.from),
            false => v,
        }
    }
}

#[inline(always)]
pub(super) fn get<S: Simd, T: Element>(x: &[T], at: At) -> V<S, T> {
    match at.part {
        true => T::load_part::<S>(&x[at.from..at.to]),
        false => T::load::<S>(&x[at.from..at.to]),
    }
}

#[inline(always)]
pub(super) fn put<S: Simd, T: Element>(y: &mut [MaybeUninit<T>], at: At, v: V<S, T>) {
    match at.part {
        true => T::store_part::<S>(v, &mut y[at.from..at.to]),
        false => T::store::<S>(v, &mut y[at.from..at.to]),
    }
}

/// `$body` for every vector of `0..$n`, with its place.
macro_rules! each_vector {
    ($w:expr, $n:expr, |$at:ident| $body:block) => {{
        let (w, n) = ($w, $n);
        let mut from = 0;
        while from + w <= n {
            let $at = $crate::cpu::streams::At { from, to: from + w, part: false };
            $body
            from += w;
        }
        if from < n {
            let $at = $crate::cpu::streams::At { from, to: n, part: true };
            $body
        }
    }};
}
pub(super) use each_vector;

/// The same, with the number of the sum's vector to add to.
macro_rules! each_in_turn {
    ($w:expr, $n:expr, |$u:ident, $at:ident| $body:block) => {{
        let (w, n) = ($w, $n);
        let mut from = 0;
        while from + UNROLL * w <= n {
            for $u in 0..UNROLL {
                let $at = At { from: from + $u * w, to: from + ($u + 1) * w, part: false };
                $body
            }
            from += UNROLL * w;
        }
        // Not a loop: the number must be known when this is compiled.
        each_in_turn!(@rest w, n, from, 0, |$u, $at| $body);
        each_in_turn!(@rest w, n, from, 1, |$u, $at| $body);
        each_in_turn!(@rest w, n, from, 2, |$u, $at| $body);
        if from < n {
            let ($u, $at) = (3, At { from, to: n, part: true });
            $body
        }
    }};
    (@rest $w:ident, $n:ident, $from:ident, $number:literal, |$u:ident, $at:ident| $body:block) => {
        if $from + $w <= $n {
            let ($u, $at) = ($number, At { from: $from, to: $from + $w, part: false });
            $body
            $from += $w;
        }
    };
}

/// A sum in `UNROLL` vectors.
pub(super) struct Sum<S: Simd, A: Float>([A::V<S>; UNROLL]);

impl<S: Simd, A: Float> Sum<S, A> {
    #[inline(always)]
    pub fn zero() -> Self {
        Sum([A::V::<S>::splat(A::ZERO); UNROLL])
    }

    #[inline(always)]
    pub fn total(self) -> A {
        let [a, b, c, d] = self.0;
        ((a + b) + (c + d)).sum()
    }
}

/// Adds `x - pivot`.
#[inline(always)]
pub(super) fn add_sum<S: Simd, T: Element>(sum: &mut Sum<S, T::Acc>, x: &[T], pivot: V<S, T>) {
    each_in_turn!(V::<S, T>::W, x.len(), |u, at| {
        sum.0[u] = sum.0[u] + at.keep(get::<S, T>(x, at) - pivot);
    })
}

/// Adds `((x - pivot) - offset)^2`.
#[inline(always)]
pub(super) fn add_squares<S: Simd, T: Element>(
    sum: &mut Sum<S, T::Acc>,
    x: &[T],
    pivot: V<S, T>,
    offset: V<S, T>,
) {
    each_in_turn!(V::<S, T>::W, x.len(), |u, at| {
        let d = at.keep((get::<S, T>(x, at) - pivot) - offset);
        sum.0[u] = d.fma(d, sum.0[u]);
    })
}

/// Adds `g` and `g * (x - high)`, where `g = dy * weight`.
#[inline(always)]
pub(super) fn add_dots<S: Simd, T: Element>(
    [g, gx]: &mut [Sum<S, T::Acc>; 2],
    x: &[T],
    dy: &[T],
    weight: Option<&[T::Acc]>,
    high: V<S, T>,
) {
    let n = x.len();
    let dy = &dy[..n];
    match weight {
        None => each_in_turn!(V::<S, T>::W, n, |u, at| {
            let d = at.keep(get::<S, T>(x, at) - high);
            let dy = get::<S, T>(dy, at);
            g.0[u] = g.0[u] + dy;
            gx.0[u] = dy.fma(d, gx.0[u]);
        }),
        Some(weight) => {
            let weight = &weight[..n];
            each_in_turn!(V::<S, T>::W, n, |u, at| {
                let d = at.keep(get::<S, T>(x, at) - high);
                let dy = get::<S, T>(dy, at) * get::<S, T::Acc>(weight, at);
                g.0[u] = g.0[u] + dy;
                gx.0[u] = dy.fma(d, gx.0[u]);
            })
        }
    }
}

/// `y = (x - high) * scale + bias`
#[inline(always)]
pub(super) fn scale<S: Simd, T: Element>(
    x: &[T],
    y: &mut [MaybeUninit<T>],
    [high, scale, bias]: [T::Acc; 3],
) {
    let n = x.len();
    let y = &mut y[..n];
    let [high, scale, bias] = [high, scale, bias].map(V::<S, T>::splat);
    each_vector!(V::<S, T>::W, n, |at| {
        put::<S, T>(y, at, (get::<S, T>(x, at) - high).fma(scale, bias));
    })
}

/// `y = ((x - high) * rstd - low * rstd) * weight + bias` for `R` rows, which lie one behind the other in y.
#[inline(always)]
pub(super) fn scale_by_column<S: Simd, T: Element, const R: usize>(
    x: [&[T]; R],
    y: &mut [MaybeUninit<T>],
    weight: &[T::Acc],
    bias: Option<&[T::Acc]>,
    stats: [Stat<T::Acc>; R],
    eps: T::Acc,
) {
    let n = weight.len();
    let zero = V::<S, T>::splat(T::Acc::ZERO);
    let (mut high, mut scale, mut shift) = ([zero; R], [zero; R], [zero; R]);
    for r in 0..R {
        let rstd = stats[r].rstd(eps);
        high[r] = V::<S, T>::splat(stats[r].high);
        scale[r] = V::<S, T>::splat(rstd);
        shift[r] = V::<S, T>::splat(-(stats[r].low * rstd));
    }
    let y = &mut y[..R * n];
    match bias {
        Some(bias) => {
            let bias = &bias[..n];
            each_vector!(V::<S, T>::W, n, |at| {
                let (weight, bias) = (get::<S, T::Acc>(weight, at), get::<S, T::Acc>(bias, at));
                for r in 0..R {
                    let xhat = (get::<S, T>(x[r], at) - high[r]).fma(scale[r], shift[r]);
                    put::<S, T>(y, at.after(r * n), xhat.fma(weight, bias));
                }
            })
        }
        None => each_vector!(V::<S, T>::W, n, |at| {
            let weight = get::<S, T::Acc>(weight, at);
            for r in 0..R {
                let xhat = (get::<S, T>(x[r], at) - high[r]).fma(scale[r], shift[r]);
                put::<S, T>(y, at.after(r * n), xhat * weight);
            }
        }),
    }
}

/// `dx = dy * weight + ((x - high) * slope + shift)`, the set's `rstd` in the weight.
#[inline(always)]
pub(super) fn gradient<S: Simd, T: Element>(
    x: &[T],
    dy: &[T],
    s: Slope<T::Acc>,
    weight: T::Acc,
    dx: &mut [MaybeUninit<T>],
) {
    let n = x.len();
    let (dy, dx) = (&dy[..n], &mut dx[..n]);
    let [high, slope, shift, weight] = [s.high, s.slope, s.shift, weight].map(V::<S, T>::splat);
    each_vector!(V::<S, T>::W, n, |at| {
        let line = (get::<S, T>(x, at) - high).fma(slope, shift);
        put::<S, T>(dx, at, get::<S, T>(dy, at).fma(weight, line));
    })
}

/// Rows of one length, with a weight for each column, and what each row's set needs.
pub(super) struct Rows<'a, T: Element, const R: usize> {
    pub x: [&'a [T]; R],
    pub dy: [&'a [T]; R],
    pub slopes: [Slope<T::Acc>; R],
    pub weight: &'a [T::Acc],
}

/// Sums of `dy * xhat` and of `dy`, one a column.
pub(super) type ColumnSums<'a, A> = [&'a mut [A]; 2];

impl<T: Element, const R: usize> Rows<'_, T, R> {
    /// dx of every row; adds to the sums.
    #[inline(always)]
    pub fn gradient<S: Simd>(
        self,
        mut dx: Option<[&mut [MaybeUninit<T>]; R]>,
        sums: Option<ColumnSums<T::Acc>>,
    ) {
        let n = self.weight.len();
        let (x, dy, weight) = (self.x.map(|x| &x[..n]), self.dy.map(|dy| &dy[..n]), self.weight);
        let mut slopes = [self.slopes[0].splat::<S>(); R];
        for r in 1..R {
            slopes[r] = self.slopes[r].splat::<S>();
        }
        match (&mut dx, sums) {
            (Some(dx), Some([dw, db])) => {
                let (dw, db) = (&mut dw[..n], &mut db[..n]);
                each_vector!(V::<S, T>::W, n, |at| {
                    let weight = get::<S, T::Acc>(weight, at);
                    let mut sums = [get::<S, T::Acc>(dw, at), get::<S, T::Acc>(db, at)];
                    for r in 0..R {
                        let d = get::<S, T>(x[r], at) - slopes[r].high;
                        let dy = get::<S, T>(dy[r], at);
                        put::<S, T>(&mut *dx[r], at, slopes[r].gradient(d, dy * weight));
                        sums = slopes[r].add(sums, d, dy);
                    }
                    set::<S, T::Acc>(dw, at, sums[0]);
                    set::<S, T::Acc>(db, at, sums[1]);
                })
            }
            (None, Some([dw, db])) => {
                let (dw, db) = (&mut dw[..n], &mut db[..n]);
                each_vector!(V::<S, T>::W, n, |at| {
                    let mut sums = [get::<S, T::Acc>(dw, at), get::<S, T::Acc>(db, at)];
                    for r in 0..R {
                        let d = get::<S, T>(x[r], at) - slopes[r].high;
                        sums = slopes[r].add(sums, d, get::<S, T>(dy[r], at));
                    }
                    set::<S, T::Acc>(dw, at, sums[0]);
                    set::<S, T::Acc>(db, at, sums[1]);
                })
            }
            (Some(dx), None) => each_vector!(V::<S, T>::W, n, |at| {
                let weight = get::<S, T::Acc>(weight, at);
                for r in 0..R {
                    let d = get::<S, T>(x[r], at) - slopes[r].high;
                    let g = get::<S, T>(dy[r], at) * weight;
                    put::<S, T>(&mut *dx[r], at, slopes[r].gradient(d, g));
                }
            }),
            (None, None) => {}
        }
    }
}

/// Overwrites elements of the accumulation type.
#[inline(always)]
pub(super) fn set<S: Simd, A: Float>(y: &mut [A], at: At, v: V<S, A>) {
    v.write(&mut y[at.from..at.to]);
}
