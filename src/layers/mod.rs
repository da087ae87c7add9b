//! The modules a model holds: parameters and running statistics, and one call of a function each.
//!
//! Apart from `functional`, which owns nothing. A layer gets its tensors from a `VarBuilder`, under
//! the names PyTorch gives them, and hands them on unchanged.
//!
//! A layer's output is contiguous, as candle-nn's is, although a function keeps the memory order of a
//! permuted input: see [`params::contiguous`].

pub mod batch_norm;
mod eval;
mod fold;
pub mod group_norm;
pub mod instance_norm;
pub mod layer_norm;
mod options;
mod params;
mod repr;
pub mod rms_norm;
mod running;
pub mod sync_batch_norm;

pub use eval::Eval;
pub use fold::FoldBatchNorm;
