//! A norm's backward called by itself, as candle calls it: for benchmarks.
//!
//! Apart, because no model needs it. candle reaches an op's backward through `Tensor::backward`
//! alone, which adds a zero-filled tensor and an addition for every gradient; how fast the op is can
//! only be seen without them.

use super::op::{attach, NormOp, Source};
use crate::geometry::{self, Channels};
use crate::request::Norm;
use candle_core::{bail, Result, Tensor};

/// Which norm, over a contiguous input.
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
pub struct Alone {
    op: NormOp,
    x: Tensor,
    affine: Vec<Tensor>,
}

impl Alone {
    /// Runs the forward as the functions of `functional` do, whose checks it leaves out.
    ///
    /// # Errors
    /// An input that is not contiguous, and what the forward returns.
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
        let geometry = match placed {
            Some(placed) if placed.order.is_none() => placed.geometry,
            _ => bail!("alone: input has strides {stride:?}, expected a contiguous one"),
        };
        let norm = Norm::new("alone", geometry, eps);
        let new = || NormOp::new(norm, x, weight, bias, Source::Input(None));
        // The op that goes into the graph fills the cell that both share.
        let (graph, mut op) = (new(), new());
        op.saved = graph.saved.clone();
        attach(graph, x, weight, bias)?;
        let affine = [weight, bias].into_iter().flatten().cloned().collect();
        Ok(Self { op, x: x.clone(), affine })
    }

    /// Gradients of x, weight and bias, `None` where the argument is not tracked.
    ///
    /// # Errors
    /// What the backward returns.
    pub fn backward(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let affine: Vec<&Tensor> = self.affine.iter().collect();
        self.op.backward(&self.x, &affine, dy)
    }
}
