//! Sets of several short runs: batch norm over small images.
//!
//! Apart from longer runs, because one set's runs lie far from each other: all sets of a tile are walked row
//! by row, in the order of memory, each with a vector of partial sums.

use super::backward::Backward;
use super::{pivot, Forward};
use crate::cpu::element::{Element, Float, PANEL, V};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Sums};
use crate::cpu::moments::{Moments, Source, Stat};
use crate::cpu::streams::{each_vector, get, gradient, scale};
use crate::cpu::tile::Tile;
use crate::cpu::vector::{Simd, Vector};
use crate::geometry::Geometry;
use std::ops::Range;

/// Elements of a run up to which sets are walked side by side: less than a page.
const SHORT: usize = 512;

/// The sets of a tile that has all of their rows.
pub(super) struct Band {
    run: usize,
    sets: Range<usize>,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Band {
    /// `None` for other sets, tiles with parts of sets, and sets with several parameters.
    #[inline(always)]
    pub fn of(g: &Geometry, tile: &Tile) -> Option<Band> {
        let whole = g.outer == 1 && tile.rows.len() == g.rows && tile.columns.len().is_multiple_of(g.run);
        let fits = g.rows > 1 && g.run <= SHORT && g.one_param_per_set() && whole;
        fits.then(|| Band {
            run: g.run,
            sets: tile.sets(g),
            rows: tile.rows.clone(),
            columns: tile.columns.clone(),
        })
    }

    /// Rows whose sums stay in the accumulation type, as ranges. Sums have one vector of `w` here, not four
    /// as elsewhere.
    #[inline(always)]
    fn panels(&self, w: usize) -> impl Iterator<Item = Range<usize>> {
        let (step, end) = ((PANEL / 4 * w / self.run).max(1), self.rows.end);
        self.rows.clone().step_by(step).map(move |r| r..(r + step).min(end))
    }

    /// The band's elements of a row.
    #[inline(always)]
    fn row<'a, T>(&self, x: &'a [T], width: usize, row: usize) -> &'a [T] {
        &x[row * width + self.columns.start..row * width + self.columns.end]
    }

    /// Places of a row's runs.
    #[inline(always)]
    fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let (start, run) = (self.columns.start, self.run);
        (0..self.sets.len()).map(move |i| start + i * run..start + (i + 1) * run)
    }
}

impl<T: Element> Forward<'_, T> {
    #[inline(always)]
    pub(super) fn band<S: Simd>(&mut self, band: &Band) {
        let stats = match &self.stats {
            Source::Given(given) => band.sets.clone().map(|set| given.of(set)).collect(),
            Source::Tile(_) => self.band_stats::<S>(band),
        };
        let mut constants = Vec::with_capacity(stats.len());
        for (i, stat) in stats.into_iter().enumerate() {
            self.stats.keep(i, stat);
            // One parameter a set.
            let p = band.sets.start + i;
            let scale = stat.rstd(self.eps) * self.params.weight(p);
            constants.push([stat.high, scale, self.params.bias(p) - stat.low * scale]);
        }
        for row in band.rows.clone() {
            let x = &self.x[row * self.g.width..][..self.g.width];
            for (c, constants) in band.runs().zip(&constants) {
                let y = self.out.row(row, c.clone());
                scale::<S, T>(&x[c], y, *constants, band.columns.len());
            }
        }
    }

    #[inline(always)]
    fn band_stats<S: Simd>(&self, band: &Band) -> Vec<Stat<T::Acc>> {
        let (g, sets) = (self.g, band.sets.len());
        let zero = V::<S, T>::splat(T::Acc::ZERO);
        let mut moments = vec![Moments::default(); sets];
        let mut sums = vec![zero; sets];
        let mut means = vec![Stat::ZERO; sets];
        for rows in band.panels(V::<S, T>::W) {
            let n = (rows.len() * band.run) as f64;
            if g.center {
                sums.fill(zero);
                for row in rows.clone() {
                    let runs = band.row(self.x, g.width, row).chunks_exact(band.run);
                    for ((x, sum), set) in runs.zip(&mut sums).zip(band.sets.clone()) {
                        let pivot = V::<S, T>::splat(pivot(g, self.x, set * band.run));
                        each_vector!(V::<S, T>::W, x.len(), |at| {
                            *sum = *sum + at.keep(get::<S, T>(x, at) - pivot);
                        });
                    }
                }
                for ((mean, sum), set) in means.iter_mut().zip(&sums).zip(band.sets.clone()) {
                    let offset = T::Acc::from64(sum.sum().to64() / n);
                    *mean = Stat::mean(pivot(g, self.x, set * band.run), offset);
                }
            }
            sums.fill(zero);
            for row in rows {
                let runs = band.row(self.x, g.width, row).chunks_exact(band.run);
                for ((x, sum), mean) in runs.zip(&mut sums).zip(&means) {
                    let high = V::<S, T>::splat(mean.high);
                    each_vector!(V::<S, T>::W, x.len(), |at| {
                        let d = at.keep(get::<S, T>(x, at) - high);
                        *sum = d.fma(d, *sum);
                    });
                }
            }
            for (i, (mean, sum)) in means.iter().zip(&sums).enumerate() {
                let pivot = pivot(g, self.x, (band.sets.start + i) * band.run);
                moments[i].merge(Moments::about(pivot, *mean, sum.sum(), n));
            }
        }
        let stat = |(set, moments)| Stat::of(pivot(g, self.x, set * band.run), moments);
        band.sets.clone().zip(moments).map(stat).collect()
    }
}

impl<T: Element> Backward<'_, T> {
    #[inline(always)]
    pub(super) fn band<S: Simd>(&mut self, band: &Band) {
        let sums = match self.means {
            MeansFrom::Tile => Some(self.band_sums::<S>(band)),
            MeansFrom::Fixed if self.slots.is_some() => Some(self.band_sums::<S>(band)),
            _ => None,
        };
        let g = self.input.g;
        let mut slopes = Vec::with_capacity(band.sets.len());
        for (i, set) in band.sets.clone().enumerate() {
            let stat = self.input.stats.of(set);
            let rstd = stat.rstd(self.input.eps);
            let weight = self.input.params.weight(set);
            let mut means = match self.means {
                MeansFrom::Given(means) => means[set],
                _ => Means::ZERO,
            };
            if let Some(sums) = &sums {
                let Sums { g: dy, gx } = sums[i];
                if let Some(slots) = &mut self.slots {
                    slots.weight[i] += T::Acc::from64(sums[i].dot(stat, rstd));
                    slots.bias[i] += T::Acc::from64(dy);
                }
                if let MeansFrom::Tile = self.means {
                    let sums = Sums { g: dy * weight.to64(), gx: gx * weight.to64() };
                    means = Means::of(sums, stat, rstd, g.center, g.set_len() as f64);
                }
            }
            slopes.push((Slope::of(stat, rstd, means), rstd * weight));
        }
        let Some(dx) = &mut self.dx else { return };
        for row in band.rows.clone() {
            let at = row * g.width..(row + 1) * g.width;
            let (x, dy) = (&self.input.x[at.clone()], &self.input.dy[at]);
            for (c, (slope, weight)) in band.runs().zip(&slopes) {
                let to = dx.row(row, c.clone());
                gradient::<S, T>([&x[c.clone()], &dy[c]], *slope, *weight, to, band.columns.len());
            }
        }
    }

    /// Sums of `dy` and of `dy * (x - high)` of every set.
    #[inline(always)]
    fn band_sums<S: Simd>(&self, band: &Band) -> Vec<Sums> {
        let (input, sets) = (&self.input, band.sets.len());
        let zero = V::<S, T>::splat(T::Acc::ZERO);
        let mut all = vec![Sums::default(); sets];
        let mut sums = vec![[zero; 2]; sets];
        for rows in band.panels(V::<S, T>::W) {
            sums.fill([zero; 2]);
            for row in rows {
                let x = band.row(input.x, input.g.width, row).chunks_exact(band.run);
                let dy = band.row(input.dy, input.g.width, row).chunks_exact(band.run);
                for (((x, dy), [g, gx]), set) in x.zip(dy).zip(&mut sums).zip(band.sets.clone()) {
                    let high = V::<S, T>::splat(input.stats.of(set).high);
                    each_vector!(V::<S, T>::W, x.len(), |at| {
                        let dy = get::<S, T>(dy, at);
                        *g = *g + dy;
                        *gx = dy.fma(at.keep(get::<S, T>(x, at) - high), *gx);
                    });
                }
            }
            for (all, [g, gx]) in all.iter_mut().zip(&sums) {
                all.g += g.sum().to64();
                all.gx += gx.sum().to64();
            }
        }
        all
    }
}
