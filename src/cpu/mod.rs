//! The CPU kernels. They know a `Geometry` and slices, and nothing of tensors, graphs or other devices.
//!
//! A tensor is a matrix of `outer * rows` rows and `width` columns. Batch norm of 3 images of 2 channels:
//!
//! ```text
//!            width
//!      .---------------.        set    what shares a mean: the a's. Here 3 runs of 4, one in each row
//!      | a a a a b b b b        run    its neighbouring columns
//! rows | a a a a b b b b        span   neighbouring columns that share a weight; here a run, in layer norm one
//!      | a a a a b b b b        part   what a tile has of a set, or of all in some rows
//!      '---------------'
//! ```
//!
//! | word | meaning | file |
//! |---|---|---|
//! | plan | which walks run, over which tiles | `plan.rs` |
//! | cut, tile | how a tensor is shared out; a rectangle of it, which one thread works on | `tile.rs` |
//! | walk | the way through a tile: `Runs`, `Sets`, `Rows` or `Columns` | `walks/` |
//! | panel | what is summed in the accumulation type before it goes on in f64; a cache keeps it | `element.rs` |
//! | strided | rows of elements that a loop reads, a stride apart (`Strided`), or writes (`To`): the door for all elements | `view.rs` |
//! | loop | what runs in vectors; compiled once a level and type, and called through a table | `loops/` |
//! | level | the vector instructions of this machine | `simd_level.rs` |
//! | line, behind | what makes z of x; what is done to z on its way into y: skip, activation, gate | `loops/finish.rs` |
//!
//! A *visit* is one pass over all tiles; a *form* says whether weights are per span, column or row (`affine.rs`). Of numbers: a *pivot* is a set's first element, which is subtracted before anything is summed; a mean is the sum of
//! a *high* and a *low* (`moments.rs`); g is `dy * weight`. A tile of f16 or of what a gate multiplies is
//! *staged*, copied to a thread's scratch, and so are the gradient of z and what `finish.rs` has no loop for: a *piece* (some of
//! its rows, where sets lie one behind the other) at a time, some of it in *strips* that the first-level cache holds
//! (`staging.rs`, where `After` is a `Behind` of whole
//! tensors). A residual's sum is read back where it was written.
//!
//! A call goes `forward.rs` or `backward.rs` (arguments, plan, threads), `staging.rs` (a tile as walks read it),
//! `walks/`, `loops/`, and each imports only what comes after it.
// Loops by index become vectors more surely than zipped ones; loops take what they touch, not a struct of it.
#![allow(clippy::needless_range_loop, clippy::type_complexity, clippy::too_many_arguments)]

mod activations;
mod affine;
mod backward;
mod backward_formula;
mod element;
mod forward;
mod loops;
mod moments;
mod output;
mod parallel;
mod plan;
mod running;
mod scalar;
mod simd_level;
mod staging;
#[cfg(test)]
mod tests;
mod tile;
mod vector;
mod view;
mod walk_args;
mod walks;

#[cfg(not(feature = "cuda-emulation"))]
use {
    crate::fusion::Gate,
    crate::request::{Arg, Backward, Forward, Gradients, Norm, Normed},
    candle_core::backend::BackendStorage,
    candle_core::{bail, CpuStorage, DType, Result, Storage, WithDType},
    half::{bf16, f16},
    simd_level::Level,
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
    fn fuses(norm: &Norm, x: DType) -> bool {
        let (g, fusion) = (&norm.geometry, &norm.fusion);
        // Not single columns, which would be spans.
        let rows = g.rows == 1 && g.run == g.width && g.width > 1;
        let samples = |tokens: usize| rows && tokens > 0 && g.outer.is_multiple_of(tokens);
        let blocks = g.rows == 1 || norm.x_blocks.is_none();
        let one = fusion.activation.is_none() || fusion.gate != Some(Gate::After);
        // Of another dtype: an f32 stream under half types, of whole sets.
        let half = x.size_in_bytes() == 2;
        let stream =
            |r| r == x || r == DType::F32 && half && g.rows == 1 && tile::Cut::new(g, 4).whole_sets();
        fusion.tokens.is_none_or(samples) && blocks && one && fusion.residual.is_none_or(stream)
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
            let forward::Outcome { y, stats, sum } = forward::forward::<T>(level, &call)?;
            if let (Some(running), Some(stats)) = (call.running, &stats) {
                running::update(&call.norm, moments::Stats(stats), running)?;
            }
            let stats = stats.filter(|_| call.keep).map(WithDType::to_cpu_storage_owned);
            Ok(Normed { y: T::to_cpu_storage_owned(y), stats, sum })
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
