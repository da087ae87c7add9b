//! Sums of every column over rows, for sets of short runs.
//!
//! In panels of a few rows and `ACROSS` vectors of columns, few enough to stay in the first-level cache between
//! two passes; a panel's sums go on in f64.
#![allow(unsafe_code)]

use super::get;
use super::sums::splat;
use crate::cpu::element::{Element, Float, V};
use crate::cpu::vector::{Simd, Vector};
use crate::cpu::view::Strided;

/// Rows of a panel.
const PANEL_ROWS: usize = 64;
/// Vectors of columns that are summed side by side.
const ACROSS: usize = 4;
/// Columns in the widest panel of any level.
const WIDEST: usize = 64;

/// `$body` for panels: columns from `$from` on, `$n` of them, in `$K` vectors.
macro_rules! each_panel {
    ($w:expr, $columns:expr, |$from:ident, $n:ident, $K:ident| $body:block) => {{
        const { assert!(ACROSS * $w <= WIDEST) };
        let mut $from = 0;
        while $from + ACROSS * $w <= $columns {
            const $K: usize = ACROSS;
            let $n = ACROSS * $w;
            $body
            $from += $n;
        }
        while $from < $columns {
            const $K: usize = 1;
            let $n = $w.min($columns - $from);
            $body
            $from += $n;
        }
    }};
}

/// Elements of vector `k` of a panel of `n` columns.
#[inline(always)]
fn of_vector(k: usize, w: usize, n: usize) -> usize {
    w.min(n - k * w)
}

#[inline(always)]
pub(super) fn moments<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    pivot: Option<&[T::Acc]>,
    offset: &mut [f64],
    m2: &mut [f64],
) {
    assert!(offset.len() == x.n && m2.len() == x.n && pivot.is_none_or(|p| p.len() == x.n));
    each_panel!(V::<S, T>::W, x.n, |from, n, K| {
        let pivot = pivot.map(|p| &p[from..from + n]);
        for r in (0..x.rows).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(x.rows - r);
            let sums = panel_moments::<S, T, K>(s, x.part(r, rows), [from, n], pivot);
            let share = rows as f64 / (r + rows) as f64;
            for l in 0..n {
                let delta = sums[0][l].to64() - offset[from + l];
                offset[from + l] += delta * share;
                m2[from + l] += sums[1][l].to64() + delta * delta * (r as f64 * share);
            }
        }
    });
}

/// Offsets from the pivot and sums of squared deviations of `n` columns from `from` on.
#[inline(always)]
fn panel_moments<S: Simd, T: Element, const K: usize>(
    s: S,
    x: Strided<T>,
    [from, n]: [usize; 2],
    pivot: Option<&[T::Acc]>,
) -> [[T::Acc; WIDEST]; 2] {
    let (w, zero) = (V::<S, T>::W, splat::<S, T>(s, T::Acc::ZERO));
    let (mut offset, mut m2, mut pivots) = ([zero; K], [zero; K], [zero; K]);
    // SAFETY: columns `from..from + n` of the block's rows, `n` of the pivots.
    unsafe {
        if let Some(pivot) = pivot {
            for k in 0..K {
                pivots[k] = get::<S, T::Acc>(s, pivot.as_ptr().add(k * w), of_vector(k, w, n));
            }
            for r in 0..x.rows {
                let row = x.row(r).add(from);
                for k in 0..K {
                    let x = get::<S, T>(s, row.add(k * w), of_vector(k, w, n));
                    offset[k] = offset[k] + (x - pivots[k]);
                }
            }
            let share = splat::<S, T>(s, T::Acc::from64(1.0 / x.rows as f64));
            for k in 0..K {
                offset[k] = offset[k] * share;
            }
        }
        for r in 0..x.rows {
            let row = x.row(r).add(from);
            for k in 0..K {
                let x = get::<S, T>(s, row.add(k * w), of_vector(k, w, n));
                let d = (x - pivots[k]) - offset[k];
                m2[k] = d.fma(d, m2[k]);
            }
        }
    }
    [spilled::<S, T, K>(offset), spilled::<S, T, K>(m2)]
}

/// Vectors as an array.
#[inline(always)]
fn spilled<S: Simd, T: Element, const K: usize>(v: [V<S, T>; K]) -> [T::Acc; WIDEST] {
    let mut array = [T::Acc::ZERO; WIDEST];
    for k in 0..K {
        // SAFETY: `K` vectors have no more than `WIDEST` lanes.
        unsafe { T::Acc::store(v[k], array.as_mut_ptr().add(k * V::<S, T>::W)) };
    }
    array
}

#[inline(always)]
pub(super) fn dots<S: Simd, T: Element>(
    s: S,
    x: Strided<T>,
    dy: Strided<T>,
    weight: Option<&[T::Acc]>,
    high: &[T::Acc],
    g: &mut [f64],
    gx: &mut [f64],
) {
    assert!(dy.n == x.n && dy.rows == x.rows && high.len() == x.n && g.len() == x.n && gx.len() == x.n);
    each_panel!(V::<S, T>::W, x.n, |from, n, K| {
        for r in (0..x.rows).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(x.rows - r);
            let (panel, weight) = ([x.part(r, rows), dy.part(r, rows)], weight.map(|w| &w[r..r + rows]));
            let sums = panel_dots::<S, T, K>(s, panel, [from, n], weight, &high[from..from + n]);
            for l in 0..n {
                g[from + l] += sums[0][l].to64();
                gx[from + l] += sums[1][l].to64();
            }
        }
    });
}

/// Sums of `g` and `g * (x - high)` of `n` columns from `from` on.
#[inline(always)]
fn panel_dots<S: Simd, T: Element, const K: usize>(
    s: S,
    [x, dy]: [Strided<T>; 2],
    [from, n]: [usize; 2],
    weight: Option<&[T::Acc]>,
    high: &[T::Acc],
) -> [[T::Acc; WIDEST]; 2] {
    let (w, zero) = (V::<S, T>::W, splat::<S, T>(s, T::Acc::ZERO));
    let (mut g, mut gx, mut highs) = ([zero; K], [zero; K], [zero; K]);
    // SAFETY: columns `from..from + n` of the blocks' rows, `n` of `high`.
    unsafe {
        for k in 0..K {
            highs[k] = get::<S, T::Acc>(s, high.as_ptr().add(k * w), of_vector(k, w, n));
        }
        for r in 0..x.rows {
            let weight = splat::<S, T>(s, weight.map_or(T::Acc::ONE, |w| w[r]));
            let (x, dy) = (x.row(r).add(from), dy.row(r).add(from));
            for k in 0..K {
                let dy = get::<S, T>(s, dy.add(k * w), of_vector(k, w, n)) * weight;
                g[k] = g[k] + dy;
                gx[k] = dy.fma(get::<S, T>(s, x.add(k * w), of_vector(k, w, n)) - highs[k], gx[k]);
            }
        }
    }
    [spilled::<S, T, K>(g), spilled::<S, T, K>(gx)]
}
