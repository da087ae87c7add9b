//! Sets of one run each: layer, RMS, group and instance norm over neighbouring elements.
//!
//! Apart from sets of several rows, because these lie one behind the other without gaps, and because
//! short ones are taken a few abreast: else the latency of a set's last sums, of its root and its
//! division would be longer than the work on its elements.

use super::backward::{Backward, Input};
use super::{moments, pivot, Forward, Part};
use crate::cpu::element::{Element, Float, V};
use crate::cpu::gradient::{MeansFrom, Slope};
use crate::cpu::moments::{Source, Stat};
use crate::cpu::params::Form;
use crate::cpu::streams::{self, pairwise, ABREAST};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::Geometry;
use std::ops::Range;

/// Bytes up to which sets are taken abreast.
const SHORT: usize = 1024;

/// The sets of a tile of whole runs.
pub(super) struct Lines {
    /// Elements of a set.
    pub n: usize,
    pub sets: Range<usize>,
}

impl Lines {
    /// `None` where a set has several rows or the tile a part of one, or where sets side by side have
    /// weights by column.
    #[inline(always)]
    pub fn of(g: &Geometry, form: Form, tile: &Tile) -> Option<Lines> {
        let whole = tile.columns.start.is_multiple_of(g.run) && tile.columns.end.is_multiple_of(g.run);
        let alike = form != Form::Columns || g.run == g.width;
        (g.rows == 1 && whole && alike).then(|| Lines { n: g.run, sets: tile.sets(g) })
    }

    #[inline(always)]
    fn short<T>(&self) -> bool {
        self.n * size_of::<T>() <= SHORT
    }

    #[inline(always)]
    fn part(&self, g: &Geometry, set: usize) -> Part {
        let (row, q) = (set / g.sets_per_outer(), set % g.sets_per_outer());
        Part { set, first: set * self.n, rows: row..row + 1, columns: q * self.n..(q + 1) * self.n }
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    pub(super) fn lines<S: Simd>(&mut self, lines: Lines) {
        let mut set = lines.sets.start;
        if lines.short::<T>() {
            while set + ABREAST <= lines.sets.end {
                self.abreast::<S, ABREAST>(&lines, set);
                set += ABREAST;
            }
        }
        while set < lines.sets.end {
            self.abreast::<S, 1>(&lines, set);
            set += 1;
        }
    }

    /// Normalizes `R` sets from `set` on.
    #[inline(always)]
    fn abreast<S: Simd, const R: usize>(&mut self, lines: &Lines, set: usize) {
        let x: [&[T]; R] = rows(self.x, lines, set);
        let mut stats = [Stat::ZERO; R];
        match &self.stats {
            Source::Given(given) => {
                for r in 0..R {
                    stats[r] = given.of(set + r);
                }
            }
            Source::Tile(_) if lines.short::<T>() => stats = short_stats::<S, T, R>(x, self.g.center),
            Source::Tile(_) => {
                for r in 0..R {
                    let part = lines.part(self.g, set + r);
                    let pivot = pivot(self.g, self.x, part.first);
                    stats[r] = Stat::of(pivot, moments::<S, T>(self.g, self.x, &part));
                }
            }
        }
        let first = set - lines.sets.start;
        for r in 0..R {
            self.stats.keep(first + r, stats[r]);
        }
        let (params, n) = (self.params, lines.n);
        match (params.form, &params.weight) {
            (Form::Columns, Some(weight)) => {
                for r in 0..R {
                    let (Stat { high, low, .. }, rstd) = (stats[r], stats[r].rstd(self.eps));
                    let bias = params.bias.as_deref();
                    let y = self.out.rows((set + r) * n..(set + r + 1) * n);
                    let constants = [high, rstd, -(low * rstd)];
                    streams::scale_by_column::<S, T>(x[r], y, weight, bias, constants, R * n);
                }
            }
            (Form::Spans(span), _) => {
                for r in 0..R {
                    let Stat { high, low, .. } = stats[r];
                    let rstd = stats[r].rstd(self.eps);
                    let mut p = (set + r) % self.g.sets_per_outer() * (n / span);
                    let mut at = (set + r) * n;
                    for x in x[r].chunks_exact(span) {
                        let scale = rstd * params.weight(p);
                        let y = self.out.rows(at..at + span);
                        streams::scale::<S, T>(x, y, [high, scale, params.bias(p) - low * scale], n);
                        (p, at) = (p + 1, at + span);
                    }
                }
            }
            // `Params::new` gives columns a weight, and rows are not walked by runs.
            _ => unreachable!(),
        }
    }
}

#[inline(always)]
fn rows<'a, T, const R: usize>(x: &'a [T], lines: &Lines, set: usize) -> [&'a [T]; R] {
    let x = &x[set * lines.n..(set + R) * lines.n];
    let mut rows = [x; R];
    for r in 0..R {
        rows[r] = &x[r * lines.n..(r + 1) * lines.n];
    }
    rows
}

/// Statistics of `R` short sets, each with two chains of sums.
#[inline(always)]
fn short_stats<S: Simd, T: Element, const R: usize>(x: [&[T]; R], center: bool) -> [Stat<T::Acc>; R] {
    let zero = V::<S, T>::splat(T::Acc::ZERO);
    let one = V::<S, T>::splat(T::Acc::ONE);
    let n = x[0].len();
    let count = T::Acc::from64(n as f64);
    let mut stats = [Stat::ZERO; R];
    let mut base = [zero; R];
    if center {
        for r in 0..R {
            base[r] = V::<S, T>::splat(x[r][0].widen());
        }
        let mut sum = [[zero; 2]; R];
        pairwise!(
            V::<S, T>::W,
            n,
            |pair| {
                for r in 0..R {
                    let [a, b] = T::load_pair::<S>(&x[r][pair.clone()]);
                    sum[r][0] = (a - base[r]).fma(one, sum[r][0]);
                    sum[r][1] = (b - base[r]).fma(one, sum[r][1]);
                }
            },
            |at| {
                for r in 0..R {
                    sum[r][0] = sum[r][0] + at.keep(streams::get::<S, T>(x[r], at) - base[r]);
                }
            }
        );
        for r in 0..R {
            stats[r] = Stat::mean(x[r][0].widen(), (sum[r][0] + sum[r][1]).sum() / count);
            base[r] = V::<S, T>::splat(stats[r].high);
        }
    }
    let mut squares = [[zero; 2]; R];
    pairwise!(
        V::<S, T>::W,
        n,
        |pair| {
            for r in 0..R {
                let [a, b] = T::load_pair::<S>(&x[r][pair.clone()]);
                let (a, b) = (a - base[r], b - base[r]);
                squares[r][0] = a.fma(a, squares[r][0]);
                squares[r][1] = b.fma(b, squares[r][1]);
            }
        },
        |at| {
            for r in 0..R {
                let d = at.keep(streams::get::<S, T>(x[r], at) - base[r]);
                squares[r][0] = d.fma(d, squares[r][0]);
            }
        }
    );
    for r in 0..R {
        // About `high`, which the mean is off by `low`.
        let square = (squares[r][0] + squares[r][1]).sum() / count;
        stats[r].var = square - stats[r].low * stats[r].low;
    }
    stats
}

impl<T: Element> Backward<'_, T> {
    /// Layer and RMS norm: the sums of a few sets, then their dx, then the sums of columns.
    #[inline(always)]
    pub(super) fn lines<S: Simd>(&mut self, lines: Lines) {
        let mut set = lines.sets.start;
        while set + ABREAST <= lines.sets.end {
            self.line::<S, ABREAST>(&lines, set);
            set += ABREAST;
        }
        while set < lines.sets.end {
            self.line::<S, 1>(&lines, set);
            set += 1;
        }
    }

    #[inline(always)]
    fn line<S: Simd, const R: usize>(&mut self, lines: &Lines, set: usize) {
        let Some(weight) = self.input.params.weight.as_deref() else { return };
        let n = lines.n;
        let (x, dy): ([_; R], [_; R]) = (rows(self.input.x, lines, set), rows(self.input.dy, lines, set));
        let mut slopes = [Slope::ZERO; R];
        // Short sets are asked for while those before are turned into dx, longer ones one by one.
        let short = lines.short::<T>();
        let ahead = if short { R * n } else { n };
        let abreast = short && matches!(self.means, MeansFrom::Tile);
        if abreast {
            slopes = short_slopes::<S, T, R>(&self.input, x, dy, weight, set);
        }
        for r in 0..R {
            if !abreast {
                slopes[r] = self.slope::<S>(&lines.part(self.input.g, set + r));
            }
            if let Some(dx) = &mut self.dx {
                let dx = dx.row(set + r, 0..n);
                streams::gradient_by_column::<S, T>([x[r], dy[r]], slopes[r], weight, dx, ahead);
            }
        }
        if let Some(slots) = &mut self.slots {
            streams::add_columns::<S, T, R>(x, dy, slopes, [slots.weight, slots.bias]);
        }
    }
}

/// Slopes of `R` short sets.
#[inline(always)]
fn short_slopes<S: Simd, T: Element, const R: usize>(
    input: &Input<T>,
    x: [&[T]; R],
    dy: [&[T]; R],
    weight: &[T::Acc],
    set: usize,
) -> [Slope<T::Acc>; R] {
    let zero = V::<S, T>::splat(T::Acc::ZERO);
    let n = x[0].len();
    let mut stats = [Stat::ZERO; R];
    let mut highs = [zero; R];
    for r in 0..R {
        stats[r] = input.stats.of(set + r);
        highs[r] = V::<S, T>::splat(stats[r].high);
    }
    let (mut g, mut gx) = ([zero; R], [zero; R]);
    streams::each_vector!(V::<S, T>::W, n, |at| {
        let weight = streams::get::<S, T::Acc>(weight, at);
        for r in 0..R {
            let d = at.keep(streams::get::<S, T>(x[r], at) - highs[r]);
            let dy = streams::get::<S, T>(dy[r], at) * weight;
            g[r] = g[r] + dy;
            gx[r] = dy.fma(d, gx[r]);
        }
    });
    let mut slopes = [Slope::ZERO; R];
    for r in 0..R {
        let rstd = stats[r].rstd(input.eps);
        let sums = [g[r].sum(), gx[r].sum()];
        slopes[r] = Slope::short(stats[r], rstd, sums, input.g.center, T::Acc::from64(n as f64));
    }
    slopes
}
