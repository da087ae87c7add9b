//! Which kernels run for a storage: the one switch between the CPU and CUDA.
//!
//! The kernels of both sides take the same calls (`request.rs`) and return the same results, so what is
//! above this file never asks for a device.

use super::parts::Parts;
use crate::kernels::Kernels;
use crate::request::{Arg, Backward, Gradients, Norm, Want};
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor};

/// Runs `$run::<S>` for the storage that a tensor on `$device` has.
macro_rules! on_device {
    ($op:expr, $device:expr, $run:ident $args:tt) => {
        match $device {
            Device::Cpu => $run::<CpuStorage> $args,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => $run::<candle_core::CudaStorage> $args,
            other => bail!("{}: no kernels for device {:?}", $op, other.location()),
        }
    };
}

type Guarded<'a> = (StorageRef<'a>, &'a Layout);

/// Where the elements start: a view of none may start beyond the end of its storage.
pub(crate) fn start(layout: &Layout) -> usize {
    match layout.shape().dims().contains(&0) {
        true => 0,
        false => layout.start_offset(),
    }
}

/// A tensor's storage as an argument.
pub(crate) fn arg<'a, S: Kernels>(guarded: &'a Guarded<'_>) -> Result<Arg<'a, S>> {
    match S::unwrap(&guarded.0) {
        Some(storage) => Ok(Arg { storage, offset: start(guarded.1) }),
        None => bail!("candle-norm: an argument is not on the input's device"),
    }
}

/// A tensor without a graph behind it.
pub(crate) fn tensor(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Tensor arguments of a backward call, all contiguous but for an x in blocks.
pub(crate) struct BackwardTensors<'a> {
    pub norm: Norm,
    pub x: &'a Tensor,
    pub dy: &'a Tensor,
    pub parts: &'a Parts<Tensor>,
    pub stats: &'a Tensor,
    pub fixed: bool,
    pub want: Want,
}

impl BackwardTensors<'_> {
    /// Runs `run` with the storages of the tensors.
    fn on<S: Kernels, T>(&self, run: impl FnOnce(Backward<S>) -> Result<T>) -> Result<T> {
        let [x, dy, stats] = [self.x, self.dy, self.stats].map(Tensor::storage_and_layout);
        let parts = self.parts.map(|t| Ok(t.storage_and_layout()))?;
        let parts = parts.map(arg)?;
        run(Backward {
            weight: parts.weight,
            bias: parts.bias,
            skip: parts.skip,
            gate: parts.gate,
            fixed: self.fixed,
            want: self.want,
            ..Backward::new(self.norm, arg(&x)?, arg(&dy)?, arg(&stats)?)
        })
    }
}

/// Gradients as tensors: those of parameters as `[params]`, the others of x's shape.
pub(crate) fn backward(t: BackwardTensors) -> Result<Gradients<Tensor>> {
    fn run<S: Kernels>(t: &BackwardTensors) -> Result<Gradients<Storage>> {
        t.on(|call| Ok(S::backward(call)?.map(S::wrap)))
    }
    let gradients = on_device!(t.norm.name, t.x.device(), run(&t))?;
    let params = |s| tensor(s, t.norm.params());
    let like_x = |s| tensor(s, t.x.shape());
    Ok(Gradients {
        dx: gradients.dx.map(like_x),
        dweight: gradients.dweight.map(params),
        dbias: gradients.dbias.map(params),
        dskip: gradients.dskip.map(like_x),
        dgate: gradients.dgate.map(like_x),
    })
}

/// The input's own statistics, `[3, sets]`.
pub(crate) fn statistics(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    fn run<S: Kernels>(norm: &Norm, x: &Tensor) -> Result<Storage> {
        S::statistics(*norm, arg(&x.storage_and_layout())?).map(S::wrap)
    }
    let stats = on_device!(norm.name, x.device(), run(norm, x))?;
    Ok(tensor(stats, (3, norm.geometry.sets())))
}

/// Sums over each set of `dy` and of `dy * xhat`, `[2, sets]`.
pub(crate) fn gradient_sums(t: &BackwardTensors) -> Result<Tensor> {
    fn run<S: Kernels>(t: &BackwardTensors) -> Result<Storage> {
        t.on(|call| S::gradient_sums(call).map(S::wrap))
    }
    let sums = on_device!(t.norm.name, t.x.device(), run(t))?;
    Ok(tensor(sums, (2, t.norm.geometry.sets())))
}

/// `dx` from the sums of `gradient_sums` over `count` elements a set.
pub(crate) fn input_gradient(t: &BackwardTensors, sums: &Tensor, count: f64) -> Result<Tensor> {
    fn run<S: Kernels>(t: &BackwardTensors, sums: &Tensor, count: f64) -> Result<Storage> {
        let sums = sums.storage_and_layout();
        t.on(|call| S::input_gradient(call, arg(&sums)?, count).map(S::wrap))
    }
    let dx = on_device!(t.norm.name, t.x.device(), run(t, sums, count))?;
    Ok(tensor(dx, t.x.shape()))
}

impl<S> Gradients<S> {
    fn map<T>(self, f: impl Fn(S) -> T) -> Gradients<T> {
        Gradients {
            dx: self.dx.map(&f),
            dweight: self.dweight.map(&f),
            dbias: self.dbias.map(&f),
            dskip: self.dskip.map(&f),
            dgate: self.dgate.map(&f),
        }
    }
}

/// Whether the kernels of `device` take this norm's fusion and blocks, for an x of dtype `x`.
pub(crate) fn fuses(device: &Device, norm: &Norm, x: DType) -> Result<bool> {
    fn run<S: Kernels>(norm: &Norm, x: DType) -> bool {
        S::fuses(norm, x)
    }
    Ok(on_device!(norm.name, device, run(norm, x)))
}

/// Whether `device` has kernels of ours; the composed path serves the others.
pub(crate) fn has_kernels(device: &Device) -> bool {
    match device {
        Device::Cpu => true,
        Device::Cuda(_) => cfg!(feature = "cuda"),
        Device::Metal(_) => false,
    }
}

/// dtypes the kernels take for x, weight and bias.
pub(crate) const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
