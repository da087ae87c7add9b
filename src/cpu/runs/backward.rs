//! Backward kernels for sets of long runs.

use super::lines::Lines;
use super::{parts, Part};
use crate::cpu::element::{Element, Float, V};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Slots, Sums};
use crate::cpu::level::Kernel;
use crate::cpu::moments::{Stat, Stats};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::streams::{add_dots, gradient, Rows, Sum, ABREAST};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::Geometry;
use std::ops::Range;

/// Arguments of both kernels.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Input<'a, T: Element> {
    pub g: &'a Geometry,
    pub eps: T::Acc,
    pub x: &'a [T],
    pub dy: &'a [T],
    pub params: &'a Params<'a, T::Acc>,
    pub stats: Stats<'a, T::Acc>,
    pub tile: &'a Tile,
}

/// Sums over a tile without dx: of its parameters, and of its sets.
pub(in crate::cpu) struct Partial<'a, T: Element> {
    pub input: Input<'a, T>,
    /// Not for weights by column, whose sums `Backward` makes.
    pub slots: Option<Slots<'a, T::Acc>>,
    pub sums: &'a mut [Sums],
}

impl<T: Element> Kernel for Partial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        for (part, sums) in parts(self.input.g, self.input.tile).zip(self.sums) {
            let stat = self.input.stats.of(part.set);
            *sums = self.input.sums::<S>(&part, stat, &mut self.slots);
        }
    }
}

/// dx of a tile, and the sums of its parameters.
pub(in crate::cpu) struct Backward<'a, T: Element> {
    pub input: Input<'a, T>,
    pub means: MeansFrom<'a, T::Acc>,
    pub slots: Option<Slots<'a, T::Acc>>,
    pub dx: Option<OutTile<'a, T>>,
}

impl<T: Element> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let Input { g, params, tile, .. } = self.input;
        match params.form {
            Form::Columns if Lines::of(g, params.form, tile).is_some() => self.lines::<S>(tile.sets(g)),
            Form::Columns => self.by_columns::<S>(),
            _ => self.by_spans::<S>(),
        }
    }
}

impl<T: Element> Input<'_, T> {
    /// Weighted sums of a part; adds to the slots what belongs to its parameters.
    #[inline(always)]
    fn sums<S: Simd>(&self, part: &Part, stat: Stat<T::Acc>, slots: &mut Option<Slots<T::Acc>>) -> Sums {
        let Form::Spans(span) = self.params.form else {
            return self.dots::<S>(part, self.params.weight.as_deref(), stat.high);
        };
        let mut sums = Sums::default();
        let rstd = stat.rstd(self.eps);
        let first = self.tile.columns.start / span;
        for (p, columns) in part.spans(span) {
            let own = self.dots::<S>(&Part { columns, ..part.clone() }, None, stat.high);
            let weight = self.params.weight(p).to64();
            sums.g += own.g * weight;
            sums.gx += own.gx * weight;
            if let Some(slots) = slots {
                slots.weight[p - first] += T::Acc::from64(own.dot(stat, rstd));
                slots.bias[p - first] += T::Acc::from64(own.g);
            }
        }
        sums
    }

    /// Sums of a part, with `weight` by column.
    #[inline(always)]
    fn dots<S: Simd>(&self, part: &Part, weight: Option<&[T::Acc]>, high: T::Acc) -> Sums {
        let mut sums = Sums::default();
        for (rows, columns) in part.panels() {
            let weight = weight.map(|w| &w[columns.clone()]);
            let mut dots = [Sum::<S, T::Acc>::zero(), Sum::zero()];
            for r in rows {
                let at = r * self.g.width + columns.start..r * self.g.width + columns.end;
                add_dots(&mut dots, &self.x[at.clone()], &self.dy[at], weight, V::<S, T>::splat(high));
            }
            let [g, gx] = dots;
            sums.g += g.total().to64();
            sums.gx += gx.total().to64();
        }
        sums
    }
}

impl<T: Element> Backward<'_, T> {
    #[inline(always)]
    pub(super) fn slope<S: Simd>(&mut self, part: &Part) -> Slope<T::Acc> {
        let stat = self.input.stats.of(part.set);
        let rstd = stat.rstd(self.input.eps);
        // Sums by span are made here along with the set's; those by column later, along with dx.
        let spans = self.input.params.form != Form::Columns;
        let means = match self.means {
            MeansFrom::Given(means) => means[part.set],
            MeansFrom::Fixed if !spans || self.slots.is_none() => Means::ZERO,
            MeansFrom::Fixed | MeansFrom::Tile => {
                let sums = self.input.sums::<S>(part, stat, &mut self.slots);
                let g = self.input.g;
                match self.means {
                    MeansFrom::Fixed => Means::ZERO,
                    _ => Means::of(sums, stat, rstd, g.center, g.set_len() as f64),
                }
            }
        };
        Slope::of(stat, rstd, means)
    }

    #[inline(always)]
    fn by_spans<S: Simd>(&mut self) {
        let Input { g, x, dy, params, tile, .. } = self.input;
        let Form::Spans(span) = params.form else { return };
        for part in parts(g, tile) {
            let s = self.slope::<S>(&part);
            let Some(dx) = &mut self.dx else { continue };
            for row in part.rows.clone() {
                for (p, c) in part.spans(span) {
                    let at = row * g.width + c.start..row * g.width + c.end;
                    let to = dx.row(row, c);
                    gradient::<S, T>(&x[at.clone()], &dy[at], s, s.rstd * params.weight(p), to, g.run);
                }
            }
        }
    }

    /// A few rows at a time: the sums of their sets, then dx and the sums of columns.
    #[inline(always)]
    fn by_columns<S: Simd>(&mut self) {
        let (g, tile) = (self.input.g, self.input.tile);
        let across = tile.columns.start / g.run..tile.columns.end.div_ceil(g.run);
        let mut slopes = Vec::with_capacity(ABREAST * across.len());
        let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
        // Blocks of one row are taken together; else the sets of a block have the same slopes in all rows.
        let together = if g.rows == 1 { ABREAST } else { 1 };
        for block in blocks.clone().step_by(together) {
            let end = (block + together).min(blocks.end);
            let rows = tile.rows.start.max(block * g.rows)..tile.rows.end.min(end * g.rows);
            slopes.clear();
            for part in parts(g, &Tile { rows: rows.clone(), columns: tile.columns.clone() }) {
                slopes.push(self.slope::<S>(&part));
            }
            for (i, q) in across.clone().enumerate() {
                let columns = tile.columns.start.max(q * g.run)..tile.columns.end.min((q + 1) * g.run);
                let slope = |r: usize| slopes[if g.rows == 1 { r * across.len() + i } else { i }];
                let mut r = 0;
                while r + ABREAST <= rows.len() {
                    let own: [_; ABREAST] = std::array::from_fn(|k| slope(r + k));
                    self.abreast::<S, ABREAST>(rows.start + r, columns.clone(), own);
                    r += ABREAST;
                }
                for r in r..rows.len() {
                    self.abreast::<S, 1>(rows.start + r, columns.clone(), [slope(r)]);
                }
            }
        }
    }

    /// dx and column sums of `R` rows from `row` on.
    #[inline(always)]
    fn abreast<S: Simd, const R: usize>(&mut self, row: usize, c: Range<usize>, slopes: [Slope<T::Acc>; R]) {
        let Input { g, x, dy, params, tile, .. } = self.input;
        let Some(weight) = &params.weight else { return };
        let at = |k: usize| (row + k) * g.width + c.start..(row + k) * g.width + c.end;
        let rows = Rows::<T, R> {
            x: std::array::from_fn(|k| &x[at(k)]),
            dy: std::array::from_fn(|k| &dy[at(k)]),
            slopes,
            weight: &weight[c.clone()],
            ahead: R * g.width,
        };
        let own = c.start - tile.columns.start..c.end - tile.columns.start;
        let sums = self.slots.as_mut().map(|s| [&mut s.weight[own.clone()], &mut s.bias[own]]);
        let dx = self.dx.as_mut().map(|dx| dx.rows_of::<R>(row, c.clone()));
        rows.gradient::<S>(dx, sums);
    }
}
