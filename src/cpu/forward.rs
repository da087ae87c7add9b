//! The forward: one visit per tile where tiles hold whole sets, else a sweep for the statistics and one to
//! normalize.

use super::affine::{Affine, Form};
use super::element::{converted, Element, Float};
use super::loops::{Behind, Stored, Walked};
use super::moments::{Moments, Stat, Stats, StatsFrom};
use super::output::Output;
use super::parallel::{for_each, split};
use super::plan::{self, Origin, Visit};
use super::simd_level::Level;
use super::staging::{pieces, After, Scratch, Source, Tensor};
use super::view::same;
use super::walk_args::{ForwardArgs, MomentsArgs};
use super::walks;
use crate::fusion::Gate;
use crate::geometry::Geometry;
use crate::request::{Arg, Forward, Given, Norm};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, Result};

/// What a forward returns, in its types.
pub(super) struct Outcome<T: Stored> {
    pub y: Vec<T>,
    /// If the call wants them or has running ones to move.
    pub stats: Option<Vec<T::Acc>>,
    /// x + residual, in the residual's type.
    pub sum: Option<CpuStorage>,
}

pub(super) fn forward<T: Stored>(level: Level, call: &Forward<CpuStorage>) -> Result<Outcome<T>> {
    match call.residual {
        // A stream of wider elements.
        Some(r) if r.storage.dtype() != T::DTYPE => with_residual::<T, T::Acc>(level, call),
        _ => with_residual::<T, T>(level, call),
    }
}

fn with_residual<T: Stored, R: Element<Acc = T::Acc>>(
    level: Level,
    call: &Forward<CpuStorage>,
) -> Result<Outcome<T>> {
    let (norm, g) = (&call.norm, &call.norm.geometry);
    let after = after(level, norm, [&call.skip, &call.gate])?;
    let mut x = source::<T>(level, norm, &call.x, &call.gate)?;
    let residual = call.residual.map(|r| elements::<R>(norm, &r)).transpose()?;
    let residual = residual.map(|x| Tensor { level, x, width: g.width });
    // z that scratch holds is not rounded before what follows it, nor is x times its gate.
    let wide = !after.in_registers::<T::WalkedAs>() || x.gate.is_some() || same::<T, R>(&[]).is_none();
    let form = Form::of(g, call.weight.is_some() || call.bias.is_some());
    let bytes = if wide { size_of::<T::Acc>() } else { size_of::<T::WalkedAs>() };
    let plan = plan::ForwardPlan::new(g, form, bytes, call.given.is_some());
    // Where tiles do not hold whole sets, x would be read before it is summed; tiles of several rows have gaps.
    let early = residual.filter(|_| plan.from == Origin::Given || g.rows > 1);
    let sum = early.map(|residual| add(level, g, &x, residual.x));
    if let Some(sum) = &sum {
        let Some(sum) = same(sum) else {
            bail!("{}: a residual of another dtype, and sets that are cut", norm.name)
        };
        x = Source::plain(level, sum, g);
    }
    let residual = residual.filter(|_| sum.is_none());
    let outcome = match wide {
        true => run::<T, R, T::Acc>(level, call, &plan, x, residual, after)?,
        // Only where both have one type, which the compiler is told: it makes no code for the others.
        false if const { size_of::<R>() == size_of::<T>() } => {
            run::<T, R, T::WalkedAs>(level, call, &plan, x, residual, after)?
        }
        false => unreachable!("a residual of another type is added in scratch"),
    };
    Ok(Outcome { sum: outcome.sum.or(sum.map(R::to_cpu_storage_owned)), ..outcome })
}

/// `x + residual`, rounded to the residual's type.
fn add<T: Stored, R: Element<Acc = T::Acc>>(
    level: Level,
    g: &Geometry,
    x: &Source<T>,
    residual: &[R],
) -> Vec<R> {
    let visit = plan::ForwardPlan::new(g, Form::PerSpan(g.run), size_of::<R>(), true).y;
    let mut output = Output::new(g, false);
    let residual = Tensor { level, x: residual, width: g.width };
    for_each(output.tiles(&visit.cut), x.bytes(), Scratch::new, |scratch: &mut Scratch<T>, mut sum| {
        x.add(&residual, &sum.tile().clone(), &mut scratch.x, &mut sum);
    });
    written(output)
}

/// What stands behind the norm.
pub(super) fn after<'a, T: Stored>(
    level: Level,
    norm: &Norm,
    [skip, gate]: [&Option<Arg<'a, CpuStorage>>; 2],
) -> Result<After<'a, T>> {
    let tensor = |arg: &Option<Arg<'a, CpuStorage>>| {
        arg.map(|arg| Result::Ok(Tensor { level, x: elements(norm, &arg)?, width: norm.geometry.width }))
            .transpose()
    };
    let gate = if norm.fusion.gate == Some(Gate::After) { tensor(gate)? } else { None };
    let behind = Behind { skip: tensor(skip)?, activation: norm.fusion.activation, gate };
    Ok(After { level, behind })
}

/// x, with its gate if it has one.
pub(super) fn source<'a, T: Stored>(
    level: Level,
    norm: &Norm,
    x: &Arg<'a, CpuStorage>,
    gate: &Option<Arg<'a, CpuStorage>>,
) -> Result<Source<'a, T>> {
    let mut source = Source::plain(level, strided(norm, x)?, &norm.geometry);
    source.blocks = norm.x_blocks;
    if let (Some(Gate::Before), Some(gate)) = (norm.fusion.gate, gate) {
        source.gate = Some(Tensor { x: elements(norm, gate)?, ..source.tensor });
    }
    Ok(source)
}

fn run<T: Stored, R: Element<Acc = T::Acc>, W: Walked<Acc = T::Acc>>(
    level: Level,
    call: &Forward<CpuStorage>,
    plan: &plan::ForwardPlan,
    x: Source<T>,
    residual: Option<Tensor<R>>,
    after: After<T>,
) -> Result<Outcome<T>> {
    let (norm, g) = (&call.norm, &call.norm.geometry);
    let mut affine = Affine::new(norm, call.weight, call.bias, call.weight.is_some() || call.bias.is_some())?;
    if !after.any() {
        affine.part(W::loops(level), g);
    }
    let mut stats = match (&call.given, &plan.statistics) {
        (Some(given), _) => Some(snapshot::<T::Acc>(given, g.sets())?),
        (None, Some(visit)) => Some(statistics_in_parts::<T, W>(level, g, x, visit)),
        (None, None) => (call.keep || call.running.is_some()).then(|| vec![T::Acc::ZERO; 3 * g.sets()]),
    };
    let mut from = match (plan.from, &mut stats) {
        (Origin::Given, Some(stats)) => StatsFrom::Given(Stats(stats)),
        (_, Some(stats)) => StatsFrom::to_keep(stats),
        (_, None) => StatsFrom::Tile(None),
    };
    let [x_bytes, sum_bytes] = [size_of::<T>(), if residual.is_some() { size_of::<R>() } else { 0 }];
    // Of x, the residual, and y.
    let mut output = Output::new(g, plan.y.past_caches(x_bytes, 2 * x_bytes + sum_bytes));
    // The sum is read back at once.
    let mut sum = residual.map(|_| Output::new(g, false));
    let mut sums = sum.as_mut().map(|sum| sum.tiles(&plan.y.cut));
    let work = output.tiles(&plan.y.cut).map(move |y| {
        let stats = from.next(y.tile().sets(g).len());
        (y, stats, sums.as_mut().and_then(Iterator::next))
    });
    let (loops, eps) = (W::loops(level), T::Acc::from64(norm.eps));
    let staged = residual.is_some() || x.staged::<W>() || after.staged::<W>();
    for_each(work, x.bytes(), Scratch::new, |scratch: &mut Scratch<T>, (mut y, mut stats, mut sum)| {
        for piece in pieces(g, y.tile(), norm.fusion.tokens, staged) {
            let x = match (&residual, &mut sum) {
                (Some(residual), Some(sum)) => x.read_sum::<R, W>(residual, &piece, &mut scratch.x, sum),
                _ => x.read::<W>(&piece, &mut scratch.x),
            };
            let (affine, stats) = (&affine.of_row(piece.rows.start, g), stats.next(piece.sets(g).len()));
            after.write(y.part(&piece), &mut scratch.out, |y| {
                walks::forward(plan.y.walk, ForwardArgs { loops, g, eps, affine, x, tile: &piece, stats, y });
            });
        }
    });
    let sum = sum.map(|sum| R::to_cpu_storage_owned(written(sum)));
    Ok(Outcome { y: written(output), stats, sum })
}

#[allow(unsafe_code)]
pub(super) fn written<T: Element>(output: Output<T>) -> Vec<T> {
    // SAFETY: the callers have just sent every tile of a cut through a walk.
    unsafe { output.written() }
}

/// Given statistics in the form `[3, sets]`.
fn snapshot<A: Float>(given: &Given<CpuStorage>, sets: usize) -> Result<Vec<A>> {
    let mean = converted::<f64>(&given.mean, sets)?;
    let low = given.mean_low.as_ref().map(|low| converted::<f64>(low, sets)).transpose()?;
    let var = converted::<A>(&given.var, sets)?;
    let mut stats = vec![A::ZERO; 3 * sets];
    for s in 0..sets {
        let high = A::from64(mean[s]);
        let low = low.as_ref().map_or(0.0, |low| low[s]);
        // A mean in f64 may have digits that an f32 has not.
        stats[s] = high;
        stats[sets + s] = A::from64(mean[s] - high.to64() + low);
        stats[2 * sets + s] = var[s];
    }
    Ok(stats)
}

/// The input's statistics, `[3, sets]`.
pub(super) fn statistics<T: Stored>(level: Level, norm: &Norm, x: &Arg<CpuStorage>) -> Result<Vec<T::Acc>> {
    let visit = plan::ForwardPlan::statistics(&norm.geometry, size_of::<T::WalkedAs>());
    let x = source::<T>(level, norm, x, &None)?;
    Ok(statistics_in_parts::<T, T::WalkedAs>(level, &norm.geometry, x, &visit))
}

/// The elements of a contiguous argument of x's shape.
pub(super) fn elements<'a, T: Element>(norm: &Norm, x: &Arg<'a, CpuStorage>) -> Result<&'a [T]> {
    Ok(&T::cpu_storage_as_slice(x.storage)?[x.offset..][..norm.geometry.elements()])
}

/// Those of x, which need not be contiguous.
fn strided<'a, T: Element>(norm: &Norm, x: &Arg<'a, CpuStorage>) -> Result<&'a [T]> {
    match norm.x_blocks {
        Some(_) => Ok(&T::cpu_storage_as_slice(x.storage)?[x.offset..]),
        None => elements(norm, x),
    }
}

/// Statistics of sets that are cut, or may be.
fn statistics_in_parts<T: Stored, W: Walked<Acc = T::Acc>>(
    level: Level,
    g: &Geometry,
    x: Source<T>,
    visit: &Visit,
) -> Vec<T::Acc> {
    let tiles = visit.cut.tiles();
    let counts = || tiles.iter().map(|t| t.sets(g).len());
    let mut partial = vec![Moments::default(); counts().sum()];
    let pivots: Vec<_> = match g.center && g.elements() > 0 {
        true => (0..g.sets()).map(|set| x.first(g, set)).collect(),
        false => vec![T::Acc::ZERO; g.sets()],
    };
    let work = tiles.iter().zip(split(&mut partial, counts()));
    let loops = W::loops(level);
    for_each(work, x.bytes(), Scratch::new, |scratch: &mut Scratch<T>, (tile, out)| {
        let x = x.read::<W>(tile, &mut scratch.x);
        walks::moments(visit.walk, MomentsArgs { loops, g, x, tile, pivots: &pivots, out });
    });
    let mut merged = vec![Moments::default(); g.sets()];
    let sets = tiles.iter().flat_map(|t| t.sets(g));
    sets.zip(&partial).for_each(|(set, m)| merged[set].merge(*m));
    let mut stats = vec![T::Acc::ZERO; 3 * g.sets()];
    for (s, moments) in merged.into_iter().enumerate() {
        let stat = Stat::of(Some(pivots[s]), moments);
        (stats[s], stats[g.sets() + s], stats[2 * g.sets() + s]) = (stat.high, stat.low, stat.var);
    }
    stats
}
