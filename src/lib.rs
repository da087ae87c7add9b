//! Normalization layers for candle that train, are exact and run at the speed of memory.
#![deny(unsafe_code, missing_docs)]

mod autograd;
mod call;
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
mod cuda;
pub mod functional;
mod geometry;
