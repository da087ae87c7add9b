//! Layer and RMS norm as candle-nn means them: over the last dimension, whatever shape the weight and the
//! bias have, as long as they broadcast against the input.
//!
//! Apart from `layer_norm` and `rms_norm`, PyTorch's, where `normalized_shape` says what is normalized and
//! what shape the parameters have.

use super::checks::{channels_hint, check_device, check_dtype, check_input, check_param};
use super::fused::{contiguous_add, AddNorm, Tail};
use super::{apply_layer, contiguous_layer};
use crate::autograd::{sum, widened};
use crate::request::accumulation_dtype;
use candle_core::{bail, Result, Tensor};

/// The output is contiguous, and of the shape that input and parameters broadcast to.
pub(crate) fn last_dim(
    op: &'static str,
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
    tail: Option<Tail>,
) -> Result<Tensor> {
    let Some([w, b]) = vectors(op, input, [weight, bias])? else {
        return broadcast(op, input, weight, bias, eps, center, tail);
    };
    let n = &input.dims()[input.rank() - 1..];
    contiguous_layer(op, input, n, w.as_ref(), b.as_ref(), 0.0, eps, center, tail)
}

/// The norm of `input + residual`, and that sum; both contiguous.
pub(crate) fn add_last_dim(
    op: &'static str,
    input: &Tensor,
    residual: &Tensor,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f64,
    center: bool,
) -> Result<AddNorm> {
    let Some([w, b]) = vectors(op, input, [weight, bias])? else {
        check_param(op, "residual", input, Some(residual), input.dims())?;
        let sum = sum(input, residual)?.contiguous()?;
        let normed = last_dim(op, &widened(&sum, input)?, weight, bias, eps, center, None)?;
        let normed = normed.to_dtype(input.dtype())?;
        return Ok(AddNorm { normed, sum });
    };
    let n = &input.dims()[input.rank() - 1..];
    contiguous_add(op, input, residual, n, [w.as_ref(), b.as_ref()], 0.0, eps, center)
}

/// Weight and bias as `[n]`, which kernels take; `None` where one of them has another shape.
pub(crate) fn vectors(
    op: &str,
    input: &Tensor,
    params: [Option<&Tensor>; 2],
) -> Result<Option<[Option<Tensor>; 2]>> {
    let Some(&n) = input.dims().last() else {
        bail!("{op}: input is a scalar, expected at least one dimension")
    };
    if !params.into_iter().flatten().all(|param| is_vector(param, n, input.rank())) {
        return Ok(None);
    }
    let vector = |param: &Tensor| if param.rank() == 1 { Ok(param.clone()) } else { param.reshape(n) };
    let [weight, bias] = params;
    Ok(Some([weight.map(vector).transpose()?, bias.map(vector).transpose()?]))
}

/// `[n]`, or `[1, .., 1, n]` of at most the input's rank: each set has the same `n` parameters.
fn is_vector(param: &Tensor, n: usize, rank: usize) -> bool {
    param.elem_count() == n && param.dims().last() == Some(&n) && param.rank() <= rank
}

/// Parameters of other shapes: normalized by the kernels without them, and the rest by candle's own ops, in
/// the dtype of accumulation, so that the output is rounded once here too.
fn broadcast(
    op: &'static str,
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
    tail: Option<Tail>,
) -> Result<Tensor> {
    check_input(op, input, eps)?;
    check_broadcast(op, "weight", input, weight)?;
    check_broadcast(op, "bias", input, bias)?;
    let dtype = accumulation_dtype(input.dtype());
    let n = input.dim(candle_core::D::Minus1)?;
    let mut y = apply_layer(op, &input.to_dtype(dtype)?, &[n], None, None, eps, center)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.to_dtype(dtype)?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(dtype)?)?;
    }
    match tail {
        None => y.to_dtype(input.dtype())?.contiguous(),
        Some(tail) => tail.compose(op, input, &y)?.contiguous(),
    }
}

fn check_broadcast(op: &'static str, what: &str, input: &Tensor, param: Option<&Tensor>) -> Result<()> {
    let Some(param) = param else { return Ok(()) };
    check_dtype(op, what, param)?;
    check_device(op, what, input, param)?;
    if input.shape().broadcast_shape_binary_op(param.shape(), op).is_err() {
        let (dims, got) = (input.dims(), param.dims());
        let hint = channels_hint(op, input, got);
        bail!(
            "{op}: {what} has shape {got:?}, expected {:?} or what broadcasts against the input's {dims:?}{hint}",
            &dims[dims.len() - 1..]
        )
    }
    Ok(())
}
