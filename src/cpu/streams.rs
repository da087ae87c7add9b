//! Loops over neighbouring elements: sums in several vectors at once, and maps that write each element once.
//!
//! The inner loops of the kernels. Apart, because here each instruction counts: sums have several chains,
//! so that the processor need not wait for one addition before the next; every second addition is a
//! multiplication by one and addition, which other units of the processor do; rests of less than a vector
//! are masked.
//!
//! All are `#[inline(always)]`, and none takes a closure: a closure may be compiled apart, for the baseline.

use super::element::{Element, Float, V};
use super::gradient::Slope;
use super::vector::{Simd, Vector};
use std::mem::MaybeUninit;

/// Short sets, or rows, that are summed side by side, so that their latencies overlap.
pub(super) const ABREAST: usize = 4;
/// Pairs of vectors of partial sums per sum. An addition takes 3 to 5 cycles, and 1 or 2 start in each.
const PAIRS: usize = 2;

/// Where a vector's elements lie: `W` of them, or a part.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub from: usize,
    pub to: usize,
    pub part: bool,
}

/// A map's target.
pub(super) struct To<'a, T> {
    pub y: &'a mut [MaybeUninit<T>],
    /// Past the caches.
    pub stream: bool,
}

impl<T: Element> To<'_, T> {
    #[inline(always)]
    pub fn put<S: Simd>(&mut self, at: At, v: V<S, T>) {
        let y = &mut self.y[at.from..at.to];
        match (at.part, self.stream) {
            (true, _) => T::store_part::<S>(v, y),
            (false, true) => T::stream::<S>(v, y),
            (false, false) => T::store::<S>(v, y),
        }
    }

    #[inline(always)]
    fn put_pair<S: Simd>(&mut self, at: std::ops::Range<usize>, v: [V<S, T>; 2]) {
        match self.stream {
            true => T::stream_pair::<S>(v, &mut self.y[at]),
            false => T::store_pair::<S>(v, &mut self.y[at]),
        }
    }
}

impl At {
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

/// Overwrites elements of the accumulation type.
#[inline(always)]
pub(super) fn set<S: Simd, A: Float>(y: &mut [A], at: At, v: V<S, A>) {
    v.write(&mut y[at.from..at.to]);
}

/// Asks for the element `ahead` of `x[at]`, which may lie behind the slice's end.
#[inline(always)]
fn prefetch<S: Simd, T>(x: &[T], at: usize, ahead: usize) {
    S::prefetch(x.as_ptr().wrapping_add(at + ahead));
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

/// `$two` for pairs of vectors of `0..$n`, with their range; `$one` for what is left, a vector or the rest
/// of one, with its place.
macro_rules! pairwise {
    ($w:expr, $n:expr, |$pair:ident| $two:block, |$at:ident| $one:block) => {{
        let (w, n) = ($w, $n);
        let mut from = 0;
        while from + 2 * w <= n {
            let $pair = from..from + 2 * w;
            $two
            from += 2 * w;
        }
        if from + w <= n {
            let $at = $crate::cpu::streams::At { from, to: from + w, part: false };
            $one
            from += w;
        }
        if from < n {
            let $at = $crate::cpu::streams::At { from, to: n, part: true };
            $one
        }
    }};
}
pub(super) use pairwise;

/// The same, with the number of the pair of sums to add to, 0 or 1.
macro_rules! pairwise_in_turn {
    ($w:expr, $n:expr, |$u:ident, $pair:ident| $two:block, |$at:ident| $one:block) => {{
        let (w, n) = ($w, $n);
        let mut from = 0;
        while from + 4 * w <= n {
            {
                let ($u, $pair) = (0, from..from + 2 * w);
                $two
            }
            {
                let ($u, $pair) = (1, from + 2 * w..from + 4 * w);
                $two
            }
            from += 4 * w;
        }
        if from + 2 * w <= n {
            let ($u, $pair) = (0, from..from + 2 * w);
            $two
            from += 2 * w;
        }
        if from + w <= n {
            let $at = At { from, to: from + w, part: false };
            $one
            from += w;
        }
        if from < n {
            let $at = At { from, to: n, part: true };
            $one
        }
    }};
}

/// A sum in several vectors.
pub(super) struct Sum<S: Simd, A: Float>([[A::V<S>; 2]; PAIRS]);

impl<S: Simd, A: Float> Sum<S, A> {
    #[inline(always)]
    pub fn zero() -> Self {
        Sum([[A::V::<S>::splat(A::ZERO); 2]; PAIRS])
    }

    #[inline(always)]
    pub fn total(self) -> A {
        let [[a, b], [c, d]] = self.0;
        ((a + b) + (c + d)).sum()
    }
}

/// Adds `x - pivot`.
#[inline(always)]
pub(super) fn add_sum<S: Simd, T: Element>(sum: &mut Sum<S, T::Acc>, x: &[T], pivot: V<S, T>) {
    let one = V::<S, T>::splat(T::Acc::ONE);
    let sum = &mut sum.0;
    pairwise_in_turn!(
        V::<S, T>::W,
        x.len(),
        |u, pair| {
            let [a, b] = T::load_pair::<S>(&x[pair]);
            sum[u][0] = (a - pivot).fma(one, sum[u][0]);
            sum[u][1] = (b - pivot).fma(one, sum[u][1]);
        },
        |at| {
            let u = at.part as usize;
            sum[1][u] = sum[1][u] + at.keep(get::<S, T>(x, at) - pivot);
        }
    )
}

/// Adds `(x - high)^2`.
#[inline(always)]
pub(super) fn add_squares<S: Simd, T: Element>(sum: &mut Sum<S, T::Acc>, x: &[T], high: V<S, T>) {
    let sum = &mut sum.0;
    pairwise_in_turn!(
        V::<S, T>::W,
        x.len(),
        |u, pair| {
            let [a, b] = T::load_pair::<S>(&x[pair]);
            let (a, b) = (a - high, b - high);
            sum[u][0] = a.fma(a, sum[u][0]);
            sum[u][1] = b.fma(b, sum[u][1]);
        },
        |at| {
            let u = at.part as usize;
            let d = at.keep(get::<S, T>(x, at) - high);
            sum[1][u] = d.fma(d, sum[1][u]);
        }
    )
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
    let (g, gx, dy) = (&mut g.0, &mut gx.0, &dy[..n]);
    match weight {
        None => pairwise_in_turn!(
            V::<S, T>::W,
            n,
            |u, pair| {
                let [xa, xb] = T::load_pair::<S>(&x[pair.clone()]);
                let [a, b] = T::load_pair::<S>(&dy[pair]);
                g[u][0] = g[u][0] + a;
                g[u][1] = g[u][1] + b;
                gx[u][0] = a.fma(xa - high, gx[u][0]);
                gx[u][1] = b.fma(xb - high, gx[u][1]);
            },
            |at| {
                let u = at.part as usize;
                let d = at.keep(get::<S, T>(x, at) - high);
                let dy = get::<S, T>(dy, at);
                g[1][u] = g[1][u] + dy;
                gx[1][u] = dy.fma(d, gx[1][u]);
            }
        ),
        Some(weight) => {
            let weight = &weight[..n];
            let w = V::<S, T>::W;
            pairwise_in_turn!(
                w,
                n,
                |u, pair| {
                    for k in 0..2 {
                        let at = pair.start + k * w..pair.start + (k + 1) * w;
                        let d = T::load::<S>(&x[at.clone()]) - high;
                        let dy = T::load::<S>(&dy[at.clone()]) * <T::Acc as Element>::load::<S>(&weight[at]);
                        g[u][k] = g[u][k] + dy;
                        gx[u][k] = dy.fma(d, gx[u][k]);
                    }
                },
                |at| {
                    let u = at.part as usize;
                    let d = at.keep(get::<S, T>(x, at) - high);
                    let dy = get::<S, T>(dy, at) * get::<S, T::Acc>(weight, at);
                    g[1][u] = g[1][u] + dy;
                    gx[1][u] = dy.fma(d, gx[1][u]);
                }
            )
        }
    }
}

/// `y = (x - high) * scale + bias`. Asks for what is `ahead` in x.
#[inline(always)]
pub(super) fn scale<S: Simd, T: Element>(
    x: &[T],
    mut y: To<T>,
    [high, scale, bias]: [T::Acc; 3],
    ahead: usize,
) {
    let n = x.len();
    let high = V::<S, T>::splat(high);
    let (scale, bias) = (V::<S, T>::splat(scale), V::<S, T>::splat(bias));
    pairwise!(
        V::<S, T>::W,
        n,
        |pair| {
            let (first, second) = (pair.start, pair.start + V::<S, T>::W);
            let [a, b] = T::load_pair::<S>(&x[pair.clone()]);
            y.put_pair::<S>(pair, [(a - high).fma(scale, bias), (b - high).fma(scale, bias)]);
            prefetch::<S, T>(x, first, ahead);
            prefetch::<S, T>(x, second, ahead);
        },
        |at| {
            y.put::<S>(at, (get::<S, T>(x, at) - high).fma(scale, bias));
            prefetch::<S, T>(x, at.from, ahead);
        }
    )
}

/// `y = ((x - high) * rstd - low * rstd) * weight + bias`. Asks for what is `ahead` in x.
#[inline(always)]
pub(super) fn scale_by_column<S: Simd, T: Element>(
    x: &[T],
    mut y: To<T>,
    weight: &[T::Acc],
    bias: Option<&[T::Acc]>,
    [high, rstd, shift]: [T::Acc; 3],
    ahead: usize,
) {
    let n = x.len();
    let weight = &weight[..n];
    let high = V::<S, T>::splat(high);
    let (rstd, shift) = (V::<S, T>::splat(rstd), V::<S, T>::splat(shift));
    match bias {
        Some(bias) => {
            let bias = &bias[..n];
            each_vector!(V::<S, T>::W, n, |at| {
                let xhat = (get::<S, T>(x, at) - high).fma(rstd, shift);
                y.put::<S>(at, xhat.fma(get::<S, T::Acc>(weight, at), get::<S, T::Acc>(bias, at)));
                prefetch::<S, T>(x, at.from, ahead);
            })
        }
        None => each_vector!(V::<S, T>::W, n, |at| {
            let xhat = (get::<S, T>(x, at) - high).fma(rstd, shift);
            y.put::<S>(at, xhat * get::<S, T::Acc>(weight, at));
            prefetch::<S, T>(x, at.from, ahead);
        }),
    }
}

/// `dx = dy * weight + ((x - high) * slope + shift)`, the set's `rstd` in the weight. Asks for what is
/// `ahead` in x and dy.
#[inline(always)]
pub(super) fn gradient<S: Simd, T: Element>(
    [x, dy]: [&[T]; 2],
    s: Slope<T::Acc>,
    weight: T::Acc,
    mut dx: To<T>,
    ahead: usize,
) {
    let n = x.len();
    let dy = &dy[..n];
    let s = s.splat::<S>();
    let weight = V::<S, T>::splat(weight);
    pairwise!(
        V::<S, T>::W,
        n,
        |pair| {
            let (first, second) = (pair.start, pair.start + V::<S, T>::W);
            let [xa, xb] = T::load_pair::<S>(&x[pair.clone()]);
            let [a, b] = T::load_pair::<S>(&dy[pair.clone()]);
            let a = a.fma(weight, (xa - s.high).fma(s.slope, s.shift));
            let b = b.fma(weight, (xb - s.high).fma(s.slope, s.shift));
            dx.put_pair::<S>(pair, [a, b]);
            prefetch::<S, T>(x, first, ahead);
            prefetch::<S, T>(x, second, ahead);
            prefetch::<S, T>(dy, first, ahead);
            prefetch::<S, T>(dy, second, ahead);
        },
        |at| {
            let line = (get::<S, T>(x, at) - s.high).fma(s.slope, s.shift);
            dx.put::<S>(at, get::<S, T>(dy, at).fma(weight, line));
        }
    )
}

/// `dx = dy * rstd * weight + ((x - high) * slope + shift)` of a row with a weight for each column. Asks for
/// what is `ahead` in x and dy.
#[inline(always)]
pub(super) fn gradient_by_column<S: Simd, T: Element>(
    [x, dy]: [&[T]; 2],
    s: Slope<T::Acc>,
    weight: &[T::Acc],
    mut dx: To<T>,
    ahead: usize,
) {
    let n = weight.len();
    let (x, dy) = (&x[..n], &dy[..n]);
    let s = s.splat::<S>();
    each_vector!(V::<S, T>::W, n, |at| {
        let (d, scaled) = (get::<S, T>(x, at) - s.high, get::<S, T>(dy, at) * s.rstd);
        dx.put::<S>(at, scaled.fma(get::<S, T::Acc>(weight, at), d.fma(s.slope, s.shift)));
        prefetch::<S, T>(x, at.from, ahead);
        prefetch::<S, T>(dy, at.from, ahead);
    })
}

/// Adds `dy * xhat` and `dy` of `R` rows to the sums of every column.
///
/// Several rows at once, so that a sum is not stored by one and awaited by the next; and apart from dx, whose
/// stores would take turns in as many places.
#[inline(always)]
pub(super) fn add_columns<S: Simd, T: Element, const R: usize>(
    x: [&[T]; R],
    dy: [&[T]; R],
    slopes: [Slope<T::Acc>; R],
    [dw, db]: [&mut [T::Acc]; 2],
) {
    let n = dw.len();
    let db = &mut db[..n];
    let (mut rows, mut s) = ([(x[0], dy[0]); R], [slopes[0].splat::<S>(); R]);
    for r in 0..R {
        rows[r] = (&x[r][..n], &dy[r][..n]);
        s[r] = slopes[r].splat::<S>();
    }
    each_vector!(V::<S, T>::W, n, |at| {
        let (mut weight, mut bias) = (get::<S, T::Acc>(dw, at), get::<S, T::Acc>(db, at));
        for r in 0..R {
            let (x, dy) = rows[r];
            let dy = get::<S, T>(dy, at);
            let d = (get::<S, T>(x, at) - s[r].high) - s[r].low;
            weight = (dy * s[r].rstd).fma(d, weight);
            bias = bias + dy;
        }
        set::<S, T::Acc>(dw, at, weight);
        set::<S, T::Acc>(db, at, bias);
    })
}
