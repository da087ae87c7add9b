//! What the backward kernels share: the formula, and where its means come from and its sums go.
//!
//! With `xhat = (x - mean) * rstd` and `g = dy * weight`, over the elements of a set:
//!
//! ```text
//! dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//!    = rstd * weight * dy + slope * (x - high) + shift
//! ```

use super::element::Float;
use super::moments::Stat;
use super::vector::{Simd, Vector};

/// Sums of `g` and of `g * (x - high)`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    pub g: f64,
    pub gx: f64,
}

impl Sums {
    /// The sum of `g * xhat`.
    #[inline(always)]
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

    #[inline(always)]
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

/// What turns dy and x into dx for one set; in kernels each field is a vector of one value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slope<A> {
    pub high: A,
    pub rstd: A,
    pub slope: A,
    pub shift: A,
    pub low: A,
}

impl<A: Float> Slope<A> {
    pub const ZERO: Self =
        Slope { high: A::ZERO, rstd: A::ZERO, slope: A::ZERO, shift: A::ZERO, low: A::ZERO };

    /// Of a set's sums of `g` and `g * (x - high)`, which are short enough to stay in this type.
    #[inline(always)]
    pub fn short(stat: Stat<A>, rstd: A, [g, gx]: [A; 2], center: bool, n: A) -> Self {
        let mean = if center { g / n } else { A::ZERO };
        Self::of(stat, rstd, Means { g: mean, dot: (gx - stat.low * g) * rstd / n })
    }

    #[inline(always)]
    pub fn of(stat: Stat<A>, rstd: A, means: Means<A>) -> Self {
        let slope = -(rstd * (rstd * means.dot));
        let shift = -(rstd * means.g) - slope * stat.low;
        Slope { high: stat.high, rstd, slope, shift, low: stat.low }
    }

    #[inline(always)]
    pub fn splat<S: Simd>(self) -> Slope<A::V<S>> {
        Slope {
            high: A::V::<S>::splat(self.high),
            rstd: A::V::<S>::splat(self.rstd),
            slope: A::V::<S>::splat(self.slope),
            shift: A::V::<S>::splat(self.shift),
            low: A::V::<S>::splat(self.low),
        }
    }
}

/// Sums for the parameters that a tile touches; kernels add to what is there.
pub(super) struct Slots<'a, A> {
    /// Of `dy * xhat`.
    pub weight: &'a mut [A],
    /// Of `dy`.
    pub bias: &'a mut [A],
}
