//! What the walks' backwards share: the formula, and where its means come from and its sums go.
//!
//! With `xhat = (x - mean) * rstd` and `g = dy * weight`, over the elements of a set:
//!
//! ```text
//! dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//!    = rstd * weight * dy + x_scale * (x - high) + shift
//! ```

use super::element::Float;
use super::moments::Stat;
use super::tile::Tile;

/// Sums of `g` and of `g * (x - high)`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    pub g: f64,
    pub gx: f64,
}

impl Sums {
    pub fn times(self, weight: f64) -> Sums {
        Sums { g: self.g * weight, gx: self.gx * weight }
    }

    /// The sum of `g * xhat`.
    pub fn dot<A: Float>(&self, stat: Stat<A>, rstd: A) -> f64 {
        (self.gx - stat.low.to64() * self.g) * rstd.to64()
    }
}

/// Means of `g` and of `g * xhat` over a set.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means<A> {
    pub g: A,
    pub dot: A,
}

impl<A: Float> Means<A> {
    pub const ZERO: Self = Means { g: A::ZERO, dot: A::ZERO };

    pub fn of(sums: Sums, stat: Stat<A>, rstd: A, center: bool, n: f64) -> Self {
        let g = if center { A::from64(sums.g / n) } else { A::ZERO };
        Means { g, dot: A::from64(sums.dot(stat, rstd) / n) }
    }
}

/// Where the means come from.
#[derive(Clone, Copy)]
pub(super) enum MeansFrom<'a, A> {
    /// The tile, which holds whole sets.
    Tile,
    /// One for every set of the tensor.
    Given(&'a [Means<A>]),
    /// The statistics did not depend on x: there are none.
    Fixed,
}

/// What turns dy and x into dx for one set.
#[derive(Debug, Clone, Copy)]
pub(super) struct InputGradient<A> {
    pub high: A,
    pub rstd: A,
    pub x_scale: A,
    pub shift: A,
    pub low: A,
}

impl<A: Float> InputGradient<A> {
    pub const ZERO: Self =
        InputGradient { high: A::ZERO, rstd: A::ZERO, x_scale: A::ZERO, shift: A::ZERO, low: A::ZERO };

    /// Of a set's sums of `g` and `g * (x - high)`, which are short enough to stay in this type.
    pub fn short(stat: Stat<A>, rstd: A, [g, gx]: [A; 2], center: bool, n: A) -> Self {
        let mean = if center { g / n } else { A::ZERO };
        Self::of(stat, rstd, Means { g: mean, dot: (gx - stat.low * g) * rstd / n })
    }

    pub fn of(stat: Stat<A>, rstd: A, means: Means<A>) -> Self {
        let x_scale = -(rstd * (rstd * means.dot));
        let shift = -(rstd * means.g) - x_scale * stat.low;
        InputGradient { high: stat.high, rstd, x_scale, shift, low: stat.low }
    }

    /// As loops take it, `scale` being what dy is multiplied by.
    #[inline(always)]
    pub fn with_scale(self, scale: A) -> [A; 4] {
        [self.high, self.x_scale, self.shift, scale]
    }

    /// What finds `xhat`.
    #[inline(always)]
    pub fn stats(self) -> [A; 3] {
        [self.high, self.low, self.rstd]
    }
}

/// Sums for the parameters that a tile touches; walks add to what is there.
pub(super) struct ParamSums<'a, A> {
    /// Of `dy * xhat`.
    pub weight: &'a mut [A],
    /// Of `dy`.
    pub bias: &'a mut [A],
}

impl<A> ParamSums<'_, A> {
    /// Those of a piece of the tile, which lies within a sample where samples have their own parameters.
    pub fn of_sample(&mut self, tokens: Option<usize>, tile: &Tile, piece: &Tile) -> ParamSums<'_, A> {
        let own = match tokens {
            Some(tokens) => {
                let (sample, n) = (piece.rows.start / tokens - tile.rows.start / tokens, tile.columns.len());
                sample * n..(sample + 1) * n
            }
            None => 0..self.weight.len(),
        };
        ParamSums { weight: &mut self.weight[own.clone()], bias: &mut self.bias[own] }
    }
}
