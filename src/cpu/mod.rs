//! The CPU kernels.
//!
//! They know a `Geometry` and slices, and nothing of tensors, graphs or other devices.

mod plain;

pub(crate) use plain::{backward, forward};
