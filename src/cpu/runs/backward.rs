//! Backward kernels for sets of long runs.

use super::bands::Band;
use super::lines::Lines;
use super::{parts, Part};
use crate::cpu::element::{Element, Float, PANEL, V};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Slots, Sums};
use crate::cpu::level::Kernel;
use crate::cpu::moments::{Stat, Stats};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::streams::{add_columns, add_dots, gradient, gradient_by_column, Sum};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::Geometry;

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
        if let Some(band) = Band::of(g, tile) {
            return self.band::<S>(&band);
        }
        match (params.form, Lines::of(g, params.form, tile)) {
            (Form::Columns, Some(lines)) => self.lines::<S>(lines),
            (Form::Columns, None) => self.by_columns::<S>(),
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
        for (rows, columns) in part.panels(PANEL * V::<S, T>::W) {
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
                    gradient::<S, T>([&x[at.clone()], &dy[at]], s, s.rstd * params.weight(p), to, g.run);
                }
            }
        }
    }

    #[inline(always)]
    fn by_columns<S: Simd>(&mut self) {
        let Input { g, x, dy, params, tile, .. } = self.input;
        let Some(weight) = &params.weight else { return };
        for part in parts(g, tile) {
            let s = self.slope::<S>(&part);
            let c = part.columns.clone();
            let at = |row: usize| row * g.width + c.start..row * g.width + c.end;
            if let Some(dx) = &mut self.dx {
                for row in part.rows.clone() {
                    let both = [&x[at(row)], &dy[at(row)]];
                    gradient_by_column::<S, T>(both, s, &weight[c.clone()], dx.row(row, c.clone()), 0);
                }
            }
            let Some(slots) = &mut self.slots else { continue };
            let own = c.start - tile.columns.start..c.end - tile.columns.start;
            let (dw, db) = (&mut slots.weight[own.clone()], &mut slots.bias[own]);
            let mut row = part.rows.start;
            while row + 2 <= part.rows.end {
                let (x, dy) = ([&x[at(row)], &x[at(row + 1)]], [&dy[at(row)], &dy[at(row + 1)]]);
                add_columns::<S, T, 2>(x, dy, [s; 2], [&mut *dw, &mut *db]);
                row += 2;
            }
            if row < part.rows.end {
                add_columns::<S, T, 1>([&x[at(row)]], [&dy[at(row)]], [s], [dw, db]);
            }
        }
    }
}
