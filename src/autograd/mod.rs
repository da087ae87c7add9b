//! candle custom ops: forward, backward, the statistics kept between them, the composed path.
//!
//! Apart from `functional`, which checks arguments and speaks shapes, and from the kernels, which
//! know nothing of graphs.

pub(crate) mod bench;
mod composed;
mod custom_op;
mod device;
mod op;
mod parts;
mod residual;
mod sync;

pub(crate) use device::DTYPES;
pub(crate) use op::{normalize, Statistics};
pub(crate) use parts::Parts;
pub(crate) use residual::{add_normalize, sum, widened};
pub(crate) use sync::{normalize_shared, Synchronized};
