//! Every level of this machine against a scalar oracle in f64, on every way in which kernels walk.

mod activations;
mod case;
mod fused;
mod kernels;
mod oracle;
mod parts;
mod plans;
pub(super) mod ran;
