//! The CPU kernels.
//!
//! They know a `Geometry` and slices, and nothing of tensors, graphs or other devices.
// Loops by index become vectors more surely than zipped ones; kernels take what they touch, and the pairs of optional buffers are said once.
#![allow(clippy::needless_range_loop, clippy::type_complexity, clippy::too_many_arguments)]

mod backward;
mod columns;
mod element;
mod forward;
mod gradient;
mod level;
mod moments;
mod output;
mod params;
mod running;
mod runs;
mod streams;
#[cfg(test)]
mod tests;
mod tile;
mod vector;
mod work;

#[cfg(not(feature = "cuda-emulation"))]
use {
    crate::fusion::Fusion,
    crate::request::{Arg, Backward, Forward, Gradients, Norm, Normed},
    candle_core::backend::BackendStorage,
    candle_core::{bail, CpuStorage, DType, Result, Storage, WithDType},
    half::{bf16, f16},
    level::Level,
};

#[cfg(not(feature = "cuda-emulation"))]
/// Evaluates `$body` with `$T` the element type of `$x`.
macro_rules! by_dtype {
    ($norm:expr, $x:expr, |$T:ident| $body:expr) => {
        match $x.storage.dtype() {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::F64 => {
                type $T = f64;
                $body
            }
            other => bail!("{}: no CPU kernels for dtype {other:?}", $norm.name),
        }
    };
}

// With the emulation, CPU tensors run through the CUDA kernels instead.
#[cfg(not(feature = "cuda-emulation"))]
impl crate::kernels::Kernels for CpuStorage {
    fn fuses(norm: &Norm, _: DType) -> bool {
        norm.fusion == Fusion::default() && norm.x_blocks.is_none()
    }

    fn wrap(self) -> Storage {
        Storage::Cpu(self)
    }

    fn unwrap(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_own(storage: Storage) -> Option<Self> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn forward(call: Forward<Self>) -> Result<Normed<Self>> {
        let level = Level::current()?;
        by_dtype!(call.norm, call.x, |T| {
            let (y, stats) = forward::forward::<T>(level, &call)?;
            if let (Some(running), Some(stats)) = (call.running, &stats) {
                running::update(&call.norm, moments::Stats(stats), running)?;
            }
            let stats = stats.filter(|_| call.keep).map(WithDType::to_cpu_storage_owned);
            Ok(Normed { y: T::to_cpu_storage_owned(y), stats, sum: None })
        })
    }

    fn backward(call: Backward<Self>) -> Result<Gradients<Self>> {
        let level = Level::current()?;
        by_dtype!(call.norm, call.x, |T| backward::backward::<T>(level, &call))
    }

    fn statistics(norm: Norm, x: Arg<Self>) -> Result<Self> {
        let level = Level::current()?;
        by_dtype!(norm, x, |T| {
            let stats = forward::statistics::<T>(level, &norm, &x)?;
            Ok(WithDType::to_cpu_storage_owned(stats))
        })
    }

    fn gradient_sums(call: Backward<Self>) -> Result<Self> {
        let level = Level::current()?;
        by_dtype!(call.norm, call.x, |T| {
            let sums = backward::gradient_sums::<T>(level, &call)?;
            Ok(WithDType::to_cpu_storage_owned(sums))
        })
    }

    fn input_gradient(call: Backward<Self>, sums: Arg<Self>, count: f64) -> Result<Self> {
        let level = Level::current()?;
        by_dtype!(call.norm, call.x, |T| {
            Ok(T::to_cpu_storage_owned(backward::input_gradient::<T>(level, &call, &sums, count)?))
        })
    }
}
