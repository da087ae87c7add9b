//! Mean and variance: partial results that can be merged, and the form in which they are kept.
//!
//! Partial results are offsets from the set's pivot, its first element: differences from a nearby
//! number keep the digits that a mean near 1e4 has no room for. Merging is Chan, Golub and LeVeque's
//! update (1979), in f64: a few operations per thousands of elements.

use super::element::Float;

/// Mean, as an offset from the pivot, and sum of squared deviations of `n` elements.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moments {
    pub n: f64,
    pub offset: f64,
    pub m2: f64,
}

impl Moments {
    /// Of `n` elements whose mean is `mean`, and their squared distances from its `high`, which the mean is
    /// off by `low`.
    pub fn about<A: Float>(pivot: A, mean: Stat<A>, squares: A, n: f64) -> Self {
        let low = mean.low.to64();
        let offset = mean.high.to64() - pivot.to64() + low;
        Moments { n, offset, m2: squares.to64() - n * low * low }
    }

    pub fn merge(&mut self, other: Moments) {
        if self.n == 0.0 {
            *self = other;
        } else if other.n > 0.0 {
            let n = self.n + other.n;
            let (delta, share) = (other.offset - self.offset, other.n / n);
            self.offset += delta * share;
            self.m2 += other.m2 + delta * delta * self.n * share;
            self.n = n;
        }
    }
}

/// Statistics of a set: the mean is `high + low`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat<A> {
    pub high: A,
    pub low: A,
    pub var: A,
}

impl<A: Float> Stat<A> {
    pub const ZERO: Self = Stat { high: A::ZERO, low: A::ZERO, var: A::ZERO };

    /// The mean `pivot + offset`; the variance is left at zero.
    #[inline(always)]
    pub fn mean(pivot: A, offset: A) -> Self {
        let high = pivot + offset;
        // What the addition lost (Knuth's exact sum).
        let rest = high - pivot;
        let low = (pivot - (high - rest)) + (offset - rest);
        let low = if high.to64().is_finite() { low } else { A::ZERO };
        Stat { high, low, var: A::ZERO }
    }

    /// Of a set whose pivot is `pivot`, or zero; zeros for an empty set.
    pub fn of(pivot: Option<A>, moments: Moments) -> Self {
        if moments.n == 0.0 {
            return Stat::ZERO;
        }
        let pivot = pivot.map_or(0.0, A::to64);
        let mean = pivot + moments.offset;
        let high = A::from64(mean);
        // What the two roundings above lost (the first by Knuth's exact sum).
        let rest = mean - pivot;
        let low = (mean - high.to64()) + ((pivot - (mean - rest)) + (moments.offset - rest));
        let low = if mean.is_finite() { A::from64(low) } else { A::ZERO };
        Stat { high, low, var: A::from64(moments.m2 / moments.n) }
    }

    #[inline(always)]
    pub fn rstd(&self, eps: A) -> A {
        A::ONE / (self.var + eps).root()
    }
}

/// Statistics of all sets, as they travel: `[3, sets]`.
#[derive(Clone, Copy)]
pub(super) struct Stats<'a, A>(pub &'a [A]);

impl<A: Float> Stats<'_, A> {
    #[inline(always)]
    pub fn of(&self, set: usize) -> Stat<A> {
        let sets = self.0.len() / 3;
        Stat { high: self.0[set], low: self.0[sets + set], var: self.0[2 * sets + set] }
    }
}

/// Where the statistics of neighbouring sets are written.
pub(super) type StatsOut<'a, A> = [&'a mut [A]; 3];

/// Where a kernel takes the statistics from.
pub(super) enum StatsFrom<'a, A> {
    Given(Stats<'a, A>),
    /// From the tile, which holds whole sets; kept for the backward if somebody asks.
    Tile(Option<StatsOut<'a, A>>),
}

impl<'a, A: Float> StatsFrom<'a, A> {
    /// From tiles that hold whole sets, in their order; kept in `[3, sets]`.
    pub fn to_keep(stats: &'a mut [A]) -> Self {
        let (high, rest) = stats.split_at_mut(stats.len() / 3);
        let (low, var) = rest.split_at_mut(rest.len() / 2);
        StatsFrom::Tile(Some([high, low, var]))
    }

    /// That of the next `n` sets of the tile, which are walked on their own.
    pub fn next(&mut self, n: usize) -> StatsFrom<'a, A> {
        match self {
            StatsFrom::Given(stats) => StatsFrom::Given(*stats),
            StatsFrom::Tile(None) => StatsFrom::Tile(None),
            StatsFrom::Tile(Some(out)) => {
                StatsFrom::Tile(Some(out.each_mut().map(|out| out.split_off_mut(..n).unwrap_or_default())))
            }
        }
    }

    /// Keeps the statistics of the tile's set number `i`.
    #[inline(always)]
    pub fn keep(&mut self, i: usize, stat: Stat<A>) {
        if let StatsFrom::Tile(Some([high, low, var])) = self {
            (high[i], low[i], var[i]) = (stat.high, stat.low, stat.var);
        }
    }
}
