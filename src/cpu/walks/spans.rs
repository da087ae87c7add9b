//! Sums and constants of spans: neighbouring columns that share a parameter.
//!
//! Apart, because walks by set and by row both make them.

use crate::cpu::affine::Affine;
use crate::cpu::backward_formula::{ParamSums, Sums};
use crate::cpu::element::{Float, PANEL};
use crate::cpu::loops::Walked;
use crate::cpu::moments::Stat;
use crate::cpu::walk_args::{Input, Part};
use std::ops::Range;

/// Elements of a span up to which spans are summed side by side, each in one vector.
const SHORT_SPAN: usize = 512;

/// What the columns of a parameter are normalized with.
#[inline(always)]
pub(super) fn constants<A: Float>([weight, bias]: [A; 2], stat: Stat<A>, rstd: A) -> [A; 3] {
    let scale = rstd * weight;
    [stat.high, scale, bias - stat.low * scale]
}

/// Those of parameters that are one set's.
#[inline(always)]
pub(super) fn constants_of_set<A: Float>(
    affine: &Affine<A>,
    params: Range<usize>,
    stat: Stat<A>,
    rstd: A,
    to: &mut Vec<[A; 3]>,
) {
    let [weight, bias] = affine.of_spans(params);
    to.extend(weight.iter().zip(bias).map(|(w, b)| constants([*w, *b], stat, rstd)));
}

/// Sums of spans, and what they are made in: kept from set to set, of which a small one would take less time than the memory.
pub(super) struct SpanSums<A> {
    /// Of `dy` and of `dy * (x - high)` of every span of a part.
    pub all: Vec<Sums>,
    /// Of every span.
    pub high: Vec<A>,
    lanes: [Vec<A>; 2],
    sums: Vec<A>,
}

impl<A: Float> SpanSums<A> {
    pub fn new() -> Self {
        SpanSums { all: vec![], high: vec![], lanes: [vec![], vec![]], sums: vec![] }
    }

    /// Makes those of a part, whose spans have `run` columns of it and the highs that stand here.
    pub fn of<T: Walked<Acc = A>>(&mut self, input: &Input<T>, part: &Part, run: usize) {
        let SpanSums { all, high, lanes: [g, gx], sums } = self;
        let (loops, spans) = (input.loops, high.len());
        all.clear();
        if run > SHORT_SPAN {
            all.extend(high.iter().enumerate().map(|(i, high)| {
                let columns = part.columns.start + i * run..part.columns.start + (i + 1) * run;
                dots(input, &Part { columns, ..part.clone() }, None, *high)
            }));
            return;
        }
        all.resize(spans, Sums::default());
        sums.resize(spans, A::ZERO);
        // One vector sums here, not four as elsewhere.
        let step = (PANEL / 4 * loops.width / run).max(1);
        for start in part.rows.clone().step_by(step) {
            let rows = start..(start + step).min(part.rows.end);
            let panel = Part { rows, ..part.clone() };
            for lanes in [&mut *g, &mut *gx] {
                lanes.clear();
                lanes.resize(spans * loops.width, A::ZERO);
            }
            loops.span_dots(panel.block(&input.x), panel.block(&input.dy), run, high, g, gx);
            loops.fold(g, sums);
            all.iter_mut().zip(&*sums).for_each(|(all, sum)| all.g += sum.to64());
            loops.fold(gx, sums);
            all.iter_mut().zip(&*sums).for_each(|(all, sum)| all.gx += sum.to64());
        }
    }
}

/// Sums of a part, with `weight` by column.
pub(super) fn dots<T: Walked>(
    input: &Input<T>,
    part: &Part,
    weight: Option<&[T::Acc]>,
    high: T::Acc,
) -> Sums {
    let mut sums = Sums::default();
    for panel in part.panels(PANEL * input.loops.width) {
        let weight = weight.map(|w| &w[panel.columns.clone()]);
        let (x, dy) = (panel.block(&input.x), panel.block(&input.dy));
        let [g, gx] = input.loops.dots(x, dy, weight, high);
        sums.g += g.to64();
        sums.gx += gx.to64();
    }
    sums
}

/// Adds sums of spans of a set to those of their parameters, from `first` on.
pub(super) fn add<A: Float>(params: &mut ParamSums<A>, first: usize, sums: &[Sums], stat: Stat<A>, rstd: A) {
    let own = first..first + sums.len();
    let params = params.weight[own.clone()].iter_mut().zip(&mut params.bias[own]);
    for ((weight, bias), sums) in params.zip(sums) {
        *weight += A::from64(sums.dot(stat, rstd));
        *bias += A::from64(sums.g);
    }
}
