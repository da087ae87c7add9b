//! A residual added before a norm: two linked nodes, since candle's ops have one output.
//!
//! ```text
//! x, residual --AddOp--> sum --NormOp--> normed
//! ```
//!
//! `AddOp` runs the kernel, which makes both, returns the sum and puts the rest where `NormOp` takes it out.
//! Gradients flow along the edges as from an addition followed by a norm. Where nobody tracks anything, one op
//! does it all.

use super::device;
use super::op::{normalize, second_order, wider, Laid, NormOp, Statistics};
use super::parts::Parts;
use crate::kernels::Kernels;
use crate::request::{Norm, Normed};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

/// `(normed, sum)`; all contiguous, of x's shape. The sum has the residual's dtype, `normed` x's.
pub(crate) fn add_normalize(
    norm: Norm,
    x: &Tensor,
    residual: &Tensor,
    parts: Parts<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let mut fused = norm;
    fused.fusion.residual = Some(residual.dtype());
    // The sum is contiguous wherever x lies.
    let norm = Norm { x_blocks: None, ..norm };
    let kernels = device::has_kernels(x.device()) && !second_order();
    if !kernels || !device::fuses(x.device(), &fused, x.dtype())? {
        let sum = sum(x, residual)?;
        let normed = normalize(norm, &widened(&sum, x)?, parts, Statistics::Input(None))?;
        return Ok((normed.to_dtype(x.dtype())?, sum));
    }
    let held = Parts { residual: Some(residual.detach()), ..parts.map(|t| Ok(t.detach()))? };
    let (mut both, _) = NormOp::new(fused, &x.detach(), held, Statistics::Input(None))?;
    let saved = both.saved.clone();
    let tracked = |t: &Tensor| t.track_op();
    if ![x, residual].into_iter().chain(&parts.weight).chain(&parts.bias).any(tracked) {
        let normed = both.apply(x, &[])?;
        return match saved.sum.get() {
            Some(sum) => Ok((normed, sum.clone())),
            None => bail!("{}: the kernel returned no sum", norm.name),
        };
    }
    both.keep = true;
    let sum = x.apply_op2(residual, AddOp { both })?;
    let (mut op, inputs) = NormOp::new(norm, &sum, parts, Statistics::Input(None))?;
    op.saved = saved;
    Ok((op.apply(&sum, &inputs)?, sum))
}

/// `x + residual`, rounded to the residual's dtype; in f32 where candle 0.11.1's own addition of bf16 drops bits instead.
pub(crate) fn sum(x: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let wide = match wider(x.dtype(), residual.dtype()) {
        DType::BF16 if cfg!(target_arch = "aarch64") && x.device().is_cpu() => DType::F32,
        wide => wide,
    };
    (x.to_dtype(wide)? + residual.to_dtype(wide)?)?.to_dtype(residual.dtype())
}

/// `t` in the wider dtype of the two; exact.
pub(crate) fn widened(t: &Tensor, other: &Tensor) -> Result<Tensor> {
    t.to_dtype(wider(t.dtype(), other.dtype()))
}

/// `x + residual`, with the norm of the sum left in `both.saved`.
struct AddOp {
    /// Holds the residual too, which the graph sees as this op's input.
    both: NormOp,
}

impl AddOp {
    fn forward<S: Kernels>(&self, x: Laid<S>) -> Result<(S, Shape)> {
        let Normed { y, stats, sum } = self.both.run(x, &[])?;
        self.both.save(stats, None, x.1);
        self.both.saved.leave(y.wrap());
        match sum {
            Some(sum) => Ok((sum, x.1.shape().clone())),
            None => bail!("{}: the kernel returned no sum", self.both.norm.name),
        }
    }
}

impl CustomOp2 for AddOp {
    fn name(&self) -> &'static str {
        self.both.norm.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward((s1, l1))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _sum: &Tensor,
        dsum: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let to = |arg: &Tensor| arg.track_op().then(|| dsum.to_dtype(arg.dtype())).transpose();
        Ok((to(x)?, to(residual)?))
    }
}
