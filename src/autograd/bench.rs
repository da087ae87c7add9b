//! A norm's backward called by itself, as candle calls it: for benchmarks.
//!
//! Apart, because no model needs it. candle reaches an op's backward through `Tensor::backward`
//! alone, which adds a zero-filled tensor and an addition for every gradient; how fast the op is can
//! only be seen without them.

use super::op::{NormOp, Statistics};
use super::parts::Parts;
use crate::geometry::{self, Channels};
use crate::request::Norm;
use candle_core::{bail, Result, Tensor};

/// Which norm, over an input that is contiguous in some order of its dimensions.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Over the last dimension: layer norm, and RMS norm where `center` is false.
    Layer {
        /// Whether the mean is subtracted.
        center: bool,
    },
    /// Over groups of channels: group and instance norm.
    Groups(usize),
    /// Over the batch.
    Batch,
}

/// An op that has run forward once, so that its statistics are there.
pub struct RecordedOp {
    op: NormOp,
    x: Tensor,
    inputs: Vec<Tensor>,
    /// In which x is contiguous; `None` for its own.
    order: Option<Vec<usize>>,
}

/// `t` with its dimensions in `order`.
fn ordered(t: &Tensor, order: &Option<Vec<usize>>) -> Result<Tensor> {
    order.as_ref().map_or_else(|| Ok(t.clone()), |order| t.permute(order.as_slice()))
}

impl RecordedOp {
    /// Runs the forward as the functions of `functional` do, whose checks it leaves out.
    ///
    /// # Errors
    /// An input that is contiguous in no order, and what the forward returns.
    pub fn new(
        kind: Kind,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Self> {
        let (dims, stride) = (x.dims(), x.stride());
        let placed = match kind {
            Kind::Layer { center } => geometry::layer(dims, stride, 1, center),
            Kind::Groups(groups) => geometry::channels(dims, stride, Channels::Groups(groups)),
            Kind::Batch => geometry::channels(dims, stride, Channels::Batch),
        };
        let (geometry, order) = match placed {
            Some(placed) if placed.blocks.is_none() => (placed.geometry, placed.order),
            _ => bail!("bench: input has strides {stride:?}, expected a contiguous one"),
        };
        let (norm, x) = (Norm::new("bench", geometry, eps), &ordered(x, &order)?);
        let parts = || Parts::affine(weight.cloned(), bias.cloned());
        let (op, inputs) = NormOp::new(norm, x, parts(), Statistics::Input(None))?;
        // The op that goes into the graph fills the cells that both share.
        let (mut graph, _) = NormOp::new(norm, x, parts(), Statistics::Input(None))?;
        graph.saved = op.saved.clone();
        graph.apply(x, &inputs)?;
        Ok(Self { op, x: x.clone(), inputs, order })
    }

    /// Gradients of x and of what else is tracked, in the order weight, bias; that of x as x lies in memory.
    ///
    /// # Errors
    /// What the backward returns.
    pub fn backward(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let inputs: Vec<&Tensor> = self.inputs.iter().collect();
        self.op.backward(&self.x, &inputs, &ordered(dy, &self.order)?)
    }
}
