//! The arguments of a norm behind x, as tensors or as storages, and which of them candle's graph sees.
//!
//! Kept separate because forward, backward and the composed path all take them, and candle's ops take three
//! inputs at most: tracked ones are inputs of the graph's node, all others are held by the op.

use candle_core::{DType, Result, Tensor};

/// x, skip and gate have the same shape and dtype; all are contiguous in the geometry's order.
#[derive(Debug, Clone)]
pub(crate) struct Parts<A> {
    pub weight: Option<A>,
    pub bias: Option<A>,
    /// Added to `xhat * weight + bias`.
    pub skip: Option<A>,
    /// What `fusion.gate` places.
    pub gate: Option<A>,
    /// Added to x before anything else, of any dtype; never an input of the norm's node.
    pub residual: Option<A>,
}

impl<A> Default for Parts<A> {
    fn default() -> Self {
        Self { weight: None, bias: None, skip: None, gate: None, residual: None }
    }
}

impl<A> Parts<A> {
    /// Weight and bias, as far as there are any.
    pub fn affine(weight: Option<A>, bias: Option<A>) -> Self {
        Self { weight, bias, ..Self::default() }
    }

    /// Each in another form.
    pub fn map<'a, B>(&'a self, mut f: impl FnMut(&'a A) -> Result<B>) -> Result<Parts<B>> {
        let mut one = |a: &'a Option<A>| a.as_ref().map(&mut f).transpose();
        Ok(Parts {
            weight: one(&self.weight)?,
            bias: one(&self.bias)?,
            skip: one(&self.skip)?,
            gate: one(&self.gate)?,
            residual: one(&self.residual)?,
        })
    }
}

/// An input of the graph's node behind x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    Weight,
    Bias,
    /// Weight and bias as one tensor `[2, params]`, so that a skip finds a place beside them.
    Both,
    Skip,
    Gate,
}

impl Parts<Tensor> {
    /// What candle's graph must see, and the rest without a graph.
    pub(super) fn split(mut self) -> Result<(Vec<(Input, Tensor)>, Self)> {
        let mut inputs = vec![];
        let mut take = |part: &mut Option<Tensor>, input| {
            if let Some(tensor) = part.take_if(|tensor| tensor.track_op()) {
                inputs.push((input, tensor));
            }
        };
        take(&mut self.weight, Input::Weight);
        take(&mut self.bias, Input::Bias);
        take(&mut self.skip, Input::Skip);
        take(&mut self.gate, Input::Gate);
        if let [(Input::Weight, weight), (Input::Bias, bias), _] = &inputs[..] {
            let wide = [weight, bias].iter().any(|t| t.dtype() == DType::F64);
            let dtype = if wide { DType::F64 } else { DType::F32 };
            let flat = |t: &Tensor| t.flatten_all()?.to_dtype(dtype);
            let both = Tensor::stack(&[flat(weight)?, flat(bias)?], 0)?;
            inputs.splice(0..2, [(Input::Both, both)]);
        }
        // Nobody tracks what is left, but perhaps the residual.
        self.residual = self.residual.map(|tensor| tensor.detach());
        Ok((inputs, self))
    }
}
