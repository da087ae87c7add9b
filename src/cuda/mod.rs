//! The host side of the CUDA kernels: what runs for a call, and on which machine.
//!
//! `plan` decides, in pure arithmetic; a `Machine` runs it: a CUDA device, or the host for which a
//! C++ compiler has compiled the same kernels. The ops here serve both.

mod entry;
#[cfg(feature = "cuda")]
mod launch;
mod machine;
mod params;
mod plan;
