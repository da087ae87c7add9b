//! Backward kernels for sets of long runs.

use super::{parts, Part};
use crate::cpu::element::{fma, Element, Float, Panel};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Slots, Sums};
use crate::cpu::lanes::Dots;
use crate::cpu::level::{Kernel, Level};
use crate::cpu::moments::{Stat, Stats};
use crate::cpu::output::OutTile;
use crate::cpu::params::{Form, Params};
use crate::cpu::tile::Tile;
use crate::geometry::Geometry;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Columns whose parameter sums are kept on the stack while rows pass by.
const BLOCK: usize = 256;
/// Bytes of x and dy that are summed and then turned into dx before the next rows are read: half of
/// a small second-level cache.
const GROUP_BYTES: usize = 128 << 10;

/// Arguments of both kernels.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Input<'a, T: Element> {
    pub level: Level,
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
    fn run<const W: usize, const FMA: bool>(mut self) {
        let mut buffers = (T::buffer(), T::buffer());
        for (part, sums) in parts(self.input.g, self.input.tile).zip(self.sums) {
            let stat = self.input.stats.of(part.set);
            *sums = self.input.sums(&part, stat, &mut self.slots, &mut buffers);
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
    fn run<const W: usize, const FMA: bool>(mut self) {
        let mut buffers = (T::buffer(), T::buffer());
        match self.input.params.form {
            Form::Columns => self.by_columns::<FMA>(&mut buffers),
            _ => self.by_spans::<FMA>(&mut buffers),
        }
    }
}

type Buffers<T> = (<T as Element>::Buffer, <T as Element>::Buffer);

impl<T: Element> Input<'_, T> {
    /// Weighted sums of a part; adds to the slots what belongs to its parameters.
    #[inline(always)]
    fn sums(
        &self,
        part: &Part,
        stat: Stat<T::Acc>,
        slots: &mut Option<Slots<T::Acc>>,
        buffers: &mut Buffers<T>,
    ) -> Sums {
        let mut sums = Sums::default();
        let Form::Spans(span) = self.params.form else {
            let weight = self.params.weight.as_deref();
            for (rows, columns) in part.panels() {
                let weight = weight.map(|w| &w[columns.clone()]);
                let [x, dy] = self.panels(rows, columns, buffers);
                sums.add(self.level.run(Dots { x, dy, weight, high: stat.high }), 1.0);
            }
            return sums;
        };
        let rstd = stat.rstd(self.eps);
        let first = self.tile.columns.start / span;
        for (p, columns) in part.spans(span) {
            let piece = Part { columns, ..part.clone() };
            let mut own = Sums::default();
            for (rows, columns) in piece.panels() {
                let [x, dy] = self.panels(rows, columns, buffers);
                own.add(self.level.run(Dots { x, dy, weight: None, high: stat.high }), 1.0);
            }
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

    /// A panel of x and the same of dy.
    #[inline(always)]
    fn panels<'b>(
        &'b self,
        rows: Range<usize>,
        columns: Range<usize>,
        buffers: &'b mut Buffers<T>,
    ) -> [Panel<'b, T::Acc>; 2] {
        let at = rows.start * self.g.width + columns.start;
        let (r, len) = (rows.len(), columns.len());
        let x = T::panel(&self.x[at..], self.g.width, r, len, &mut buffers.0);
        let dy = T::panel(&self.dy[at..], self.g.width, r, len, &mut buffers.1);
        [x, dy]
    }
}

impl<T: Element> Backward<'_, T> {
    #[inline(always)]
    fn slope(&mut self, part: &Part, buffers: &mut Buffers<T>) -> Slope<T::Acc> {
        let stat = self.input.stats.of(part.set);
        let rstd = stat.rstd(self.input.eps);
        // Sums by span are made here along with the set's; those by column later, along with dx.
        let spans = self.input.params.form != Form::Columns;
        let means = match self.means {
            MeansFrom::Given(means) => means[part.set],
            MeansFrom::Fixed if !spans || self.slots.is_none() => Means::ZERO,
            MeansFrom::Fixed | MeansFrom::Tile => {
                let sums = self.input.sums(part, stat, &mut self.slots, buffers);
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
    fn by_spans<const FMA: bool>(&mut self, buffers: &mut Buffers<T>) {
        let Input { g, x, dy, params, tile, .. } = self.input;
        let Form::Spans(span) = params.form else { return };
        for part in parts(g, tile) {
            let s = self.slope(&part, buffers);
            let Some(dx) = &mut self.dx else { continue };
            for row in part.rows.clone() {
                for (p, c) in part.spans(span) {
                    let at = row * g.width + c.start..row * g.width + c.end;
                    let to = dx.row(row, c);
                    constant_weight::<T, FMA>(&x[at.clone()], &dy[at], s, s.rstd * params.weight(p), to);
                }
            }
        }
    }

    #[inline(always)]
    fn by_columns<const FMA: bool>(&mut self, buffers: &mut Buffers<T>) {
        let (g, tile) = (self.input.g, self.input.tile);
        let bytes = 2 * size_of::<T>() * tile.columns.len();
        let group = (GROUP_BYTES / bytes).clamp(1, tile.rows.len());
        // Sets in the order of rows: one slope per row and set.
        let across = tile.columns.start / g.run..tile.columns.end.div_ceil(g.run);
        let mut slopes = Vec::with_capacity(group * across.len());
        let mut whole = Vec::new();
        for from in tile.rows.clone().step_by(group) {
            let rows = from..(from + group).min(tile.rows.end);
            slopes.clear();
            for row in rows.clone() {
                if g.rows == 1 {
                    let line = Tile { rows: row..row + 1, columns: tile.columns.clone() };
                    for part in parts(g, &line) {
                        slopes.push(self.slope(&part, buffers));
                    }
                } else {
                    // A set of several rows: all its rows are in the tile, or its means are given.
                    if whole.is_empty() || row % g.rows == 0 {
                        let end = ((row / g.rows + 1) * g.rows).min(tile.rows.end);
                        let block = Tile { rows: row..end, columns: tile.columns.clone() };
                        whole.clear();
                        for part in parts(g, &block) {
                            whole.push(self.slope(&part, buffers));
                        }
                    }
                    slopes.extend_from_slice(&whole);
                }
            }
            for (i, q) in across.clone().enumerate() {
                let columns = tile.columns.start.max(q * g.run)..tile.columns.end.min((q + 1) * g.run);
                for c in columns.clone().step_by(BLOCK) {
                    let block = c..(c + BLOCK).min(columns.end);
                    self.block::<FMA>(rows.clone(), block, slopes[i..].iter().step_by(across.len()));
                }
            }
        }
    }

    /// dx and parameter sums of a few columns over the rows of a group.
    #[inline(always)]
    fn block<'s, const FMA: bool>(
        &mut self,
        rows: Range<usize>,
        c: Range<usize>,
        slopes: impl Iterator<Item = &'s Slope<T::Acc>>,
    ) where
        T::Acc: 's,
    {
        let Input { g, x, dy, params, tile, .. } = self.input;
        let weight = &params.weight.as_ref().map_or(&[][..], |w| &w[c.clone()]);
        let n = c.len();
        let (mut dw, mut db) = ([T::Acc::ZERO; BLOCK], [T::Acc::ZERO; BLOCK]);
        for (row, s) in rows.zip(slopes) {
            let at = row * g.width + c.start..row * g.width + c.end;
            let (x, dy) = (&x[at.clone()], &dy[at]);
            let dx = self.dx.as_mut().map(|dx| dx.row(row, c.clone()));
            match (self.slots.is_some(), dx) {
                (true, Some(dx)) => both::<T, FMA>(x, dy, *s, weight, dx, &mut dw[..n], &mut db[..n]),
                (true, None) => column_sums::<T, FMA>(x, dy, *s, &mut dw[..n], &mut db[..n]),
                (false, Some(dx)) => column_weight::<T, FMA>(x, dy, *s, weight, dx),
                (false, None) => {}
            }
        }
        if let Some(slots) = &mut self.slots {
            let span = g.width / g.params();
            let first = tile.columns.start / span;
            if span == 1 {
                add(&mut slots.weight[c.start - first..c.end - first], &dw[..n]);
                add(&mut slots.bias[c.start - first..c.end - first], &db[..n]);
            } else {
                for (i, column) in c.enumerate() {
                    slots.weight[column / span - first] += dw[i];
                    slots.bias[column / span - first] += db[i];
                }
            }
        }
    }
}

#[inline(always)]
fn add<A: Float>(to: &mut [A], from: &[A]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
}

#[inline(always)]
fn constant_weight<T: Element, const FMA: bool>(
    x: &[T],
    dy: &[T],
    s: Slope<T::Acc>,
    weight: T::Acc,
    dx: &mut [MaybeUninit<T>],
) {
    let n = x.len();
    let (dy, dx) = (&dy[..n], &mut dx[..n]);
    for i in 0..n {
        let line = fma::<_, FMA>(x[i].widen() - s.high, s.slope, s.shift);
        dx[i].write(T::narrow(fma::<_, FMA>(dy[i].widen(), weight, line)));
    }
}

#[inline(always)]
fn column_weight<T: Element, const FMA: bool>(
    x: &[T],
    dy: &[T],
    s: Slope<T::Acc>,
    weight: &[T::Acc],
    dx: &mut [MaybeUninit<T>],
) {
    let n = x.len();
    let (dy, dx, weight) = (&dy[..n], &mut dx[..n], &weight[..n]);
    for i in 0..n {
        let line = fma::<_, FMA>(x[i].widen() - s.high, s.slope, s.shift);
        dx[i].write(T::narrow(fma::<_, FMA>(dy[i].widen() * weight[i], s.rstd, line)));
    }
}

#[inline(always)]
fn both<T: Element, const FMA: bool>(
    x: &[T],
    dy: &[T],
    s: Slope<T::Acc>,
    weight: &[T::Acc],
    dx: &mut [MaybeUninit<T>],
    dw: &mut [T::Acc],
    db: &mut [T::Acc],
) {
    let n = x.len();
    let (dy, dx, weight, dw, db) = (&dy[..n], &mut dx[..n], &weight[..n], &mut dw[..n], &mut db[..n]);
    for i in 0..n {
        let (d, dy) = (x[i].widen() - s.high, dy[i].widen());
        let line = fma::<_, FMA>(d, s.slope, s.shift);
        dx[i].write(T::narrow(fma::<_, FMA>(dy * weight[i], s.rstd, line)));
        dw[i] = fma::<_, FMA>(dy, fma::<_, FMA>(d, s.rstd, s.centre), dw[i]);
        db[i] += dy;
    }
}

#[inline(always)]
fn column_sums<T: Element, const FMA: bool>(
    x: &[T],
    dy: &[T],
    s: Slope<T::Acc>,
    dw: &mut [T::Acc],
    db: &mut [T::Acc],
) {
    let n = x.len();
    let (dy, dw, db) = (&dy[..n], &mut dw[..n], &mut db[..n]);
    for i in 0..n {
        let dy = dy[i].widen();
        let xhat = fma::<_, FMA>(x[i].widen() - s.high, s.rstd, s.centre);
        dw[i] = fma::<_, FMA>(dy, xhat, dw[i]);
        db[i] += dy;
    }
}
