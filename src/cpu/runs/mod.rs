//! Forward kernels for sets of long runs: each set of the tile is summed and normalized in turn,
//! while it is in cache.
//!
//! ```text
//! y = (x - high) * (rstd * weight) + (bias - low * rstd * weight)        mean = high + low
//! ```

pub(in crate::cpu) mod backward;

use crate::cpu::element::{fma, Element, Float, PANEL};
use crate::cpu::lanes::{Squares, Sum};
use crate::cpu::level::{Kernel, Level};
use crate::cpu::moments::{Moments, Source, Stat};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::tile::Tile;
use crate::geometry::Geometry;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The part of one set that lies in a tile: rows of the matrix, and columns.
#[derive(Debug, Clone)]
pub(in crate::cpu) struct Part {
    pub set: usize,
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
            rows: rows.clone(),
            columns: tile.columns.start.max(q * g.run)..tile.columns.end.min((q + 1) * g.run),
        })
    })
}

impl Part {
    // Iterators rather than functions that take a closure: a closure as large as a kernel's inner part
    // would be compiled apart, for the baseline.

    /// Rows and columns of panels of at most `PANEL` elements.
    #[inline(always)]
    pub fn panels(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let len = self.columns.len();
        let (down, across) = ((PANEL / len).max(1), len.min(PANEL));
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

/// The first element of a set.
#[inline(always)]
pub(in crate::cpu) fn pivot<T: Element>(g: &Geometry, x: &[T], set: usize) -> T::Acc {
    let spo = g.sets_per_outer();
    match g.center {
        true => x[set / spo * g.block_len() + set % spo * g.run].widen(),
        false => T::Acc::ZERO,
    }
}

/// Moments of a part about the set's pivot; about zero without centering.
#[inline(always)]
pub(in crate::cpu) fn moments<T: Element>(
    level: Level,
    g: &Geometry,
    x: &[T],
    part: &Part,
    buffer: &mut T::Buffer,
) -> Moments {
    let pivot = pivot(g, x, part.set);
    let mut moments = Moments::default();
    for (rows, columns) in part.panels() {
        let n = rows.len() * columns.len();
        let from = &x[rows.start * g.width + columns.start..];
        let panel = T::panel(from, g.width, rows.len(), columns.len(), buffer).flat();
        let mut offset = T::Acc::ZERO;
        if g.center {
            let sum = level.run(Sum { x: panel, pivot });
            offset = T::Acc::from64(sum.to64() / n as f64);
        }
        let m2 = level.run(Squares { x: panel, pivot, offset });
        moments.merge(Moments { n: n as f64, offset: offset.to64(), m2: m2.to64() });
    }
    moments
}

/// Moments of every part of a set in a tile, for sets that are cut.
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
        for (part, out) in parts(self.g, self.tile).zip(self.out) {
            *out = moments(self.level, self.g, self.x, &part, &mut buffer);
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
        for (i, part) in parts(self.g, self.tile).enumerate() {
            let stat = match &self.stats {
                Source::Given(stats) => stats.of(part.set),
                Source::Tile(_) => {
                    let moments = moments(self.level, self.g, self.x, &part, &mut buffer);
                    Stat::of(pivot(self.g, self.x, part.set), moments)
                }
            };
            self.stats.keep(i, stat);
            self.normalize::<FMA>(&part, stat);
        }
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    fn normalize<const FMA: bool>(&mut self, part: &Part, stat: Stat<T::Acc>) {
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
                    by_column::<T, FMA>(&x[c.clone()], y, &weight[c], bias, [high, rstd, shift]);
                }
                (Form::Spans(span), _, _) => {
                    for (p, c) in part.spans(span) {
                        let weight = params.weight(p);
                        let bias = fma::<_, FMA>(shift, weight, params.bias(p));
                        let y = out.row(row, c.clone());
                        by_constant::<T, FMA>(&x[c], y, [high, rstd * weight, bias]);
                    }
                }
                // `Params::new` gives columns a weight, and rows are not walked by runs.
                _ => unreachable!(),
            }
        }
    }
}

/// `y = (x - high) * scale + bias`
#[inline(always)]
fn by_constant<T: Element, const FMA: bool>(
    x: &[T],
    y: &mut [MaybeUninit<T>],
    [high, scale, bias]: [T::Acc; 3],
) {
    let n = x.len();
    let y = &mut y[..n];
    for i in 0..n {
        y[i].write(T::narrow(fma::<_, FMA>(x[i].widen() - high, scale, bias)));
    }
}

/// `y = ((x - high) * rstd + shift) * weight + bias`
#[inline(always)]
fn by_column<T: Element, const FMA: bool>(
    x: &[T],
    y: &mut [MaybeUninit<T>],
    weight: &[T::Acc],
    bias: Option<&[T::Acc]>,
    [high, rstd, shift]: [T::Acc; 3],
) {
    let n = x.len();
    let (y, weight) = (&mut y[..n], &weight[..n]);
    match bias {
        Some(bias) => {
            let bias = &bias[..n];
            for i in 0..n {
                let xhat = fma::<_, FMA>(x[i].widen() - high, rstd, shift);
                y[i].write(T::narrow(fma::<_, FMA>(xhat, weight[i], bias[i])));
            }
        }
        None => {
            for i in 0..n {
                let xhat = fma::<_, FMA>(x[i].widen() - high, rstd, shift);
                y[i].write(T::narrow(xhat * weight[i]));
            }
        }
    }
}
