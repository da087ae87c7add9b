//! Sums and constants of spans: neighbouring columns that share a parameter.
//!
//! Apart, because walks by set and by row both make them.

use crate::cpu::affine::Affine;
use crate::cpu::backward_formula::{ParamSums, Sums};
use crate::cpu::element::{Float, PANEL};
use crate::cpu::loops::Walked;
use crate::cpu::moments::Stat;
use crate::cpu::walk_args::{Input, Part};

/// Elements of a span up to which spans are summed side by side, each in one vector.
const SHORT_SPAN: usize = 512;

/// What the columns of parameter `p` are normalized with.
#[inline(always)]
pub(super) fn constants<A: Float>(affine: &Affine<A>, p: usize, stat: Stat<A>, rstd: A) -> [A; 3] {
    let [weight, bias] = affine.at(p);
    let scale = rstd * weight;
    [stat.high, scale, bias - stat.low * scale]
}

/// Sums of `dy` and of `dy * (x - high)` of every span of a part.
pub(super) fn sums<T: Walked>(input: &Input<T>, part: &Part, run: usize, high: &[T::Acc]) -> Vec<Sums> {
    let (loops, spans) = (input.loops, high.len());
    let mut all = vec![Sums::default(); spans];
    if run > SHORT_SPAN {
        for (i, all) in all.iter_mut().enumerate() {
            let columns = part.columns.start + i * run..part.columns.start + (i + 1) * run;
            *all = dots(input, &Part { columns, ..part.clone() }, None, high[i]);
        }
        return all;
    }
    let zeros = || vec![T::Acc::ZERO; spans * loops.width];
    let (mut g, mut gx, mut sums) = (zeros(), zeros(), vec![T::Acc::ZERO; spans]);
    // One vector sums here, not four as elsewhere.
    let step = (PANEL / 4 * loops.width / run).max(1);
    for start in part.rows.clone().step_by(step) {
        let rows = start..(start + step).min(part.rows.end);
        let panel = Part { rows, ..part.clone() };
        g.fill(T::Acc::ZERO);
        gx.fill(T::Acc::ZERO);
        loops.span_dots(panel.block(&input.x), panel.block(&input.dy), run, high, &mut g, &mut gx);
        loops.fold(&g, &mut sums);
        all.iter_mut().zip(&sums).for_each(|(all, sum)| all.g += sum.to64());
        loops.fold(&gx, &mut sums);
        all.iter_mut().zip(&sums).for_each(|(all, sum)| all.gx += sum.to64());
    }
    all
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

/// Adds a span's sums to its parameter's.
pub(super) fn add<A: Float>(params: &mut ParamSums<A>, i: usize, sums: Sums, stat: Stat<A>, rstd: A) {
    params.weight[i] += A::from64(sums.dot(stat, rstd));
    params.bias[i] += A::from64(sums.g);
}
