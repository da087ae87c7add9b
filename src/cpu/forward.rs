//! The forward: one visit per tile where tiles hold whole sets, else a sweep for the statistics and
//! one to normalize.

use super::element::{converted, Element, Float};
use super::level::Level;
use super::moments::{Moments, Source, Stat, Stats, StatsOut};
use super::output::Output;
use super::params::Params;
use super::tile::{Cut, Tile, Walk};
use super::work::{each, split};
use super::{columns, runs};
use crate::request::{Arg, Forward, Given, Norm};
use candle_core::{CpuStorage, Result};

/// Output and, if the call wants them or has running statistics to move, the statistics.
pub(super) fn forward<T: Element>(
    level: Level,
    call: &Forward<CpuStorage>,
) -> Result<(Vec<T>, Option<Vec<T::Acc>>)> {
    let g = &call.norm.geometry;
    let x = elements::<T>(&call.norm, &call.x)?;
    let any = call.weight.is_some() || call.bias.is_some();
    let params = Params::new(g, &call.weight, &call.bias, any)?;
    let size = size_of::<T>();
    if let Some(given) = &call.given {
        let stats = snapshot::<T::Acc>(given, g.sets())?;
        let y = normalize(level, &call.norm, x, &params, Stats(&stats), &Cut::sweep(g, size));
        return Ok((y, Some(stats)));
    }
    let cut = Cut::new(g, size);
    if !cut.whole_sets() {
        let stats = statistics_of_cut_sets(level, &call.norm, x, &cut);
        let y = normalize(level, &call.norm, x, &params, Stats(&stats), &Cut::sweep(g, size));
        return Ok((y, Some(stats)));
    }
    let keep = call.keep || call.running.is_some();
    let mut stats = keep.then(|| vec![T::Acc::ZERO; 3 * g.sets()]);
    let mut output = Output::new(g);
    let tiles = cut.tiles();
    let mut kept = stats.as_mut().map(|stats| split_stats(g.sets(), stats, &tiles, &call.norm).into_iter());
    let work: Vec<_> = (tiles.iter().zip(output.tiles(&cut)))
        .map(|(tile, out)| (tile, out, Source::Tile(kept.as_mut().and_then(|k| k.next()))))
        .collect();
    each(work, |(tile, out, stats)| run(level, &call.norm, x, &params, tile, out, stats));
    Ok((written(output), stats))
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
pub(super) fn statistics<T: Element>(level: Level, norm: &Norm, x: &Arg<CpuStorage>) -> Result<Vec<T::Acc>> {
    let cut = Cut::new(&norm.geometry, size_of::<T>());
    Ok(statistics_of_cut_sets(level, norm, elements::<T>(norm, x)?, &cut))
}

/// The argument's elements.
pub(super) fn elements<'a, T: Element>(norm: &Norm, x: &Arg<'a, CpuStorage>) -> Result<&'a [T]> {
    Ok(&T::cpu_storage_as_slice(x.storage)?[x.offset..][..norm.geometry.elements()])
}

fn statistics_of_cut_sets<T: Element>(level: Level, norm: &Norm, x: &[T], cut: &Cut) -> Vec<T::Acc> {
    let g = &norm.geometry;
    let tiles = cut.tiles();
    let counts = || tiles.iter().map(|t| t.sets(g).len());
    let mut partial = vec![Moments::default(); counts().sum()];
    let work: Vec<_> = tiles.iter().zip(split(&mut partial, counts())).collect();
    each(work, |(tile, out)| match Walk::of(g) {
        Walk::Runs => level.run(runs::Partial { g, x, tile, out }),
        Walk::Columns => level.run(columns::Partial { g, x, tile, out }),
    });
    let mut merged = vec![Moments::default(); g.sets()];
    let sets = tiles.iter().flat_map(|t| t.sets(g));
    sets.zip(&partial).for_each(|(set, m)| merged[set].merge(*m));
    let mut stats = vec![T::Acc::ZERO; 3 * g.sets()];
    for (s, moments) in merged.into_iter().enumerate() {
        let pivot = if x.is_empty() { T::Acc::ZERO } else { runs::pivot(g, x, g.first(s)) };
        let stat = Stat::of(pivot, moments);
        (stats[s], stats[g.sets() + s], stats[2 * g.sets() + s]) = (stat.high, stat.low, stat.var);
    }
    stats
}

/// Normalizes with known statistics.
fn normalize<T: Element>(
    level: Level,
    norm: &Norm,
    x: &[T],
    params: &Params<T::Acc>,
    stats: Stats<T::Acc>,
    cut: &Cut,
) -> Vec<T> {
    let mut output = Output::new(&norm.geometry);
    let tiles = cut.tiles();
    let work: Vec<_> = tiles.iter().zip(output.tiles(cut)).collect();
    each(work, |(tile, out)| run(level, norm, x, params, tile, out, Source::Given(stats)));
    written(output)
}

#[allow(unsafe_code)]
fn written<T: Element>(output: Output<T>) -> Vec<T> {
    // SAFETY: the callers have just sent every tile of a cut through `run`.
    unsafe { output.written() }
}

fn run<T: Element>(
    level: Level,
    norm: &Norm,
    x: &[T],
    params: &Params<T::Acc>,
    tile: &Tile,
    out: super::output::OutTile<T>,
    stats: Source<T::Acc>,
) {
    let (g, eps) = (&norm.geometry, T::Acc::from64(norm.eps));
    match Walk::of(g) {
        Walk::Runs => level.run(runs::Forward { g, eps, x, params, stats, tile, out }),
        Walk::Columns => level.run(columns::Forward { g, eps, x, params, stats, tile, out }),
    }
}

/// The places of each tile's statistics in `[3, sets]`; tiles hold whole sets, in order.
fn split_stats<'a, A>(sets: usize, stats: &'a mut [A], tiles: &[Tile], norm: &Norm) -> Vec<StatsOut<'a, A>> {
    let (high, rest) = stats.split_at_mut(sets);
    let (low, var) = rest.split_at_mut(sets);
    let lens = || tiles.iter().map(|t| t.sets(&norm.geometry).len());
    let (high, low, var) = (split(high, lens()), split(low, lens()), split(var, lens()));
    high.into_iter().zip(low).zip(var).map(|((high, low), var)| [high, low, var]).collect()
}
