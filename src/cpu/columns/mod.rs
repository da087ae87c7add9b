//! Forward kernels for sets of short runs: memory is walked row by row, with sums for every column,
//! and columns are merged into sets at the end.
//!
//! Rows shorter than a few vectors are folded: `k` rows are walked as one of `k` times the columns.

pub(in crate::cpu) mod backward;

use crate::cpu::element::{Element, Float, V};
use crate::cpu::level::Kernel;
use crate::cpu::moments::{Moments, Source, Stat};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::runs::pivot;
use crate::cpu::streams::{each_vector, get, set, At, To};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::{Affine, Geometry};
use std::ops::Range;

/// Rows of a panel, which is `ACROSS` vectors wide: few enough to stay in the first-level cache.
pub(in crate::cpu) const PANEL_ROWS: usize = 64;
/// Vectors of columns that are summed side by side.
pub(in crate::cpu) const ACROSS: usize = 4;
/// Columns in the widest panel of any level.
pub(in crate::cpu) const WIDEST: usize = 64;
/// Rows are folded up to this many columns.
const FOLDED: usize = 512;

/// The part of a block in a tile, folded: `rows` full rows of `columns`, one of `extra`, from `first`
/// on, `stride` apart. Column `j` holds elements of the tile's column `j % unfolded`.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Sheet {
    pub first: usize,
    pub stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub extra: usize,
    pub unfolded: usize,
    /// Rows of the block in it, from `row` on.
    pub block: usize,
    pub row: usize,
    pub column: usize,
}

/// The sheets of a tile, one per block it touches.
///
/// Rows share a sheet's row where all of a row's columns are in the tile. Not where a row has a parameter,
/// nor its columns sets of their own: a set's sums must not depend on the sets beside it.
#[inline(always)]
pub(in crate::cpu) fn sheets<'a>(g: &'a Geometry, tile: &'a Tile) -> impl Iterator<Item = Sheet> + 'a {
    let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
    blocks.map(move |block| {
        let rows = tile.rows.start.max(block * g.rows)..tile.rows.end.min((block + 1) * g.rows);
        let unfolded = tile.columns.len();
        let k = match g.affine != Affine::Row && unfolded == g.width {
            // Eight rows at least, else merging the columns would cost more than walking them.
            true => (FOLDED / unfolded).min(rows.len() / 8).max(1),
            false => 1,
        };
        Sheet {
            first: rows.start * g.width + tile.columns.start,
            stride: k * g.width,
            rows: rows.len() / k,
            columns: k * unfolded,
            extra: rows.len() % k * unfolded,
            unfolded,
            block,
            row: rows.start - block * g.rows,
            column: tile.columns.start,
        }
    })
}

impl Sheet {
    /// Sets of the sheet, and of each its columns before folding, counted from the sheet's first.
    #[inline(always)]
    pub fn sets(&self, g: &Geometry) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (run, first) = (g.run, self.block * g.sets_per_outer() + self.column / g.run);
        (0..self.unfolded / run).map(move |q| (first + q, q * run..(q + 1) * run))
    }

    /// The folded columns of `columns`.
    #[inline(always)]
    pub fn folded(&self, columns: Range<usize>) -> impl Iterator<Item = usize> {
        let unfolded = self.unfolded;
        (0..self.columns / unfolded).flat_map(move |k| columns.clone().map(move |c| k * unfolded + c))
    }

    /// Elements in folded column `j`.
    #[inline(always)]
    pub fn count(&self, j: usize) -> f64 {
        (self.rows + (j < self.extra) as usize) as f64
    }

    /// Rows as ranges of x: the full ones and the extra one.
    #[inline(always)]
    pub fn lines(&self) -> impl Iterator<Item = Range<usize>> {
        let Sheet { first, stride, rows, columns, extra, .. } = *self;
        (0..rows + 1).map(move |r| {
            let at = first + r * stride;
            at..at + if r < rows { columns } else { extra }
        })
    }
}

/// `$body` for bands of neighbouring columns, `$from..$to`: `ACROSS` vectors, then single ones and the rest
/// of one. `$K` is the number of vectors.
macro_rules! each_band {
    ($w:expr, $n:expr, |$from:ident, $to:ident, $K:ident| $body:block) => {{
        let (w, n) = ($w, $n);
        let mut $from = 0;
        while $from + ACROSS * w <= n {
            const $K: usize = ACROSS;
            let $to = $from + ACROSS * w;
            $body
            $from = $to;
        }
        while $from < n {
            const $K: usize = 1;
            let $to = n.min($from + w);
            $body
            $from = $to;
        }
    }};
}
pub(in crate::cpu) use each_band;

/// Moments of every folded column about its pivot.
pub(in crate::cpu) struct ColumnMoments<A> {
    pub pivot: Vec<A>,
    pub offset: Vec<f64>,
    pub m2: Vec<f64>,
}

impl<A: Float> ColumnMoments<A> {
    #[inline(always)]
    pub fn of<S: Simd, T: Element<Acc = A>>(g: &Geometry, x: &[T], sheet: &Sheet) -> Self {
        let n = sheet.columns;
        let mut m = ColumnMoments { pivot: vec![A::ZERO; n], offset: vec![0.0; n], m2: vec![0.0; n] };
        if g.center {
            for (set, columns) in sheet.sets(g) {
                let pivot = pivot(g, x, g.first(set));
                sheet.folded(columns).for_each(|j| m.pivot[j] = pivot);
            }
        }
        each_band!(V::<S, T>::W, n, |from, to, K| {
            for r in (0..sheet.rows).step_by(PANEL_ROWS) {
                let rows = PANEL_ROWS.min(sheet.rows - r);
                let x = &x[sheet.first + r * sheet.stride + from..];
                let pivot = &m.pivot[from..to];
                let (offset, m2) = panel_moments::<S, T, K>(x, sheet.stride, rows, pivot, g.center);
                let (before, n) = (r as f64, (r + rows) as f64);
                let share = rows as f64 / n;
                for l in 0..to - from {
                    let j = from + l;
                    let delta = offset[l].to64() - m.offset[j];
                    m.offset[j] += delta * share;
                    m.m2[j] += m2[l].to64() + delta * delta * (before * share);
                }
            }
        });
        for j in 0..sheet.extra {
            let x = x[sheet.first + sheet.rows * sheet.stride + j].widen().to64();
            let mut moments = Moments { n: sheet.rows as f64, offset: m.offset[j], m2: m.m2[j] };
            moments.merge(match g.center {
                true => Moments { n: 1.0, offset: x - m.pivot[j].to64(), m2: 0.0 },
                false => Moments { n: 1.0, offset: 0.0, m2: x * x },
            });
            (m.offset[j], m.m2[j]) = (moments.offset, moments.m2);
        }
        m
    }

    /// The columns of a set merged, two-pass.
    #[inline(always)]
    pub fn merged(&self, sheet: &Sheet, columns: Range<usize>) -> Moments {
        let (mut n, mut sum) = (0.0, 0.0);
        for j in sheet.folded(columns.clone()) {
            n += sheet.count(j);
            sum += sheet.count(j) * self.offset[j];
        }
        let offset = sum / n;
        let mut m2 = 0.0;
        for j in sheet.folded(columns) {
            let d = self.offset[j] - offset;
            m2 += self.m2[j] + sheet.count(j) * d * d;
        }
        Moments { n, offset, m2 }
    }
}

/// The places of `K` vectors in a band's row of `n` columns.
#[inline(always)]
pub(in crate::cpu) fn places<const K: usize>(w: usize, n: usize) -> [At; K] {
    std::array::from_fn(|k| At { from: k * w, to: n.min((k + 1) * w), part: n < (k + 1) * w })
}

/// Offsets from the pivot and sums of squared deviations of the columns of a panel: as many as `pivot` has,
/// in `K` vectors.
#[inline(always)]
fn panel_moments<S: Simd, T: Element, const K: usize>(
    x: &[T],
    stride: usize,
    rows: usize,
    pivot: &[T::Acc],
    center: bool,
) -> ([T::Acc; WIDEST], [T::Acc; WIDEST]) {
    let zero = V::<S, T>::splat(T::Acc::ZERO);
    let n = pivot.len();
    let at = places::<K>(V::<S, T>::W, n);
    let (mut offset, mut m2, mut pivots) = ([zero; K], [zero; K], [zero; K]);
    for k in 0..K {
        pivots[k] = get::<S, T::Acc>(pivot, at[k]);
    }
    if center {
        for r in 0..rows {
            let row = &x[r * stride..][..n];
            for k in 0..K {
                offset[k] = offset[k] + (get::<S, T>(row, at[k]) - pivots[k]);
            }
        }
        let share = V::<S, T>::splat(T::Acc::from64(1.0 / rows as f64));
        for k in 0..K {
            offset[k] = offset[k] * share;
        }
    }
    for r in 0..rows {
        let row = &x[r * stride..][..n];
        for k in 0..K {
            let d = (get::<S, T>(row, at[k]) - pivots[k]) - offset[k];
            m2[k] = d.fma(d, m2[k]);
        }
    }
    (spilled::<S, T::Acc, K>(offset, at), spilled::<S, T::Acc, K>(m2, at))
}

/// Vectors as an array.
#[inline(always)]
pub(in crate::cpu) fn spilled<S: Simd, A: Float, const K: usize>(
    v: [A::V<S>; K],
    at: [At; K],
) -> [A; WIDEST] {
    let mut array = [A::ZERO; WIDEST];
    for k in 0..K {
        set::<S, A>(&mut array, at[k], v[k]);
    }
    array
}

/// Moments of every set's part in a tile, for sets that are cut.
pub(in crate::cpu) struct Partial<'a, T: Element> {
    pub g: &'a Geometry,
    pub x: &'a [T],
    pub tile: &'a Tile,
    pub out: &'a mut [Moments],
}

impl<T: Element> Kernel for Partial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut out = self.out.iter_mut();
        for sheet in sheets(self.g, self.tile) {
            let moments = ColumnMoments::of::<S, T>(self.g, self.x, &sheet);
            for ((_, columns), out) in sheet.sets(self.g).zip(&mut out) {
                *out = moments.merged(&sheet, columns);
            }
        }
    }
}

/// Normalizes a tile.
pub(in crate::cpu) struct Forward<'a, T: Element> {
    pub g: &'a Geometry,
    pub eps: T::Acc,
    pub x: &'a [T],
    pub params: &'a Params<'a, T::Acc>,
    pub stats: Source<'a, T::Acc>,
    pub tile: &'a Tile,
    pub out: OutTile<'a, T>,
}

impl<T: Element> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let (g, mut done) = (self.g, 0);
        for sheet in sheets(g, self.tile) {
            let moments = match &self.stats {
                Source::Given(_) => None,
                Source::Tile(_) => Some(ColumnMoments::of::<S, T>(g, self.x, &sheet)),
            };
            let mut line = Line::new(sheet.columns);
            for (set, columns) in sheet.sets(g) {
                let stat = match (&self.stats, &moments) {
                    (Source::Tile(_), Some(m)) => {
                        Stat::of(pivot(g, self.x, g.first(set)), m.merged(&sheet, columns.clone()))
                    }
                    (Source::Given(stats), _) => stats.of(set),
                    (Source::Tile(_), None) => unreachable!(),
                };
                self.stats.keep(done, stat);
                done += 1;
                line.set(&sheet, columns, stat, stat.rstd(self.eps), self.params);
            }
            self.normalize::<S>(&sheet, &line);
        }
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    fn normalize<S: Simd>(&mut self, sheet: &Sheet, line: &Line<T::Acc>) {
        for (r, at) in sheet.lines().enumerate().filter(|(_, at)| !at.is_empty()) {
            let y = match sheet.stride == sheet.columns {
                true => self.out.rows(at.clone()),
                false => {
                    let row = sheet.block * self.g.rows + sheet.row + r;
                    self.out.row(row, sheet.column..sheet.column + sheet.columns)
                }
            };
            let (high, scale, bias) = (&line.high[..at.len()], &line.scale, &line.bias);
            match self.params.form {
                Form::Rows => {
                    let row = sheet.row + r;
                    let (w, b) = (self.params.weight(row), self.params.bias(row));
                    by_row::<S, T>(&self.x[at], y, high, scale, bias, [w, b]);
                }
                _ => by_columns::<S, T>(&self.x[at], y, high, scale, bias),
            }
        }
    }
}

/// What each folded column is normalized with: `y = (x - high) * scale + bias`.
struct Line<A> {
    high: Vec<A>,
    scale: Vec<A>,
    bias: Vec<A>,
}

impl<A: Float> Line<A> {
    fn new(n: usize) -> Self {
        Line { high: vec![A::ZERO; n], scale: vec![A::ZERO; n], bias: vec![A::ZERO; n] }
    }

    #[inline(always)]
    fn set(&mut self, sheet: &Sheet, columns: Range<usize>, stat: Stat<A>, rstd: A, params: &Params<A>) {
        for j in sheet.folded(columns) {
            let (w, b) = match params.form {
                Form::Spans(span) => {
                    let p = (sheet.column + j % sheet.unfolded) / span;
                    (params.weight(p), params.bias(p))
                }
                // Applied row by row.
                _ => (A::ONE, A::ZERO),
            };
            self.high[j] = stat.high;
            self.scale[j] = rstd * w;
            self.bias[j] = b - stat.low * (rstd * w);
        }
    }
}

#[inline(always)]
fn by_columns<S: Simd, T: Element>(
    x: &[T],
    mut y: To<T>,
    high: &[T::Acc],
    scale: &[T::Acc],
    bias: &[T::Acc],
) {
    let n = x.len();
    let (high, scale, bias) = (&high[..n], &scale[..n], &bias[..n]);
    each_vector!(V::<S, T>::W, n, |at| {
        let d = get::<S, T>(x, at) - get::<S, T::Acc>(high, at);
        y.put::<S>(at, d.fma(get::<S, T::Acc>(scale, at), get::<S, T::Acc>(bias, at)));
    })
}

#[inline(always)]
fn by_row<S: Simd, T: Element>(
    x: &[T],
    mut y: To<T>,
    high: &[T::Acc],
    scale: &[T::Acc],
    bias: &[T::Acc],
    [w, b]: [T::Acc; 2],
) {
    let n = x.len();
    let (high, scale, bias) = (&high[..n], &scale[..n], &bias[..n]);
    let (w, b) = (V::<S, T>::splat(w), V::<S, T>::splat(b));
    each_vector!(V::<S, T>::W, n, |at| {
        let d = get::<S, T>(x, at) - get::<S, T::Acc>(high, at);
        let xhat = d.fma(get::<S, T::Acc>(scale, at), get::<S, T::Acc>(bias, at));
        y.put::<S>(at, xhat.fma(w, b));
    })
}
