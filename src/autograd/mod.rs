//! candle custom ops: forward, backward, the statistics kept between them, the composed path.
//!
//! Apart from `functional`, which checks arguments and speaks shapes, and from the kernels, which
//! know nothing of graphs.

pub(crate) mod alone;
mod composed;
mod device;
mod op;
mod sync;

pub(crate) use device::DTYPES;
pub(crate) use op::{normalize, Source};
pub(crate) use sync::{Shared, Synchronized};
