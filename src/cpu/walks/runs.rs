//! Sets of one run each, one behind the other without gaps: layer, RMS, group and instance norm.
//!
//! Short ones are taken some at a time: else the latency of a set's last sums, of its root and its division would
//! be longer than the work on its elements.

use super::sets;
use super::spans::{self, SpanSums};
use crate::cpu::affine::Form;
use crate::cpu::backward_formula::{InputGradient, MeansFrom};
use crate::cpu::element::Float;
use crate::cpu::loops::{Line, Walked};
use crate::cpu::moments::{Stat, StatsFrom};
use crate::cpu::walk_args::{pivot, BackwardArgs, ForwardArgs, Part, Place};
use crate::geometry::Geometry;

/// Elements up to which a set is short: its sums stay in the accumulation type, in f32 no longer than a panel's at any
/// level.
const SHORT_ROW: usize = 1024;
/// Bytes that are taken at a time, of x.
const AT_A_TIME: usize = 8 << 10;
/// Sets that are taken at a time, at most.
const MOST: usize = 16;
/// Longer sets whose sums of columns are made together.
const ABREAST: usize = 4;

/// Sets at a time, of `n` elements.
fn step<T>(n: usize, long: usize) -> usize {
    match n <= SHORT_ROW {
        true => (AT_A_TIME / (n * size_of::<T>()) / ABREAST * ABREAST).clamp(ABREAST, MOST),
        false => long,
    }
}

/// Row and column of a set's first element.
fn place(g: &Geometry, set: usize) -> [usize; 2] {
    [set / g.sets_per_outer(), set % g.sets_per_outer() * g.run]
}

fn part(g: &Geometry, set: usize) -> Part {
    let [row, column] = place(g, set);
    Part { set, rows: row..row + 1, columns: column..column + g.run }
}

pub(super) fn forward<T: Walked>(mut k: ForwardArgs<T>) {
    let (g, n, sets) = (k.g, k.g.run, k.tile.sets(k.g));
    let short = n <= SHORT_ROW;
    let step = step::<T>(n, 1);
    let mut stats = [Stat::ZERO; MOST];
    let mut constants = Vec::with_capacity(step);
    for set in sets.clone().step_by(step) {
        let at = place(g, set);
        let x = k.x.block(at, n, step.min(sets.end - set), n);
        let stats = &mut stats[..x.rows];
        match &k.stats {
            StatsFrom::Given(given) => stats.iter_mut().enumerate().for_each(|(i, s)| *s = given.of(set + i)),
            StatsFrom::Tile(_) if short => k.loops.short_moments(x, g.center, stats),
            StatsFrom::Tile(_) => {
                for (i, stat) in stats.iter_mut().enumerate() {
                    let pivot = pivot(g, &k.x, place(g, set + i)[0], place(g, set + i)[1]);
                    *stat = Stat::of(pivot, part(g, set + i).moments(k.loops, &k.x, pivot));
                }
            }
        }
        constants.clear();
        for (i, stat) in stats.iter().enumerate() {
            k.stats.keep(set - sets.start + i, *stat);
            let rstd = stat.rstd(k.eps);
            match k.affine.form {
                Form::PerSpan(span) => {
                    let first = (set + i) % g.sets_per_outer() * (n / span);
                    let params = first..first + n / span;
                    spans::constants_of_set(k.affine, params, *stat, rstd, &mut constants);
                }
                _ => constants.push([stat.high, rstd, -(stat.low * rstd)]),
            }
        }
        let (constants, ahead, to) = (&constants[..], step * n, Place { at, stride: n });
        match k.affine.form {
            Form::PerSpan(span) => k.y.write(k.loops, to, x, Line::Spans { span, constants, ahead }),
            _ => {
                let (weight, bias, parted) = k.affine.columns();
                k.y.write(k.loops, to, x, Line::Columns { weight, bias, parted, constants, ahead })
            }
        }
    }
}

/// With weights by column: the sums of a few sets, then their dx, then the sums of columns.
pub(super) fn backward<T: Walked>(mut k: BackwardArgs<T>) {
    let input = k.input;
    let (g, n, sets, loops) = (input.g, input.g.run, input.tile.sets(input.g), input.loops);
    let short = n <= SHORT_ROW;
    let step = step::<T>(n, ABREAST);
    let abreast = short && matches!(k.means, MeansFrom::Tile);
    let (weight, _, parted) = input.affine.columns();
    let mut spans = SpanSums::new();
    let mut gradients = [InputGradient::ZERO; MOST];
    let mut constants = [[T::Acc::ZERO; 4]; MOST];
    for set in sets.clone().step_by(step) {
        let at = place(g, set);
        let x = input.x.block(at, n, step.min(sets.end - set), n);
        let dy = input.dy.block(at, n, x.rows, n);
        let gradients = &mut gradients[..x.rows];
        if abreast {
            short_gradients(&k, x, dy, set, gradients);
        }
        for i in 0..x.rows {
            if !abreast {
                gradients[i] = sets::gradient(&mut k, &part(g, set + i), &mut spans);
            }
            constants[i] = gradients[i].with_scale(gradients[i].rstd);
            if let (Some(dx), false) = (&mut k.dx, short) {
                let dx = dx.block(place(g, set + i), n, 1, n);
                let (x, dy) = (x.part(i, 1), dy.part(i, 1));
                loops.gradient_columns(x, dy, dx, weight, parted, &constants[i..=i], n);
            }
        }
        if let (Some(dx), true) = (&mut k.dx, short) {
            let dx = dx.block(at, n, x.rows, n);
            loops.gradient_columns(x, dy, dx, weight, parted, &constants[..x.rows], step * n);
        }
        if let Some(params) = &mut k.params {
            let mut stats = [[T::Acc::ZERO; 3]; MOST];
            stats.iter_mut().zip(&*gradients).for_each(|(s, gradient)| *s = gradient.stats());
            loops.add_columns(x, dy, &stats[..x.rows], params.weight, params.bias);
        }
    }
}

/// Of short sets from `set` on.
fn short_gradients<T: Walked>(
    k: &BackwardArgs<T>,
    x: crate::cpu::view::Strided<T>,
    dy: crate::cpu::view::Strided<T>,
    set: usize,
    gradients: &mut [InputGradient<T::Acc>],
) {
    let input = &k.input;
    let (mut high, mut sums) = ([T::Acc::ZERO; MOST], [[T::Acc::ZERO; 2]; MOST]);
    for i in 0..x.rows {
        high[i] = input.stats.of(set + i).high;
    }
    let n = T::Acc::from64(x.n as f64);
    input.loops.short_dots(x, dy, &input.affine.weight, &high[..x.rows], &mut sums[..x.rows]);
    for (i, gradient) in gradients.iter_mut().enumerate() {
        let (stat, rstd) = input.stat(set + i);
        *gradient = InputGradient::short(stat, rstd, sums[i], input.g.center, n);
    }
}
