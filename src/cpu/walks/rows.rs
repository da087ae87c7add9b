//! Row after row, in the order of memory, the sets of a tile side by side: batch norm over small images, and every
//! norm with a parameter a span whose statistics are known.
//!
//! Apart from walks by set, because one set's runs lie far from each other.

use super::spans::{self, SpanSums};
use crate::cpu::affine::Form;
use crate::cpu::backward_formula::{InputGradient, Means, MeansFrom};
use crate::cpu::element::{Float, PANEL};
use crate::cpu::loops::{Line, Walked};
use crate::cpu::moments::{Moments, Stat, StatsFrom};
use crate::cpu::tile::Tile;
use crate::cpu::walk_args::{pivot, BackwardArgs, ForwardArgs, Part};
use crate::geometry::Geometry;

/// The rows of a tile that lie in one block, as one part from its first set on.
fn bands<'a>(g: &'a Geometry, tile: &'a Tile) -> impl Iterator<Item = Part> + 'a {
    let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
    blocks.map(move |o| Part {
        set: o * g.sets_per_outer() + tile.columns.start / g.run,
        rows: tile.rows.start.max(o * g.rows)..tile.rows.end.min((o + 1) * g.rows),
        columns: tile.columns.clone(),
    })
}

/// Columns of a parameter.
fn span(form: Form, g: &Geometry) -> usize {
    match form {
        Form::PerSpan(span) => span,
        _ => g.run,
    }
}

/// The set of a parameter's columns, in the block of `part`.
fn set_of(g: &Geometry, part: &Part, p: usize, span: usize) -> usize {
    part.set - part.columns.start / g.run + (p * span).max(part.columns.start) / g.run
}

pub(super) fn forward<T: Walked>(mut k: ForwardArgs<T>) {
    let (g, span) = (k.g, span(k.affine.form, k.g));
    let mut done = 0;
    for part in bands(g, k.tile) {
        let first = part.set;
        let stats: Vec<_> = match &k.stats {
            StatsFrom::Given(given) => (first..first + sets(g, &part)).map(|set| given.of(set)).collect(),
            StatsFrom::Tile(_) => statistics(&k, &part),
        };
        for stat in &stats {
            k.stats.keep(done, *stat);
            done += 1;
        }
        let rstd: Vec<_> = stats.iter().map(|stat| stat.rstd(k.eps)).collect();
        let (params, run) = part.spans(span);
        let constants: Vec<_> = params
            .map(|p| {
                let i = set_of(g, &part, p, span) - first;
                spans::constants(k.affine.at(p), stats[i], rstd[i])
            })
            .collect();
        let line = Line::Spans { span: run, constants: &constants, ahead: k.tile.columns.len() };
        k.y.write(k.loops, part.place(k.y.stride()), part.block(&k.x), line);
    }
}

/// Sets that the part's columns touch.
fn sets(g: &Geometry, part: &Part) -> usize {
    part.columns.end.div_ceil(g.run) - part.columns.start / g.run
}

/// Statistics of the sets of a tile that has all of their rows.
fn statistics<T: Walked>(k: &ForwardArgs<T>, part: &Part) -> Vec<Stat<T::Acc>> {
    let (g, loops, sets) = (k.g, k.loops, sets(k.g, part));
    let column = |i: usize| part.columns.start + i * g.run;
    let pivots: Vec<_> = (0..sets).map(|i| pivot(g, &k.x, part.rows.start, column(i))).collect();
    let mut moments = vec![Moments::default(); sets];
    let mut lanes = vec![T::Acc::ZERO; sets * loops.width];
    let (mut sums, mut means) = (vec![T::Acc::ZERO; sets], vec![Stat::ZERO; sets]);
    let mut base: Vec<_> = pivots.iter().map(|p| p.unwrap_or(T::Acc::ZERO)).collect();
    // Rows whose sums stay in the accumulation type. One vector sums here, not four as elsewhere.
    let step = (PANEL / 4 * loops.width / g.run).max(1);
    for start in part.rows.clone().step_by(step) {
        let panel = Part { rows: start..(start + step).min(part.rows.end), ..part.clone() };
        let (x, n) = (panel.block(&k.x), (panel.rows.len() * g.run) as f64);
        if g.center {
            lanes.fill(T::Acc::ZERO);
            base.iter_mut().zip(&pivots).for_each(|(base, p)| *base = p.unwrap_or(T::Acc::ZERO));
            loops.run_sums(x, g.run, &base, false, &mut lanes);
            loops.fold(&lanes, &mut sums);
            for i in 0..sets {
                means[i] = Stat::mean(base[i], T::Acc::from64(sums[i].to64() / n));
                base[i] = means[i].high;
            }
        }
        lanes.fill(T::Acc::ZERO);
        loops.run_sums(x, g.run, &base, true, &mut lanes);
        loops.fold(&lanes, &mut sums);
        for i in 0..sets {
            let pivot = pivots[i].unwrap_or(T::Acc::ZERO);
            moments[i].merge(Moments::about(pivot, means[i], sums[i], n));
        }
    }
    pivots.into_iter().zip(moments).map(|(pivot, moments)| Stat::of(pivot, moments)).collect()
}

pub(super) fn backward<T: Walked>(mut k: BackwardArgs<T>) {
    let input = k.input;
    let (g, affine) = (input.g, input.affine);
    let span = span(affine.form, g);
    for part in bands(g, input.tile) {
        let (params, run) = part.spans(span);
        let summed = match k.means {
            MeansFrom::Tile => true,
            MeansFrom::Fixed => k.params.is_some(),
            MeansFrom::Given(_) => false,
        };
        let set = |p| set_of(g, &part, p, span);
        let sums = summed.then(|| {
            let mut sums = SpanSums::new();
            sums.high.extend(params.clone().map(|p| input.stats.of(set(p)).high));
            sums.of(&input, &part, run);
            sums.all
        });
        let mut constants = Vec::with_capacity(params.len());
        for (i, p) in params.enumerate() {
            let (stat, rstd) = input.stat(set(p));
            let weight = affine.weight[p];
            let means = match (k.means, &sums) {
                (MeansFrom::Given(means), _) => means[set(p)],
                // One parameter a set: a tile's own means are asked for of no others.
                (MeansFrom::Tile, Some(sums)) => input.means(sums[i].times(weight.to64()), stat, rstd),
                _ => Means::ZERO,
            };
            if let (Some(params), Some(sums)) = (&mut k.params, &sums) {
                spans::add(params, i, &sums[i..=i], stat, rstd);
            }
            let gradient = InputGradient::of(stat, rstd, means);
            constants.push(gradient.with_scale(rstd * weight));
        }
        let Some(dx) = &mut k.dx else { continue };
        let (x, dy, ahead) = (part.block(&input.x), part.block(&input.dy), input.tile.columns.len());
        input.loops.gradient_spans(x, dy, part.out(dx), run, &constants, ahead);
    }
}
