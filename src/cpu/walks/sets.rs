//! Set after set, each summed and then normalized while it is in cache: sets of several rows, of which a tile may
//! have a part, and sets side by side with a weight for each column.
//!
//! ```text
//! y = (x - high) * (rstd * weight) + (bias - low * rstd * weight)        mean = high + low
//! ```

use super::spans::{self, SpanSums};
use crate::cpu::affine::Form;
use crate::cpu::backward_formula::{InputGradient, Means, MeansFrom, ParamSums, Sums};
use crate::cpu::loops::{Line, Walked};
use crate::cpu::moments::{Stat, StatsFrom};
use crate::cpu::walk_args::{parts, pivot, BackwardArgs, ForwardArgs, Input, MomentsArgs, Part, SumsArgs};

pub(super) fn moments<T: Walked>(k: MomentsArgs<T>) {
    for (part, out) in parts(k.g, k.tile).zip(k.out) {
        let pivot = k.g.center.then(|| k.pivots[part.set]);
        *out = part.moments(k.loops, &k.x, pivot);
    }
}

pub(super) fn forward<T: Walked>(mut k: ForwardArgs<T>) {
    for (i, part) in parts(k.g, k.tile).enumerate() {
        let stat = match &k.stats {
            StatsFrom::Given(stats) => stats.of(part.set),
            StatsFrom::Tile(_) => {
                let pivot = pivot(k.g, &k.x, part.rows.start, part.columns.start);
                Stat::of(pivot, part.moments(k.loops, &k.x, pivot))
            }
        };
        k.stats.keep(i, stat);
        normalize(&mut k, &part, stat);
    }
}

fn normalize<T: Walked>(k: &mut ForwardArgs<T>, part: &Part, stat: Stat<T::Acc>) {
    let (affine, rstd, x) = (k.affine, stat.rstd(k.eps), part.block(&k.x));
    let to = part.place(k.y.stride());
    if let Form::PerSpan(span) = affine.form {
        let (params, run) = part.spans(span);
        let mut constants = vec![];
        spans::constants_of_set(affine, params, stat, rstd, &mut constants);
        let line = Line::Spans { span: run, constants: &constants, ahead: k.g.run };
        return k.y.write(k.loops, to, x, line);
    }
    let c = part.columns.clone();
    let bias = affine.bias().map(|b| &b[c.clone()]);
    let constants = [[stat.high, rstd, -(stat.low * rstd)]];
    let (weight, constants) = (&affine.weight[c], &constants);
    let line = Line::Columns { weight, bias, parted: false, constants, ahead: 0 };
    k.y.write(k.loops, to, x, line)
}

pub(super) fn sums<T: Walked>(mut k: SumsArgs<T>) {
    let mut spans = SpanSums::new();
    for (part, out) in parts(k.input.g, k.input.tile).zip(k.sums) {
        *out = weighted_sums(&k.input, &part, &mut k.params, &mut spans);
    }
}

/// Sums of a part of `g` and `g * (x - high)`; adds to the parameters' what belongs to them.
fn weighted_sums<T: Walked>(
    input: &Input<T>,
    part: &Part,
    params: &mut Option<ParamSums<T::Acc>>,
    spans: &mut SpanSums<T::Acc>,
) -> Sums {
    use crate::cpu::element::Float;
    let (stat, rstd) = input.stat(part.set);
    let Form::PerSpan(span) = input.affine.form else {
        return spans::dots(input, part, Some(&input.affine.weight), stat.high);
    };
    let (own, run) = part.spans(span);
    let first = input.tile.columns.start / span;
    let weights = &input.affine.weight[own.clone()];
    // As many small sets have it, of instance norm. Not in `SpanSums`, where it would depend on the sets beside.
    let one = match own.len() {
        1 => Some([spans::dots(input, part, None, stat.high)]),
        _ => {
            spans.high.clear();
            spans.high.resize(own.len(), stat.high);
            spans.of(input, part, run);
            None
        }
    };
    let all = one.as_ref().map_or(&spans.all[..], |one| one);
    let mut sums = Sums::default();
    for (span, weight) in all.iter().zip(weights) {
        let weighted = span.times(weight.to64());
        sums = Sums { g: sums.g + weighted.g, gx: sums.gx + weighted.gx };
    }
    if let Some(params) = params {
        spans::add(params, own.start - first, all, stat, rstd);
    }
    sums
}

/// What makes dx of a set; adds to the parameters' sums where they are by span.
pub(super) fn gradient<T: Walked>(
    k: &mut BackwardArgs<T>,
    part: &Part,
    spans: &mut SpanSums<T::Acc>,
) -> InputGradient<T::Acc> {
    let (stat, rstd) = k.input.stat(part.set);
    // Sums by column are made later, along with dx.
    let by_span = k.input.affine.form != Form::PerColumn;
    let means = match k.means {
        MeansFrom::Given(means) => means[part.set],
        MeansFrom::Fixed if !by_span || k.params.is_none() => Means::ZERO,
        MeansFrom::Fixed => {
            weighted_sums(&k.input, part, &mut k.params, spans);
            Means::ZERO
        }
        MeansFrom::Tile => k.input.means(weighted_sums(&k.input, part, &mut k.params, spans), stat, rstd),
    };
    InputGradient::of(stat, rstd, means)
}

pub(super) fn backward<T: Walked>(mut k: BackwardArgs<T>) {
    let input = k.input;
    let (g, affine, loops) = (input.g, input.affine, input.loops);
    let (mut constants, mut spans) = (vec![], SpanSums::new());
    for part in parts(g, input.tile) {
        let gradient = gradient(&mut k, &part, &mut spans);
        let (x, dy) = (part.block(&input.x), part.block(&input.dy));
        if let Form::PerSpan(span) = affine.form {
            let Some(dx) = &mut k.dx else { continue };
            let (params, run) = part.spans(span);
            constants.clear();
            constants.extend(affine.weight[params].iter().map(|w| gradient.with_scale(gradient.rstd * *w)));
            loops.gradient_spans(x, dy, part.out(dx), run, &constants, g.run);
            continue;
        }
        let c = part.columns.clone();
        if let Some(dx) = &mut k.dx {
            let constants = [gradient.with_scale(gradient.rstd)];
            loops.gradient_columns(x, dy, part.out(dx), &affine.weight[c.clone()], false, &constants, 0);
        }
        if let Some(params) = &mut k.params {
            let own = c.start - input.tile.columns.start..c.end - input.tile.columns.start;
            let (dw, db) = (&mut params.weight[own.clone()], &mut params.bias[own]);
            loops.add_columns(x, dy, &[gradient.stats()], dw, db);
        }
    }
}
