//! Sums over neighbouring elements, in several vectors at once.
#![allow(unsafe_code)]

use super::{each_vector, get, pairwise, put};
use crate::cpu::element::{Element, Float, V};
use crate::cpu::moments::Stat;
use crate::cpu::vector::{Simd, Vector};
use crate::cpu::view::Strided;

/// Short rows that are summed side by side, so that their latencies overlap.
const ABREAST: usize = 4;
/// Pairs of vectors of partial sums per sum. An addition takes 3 to 5 cycles, and 1 or 2 start in each.
const PAIRS: usize = 2;

/// A sum in several vectors.
type Sum<S, T> = [[V<S, T>; 2]; PAIRS];

#[inline(always)]
fn zero<S: Simd, T: Element>(s: S) -> Sum<S, T> {
    [[splat::<S, T>(s, T::Acc::ZERO); 2]; PAIRS]
}

#[inline(always)]
fn total<S: Simd, T: Element>([[a, b], [c, d]]: Sum<S, T>) -> T::Acc {
    ((a + b) + (c + d)).sum()
}

#[inline(always)]
pub(super) fn splat<S: Simd, T: Element>(s: S, x: T::Acc) -> V<S, T> {
    V::<S, T>::splat(s, x)
}

// By index rather than `map` and `from_fn`, whose closures and guards the compiler takes apart again for every
// loop, level and type.

#[inline(always)]
pub(super) fn splats<S: Simd, T: Element, const N: usize>(s: S, values: &[T::Acc; N]) -> [V<S, T>; N] {
    let mut splats = [splat::<S, T>(s, T::Acc::ZERO); N];
    let mut i = 0;
    while i < N {
        splats[i] = splat::<S, T>(s, values[i]);
        i += 1;
    }
    splats
}

#[inline(always)]
pub(super) fn starts<A, const N: usize>(slices: [&[A]; N]) -> [*const A; N] {
    let mut starts = [std::ptr::null(); N];
    let mut i = 0;
    while i < N {
        starts[i] = slices[i].as_ptr();
        i += 1;
    }
    starts
}

/// The starts of the first rows.
#[inline(always)]
fn rows<T: Element, const R: usize>(x: Strided<T>) -> [*const T; R] {
    let mut rows = [std::ptr::null(); R];
    let mut r = 0;
    while r < R {
        rows[r] = x.row(r);
        r += 1;
    }
    rows
}

/// `$two` for pairs of vectors of `0..$n`, with the number of the pair of sums to add to, 0 or 1; `$one` for
/// what is left.
macro_rules! pairwise_in_turn {
    ($w:expr, $n:expr, |$u:ident, $pair:ident| $two:block, |$at:ident, $k:ident| $one:block) => {{
        let (w, n) = ($w, $n);
        let mut $pair = 0;
        while $pair + 4 * w <= n {
            {
                let $u = 0;
                $two
            }
            $pair += 2 * w;
            {
                let $u = 1;
                $two
            }
            $pair += 2 * w;
        }
        if $pair + 2 * w <= n {
            let $u = 0;
            $two
            $pair += 2 * w;
        }
        let mut $at = $pair;
        while $at < n {
            let $k = w.min(n - $at);
            $one
            $at += $k;
        }
    }};
}

#[inline(always)]
pub(super) fn moments<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    pivot: Option<T::Acc>,
) -> (Stat<T::Acc>, T::Acc) {
    let (w, n) = (V::<S, T>::W, x.n);
    let mean = match pivot {
        None => Stat::ZERO,
        Some(pivot) => {
            let one = splat::<S, T>(s, T::Acc::ONE);
            let (mut sum, base) = (zero::<S, T>(s), splat::<S, T>(s, pivot));
            for r in 0..x.rows {
                let p = x.row(r);
                // SAFETY: all places are below the block's `n`, here and below.
                unsafe {
                    pairwise_in_turn!(
                        w,
                        n,
                        |u, at| {
                            let [a, b] = T::load_pair(s, p.add(at));
                            sum[u][0] = (a - base).fma(one, sum[u][0]);
                            sum[u][1] = (b - base).fma(one, sum[u][1]);
                        },
                        |at, k| {
                            let u = (k < w) as usize;
                            sum[1][u] = sum[1][u] + (get::<S, T>(s, p.add(at), k) - base).keep(k);
                        }
                    )
                }
            }
            let count = (x.rows * n) as f64;
            Stat::mean(pivot, T::Acc::from64(total::<S, T>(sum).to64() / count))
        }
    };
    let (mut squares, high) = (zero::<S, T>(s), splat::<S, T>(s, mean.high));
    for r in 0..x.rows {
        let p = x.row(r);
        // SAFETY: as above.
        unsafe {
            pairwise_in_turn!(
                w,
                n,
                |u, at| {
                    let [a, b] = T::load_pair(s, p.add(at));
                    let (a, b) = (a - high, b - high);
                    squares[u][0] = a.fma(a, squares[u][0]);
                    squares[u][1] = b.fma(b, squares[u][1]);
                },
                |at, k| {
                    let u = (k < w) as usize;
                    let d = (get::<S, T>(s, p.add(at), k) - high).keep(k);
                    squares[1][u] = d.fma(d, squares[1][u]);
                }
            )
        }
    }
    (mean, total::<S, T>(squares))
}

/// `$go::<$R>` for `ABREAST` rows at a time of `$rows`, and for single ones at the end.
macro_rules! abreast {
    ($rows:expr, |$r:ident, $R:ident| $body:expr) => {{
        let mut $r = 0;
        while $r + ABREAST <= $rows {
            const $R: usize = ABREAST;
            $body;
            $r += ABREAST;
        }
        while $r < $rows {
            const $R: usize = 1;
            $body;
            $r += 1;
        }
    }};
}

#[inline(always)]
pub(super) fn short_moments<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    center: bool,
    stats: &mut [Stat<T::Acc>],
) {
    abreast!(x.rows, |r, R| some_moments::<S, T, R>(s, x.part(r, R), center, &mut stats[r..r + R]))
}

/// Of `R` rows, each with two chains of sums.
#[inline(always)]
fn some_moments<S: Simd, T: Element, const R: usize>(
    s: S,
    x: Strided<T>,
    center: bool,
    stats: &mut [Stat<T::Acc>],
) {
    let (w, n) = (V::<S, T>::W, x.n);
    let (zero, one) = (splat::<S, T>(s, T::Acc::ZERO), splat::<S, T>(s, T::Acc::ONE));
    let count = T::Acc::from64(n as f64);
    let p = rows::<T, R>(x);
    let mut base = [zero; R];
    for r in 0..R {
        stats[r] = Stat::ZERO;
    }
    if center {
        for r in 0..R {
            base[r] = splat::<S, T>(s, x.first(r).widen());
        }
        let mut sum = [[zero; 2]; R];
        // SAFETY: all places are below the block's `n`, here and below.
        unsafe {
            pairwise!(
                w,
                0..n,
                |at| {
                    for r in 0..R {
                        let [a, b] = T::load_pair(s, p[r].add(at));
                        sum[r][0] = (a - base[r]).fma(one, sum[r][0]);
                        sum[r][1] = (b - base[r]).fma(one, sum[r][1]);
                    }
                },
                |at, k| {
                    for r in 0..R {
                        sum[r][0] = sum[r][0] + (get::<S, T>(s, p[r].add(at), k) - base[r]).keep(k);
                    }
                }
            )
        };
        for r in 0..R {
            stats[r] = Stat::mean(x.first(r).widen(), (sum[r][0] + sum[r][1]).sum() / count);
            base[r] = splat::<S, T>(s, stats[r].high);
        }
    }
    let mut squares = [[zero; 2]; R];
    // SAFETY: as above.
    unsafe {
        pairwise!(
            w,
            0..n,
            |at| {
                for r in 0..R {
                    let [a, b] = T::load_pair(s, p[r].add(at));
                    let (a, b) = (a - base[r], b - base[r]);
                    squares[r][0] = a.fma(a, squares[r][0]);
                    squares[r][1] = b.fma(b, squares[r][1]);
                }
            },
            |at, k| {
                for r in 0..R {
                    let d = (get::<S, T>(s, p[r].add(at), k) - base[r]).keep(k);
                    squares[r][0] = d.fma(d, squares[r][0]);
                }
            }
        )
    };
    for r in 0..R {
        // About `high`, which the mean is off by `low`.
        let square = (squares[r][0] + squares[r][1]).sum() / count;
        stats[r].var = square - stats[r].low * stats[r].low;
    }
}

#[inline(always)]
pub(super) fn run_sums<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    run: usize,
    base: &[T::Acc],
    squares: bool,
    lanes: &mut [T::Acc],
) {
    let w = V::<S, T>::W;
    assert!(base.len() * run <= x.n && base.len() * w <= lanes.len());
    for r in 0..x.rows {
        for i in 0..base.len() {
            let base = splat::<S, T>(s, base[i]);
            // SAFETY: the runs lie within the block's rows, the lanes within theirs, by the assertion.
            unsafe {
                let (p, lanes) = (x.row(r).add(i * run), lanes.as_mut_ptr().add(i * w));
                let mut sum = T::Acc::load(s, lanes);
                match squares {
                    true => pairwise!(
                        w,
                        0..run,
                        |at| {
                            let [a, b] = T::load_pair(s, p.add(at));
                            let (a, b) = (a - base, b - base);
                            sum = b.fma(b, a.fma(a, sum));
                        },
                        |at, k| {
                            let d = (get::<S, T>(s, p.add(at), k) - base).keep(k);
                            sum = d.fma(d, sum);
                        }
                    ),
                    false => pairwise!(
                        w,
                        0..run,
                        |at| {
                            let [a, b] = T::load_pair(s, p.add(at));
                            sum = sum + ((a - base) + (b - base));
                        },
                        |at, k| {
                            sum = sum + (get::<S, T>(s, p.add(at), k) - base).keep(k);
                        }
                    ),
                }
                T::Acc::store(sum, lanes);
            }
        }
    }
}

#[inline(always)]
pub(super) fn fold<S: Simd, T: Element>(s: S, lanes: &[T::Acc], sums: &mut [T::Acc]) {
    let w = V::<S, T>::W;
    assert!(sums.len() * w <= lanes.len());
    for (i, sum) in sums.iter_mut().enumerate() {
        // SAFETY: by the assertion.
        *sum = unsafe { T::Acc::load(s, lanes.as_ptr().add(i * w)) }.sum();
    }
}

#[inline(always)]
pub(super) fn dots<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    weight: Option<&[T::Acc]>,
    high: T::Acc,
) -> [T::Acc; 2] {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && dy.rows == x.rows && weight.is_none_or(|w| w.len() >= n));
    let (mut g, mut gx, high) = (zero::<S, T>(s), zero::<S, T>(s), splat::<S, T>(s, high));
    for r in 0..x.rows {
        let (x, dy) = (x.row(r), dy.row(r));
        // SAFETY: all places are below `n`, which all have.
        unsafe {
            match weight {
                None => pairwise_in_turn!(
                    w,
                    n,
                    |u, at| {
                        let ([xa, xb], [a, b]) = (T::load_pair(s, x.add(at)), T::load_pair(s, dy.add(at)));
                        g[u][0] = g[u][0] + a;
                        g[u][1] = g[u][1] + b;
                        gx[u][0] = a.fma(xa - high, gx[u][0]);
                        gx[u][1] = b.fma(xb - high, gx[u][1]);
                    },
                    |at, k| {
                        let u = (k < w) as usize;
                        let dy = get::<S, T>(s, dy.add(at), k);
                        g[1][u] = g[1][u] + dy;
                        gx[1][u] = dy.fma((get::<S, T>(s, x.add(at), k) - high).keep(k), gx[1][u]);
                    }
                ),
                Some(weight) => {
                    let weight = weight.as_ptr();
                    pairwise_in_turn!(
                        w,
                        n,
                        |u, at| {
                            for k in 0..2 {
                                let at = at + k * w;
                                let d = T::load(s, x.add(at)) - high;
                                let dy = T::load(s, dy.add(at)) * T::Acc::load(s, weight.add(at));
                                g[u][k] = g[u][k] + dy;
                                gx[u][k] = dy.fma(d, gx[u][k]);
                            }
                        },
                        |at, k| {
                            let u = (k < w) as usize;
                            let d = (get::<S, T>(s, x.add(at), k) - high).keep(k);
                            let dy = get::<S, T>(s, dy.add(at), k) * get::<S, T::Acc>(s, weight.add(at), k);
                            g[1][u] = g[1][u] + dy;
                            gx[1][u] = dy.fma(d, gx[1][u]);
                        }
                    )
                }
            }
        }
    }
    [total::<S, T>(g), total::<S, T>(gx)]
}

#[inline(always)]
pub(super) fn short_dots<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    weight: &[T::Acc],
    high: &[T::Acc],
    sums: &mut [[T::Acc; 2]],
) {
    abreast!(x.rows, |r, R| some_dots::<S, T, R>(
        s,
        [x.part(r, R), dy.part(r, R)],
        weight,
        &high[r..r + R],
        &mut sums[r..r + R]
    ))
}

#[inline(always)]
fn some_dots<S: Simd, T: Element, const R: usize>(
    s: S,
    [x, dy]: [Strided<T>; 2],
    weight: &[T::Acc],
    high: &[T::Acc],
    sums: &mut [[T::Acc; 2]],
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && weight.len() >= n);
    let (x, dy) = (rows::<T, R>(x), rows::<T, R>(dy));
    let zero = splat::<S, T>(s, T::Acc::ZERO);
    let (mut highs, mut g, mut gx) = ([zero; R], [zero; R], [zero; R]);
    for r in 0..R {
        highs[r] = splat::<S, T>(s, high[r]);
    }
    let weight = weight.as_ptr();
    // SAFETY: all places are below `n`, which all have.
    unsafe {
        each_vector!(w, 0..n, |at, k| {
            let weight = get::<S, T::Acc>(s, weight.add(at), k);
            for r in 0..R {
                let d = (get::<S, T>(s, x[r].add(at), k) - highs[r]).keep(k);
                let dy = get::<S, T>(s, dy[r].add(at), k) * weight;
                g[r] = g[r] + dy;
                gx[r] = dy.fma(d, gx[r]);
            }
        })
    }
    for r in 0..R {
        sums[r] = [g[r].sum(), gx[r].sum()];
    }
}

#[inline(always)]
pub(super) fn span_dots<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    span: usize,
    high: &[T::Acc],
    g: &mut [T::Acc],
    gx: &mut [T::Acc],
) {
    let (w, spans) = (V::<S, T>::W, high.len());
    assert!(spans * span <= x.n && x.n == dy.n && x.rows == dy.rows);
    assert!(spans * w <= g.len() && spans * w <= gx.len());
    for r in 0..x.rows {
        for i in 0..spans {
            let high = splat::<S, T>(s, high[i]);
            // SAFETY: the spans lie within the blocks' rows, the lanes within theirs, by the assertions.
            unsafe {
                let (x, dy) = (x.row(r).add(i * span), dy.row(r).add(i * span));
                let lanes = [g.as_mut_ptr().add(i * w), gx.as_mut_ptr().add(i * w)];
                let (mut g, mut gx) = (T::Acc::load(s, lanes[0]), T::Acc::load(s, lanes[1]));
                pairwise!(
                    w,
                    0..span,
                    |at| {
                        let ([xa, xb], [a, b]) = (T::load_pair(s, x.add(at)), T::load_pair(s, dy.add(at)));
                        g = g + (a + b);
                        gx = b.fma(xb - high, a.fma(xa - high, gx));
                    },
                    |at, k| {
                        let dy = get::<S, T>(s, dy.add(at), k);
                        g = g + dy;
                        gx = dy.fma((get::<S, T>(s, x.add(at), k) - high).keep(k), gx);
                    }
                );
                T::Acc::store(g, lanes[0]);
                T::Acc::store(gx, lanes[1]);
            }
        }
    }
}

/// Several rows at once, so that a sum is not stored by one and awaited by the next; and apart from dx, whose
/// stores would take turns in as many places.
#[inline(always)]
pub(super) fn add_columns<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    stats: &[[T::Acc; 3]],
    dw: &mut [T::Acc],
    db: &mut [T::Acc],
) {
    abreast!(x.rows, |r, R| {
        let rows = [x.part(r, R), dy.part(r, R)];
        // One for all, or each its own.
        let mut of_rows = [stats[0]; R];
        for i in 0..R {
            of_rows[i] = stats[(r + i).min(stats.len() - 1)];
        }
        add_some_columns::<S, T, R>(s, rows, of_rows, [&mut *dw, &mut *db])
    })
}

#[inline(always)]
fn add_some_columns<S: Simd, T: Element, const R: usize>(
    s: S,
    [x, dy]: [Strided<T>; 2],
    stats: [[T::Acc; 3]; R],
    [dw, db]: [&mut [T::Acc]; 2],
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && dw.len() == n && db.len() == n);
    let (x, dy) = (rows::<T, R>(x), rows::<T, R>(dy));
    let zero = splat::<S, T>(s, T::Acc::ZERO);
    let (mut high, mut low, mut rstd) = ([zero; R], [zero; R], [zero; R]);
    for r in 0..R {
        high[r] = splat::<S, T>(s, stats[r][0]);
        low[r] = splat::<S, T>(s, stats[r][1]);
        rstd[r] = splat::<S, T>(s, stats[r][2]);
    }
    let (dw, db) = (dw.as_mut_ptr(), db.as_mut_ptr());
    // SAFETY: all places are below `n`, which all have.
    unsafe {
        each_vector!(w, 0..n, |at, k| {
            let (dw, db) = (dw.add(at), db.add(at));
            let (mut weight, mut bias) = (get::<S, T::Acc>(s, dw, k), get::<S, T::Acc>(s, db, k));
            for r in 0..R {
                let dy = get::<S, T>(s, dy[r].add(at), k);
                let d = (get::<S, T>(s, x[r].add(at), k) - high[r]) - low[r];
                weight = (dy * rstd[r]).fma(d, weight);
                bias = bias + dy;
            }
            put::<S, T::Acc>(weight, dw, k);
            put::<S, T::Acc>(bias, db, k);
        })
    }
}

#[inline(always)]
pub(super) fn add_rows<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    stats: [&[T::Acc]; 3],
    dw: &mut [T::Acc],
    db: &mut [T::Acc],
) {
    let (w, n) = (V::<S, T>::W, x.n);
    assert!(dy.n == n && dy.rows == x.rows && stats.iter().all(|s| s.len() >= n));
    let [high, low, rstd] = starts(stats);
    for r in 0..x.rows {
        let (x, dy) = (x.row(r), dy.row(r));
        let zero = splat::<S, T>(s, T::Acc::ZERO);
        let (mut weight, mut bias) = (zero, zero);
        // SAFETY: all places are below `n`, which all have.
        unsafe {
            each_vector!(w, 0..n, |at, k| {
                let dy = get::<S, T>(s, dy.add(at), k);
                let d = get::<S, T>(s, x.add(at), k) - get::<S, T::Acc>(s, high.add(at), k);
                let d = d - get::<S, T::Acc>(s, low.add(at), k);
                weight = (dy * get::<S, T::Acc>(s, rstd.add(at), k)).fma(d, weight);
                bias = bias + dy;
            })
        }
        dw[r] += weight.sum();
        db[r] += bias.sum();
    }
}
