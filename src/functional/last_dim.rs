//! Layer and RMS norm as candle-nn means them: over the last dimension, whatever shape the weight and the
//! bias have, as long as they broadcast against the input.
//!
//! Apart from `layer_norm` and `rms_norm`, PyTorch's, where `normalized_shape` says what is normalized and
//! what shape the parameters have.

use super::checks::{channels_hint, check_device, check_dtype, check_input};
use super::{apply_layer, contiguous_layer};
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
) -> Result<Tensor> {
    let Some(&n) = input.dims().last() else {
        bail!("{op}: input is a scalar, expected at least one dimension")
    };
    let fits = |param: Option<&Tensor>| param.is_none_or(|p| is_vector(p, n, input.rank()));
    if !fits(weight) || !fits(bias) {
        return broadcast(op, input, weight, bias, eps, center);
    }
    let vector = |param: &Tensor| if param.rank() == 1 { Ok(param.clone()) } else { param.reshape(n) };
    let (weight, bias) = (weight.map(vector).transpose()?, bias.map(vector).transpose()?);
    contiguous_layer(op, input, &[n], weight.as_ref(), bias.as_ref(), eps, center)
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
    y.to_dtype(input.dtype())?.contiguous()
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
