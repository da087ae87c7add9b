//! What a device side has to offer: the seam between `autograd` and the kernels.
//!
//! Apart, because both sides implement it for their storage and must not know each other.

use crate::request::{Arg, Backward, Forward, Gradients, Norm, Normed};
use candle_core::{DType, Result, Storage};

/// The memory of a device, and the kernels that run on it.
pub(crate) trait Kernels: Sized {
    /// Whether kernels take this norm's fusion and blocks for an x of this dtype; what they do not take runs
    /// as a plain norm between candle's own operations.
    fn fuses(norm: &Norm, x: DType) -> bool;

    fn wrap(self) -> Storage;
    fn unwrap(storage: &Storage) -> Option<&Self>;
    fn into_own(storage: Storage) -> Option<Self>;

    /// The output, and what else the call wants.
    fn forward(call: Forward<Self>) -> Result<Normed<Self>>;
    /// The gradients that the call wants.
    fn backward(call: Backward<Self>) -> Result<Gradients<Self>>;

    // The steps of batch norm on their own, for SyncBatchNorm to put a collective between.

    /// The input's own statistics, `[3, sets]`.
    fn statistics(norm: Norm, x: Arg<Self>) -> Result<Self>;
    /// Sums over each set of `dy` and of `dy * xhat`, `[2, sets]`, for norms with one parameter a set.
    fn gradient_sums(call: Backward<Self>) -> Result<Self>;
    /// `dx` from the sums of `gradient_sums` over `count` elements a set, some of them elsewhere.
    fn input_gradient(call: Backward<Self>, sums: Arg<Self>, count: f64) -> Result<Self>;
}
