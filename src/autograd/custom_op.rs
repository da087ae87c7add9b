//! `NormOp` as the three custom ops that candle has, by their number of inputs.
//!
//! Kept separate because candle dictates all of it: nothing is decided here.

use super::op::NormOp;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

impl CustomOp1 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((s, l), &[])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward((s, l), &[])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = exactly(self.backward(x, &[], dy)?);
        Ok(dx)
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(exactly::<2>(self.backward(x, &[a], dy)?).into())
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2), (s3, l3)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(exactly::<3>(self.backward(x, &[a, b], dy)?).into())
    }
}

/// A gradient for every argument.
fn exactly<const N: usize>(gradients: Vec<Option<Tensor>>) -> [Option<Tensor>; N] {
    let mut gradients = gradients.into_iter();
    std::array::from_fn(|_| gradients.next().flatten())
}
