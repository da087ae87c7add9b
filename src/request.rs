//! What one call of a norm hands to a device: geometry, eps and the arguments' storages.
//!
//! Apart, because the CPU and the CUDA side take the same calls and must not know each other.
//!
//! Statistics travel as one tensor `[3, sets]` of the accumulation dtype (f64 for f64, f32 for all
//! else): `mean`, `mean_low`, `var`. The mean is the unevaluated sum `mean + mean_low`, which keeps
//! `x - mean` exact to the last bit where a mean rounded to f32 would not (mean 1e4, std 1: 5e-4).
//! `var` is biased. RMS norm has `mean = mean_low = 0` and the mean square as `var`.

use crate::fusion::Fusion;
pub(crate) use crate::geometry::Blocks;
use crate::geometry::Geometry;
use candle_core::{DType, Result, Tensor, Var};

/// An argument, contiguous unless it is an x in blocks: its storage, and where its first element lies.
#[derive(Debug)]
pub(crate) struct Arg<'a, S> {
    pub storage: &'a S,
    pub offset: usize,
}

impl<S> Clone for Arg<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Arg<'_, S> {}

/// Geometry and constants of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    /// The op's name in errors: `layer-norm`.
    pub name: &'static str,
    pub geometry: Geometry,
    pub eps: f64,
    pub fusion: Fusion,
    /// Where the blocks of x lie, if not one behind the other; everything else is contiguous.
    pub x_blocks: Option<Blocks>,
}

impl Norm {
    /// A norm with nothing around it, over a contiguous x.
    pub fn new(name: &'static str, geometry: Geometry, eps: f64) -> Self {
        Self { name, geometry, eps, fusion: Fusion::default(), x_blocks: None }
    }

    /// Length of the weight and of the bias, of all samples where each has its own.
    pub fn params(&self) -> usize {
        let sets =
            self.fusion.tokens.map_or(1, |tokens| self.geometry.outer.checked_div(tokens).unwrap_or(0));
        sets * self.geometry.params()
    }
}

/// Statistics that do not come from the input, each `[sets]`, of any of the four dtypes: the running
/// ones as they lie in their variables, or rows of a statistics tensor.
pub(crate) struct Given<'a, S> {
    pub mean: Arg<'a, S>,
    pub mean_low: Option<Arg<'a, S>>,
    pub var: Arg<'a, S>,
}

/// Arguments of `forward`.
pub(crate) struct Forward<'a, S> {
    pub norm: Norm,
    pub x: Arg<'a, S>,
    pub weight: Option<Arg<'a, S>>,
    pub bias: Option<Arg<'a, S>>,
    /// Added to x before anything else, of x's shape and any of the four dtypes; the rounded sum is wanted back.
    pub residual: Option<Arg<'a, S>>,
    /// Added to `xhat * weight + bias`, of x's shape and dtype.
    pub skip: Option<Arg<'a, S>>,
    /// What `fusion.gate` places, of x's shape and dtype.
    pub gate: Option<Arg<'a, S>>,
    /// Statistics to normalize with instead of the input's own.
    pub given: Option<Given<'a, S>>,
    /// Whether the caller wants the statistics `[3, sets]` back (given ones as a snapshot).
    pub keep: bool,
    /// Running statistics to move once nothing can fail any more.
    pub running: Option<&'a Running>,
}

impl<'a, S> Forward<'a, S> {
    /// With nothing but x.
    pub fn new(norm: Norm, x: Arg<'a, S>) -> Self {
        let (weight, bias, residual, skip, gate) = (None, None, None, None, None);
        Self { norm, x, weight, bias, residual, skip, gate, given: None, keep: false, running: None }
    }
}

/// What `forward` returns.
pub(crate) struct Normed<S> {
    pub y: S,
    /// `[3, sets]`, if the call keeps them.
    pub stats: Option<S>,
    /// `x + residual`, rounded to the residual's dtype, if the call has a residual.
    pub sum: Option<S>,
}

/// Arguments of `backward`, `gradient_sums` and `input_gradient`.
pub(crate) struct Backward<'a, S> {
    pub norm: Norm,
    pub x: Arg<'a, S>,
    /// Gradient of the output, contiguous in the geometry's order, of the input's dtype.
    pub dy: Arg<'a, S>,
    pub weight: Option<Arg<'a, S>>,
    /// For fusions whose gradients depend on z: an activation, a gate behind the norm.
    pub bias: Option<Arg<'a, S>>,
    pub skip: Option<Arg<'a, S>>,
    pub gate: Option<Arg<'a, S>>,
    pub stats: Arg<'a, S>,
    /// The statistics did not depend on x (evaluation): `dx = dy * weight * rstd`.
    pub fixed: bool,
    pub want: Want,
}

impl<'a, S> Backward<'a, S> {
    /// Without parameters, and with no gradient wanted.
    pub fn new(norm: Norm, x: Arg<'a, S>, dy: Arg<'a, S>, stats: Arg<'a, S>) -> Self {
        let (weight, bias, skip, gate) = (None, None, None, None);
        Self { norm, x, dy, weight, bias, skip, gate, stats, fixed: false, want: Want::default() }
    }
}

/// Which gradients somebody tracks, and the dtypes they must have.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Want {
    pub dx: bool,
    pub dweight: Option<DType>,
    pub dbias: Option<DType>,
    /// Of x's dtype.
    pub dskip: bool,
    /// Of x's dtype.
    pub dgate: bool,
}

/// What `backward` returns; `None` where nobody asked.
pub(crate) struct Gradients<S> {
    pub dx: Option<S>,
    pub dweight: Option<S>,
    pub dbias: Option<S>,
    pub dskip: Option<S>,
    pub dgate: Option<S>,
}

impl<S> Default for Gradients<S> {
    fn default() -> Self {
        Self { dx: None, dweight: None, dbias: None, dskip: None, dgate: None }
    }
}

/// Running statistics of batch and instance norm, moved towards the batch's within the forward.
///
/// `running = (1 - momentum) * running + momentum * batch`, the batch's variance unbiased, both
/// averaged over `outer` (instance norm has one set per sample). Neither is an argument of the op:
/// candle holds read locks on those.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub mean: Var,
    pub var: Var,
    pub momentum: f64,
}

impl Running {
    /// Moves both by candle's ops, for statistics that no kernel of ours can move; `var` is unbiased.
    pub fn move_towards(&self, mean: &Tensor, var: &Tensor) -> Result<()> {
        let moved = |running: &Var, batch: &Tensor| {
            let batch = batch.to_dtype(running.dtype())?;
            (running.as_detached_tensor() * (1.0 - self.momentum))? + (batch * self.momentum)?
        };
        let (mean, var) = (moved(&self.mean, mean)?, moved(&self.var, var)?);
        self.mean.set(&mean)?;
        self.var.set(&var)
    }
}

/// dtype in which x of dtype `x` is accumulated and its statistics are kept.
pub(crate) fn accumulation_dtype(x: DType) -> DType {
    if x == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}
