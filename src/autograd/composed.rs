//! The norms and their gradients written in candle's own ops.
//!
//! Slower than the kernels, and differentiable any number of times: it serves second-order gradients
//! (`CANDLE_GRAD_DO_NOT_DETACH=1`), devices that have no kernels of ours (Metal), and what stands around a
//! norm where no kernel takes it.

use super::parts::Parts;
use crate::fusion::{Fusion, Gate};
use crate::geometry::{Geometry, WeightBy};
use crate::request::{accumulation_dtype, Gradients, Norm};
use candle_core::{Result, Tensor};

/// x as `[outer, rows, width / run, run]` in the accumulation dtype: a set is `[o, :, q, :]`.
fn block(x: &Tensor, g: &Geometry) -> Result<Tensor> {
    x.reshape((g.outer, g.rows, g.sets_per_outer(), g.run))?.to_dtype(accumulation_dtype(x.dtype()))
}

/// Statistics row `[sets]`, or a parameter `[params]`, in a shape that broadcasts over a block.
fn per_set(t: &Tensor, g: &Geometry) -> Result<Tensor> {
    t.reshape((g.outer, 1, g.sets_per_outer(), 1))
}

fn per_param(t: &Tensor, g: &Geometry, like: &Tensor) -> Result<Tensor> {
    let t = t.to_dtype(like.dtype())?;
    match g.weight_by {
        WeightBy::Column { span } => t.reshape((g.params(), 1))?.broadcast_as((g.params(), span))?.reshape((
            1,
            1,
            g.sets_per_outer(),
            g.run,
        )),
        WeightBy::Row => t.reshape((1, g.rows, 1, 1)),
    }
}

/// Sums a block over everything but its parameter.
fn sum_to_params(block: &Tensor, g: &Geometry) -> Result<Tensor> {
    match g.weight_by {
        WeightBy::Column { span } => block.sum((0, 1))?.reshape((g.params(), span))?.sum(1),
        WeightBy::Row => block.sum((0, 2, 3)),
    }
}

fn set_mean(block: &Tensor) -> Result<Tensor> {
    let n = block.dim(1)? * block.dim(3)?;
    block.sum_keepdim((1, 3))? / n as f64
}

/// `(xhat, rstd)`: the block normalized, with given statistics or its own.
fn normalized(x: &Tensor, norm: &Norm, stats: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let g = &norm.geometry;
    let x = block(x, g)?;
    let (centered, var) = match stats {
        Some(stats) => {
            let row = |i| per_set(&stats.get(i)?, g);
            (x.broadcast_sub(&row(0)?)?.broadcast_sub(&row(1)?)?, row(2)?)
        }
        None => {
            let centered = if g.center { x.broadcast_sub(&set_mean(&x)?)? } else { x };
            // A mean rounded to the dtype leaves its rounding in `centered`; a second one takes it.
            let centered = if g.center { centered.broadcast_sub(&set_mean(&centered)?)? } else { centered };
            let var = set_mean(&centered.sqr()?)?;
            (centered, var)
        }
    };
    let rstd = (var + norm.eps)?.sqrt()?.recip()?;
    Ok((centered.broadcast_mul(&rstd)?, rstd))
}

/// The output; differentiable in x, weight and bias.
pub(crate) fn forward(
    x: &Tensor,
    norm: &Norm,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    stats: Option<&Tensor>,
) -> Result<Tensor> {
    let g = &norm.geometry;
    let (mut y, _) = normalized(x, norm, stats)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&per_param(weight, g, &y)?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&per_param(bias, g, &y)?)?;
    }
    y.reshape(x.shape())?.to_dtype(x.dtype())
}

/// Statistics `[3, sets]` as the kernels keep them.
pub(crate) fn statistics(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let g = &norm.geometry;
    let x = block(x, g)?;
    let (mean, low, centered) = if g.center {
        let mean = set_mean(&x)?;
        let centered = x.broadcast_sub(&mean)?;
        let low = set_mean(&centered)?;
        let centered = centered.broadcast_sub(&low)?;
        (mean, low, centered)
    } else {
        let zero = set_mean(&x)?.zeros_like()?;
        (zero.clone(), zero, x)
    };
    let var = set_mean(&centered.sqr()?)?;
    Tensor::stack(&[mean.flatten_all()?, low.flatten_all()?, var.flatten_all()?], 0)
}

/// Gradients for x, weight and bias, differentiable in x, weight and dy.
///
/// With `xhat = (x - mean) * rstd` and `g = dy * weight`:
/// `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))`, without the first mean where nothing was
/// centered and without both where the statistics were given.
pub(crate) fn backward(
    x: &Tensor,
    dy: &Tensor,
    norm: &Norm,
    weight: Option<&Tensor>,
    stats: Option<&Tensor>,
) -> Result<Gradients<Tensor>> {
    let geometry = &norm.geometry;
    let (xhat, rstd) = normalized(x, norm, stats)?;
    let dy = block(dy, geometry)?;
    let dweight = sum_to_params(&(&dy * &xhat)?, geometry)?;
    let dbias = sum_to_params(&dy, geometry)?;
    let g = match weight {
        Some(weight) => dy.broadcast_mul(&per_param(weight, geometry, &dy)?)?,
        None => dy,
    };
    let dx = if stats.is_some() {
        g
    } else {
        let projected = xhat.broadcast_mul(&set_mean(&(&g * &xhat)?)?)?;
        let g = if geometry.center { g.broadcast_sub(&set_mean(&g)?)? } else { g };
        (g - projected)?
    };
    let dx = dx.broadcast_mul(&rstd)?.reshape(x.shape())?.to_dtype(x.dtype())?;
    Ok(Gradients { dx: Some(dx), dweight: Some(dweight), dbias: Some(dbias), ..Gradients::default() })
}

/// The norm `plain` between candle's own operations, which do what `norm.fusion` says; nothing is rounded in
/// between that a kernel would not round.
pub(crate) fn unfused(
    norm: Norm,
    x: &Tensor,
    parts: Parts<Tensor>,
    plain: impl FnOnce(Norm, &Tensor, Parts<Tensor>) -> Result<Tensor>,
) -> Result<Tensor> {
    let fusion = norm.fusion;
    let bare = Norm { fusion: Fusion::default(), x_blocks: None, ..norm };
    if fusion == Fusion::default() {
        return plain(bare, &x.contiguous()?, parts);
    }
    let wide = |t: &Tensor| t.to_dtype(accumulation_dtype(x.dtype()));
    let Parts { weight, bias, skip, gate, .. } = parts.map(wide)?;
    let gate = gate.map(|gate| gate.silu()).transpose()?;
    let mut z = wide(&x.contiguous()?)?;
    if let (Some(Gate::Before), Some(gate)) = (fusion.gate, &gate) {
        z = (z * gate)?;
    }
    let weight = weight.map(|weight| weight + fusion.weight_offset).transpose()?;
    z = match fusion.tokens {
        Some(tokens) => {
            let z = plain(bare, &z, Parts::default())?;
            per_sample(&z, norm.geometry.width, tokens, weight, bias)?
        }
        None => plain(bare, &z, Parts::affine(weight, bias))?,
    };
    if let Some(skip) = skip {
        z = (z + skip)?;
    }
    if let Some(activation) = fusion.activation {
        z = activation.apply(&z)?;
    }
    if let (Some(Gate::After), Some(gate)) = (fusion.gate, &gate) {
        z = (z * gate)?;
    }
    z.to_dtype(x.dtype())
}

/// Scales and shifts rows of `width`, `tokens` of which share a weight and a bias.
fn per_sample(
    z: &Tensor,
    width: usize,
    tokens: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
) -> Result<Tensor> {
    let samples = z.elem_count().checked_div(tokens * width).unwrap_or(0);
    let mut y = z.reshape((samples, tokens, width))?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.reshape((samples, 1, width))?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.reshape((samples, 1, width))?)?;
    }
    y.reshape(z.shape())
}
