//! Normalization layers for candle that train and are exact, in fused kernels.
//!
//! Every norm cuts its input into sets of elements and normalizes each set:
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! | layer | a set of `[N, C, spatial..]` is | function |
//! |---|---|---|
//! | [`BatchNorm`], [`SyncBatchNorm`] | a channel, over the batch (of all ranks) | [`functional::batch_norm`] |
//! | [`InstanceNorm`] | a channel of one sample | [`functional::instance_norm`] |
//! | [`GroupNorm`] | some channels of one sample | [`functional::group_norm`] |
//! | [`LayerNorm`] | the last dimensions | [`functional::layer_norm`] |
//! | [`RmsNorm`] | the last dimensions; the mean stays | [`functional::rms_norm`] |
//!
//! A model holds layers; they are made by candle-nn's functions of the same name ([`layer_norm()`]) or
//! with PyTorch's arguments ([`LayerNorm::with_options`]). The [`functional`] forms hold nothing. [`ops`]
//! has candle-nn's names of functions. [`FoldBatchNorm`] folds a batch norm into the layer before it.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use candle_norm::{batch_norm, layer_norm, Module, ModuleT};
//! # fn main() -> candle_core::Result<()> {
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let bn = batch_norm(3, 1e-5, vb.pp("bn"))?;
//! let ln = layer_norm(8, 1e-5, vb.pp("ln"))?;
//!
//! let x = Tensor::randn(0f32, 1., (4, 3, 8, 8), &Device::Cpu)?;
//! let y = ln.forward(&bn.forward_t(&x, true)?)?;
//! let gradients = y.sqr()?.sum_all()?.backward()?;
//! assert!(gradients.get(bn.weight().unwrap()).is_some());
//! assert!(gradients.get(ln.weight()).is_some());
//! # Ok(()) }
//! ```
//!
//! # Features
//!
//! None is on by default, and without any the crate needs nothing but Rust.
//!
//! * `cuda`: fused kernels for CUDA devices. Needs nvcc when it is built.
//! * `mpi`: [`SyncBatchNorm`] over processes that `mpirun` started.
//! * `nccl`: [`SyncBatchNorm`] over GPUs; implies `cuda`.
//! * `cuda-emulation`: for tests. CPU tensors run through the CUDA kernels, compiled for the host.
//!
//! # Environment
//!
//! * `CANDLE_NORM_SIMD`: `scalar`, `avx2` or `avx512` instead of the widest instructions of this CPU. Calls
//!   on CPU tensors fail where the CPU lacks them.
//! * `CANDLE_GRAD_DO_NOT_DETACH=1`: candle's switch for gradients of gradients. The norms' backward is then
//!   composed of candle's own operations.
#![deny(unsafe_code, missing_docs)]

mod autograd;
#[cfg_attr(feature = "cuda-emulation", allow(dead_code))]
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod cuda;
pub mod distributed;
pub mod functional;

mod fusion;
mod geometry;

mod kernels;
mod layers;
pub mod ops;

mod request;

pub use layers::batch_norm::{batch_norm, batch_norm1d, batch_norm2d, batch_norm3d};
pub use layers::batch_norm::{BatchNorm, BatchNormConfig, BatchNormOptions, FrozenBatchNorm};
pub use layers::group_norm::{group_norm, GroupNorm, GroupNormOptions};
pub use layers::instance_norm::{instance_norm, instance_norm1d, instance_norm2d, instance_norm3d};
pub use layers::instance_norm::{InstanceNorm, InstanceNormOptions};
pub use layers::layer_norm::{layer_norm, layer_norm2d, layer_norm_no_bias, LayerNorm2d};
pub use layers::layer_norm::{LayerNorm, LayerNormConfig, LayerNormOptions};
pub use layers::rms_norm::{rms_norm, RmsNorm, RmsNormOptions};
pub use layers::sync_batch_norm::{convert_sync_batchnorm, revert_sync_batchnorm, BatchNorms, SyncBatchNorm};
pub use layers::{
    batch_norm, group_norm, instance_norm, layer_norm, rms_norm, sync_batch_norm, Eval, FoldBatchNorm,
};

/// candle-nn's traits, which the layers implement.
#[doc(no_inline)]
pub use candle_nn::{Module, ModuleT};

/// Not part of the interface: what the benchmarks reach for. It may change in any release.
#[doc(hidden)]
pub mod __bench {
    pub use crate::autograd::bench::{Kind, RecordedOp};
}

/// The Rust of README.md and of these pages compiles and runs with the documentation's examples.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/switching.md")]
    struct Switching;
    #[doc = include_str!("../docs/fusing.md")]
    struct Fusing;
}
