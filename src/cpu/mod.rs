//! The CPU kernels.
//!
//! They know a `Geometry` and slices, and nothing of tensors, graphs or other devices.

mod plain;

pub(crate) use plain::{backward, forward};
// The steps of batch norm, for SyncBatchNorm to put a collective between.
pub(crate) use plain::{gradient_sums, input_gradient, statistics};
