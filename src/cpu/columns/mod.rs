//! Forward kernels for sets of short runs: memory is walked row by row, with sums for every column,
//! and columns are merged into sets at the end.
//!
//! Rows shorter than a few vectors are folded: `k` rows are walked as one of `k` times the columns.

pub(in crate::cpu) mod backward;

use crate::cpu::element::{fma, Element, Float, Panel};
use crate::cpu::level::{Kernel, Level};
use crate::cpu::moments::{Moments, Source, Stat};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::runs::pivot;
use crate::cpu::tile::Tile;
use crate::geometry::{Affine, Geometry};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of a panel 64 columns wide: `PANEL` elements.
const PANEL_ROWS: usize = 64;
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

/// Moments of every folded column about its pivot.
pub(in crate::cpu) struct ColumnMoments<A> {
    pub pivot: Vec<A>,
    pub offset: Vec<f64>,
    pub m2: Vec<f64>,
}

impl<A: Float> ColumnMoments<A> {
    #[inline(always)]
    pub fn of<T: Element<Acc = A>>(
        level: Level,
        g: &Geometry,
        x: &[T],
        sheet: &Sheet,
        buffer: &mut T::Buffer,
    ) -> Self {
        let n = sheet.columns;
        let mut m = ColumnMoments { pivot: vec![A::ZERO; n], offset: vec![0.0; n], m2: vec![0.0; n] };
        if g.center {
            for (set, columns) in sheet.sets(g) {
                let pivot = pivot(g, x, set);
                sheet.folded(columns).for_each(|j| m.pivot[j] = pivot);
            }
        }
        let mut at = 0;
        while at < n {
            at = match n - at {
                64.. => m.panels::<T, 64>(level, g, x, sheet, at, at, buffer),
                // The last vector again; what it did already is not merged twice.
                1.. if n >= 16 => m.panels::<T, 16>(level, g, x, sheet, at.min(n - 16), at, buffer),
                _ => m.panels::<T, 1>(level, g, x, sheet, at, at, buffer),
            };
        }
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

    /// Moments of `C` columns from `from` on; keeps those from `keep` on. Returns the end.
    #[inline(always)]
    fn panels<T: Element<Acc = A>, const C: usize>(
        &mut self,
        level: Level,
        g: &Geometry,
        x: &[T],
        sheet: &Sheet,
        from: usize,
        keep: usize,
        buffer: &mut T::Buffer,
    ) -> usize {
        let pivot: [A; C] = std::array::from_fn(|l| self.pivot[from + l]);
        for r in (0..sheet.rows).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(sheet.rows - r);
            let panel = &x[sheet.first + r * sheet.stride + from..];
            let panel = T::panel(panel, sheet.stride, rows, C, buffer);
            let (offset, m2) = level.run(PanelMoments { x: panel, pivot, center: g.center });
            let (before, n) = (r as f64, (r + rows) as f64);
            let share = rows as f64 / n;
            for l in keep - from..C {
                let j = from + l;
                let delta = offset[l].to64() - self.offset[j];
                self.offset[j] += delta * share;
                self.m2[j] += m2[l].to64() + delta * delta * (before * share);
            }
        }
        from + C
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

/// Offsets from the pivot and sums of squared deviations of the `C` columns of a panel.
struct PanelMoments<'a, A, const C: usize> {
    x: Panel<'a, A>,
    pivot: [A; C],
    center: bool,
}

impl<A: Float, const C: usize> Kernel for PanelMoments<'_, A, C> {
    type Output = ([A; C], [A; C]);

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) -> Self::Output {
        let PanelMoments { x, pivot, center } = self;
        let mut offset = [A::ZERO; C];
        if center {
            for r in 0..x.rows {
                let row = &x.row(r)[..C];
                for l in 0..C {
                    offset[l] += row[l] - pivot[l];
                }
            }
            let share = A::from64(1.0 / x.rows as f64);
            offset.iter_mut().for_each(|o| *o *= share);
        }
        let mut m2 = [A::ZERO; C];
        for r in 0..x.rows {
            let row = &x.row(r)[..C];
            for l in 0..C {
                let d = (row[l] - pivot[l]) - offset[l];
                m2[l] = fma::<_, FMA>(d, d, m2[l]);
            }
        }
        (offset, m2)
    }
}

/// Moments of every set's part in a tile, for sets that are cut.
pub(in crate::cpu) struct Partial<'a, T: Element> {
    pub level: Level,
    pub g: &'a Geometry,
    pub x: &'a [T],
    pub tile: &'a Tile,
    pub out: &'a mut [Moments],
}

impl<T: Element> Kernel for Partial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) {
        let mut buffer = T::buffer();
        let mut out = self.out.iter_mut();
        for sheet in sheets(self.g, self.tile) {
            let moments = ColumnMoments::of(self.level, self.g, self.x, &sheet, &mut buffer);
            for ((_, columns), out) in sheet.sets(self.g).zip(&mut out) {
                *out = moments.merged(&sheet, columns);
            }
        }
    }
}

/// Normalizes a tile.
pub(in crate::cpu) struct Forward<'a, T: Element> {
    pub level: Level,
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
    fn run<const W: usize, const FMA: bool>(mut self) {
        let mut buffer = T::buffer();
        let (g, mut done) = (self.g, 0);
        for sheet in sheets(g, self.tile) {
            let moments = match &self.stats {
                Source::Given(_) => None,
                Source::Tile(_) => Some(ColumnMoments::of(self.level, g, self.x, &sheet, &mut buffer)),
            };
            let mut line = Line::new(sheet.columns);
            for (set, columns) in sheet.sets(g) {
                let stat = match (&self.stats, &moments) {
                    (Source::Tile(_), Some(m)) => {
                        Stat::of(pivot(g, self.x, set), m.merged(&sheet, columns.clone()))
                    }
                    (Source::Given(stats), _) => stats.of(set),
                    (Source::Tile(_), None) => unreachable!(),
                };
                self.stats.keep(done, stat);
                done += 1;
                line.set(&sheet, columns, stat, stat.rstd(self.eps), self.params);
            }
            self.normalize::<FMA>(&sheet, &line);
        }
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    fn normalize<const FMA: bool>(&mut self, sheet: &Sheet, line: &Line<T::Acc>) {
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
                    by_row::<T, FMA>(&self.x[at], y, high, scale, bias, [w, b]);
                }
                _ => by_columns::<T, FMA>(&self.x[at], y, high, scale, bias),
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
fn by_columns<T: Element, const FMA: bool>(
    x: &[T],
    y: &mut [MaybeUninit<T>],
    high: &[T::Acc],
    scale: &[T::Acc],
    bias: &[T::Acc],
) {
    let n = x.len();
    let (y, high, scale, bias) = (&mut y[..n], &high[..n], &scale[..n], &bias[..n]);
    for i in 0..n {
        y[i].write(T::narrow(fma::<_, FMA>(x[i].widen() - high[i], scale[i], bias[i])));
    }
}

#[inline(always)]
fn by_row<T: Element, const FMA: bool>(
    x: &[T],
    y: &mut [MaybeUninit<T>],
    high: &[T::Acc],
    scale: &[T::Acc],
    bias: &[T::Acc],
    [w, b]: [T::Acc; 2],
) {
    let n = x.len();
    let (y, high, scale, bias) = (&mut y[..n], &high[..n], &scale[..n], &bias[..n]);
    for i in 0..n {
        let xhat = fma::<_, FMA>(x[i].widen() - high[i], scale[i], bias[i]);
        y[i].write(T::narrow(fma::<_, FMA>(xhat, w, b)));
    }
}
