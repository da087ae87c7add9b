//! Forward kernels for sets of long runs: each set of the tile is summed and normalized in turn,
//! while it is in cache.
//!
//! ```text
//! y = (x - high) * (rstd * weight) + (bias - low * rstd * weight)        mean = high + low
//! ```

pub(in crate::cpu) mod backward;
mod bands;
mod lines;

use crate::cpu::element::{Element, Float, PANEL, V};
use crate::cpu::level::Kernel;
use crate::cpu::moments::{Moments, Source, Stat};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::streams::{add_squares, add_sum, scale, scale_by_column, Sum};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::Geometry;
use bands::Band;
use lines::Lines;
use std::ops::Range;

/// The part of one set that lies in a tile: rows of the matrix, and columns.
#[derive(Debug, Clone)]
pub(in crate::cpu) struct Part {
    pub set: usize,
    /// Where the set's first element lies, which may be in another part.
    pub first: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

/// The sets of a tile, in order.
#[inline(always)]
pub(in crate::cpu) fn parts<'a>(g: &'a Geometry, tile: &'a Tile) -> impl Iterator<Item = Part> + 'a {
    let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
    blocks.flat_map(move |o| {
        let rows = tile.rows.start.max(o * g.rows)..tile.rows.end.min((o + 1) * g.rows);
        let sets = tile.columns.start / g.run..tile.columns.end.div_ceil(g.run);
        sets.map(move |q| Part {
            set: o * g.sets_per_outer() + q,
            first: o * g.block_len() + q * g.run,
            rows: rows.clone(),
            columns: tile.columns.start.max(q * g.run)..tile.columns.end.min((q + 1) * g.run),
        })
    })
}

impl Part {
    /// Rows and columns of panels of at most `most` elements.
    #[inline(always)]
    pub fn panels(&self, most: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let len = self.columns.len();
        let (down, across) = ((most / len).max(1), len.min(most));
        let (rows, columns) = (self.rows.clone(), self.columns.clone());
        rows.clone().step_by(down).flat_map(move |r| {
            let (rows, end) = (r..(r + down).min(rows.end), columns.end);
            columns.clone().step_by(across).map(move |c| (rows.clone(), c..(c + across).min(end)))
        })
    }

    /// Parameters, and the columns that have each.
    #[inline(always)]
    pub fn spans(&self, span: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let Range { start, end } = self.columns;
        let params = start / span..end.div_ceil(span);
        params.map(move |p| (p, start.max(p * span)..end.min((p + 1) * span)))
    }
}

/// The number that is subtracted from all of a set before it is summed: its first element.
#[inline(always)]
pub(in crate::cpu) fn pivot<T: Element>(g: &Geometry, x: &[T], first: usize) -> T::Acc {
    match g.center {
        true => x[first].widen(),
        false => T::Acc::ZERO,
    }
}

/// Moments of a part about the set's pivot; about zero without centering.
#[inline(always)]
pub(in crate::cpu) fn moments<S: Simd, T: Element>(g: &Geometry, x: &[T], part: &Part) -> Moments {
    let pivot = pivot(g, x, part.first);
    let mut moments = Moments::default();
    for (rows, columns) in part.panels(PANEL * V::<S, T>::W) {
        let n = (rows.len() * columns.len()) as f64;
        let row = |r: usize| &x[r * g.width + columns.start..r * g.width + columns.end];
        let mut mean = Stat::ZERO;
        if g.center {
            let mut sum = Sum::<S, T::Acc>::zero();
            for r in rows.clone() {
                add_sum(&mut sum, row(r), V::<S, T>::splat(pivot));
            }
            mean = Stat::mean(pivot, T::Acc::from64(sum.total().to64() / n));
        }
        let mut squares = Sum::<S, T::Acc>::zero();
        for r in rows {
            add_squares(&mut squares, row(r), V::<S, T>::splat(mean.high));
        }
        moments.merge(Moments::about(pivot, mean, squares.total(), n));
    }
    moments
}

/// Moments of every part of a set in a tile, for sets that are cut.
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
        for (part, out) in parts(self.g, self.tile).zip(self.out) {
            *out = moments::<S, T>(self.g, self.x, &part);
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
        if let Some(lines) = Lines::of(self.g, self.params.form, self.tile) {
            return self.lines::<S>(lines);
        }
        if let Some(band) = Band::of(self.g, self.tile) {
            return self.band::<S>(&band);
        }
        for (i, part) in parts(self.g, self.tile).enumerate() {
            let stat = match &self.stats {
                Source::Given(stats) => stats.of(part.set),
                Source::Tile(_) => {
                    let pivot = pivot(self.g, self.x, part.first);
                    Stat::of(pivot, moments::<S, T>(self.g, self.x, &part))
                }
            };
            self.stats.keep(i, stat);
            self.normalize::<S>(&part, stat);
        }
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    fn normalize<S: Simd>(&mut self, part: &Part, stat: Stat<T::Acc>) {
        let (high, rstd) = (stat.high, stat.rstd(self.eps));
        let shift = -(stat.low * rstd);
        let (params, out) = (self.params, &mut self.out);
        for row in part.rows.clone() {
            let x = &self.x[row * self.g.width..][..self.g.width];
            match (params.form, &params.weight, &params.bias) {
                (Form::Columns, Some(weight), bias) => {
                    let c = part.columns.clone();
                    let bias = bias.as_ref().map(|b| &b[c.clone()]);
                    let y = out.row(row, c.clone());
                    let constants = [high, rstd, shift];
                    scale_by_column::<S, T>(&x[c.clone()], y, &weight[c], bias, constants, 0);
                }
                (Form::Spans(span), _, _) => {
                    for (p, c) in part.spans(span) {
                        let weight = params.weight(p);
                        let bias = params.bias(p) + shift * weight;
                        let y = out.row(row, c.clone());
                        scale::<S, T>(&x[c], y, [high, rstd * weight, bias], self.g.run);
                    }
                }
                // `Params::new` gives columns a weight, and rows are not walked by runs.
                _ => unreachable!(),
            }
        }
    }
}
