//! Getting, checking and resetting the parameters of a layer.
//!
//! Apart, since every layer does it and none in a way of its own.

use candle_core::{bail, Error, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

/// The weight: ones where the builder creates it.
pub(super) fn weight(op: &str, vb: &VarBuilder, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
    param(op, vb, shape, name, 1.0)
}

/// The bias: zeros where the builder creates it.
pub(super) fn bias(op: &str, vb: &VarBuilder, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
    param(op, vb, shape, name, 0.0)
}

/// A parameter, filled with `value` where the builder creates it.
pub(super) fn param(
    op: &str,
    vb: &VarBuilder,
    shape: impl Into<Shape>,
    name: &str,
    value: f64,
) -> Result<Tensor> {
    let shape = shape.into();
    vb.get_with_hints(&shape, name, Init::Const(value)).map_err(|e| missing(op, name, &shape, e))
}

/// candle's error about a tensor, which does not know the layer.
pub(super) fn missing(op: &str, name: &str, shape: &Shape, error: Error) -> Error {
    error.context(format!("{op}: expected {name} of shape {:?}", shape.dims()))
}

pub(super) fn check_shape(op: &str, what: &str, tensor: Option<&Tensor>, shape: &[usize]) -> Result<()> {
    match tensor {
        Some(tensor) if tensor.dims() != shape => {
            bail!("{op}: {what} has shape {:?}, expected {shape:?}", tensor.dims())
        }
        _ => Ok(()),
    }
}

/// Whether the builder's source holds `name`, rather than answering yes to any name.
///
/// `VarBuilder::zeros` has every tensor one asks for, so its yes means nothing.
pub(super) fn holds(vb: &VarBuilder, name: &str) -> bool {
    vb.contains_tensor(name) && !vb.contains_tensor("a name that no checkpoint has")
}

/// The output of a layer: copied where its memory order is that of a permuted input.
///
/// candle-nn's norms return contiguous tensors, and models count on it unawares: candle 0.11's `Linear`
/// computes wrong values from a permuted batch, because the CPU's matmul with a broadcast right side
/// takes the left side's rows to be contiguous.
pub(crate) fn contiguous(y: Tensor) -> Result<Tensor> {
    y.contiguous()
}

/// Sets parameters to the values they are created with; none if one of them cannot be set.
pub(super) fn reset(op: &str, params: &[(&str, Option<&Tensor>, f64)]) -> Result<()> {
    let given = || params.iter().filter_map(|&(what, param, value)| Some((what, param?, value)));
    if let Some((what, ..)) = given().find(|(_, param, _)| !param.is_variable()) {
        bail!("{op}: {what} is a tensor, expected a variable (a layer built from a VarMap has them)")
    }
    for (_, param, value) in given() {
        fill(&Var::from_tensor(param)?, value)?;
    }
    Ok(())
}

pub(super) fn fill(var: &Var, value: f64) -> Result<()> {
    var.set(&var.zeros_like()?.affine(1.0, value)?)
}
