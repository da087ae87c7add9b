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

use crate::call::{Arg, Backward, Forward, Gradients, Norm};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, DType, Result, WithDType};
use half::{bf16, f16};
use level::Level;

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

/// The output, and the statistics if `keep` asks for them.
pub(crate) fn forward(call: Forward<CpuStorage>) -> Result<(CpuStorage, Option<CpuStorage>)> {
    let level = Level::current()?;
    by_dtype!(call.norm, call.x, |T| {
        let (y, stats) = forward::forward::<T>(level, &call)?;
        if let (Some(running), Some(stats)) = (call.running, &stats) {
            running::update(&call.norm, moments::Stats(stats), running)?;
        }
        let stats = stats.filter(|_| call.keep).map(WithDType::to_cpu_storage_owned);
        Ok((T::to_cpu_storage_owned(y), stats))
    })
}

/// The gradients that the call wants.
pub(crate) fn backward(call: Backward<CpuStorage>) -> Result<Gradients<CpuStorage>> {
    let level = Level::current()?;
    by_dtype!(call.norm, call.x, |T| backward::backward::<T>(level, &call))
}

// The steps of batch norm on their own, for SyncBatchNorm to put a collective between.

/// The input's own statistics, `[3, sets]`.
pub(crate) fn statistics(norm: Norm, x: Arg<CpuStorage>) -> Result<CpuStorage> {
    let level = Level::current()?;
    by_dtype!(norm, x, |T| {
        let stats = forward::statistics::<T>(level, &norm, &x)?;
        Ok(WithDType::to_cpu_storage_owned(stats))
    })
}

/// Sums over each set of `dy` and of `dy * xhat`, `[2, sets]`, for norms with one parameter a set.
pub(crate) fn gradient_sums(call: Backward<CpuStorage>) -> Result<CpuStorage> {
    let level = Level::current()?;
    by_dtype!(call.norm, call.x, |T| {
        let sums = backward::gradient_sums::<T>(level, &call)?;
        Ok(WithDType::to_cpu_storage_owned(sums))
    })
}

/// `dx` from the sums of `gradient_sums` over `count` elements a set, some of them elsewhere.
pub(crate) fn input_gradient(
    call: Backward<CpuStorage>,
    sums: Arg<CpuStorage>,
    count: f64,
) -> Result<CpuStorage> {
    let level = Level::current()?;
    by_dtype!(call.norm, call.x, |T| {
        Ok(T::to_cpu_storage_owned(backward::input_gradient::<T>(level, &call, &sums, count)?))
    })
}
