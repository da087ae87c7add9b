//! Which kernels run for a storage: the one switch between the CPU and CUDA.
//!
//! The kernels of both sides take the same calls (`call.rs`) and return the same results, so what is
//! above this file never asks for a device.

use crate::call::{Arg, Backward, Forward, Gradients, Norm, Want};
#[cfg(not(feature = "cuda-emulation"))]
use crate::cpu as host;
#[cfg(feature = "cuda-emulation")]
use crate::cuda::emulation as host;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Result, Storage, Tensor};
use std::ops::Deref;

pub(crate) fn cpu_forward(call: Forward<'_, CpuStorage>) -> Result<(CpuStorage, Option<CpuStorage>)> {
    host::forward(call)
}

/// A tensor without a graph behind it.
pub(crate) fn tensor(storage: Storage, dims: &[usize]) -> Tensor {
    Tensor::from_storage(storage, dims, BackpropOp::none(), false)
}

/// Tensor arguments of a backward call, all contiguous.
pub(crate) struct BackwardTensors<'a> {
    pub norm: Norm,
    pub x: &'a Tensor,
    pub dy: &'a Tensor,
    pub weight: Option<&'a Tensor>,
    pub stats: &'a Tensor,
    pub fixed: bool,
    pub want: Want,
}

/// Runs `$body` with `$call` bound to a `Backward` over the storages of `$t`, on their device.
macro_rules! on_device {
    ($t:expr, |$call:ident| cpu: $cpu:expr, cuda: $cuda:expr) => {{
        let t = $t;
        let x = t.x.storage_and_layout();
        let dy = t.dy.storage_and_layout();
        let stats = t.stats.storage_and_layout();
        let weight = t.weight.map(|w| w.storage_and_layout());
        match x.0.deref() {
            Storage::Cpu(_) => {
                let $call = Backward {
                    norm: t.norm,
                    x: cpu(&x)?,
                    dy: cpu(&dy)?,
                    weight: weight.as_ref().map(cpu).transpose()?,
                    stats: cpu(&stats)?,
                    fixed: t.fixed,
                    want: t.want,
                };
                $cpu
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => {
                let $call = Backward {
                    norm: t.norm,
                    x: cuda(&x)?,
                    dy: cuda(&dy)?,
                    weight: weight.as_ref().map(cuda).transpose()?,
                    stats: cuda(&stats)?,
                    fixed: t.fixed,
                    want: t.want,
                };
                $cuda
            }
            _ => bail!("{}: no kernels for device {:?}", t.norm.name, t.x.device().location()),
        }
    }};
}

type Guarded<'a> = (candle_core::StorageRef<'a>, &'a candle_core::Layout);

pub(crate) fn cpu<'a>(guarded: &'a Guarded<'_>) -> Result<Arg<'a, CpuStorage>> {
    match guarded.0.deref() {
        Storage::Cpu(storage) => Ok(Arg::new(storage, guarded.1)),
        _ => bail!("candle-norm: an argument left the CPU between forward and backward"),
    }
}

#[cfg(feature = "cuda")]
pub(crate) fn cuda<'a>(guarded: &'a Guarded<'_>) -> Result<Arg<'a, candle_core::CudaStorage>> {
    match guarded.0.deref() {
        Storage::Cuda(storage) => Ok(Arg::new(storage, guarded.1)),
        _ => bail!("candle-norm: an argument left the GPU between forward and backward"),
    }
}

/// Gradients as tensors: `dx` of x's shape, `dweight` and `dbias` as `[params]`.
pub(crate) fn backward(t: BackwardTensors) -> Result<Gradients<Tensor>> {
    let (dims, params) = (t.x.dims(), [t.norm.geometry.params()]);
    let wrap = |g: Gradients<Storage>| Gradients {
        dx: g.dx.map(|s| tensor(s, dims)),
        dweight: g.dweight.map(|s| tensor(s, &params)),
        dbias: g.dbias.map(|s| tensor(s, &params)),
    };
    on_device!(&t, |call|
        cpu: Ok(wrap(host::backward(call)?.map(Storage::Cpu))),
        cuda: Ok(wrap(crate::cuda::backward(call)?.map(Storage::Cuda))))
}

/// The input's own statistics, `[3, sets]`.
pub(crate) fn statistics(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    let guarded = x.storage_and_layout();
    let stats = match guarded.0.deref() {
        Storage::Cpu(_) => Storage::Cpu(host::statistics(*norm, cpu(&guarded)?)?),
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => Storage::Cuda(crate::cuda::statistics(*norm, cuda(&guarded)?)?),
        _ => bail!("{}: no kernels for device {:?}", norm.name, x.device().location()),
    };
    Ok(tensor(stats, &[3, norm.geometry.sets()]))
}

/// Sums over each set of `dy` and of `dy * xhat`, `[2, sets]`.
pub(crate) fn gradient_sums(t: &BackwardTensors) -> Result<Tensor> {
    let dims = [2, t.norm.geometry.sets()];
    on_device!(t, |call|
        cpu: Ok(tensor(Storage::Cpu(host::gradient_sums(call)?), &dims)),
        cuda: Ok(tensor(Storage::Cuda(crate::cuda::gradient_sums(call)?), &dims)))
}

/// `dx` from the sums of `gradient_sums` over `count` elements a set.
pub(crate) fn input_gradient(t: &BackwardTensors, sums: &Tensor, count: f64) -> Result<Tensor> {
    let dims = t.x.dims();
    let sums = sums.storage_and_layout();
    on_device!(t, |call|
        cpu: Ok(tensor(Storage::Cpu(host::input_gradient(call, cpu(&sums)?, count)?), dims)),
        cuda: Ok(tensor(Storage::Cuda(crate::cuda::input_gradient(call, cuda(&sums)?, count)?), dims)))
}

impl<S> Gradients<S> {
    fn map<T>(self, f: impl Fn(S) -> T) -> Gradients<T> {
        Gradients { dx: self.dx.map(&f), dweight: self.dweight.map(&f), dbias: self.dbias.map(&f) }
    }
}

/// Whether `device` has kernels of ours; the composed path serves the others.
pub(crate) fn has_kernels(device: &candle_core::Device) -> bool {
    match device {
        candle_core::Device::Cpu => true,
        candle_core::Device::Cuda(_) => cfg!(feature = "cuda"),
        candle_core::Device::Metal(_) => false,
    }
}

/// dtypes the kernels take for x, weight and bias.
pub(crate) const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
