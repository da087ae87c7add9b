//! What a walk is given: a tile, its elements and constants, and where its results go.

use super::affine::Affine;
use super::backward_formula::{Means, MeansFrom, ParamSums, Sums};
use super::element::{Element, Float, PANEL};
use super::loops::{Line, Loops, Walked};
use super::moments::{Moments, Stat, Stats, StatsFrom};
use super::tile::Tile;
use super::view::{InTile, OutTile, Strided};
use crate::geometry::Geometry;
use std::ops::Range;

/// Moments of every set's part in a tile, for sets that are cut.
pub(super) struct MomentsArgs<'a, T: Walked> {
    pub loops: &'static Loops<T>,
    pub g: &'a Geometry,
    pub x: InTile<'a, T>,
    pub tile: &'a Tile,
    /// Of every set of the tensor.
    pub pivots: &'a [T::Acc],
    pub out: &'a mut [Moments],
}

/// Normalizes a tile.
pub(super) struct ForwardArgs<'a, 'y, T: Walked> {
    pub loops: &'static Loops<T>,
    pub g: &'a Geometry,
    pub eps: T::Acc,
    pub affine: &'a Affine<'a, T::Acc>,
    pub x: InTile<'a, T>,
    pub tile: &'a Tile,
    pub stats: StatsFrom<'a, T::Acc>,
    pub y: Out<'y, T>,
}

/// Where a block is written: its first element's row and column, and the elements between two of its rows.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub at: [usize; 2],
    pub stride: usize,
}

/// A tile that a forward writes.
pub(super) enum Out<'a, T: Walked> {
    Tile(OutTile<'a, T>),
    /// Through what stands behind the norm.
    Finished(&'a mut dyn Finish<T>),
}

/// A tile of y behind what stands behind the norm.
pub(super) trait Finish<T: Walked> {
    /// Elements between two rows of the tile.
    fn stride(&self) -> usize;

    /// Writes what becomes of a block of x.
    fn write(&mut self, to: Place, x: Strided<T>, line: &Line<T::Acc>);
}

impl<T: Walked> Out<'_, T> {
    pub fn stride(&self) -> usize {
        match self {
            Out::Tile(y) => y.stride(),
            Out::Finished(y) => y.stride(),
        }
    }

    /// Writes what `line` makes of a block of x.
    #[inline(always)]
    pub fn write(&mut self, loops: &Loops<T>, to: Place, x: Strided<T>, line: Line<T::Acc>) {
        let y = match self {
            Out::Tile(y) => y.block(to.at, to.stride, x.rows, x.n),
            Out::Finished(y) => return y.write(to, x, &line),
        };
        match line {
            Line::Spans { span, constants, ahead } => loops.scale_spans(x, y, span, constants, ahead),
            Line::Columns { weight, bias, parted, constants, ahead } => {
                loops.scale_columns(x, y, weight, bias, parted, constants, ahead)
            }
            Line::Each { constants, rows } => loops.scale_each(x, y, constants, rows),
        }
    }
}

/// What both backwards read.
#[derive(Clone, Copy)]
pub(super) struct Input<'a, T: Walked> {
    pub loops: &'static Loops<T>,
    pub g: &'a Geometry,
    pub eps: T::Acc,
    pub affine: &'a Affine<'a, T::Acc>,
    pub x: InTile<'a, T>,
    pub dy: InTile<'a, T>,
    pub tile: &'a Tile,
    pub stats: Stats<'a, T::Acc>,
}

/// Sums over a tile without dx: of its sets, and of its parameters.
pub(super) struct SumsArgs<'a, T: Walked> {
    pub input: Input<'a, T>,
    /// Of spans alone; `BackwardArgs` makes those of columns and rows.
    pub params: Option<ParamSums<'a, T::Acc>>,
    pub sums: &'a mut [Sums],
}

/// dx of a tile, and the sums of its parameters.
pub(super) struct BackwardArgs<'a, T: Walked> {
    pub input: Input<'a, T>,
    pub means: MeansFrom<'a, T::Acc>,
    pub params: Option<ParamSums<'a, T::Acc>>,
    pub dx: Option<OutTile<'a, T>>,
}

impl<'a, T: Walked> BackwardArgs<'a, T> {
    pub fn with_dx<'b>(self, dx: OutTile<'b, T>) -> BackwardArgs<'b, T>
    where
        'a: 'b,
    {
        BackwardArgs { dx: Some(dx), ..self }
    }
}

/// The number that is subtracted from all of a set before it is summed: its first element.
#[inline(always)]
pub(super) fn pivot<T: Element>(g: &Geometry, x: &InTile<T>, row: usize, column: usize) -> Option<T::Acc> {
    g.center.then(|| x.at(row, column).widen())
}

/// The part of one set that lies in a tile: rows of the matrix, and columns.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub set: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

/// The sets of a tile, in order.
pub(super) fn parts<'a>(g: &'a Geometry, tile: &'a Tile) -> impl Iterator<Item = Part> + 'a {
    let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
    blocks.flat_map(move |o| {
        let rows = tile.rows.start.max(o * g.rows)..tile.rows.end.min((o + 1) * g.rows);
        let sets = tile.columns.start / g.run..tile.columns.end.div_ceil(g.run);
        sets.map(move |q| Part {
            set: o * g.sets_per_outer() + q,
            rows: rows.clone(),
            columns: tile.columns.start.max(q * g.run)..tile.columns.end.min((q + 1) * g.run),
        })
    })
}

impl Part {
    pub fn block<'a, T: Copy>(&self, x: &InTile<'a, T>) -> Strided<'a, T> {
        x.block([self.rows.start, self.columns.start], x.stride(), self.rows.len(), self.columns.len())
    }

    pub fn place(&self, stride: usize) -> Place {
        Place { at: [self.rows.start, self.columns.start], stride }
    }

    pub fn out<'a, T: Element>(&self, y: &'a mut OutTile<'_, T>) -> super::view::To<'a, T> {
        let stride = y.stride();
        y.block([self.rows.start, self.columns.start], stride, self.rows.len(), self.columns.len())
    }

    /// Parts of at most `most` elements.
    pub fn panels(&self, most: usize) -> impl Iterator<Item = Part> {
        let len = self.columns.len();
        let (down, across) = ((most / len).max(1), len.min(most));
        let (set, rows, columns) = (self.set, self.rows.clone(), self.columns.clone());
        rows.clone().step_by(down).flat_map(move |r| {
            let (rows, end) = (r..(r + down).min(rows.end), columns.end);
            let columns = columns.clone().step_by(across).map(move |c| c..(c + across).min(end));
            columns.map(move |columns| Part { set, rows: rows.clone(), columns })
        })
    }

    /// Parameters of the part's columns; each has `run` of them, a span or a part of one.
    pub fn spans(&self, span: usize) -> (Range<usize>, usize) {
        let Range { start, end } = self.columns;
        (start / span..end.div_ceil(span), span.min(end - start))
    }

    /// Moments about the set's pivot; about zero without one.
    pub fn moments<T: Walked>(&self, loops: &Loops<T>, x: &InTile<T>, pivot: Option<T::Acc>) -> Moments {
        let mut moments = Moments::default();
        for panel in self.panels(PANEL * loops.width) {
            let n = (panel.rows.len() * panel.columns.len()) as f64;
            let (mean, squares) = loops.moments(panel.block(x), pivot);
            moments.merge(Moments::about(pivot.unwrap_or(T::Acc::ZERO), mean, squares, n));
        }
        moments
    }
}

impl<T: Walked> Input<'_, T> {
    /// Statistics of a set, and its reciprocal deviation.
    #[inline(always)]
    pub fn stat(&self, set: usize) -> (Stat<T::Acc>, T::Acc) {
        let stat = self.stats.of(set);
        (stat, stat.rstd(self.eps))
    }

    pub fn means(&self, sums: Sums, stat: Stat<T::Acc>, rstd: T::Acc) -> Means<T::Acc> {
        Means::of(sums, stat, rstd, self.g.center, self.g.set_len() as f64)
    }
}
