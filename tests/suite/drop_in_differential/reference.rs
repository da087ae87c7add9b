//! What candle-nn's norms mean, in f64, and how far from it an evaluation in a dtype may be.
//!
//! Apart from the suite's oracle, which knows PyTorch's meaning: here parameters broadcast. Bounds are for
//! the largest error of a tensor, from the largest values that take part in it.

use super::sides::{Family, Momentum, GROUPS};
use super::Call;
use crate::common::{accumulation, underflow, unit_roundoff};
use candle_core::{DType, Result, Tensor, D};

/// Arguments as f64 tensors; gradients flow to those that are variables.
pub struct Exact {
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub running: (Tensor, Tensor),
}

pub struct Meaning {
    pub y: Tensor,
    pub running: Option<(Tensor, Tensor)>,
    pub sizes: Sizes,
}

/// Largest magnitudes, over all sets and elements.
#[derive(Debug)]
pub struct Sizes {
    /// Elements of a set.
    n: f64,
    x: f64,
    xhat: f64,
    rstd: f64,
    weight: f64,
    bias: f64,
    old: f64,
}

fn largest(t: &Tensor) -> Result<f64> {
    t.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// Momentum that a family moves running statistics with.
pub fn momentum(family: Family, given: f64) -> f64 {
    match family {
        Family::Batch { momentum: Momentum::Given, .. } => given,
        _ => 0.1,
    }
}

/// `x` as `[sets.., n]`, `xhat` back in x's shape, and the statistics.
struct Normalized {
    xhat: Tensor,
    rstd: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    n: usize,
}

fn normalize(rows: &Tensor, center: bool, eps: f64) -> Result<Normalized> {
    let mean = rows.mean_keepdim(D::Minus1)?;
    let centered = if center { rows.broadcast_sub(&mean)? } else { rows.clone() };
    let mean_square = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let rstd = (&mean_square + eps)?.sqrt()?.recip()?;
    let xhat = centered.broadcast_mul(&rstd)?;
    Ok(Normalized { xhat, rstd, mean, mean_square, n: rows.dim(D::Minus1)? })
}

/// A parameter of C elements, along dimension 1 of `rank` dimensions.
fn per_channel(param: &Tensor, rank: usize) -> Result<Tensor> {
    let mut dims = vec![1; rank];
    *dims.get_mut(1).unwrap_or(&mut 1) = param.elem_count();
    param.reshape(dims)
}

pub fn evaluate(call: &Call, a: &Exact) -> Result<Meaning> {
    let (x, rank) = (&a.x, a.x.rank());
    let mut moved = None;
    let (normalized, affine) = match call.family {
        Family::Last { center, .. } => (normalize(x, center, call.eps)?, (a.weight.clone(), a.bias.clone())),
        Family::Group => {
            let rows = x.reshape((x.dim(0)?, GROUPS, ()))?;
            let normalized = normalize(&rows, true, call.eps)?;
            let xhat = normalized.xhat.reshape(x.dims())?;
            (Normalized { xhat, ..normalized }, (per_channel(&a.weight, rank)?, per_channel(&a.bias, rank)?))
        }
        Family::Batch { center, .. } => {
            let affine = (per_channel(&a.weight, rank)?, per_channel(&a.bias, rank)?);
            let normalized = if call.train {
                let by_channel = x.transpose(0, 1)?;
                let normalized = normalize(&by_channel.flatten_from(1)?, center, call.eps)?;
                moved = Some(moving(call, a, &normalized, center)?);
                let xhat = normalized.xhat.reshape(by_channel.dims())?.transpose(0, 1)?;
                Normalized { xhat, ..normalized }
            } else {
                moved = Some(a.running.clone());
                let (mean, mean_square) =
                    (per_channel(&a.running.0, rank)?, per_channel(&a.running.1, rank)?);
                let rstd = (&mean_square + call.eps)?.sqrt()?.recip()?;
                let xhat = x.broadcast_sub(&mean)?.broadcast_mul(&rstd)?;
                Normalized { xhat, rstd, mean, mean_square, n: 1 }
            };
            (normalized, affine)
        }
    };
    let [scaled, shifted] = call.parameters();
    let mut y = normalized.xhat.clone();
    if scaled {
        y = y.broadcast_mul(&affine.0)?;
    }
    if shifted {
        y = y.broadcast_add(&affine.1)?;
    }
    let sizes = Sizes {
        n: normalized.n as f64,
        x: largest(x)?.max(largest(&normalized.mean)?),
        xhat: largest(&normalized.xhat)?.max(1.0),
        rstd: largest(&normalized.rstd)?,
        weight: if scaled { largest(&a.weight)? } else { 1.0 },
        bias: if shifted { largest(&a.bias)? } else { 0.0 },
        old: largest(&a.running.0)?.max(largest(&a.running.1)?),
    };
    Ok(Meaning { y, running: moved, sizes })
}

/// Without mean removal the running mean stays, and the mean square takes the variance's place.
fn moving(call: &Call, a: &Exact, batch: &Normalized, center: bool) -> Result<(Tensor, Tensor)> {
    let (m, n) = (momentum(call.family, call.momentum), batch.n as f64);
    let step = |old: &Tensor, new: &Tensor| (old * (1.0 - m))? + (new.detach().flatten_all()? * m)?;
    let mean = if center { step(&a.running.0, &batch.mean)? } else { a.running.0.clone() };
    Ok((mean, step(&a.running.1, &(&batch.mean_square * (n / (n - 1.0)))?)?))
}

/// Largest errors of y, of the gradients of x, weight and bias, and of the running statistics.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub y: f64,
    pub x: f64,
    pub weight: f64,
    pub bias: f64,
    pub running: f64,
}

/// How often an element of an argument takes part in the output, for sums that candle makes in its dtype.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Elements of x that are one element in memory.
    pub view: f64,
    pub x: f64,
    pub weight: f64,
    pub bias: f64,
}

/// What an evaluation is allowed, in roundings of the accumulation and of the arguments' dtype.
struct Care {
    /// Of the statistics, over the condition `x * rstd` (to its square where the variance is one pass).
    statistics: f64,
    squared: bool,
    /// Of the dtype for an element of the output, of a term in a gradient, and whether sums are made in it.
    output: f64,
    gradient: f64,
    sums_in_dtype: bool,
}

/// candle-norm's: two-pass statistics whose error grows like the root of n (the oracle's growth), and one
/// rounding to the dtype.
pub fn ours(sizes: &Sizes, r: Repeats, dtype: DType, running: DType) -> Bounds {
    let growth = 12.0 + 2.0 * sizes.n.sqrt();
    let care =
        Care { statistics: growth, squared: false, output: 1.01, gradient: 1.01, sums_in_dtype: false };
    care.bounds(sizes, r, dtype, running)
}

/// candle-nn's: sums of n terms one after the other, a variance as the difference of two sums, and a rounding
/// after each of its operations in half precision, sums over broadcast dimensions among them.
pub fn theirs(sizes: &Sizes, r: Repeats, dtype: DType, running: DType) -> Bounds {
    let statistics = 2.0 * (sizes.n + 12.0);
    let care = Care { statistics, squared: true, output: 6.0, gradient: 10.0, sums_in_dtype: true };
    care.bounds(sizes, r, dtype, running)
}

impl Care {
    fn bounds(&self, s: &Sizes, r: Repeats, dtype: DType, running: DType) -> Bounds {
        let (ua, ud) = (unit_roundoff(accumulation(dtype)), unit_roundoff(dtype));
        let condition = 1.0 + s.x * s.rstd;
        // Relative error of rstd, and absolute error of xhat.
        let spread = self.statistics * ua * if self.squared { condition * condition } else { 1.0 };
        let xhat = spread * s.xhat + self.statistics * ua * condition;
        // Where operations round to the dtype, x - mean does too.
        let rounded = if self.output > 1.0 { self.output * ud * condition } else { 0.0 };
        let largest_y = s.xhat * s.weight + s.bias;
        let y = (xhat + rounded) * s.weight + (self.output * ud + 4.0 * ua) * largest_y;

        // Terms: g = dy * weight at each place, summed over what the weight or the view repeats.
        let g = r.x * DY * s.weight;
        let term = s.rstd * g * (2.0 + s.xhat * s.xhat);
        let sum = |count: f64| if count > 1.0 { (count + 2.0) * ud } else { 0.0 };
        let in_sums = if self.sums_in_dtype { sum(r.x) } else { (r.x - 1.0) * ua };
        let projected = 3.0 * spread.max(self.statistics * ua) * condition;
        let one = term * (projected + in_sums + self.gradient * ud + 40.0 * ua);
        let x = r.view * (one + sum(r.view) * term);

        let sums = |count: f64| (count + 12.0) * if self.sums_in_dtype { ud } else { ua };
        let weight =
            r.weight * DY * (xhat + rounded + s.xhat * (sums(r.weight) + (self.gradient + 0.01) * ud));
        let bias = r.bias * DY * (sums(r.bias) + self.gradient * ud);
        let moved = s.x.max(s.old).max(s.x * s.x * s.n / (s.n - 1.0).max(1.0));
        let running = moved * (self.statistics * ua + 8.0 * unit_roundoff(running));
        let tiny = 8.0 * underflow(dtype);
        let floor = |bound: f64, times: f64| bound + tiny * times;
        Bounds {
            y: floor(y, 1.0),
            x: floor(x, r.view * r.x),
            weight: floor(weight, r.weight),
            bias: floor(bias, r.bias),
            running,
        }
    }
}

/// Largest output gradient: `common::data` reaches `sqrt(12)` standard deviations.
const DY: f64 = 3.5;
