//! Normalization layers for candle that train, are exact and run at the speed of memory.
#![deny(unsafe_code, missing_docs)]

mod autograd;
mod call;
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
mod cuda;
pub mod distributed;
pub mod functional;
mod geometry;
mod layers;
pub mod ops;

pub use layers::batch_norm::{batch_norm, batch_norm1d, batch_norm2d, batch_norm3d};
pub use layers::batch_norm::{BatchNorm, BatchNormConfig, BatchNormOptions};
pub use layers::group_norm::{group_norm, GroupNorm, GroupNormOptions};
pub use layers::instance_norm::{instance_norm, instance_norm1d, instance_norm2d, instance_norm3d};
pub use layers::instance_norm::{InstanceNorm, InstanceNormOptions};
pub use layers::layer_norm::{layer_norm, layer_norm_no_bias};
pub use layers::layer_norm::{LayerNorm, LayerNormConfig, LayerNormOptions};
pub use layers::rms_norm::{rms_norm, RmsNorm, RmsNormOptions};
pub use layers::sync_batch_norm::{convert_sync_batchnorm, revert_sync_batchnorm, BatchNorms, SyncBatchNorm};
pub use layers::{
    batch_norm, group_norm, instance_norm, layer_norm, rms_norm, sync_batch_norm, FoldBatchNorm,
};

/// candle-nn's traits, which the layers implement.
#[doc(no_inline)]
pub use candle_nn::{Module, ModuleT};

/// Not part of the interface: what the benchmarks reach for. It may change in any release.
#[doc(hidden)]
pub mod __bench {
    pub use crate::autograd::alone::{Alone, Kind};
}
