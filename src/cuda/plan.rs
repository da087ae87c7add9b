//! The launch plan: which kernels run, how wide, with how much memory.
//!
//! Pure arithmetic on a geometry, a dtype and the properties of a device, apart from all that runs
//! kernels, so that its tables can be tested without a GPU.

use super::entry::Entry;
use super::params::Params;

/// What the plan asks of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceProperties {
    /// Compute capability, major * 10 + minor: 70, 75, 80, 86, 89, 90.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory a block may have with opt-in
    /// (`CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`).
    pub shared: u32,
}

/// One kernel launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub entry: Entry,
    /// Blocks, in x only; a multiple of `cluster`.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// Blocks of a cluster, 1 for none. Compiled into the kernel.
    pub cluster: u32,
}

/// Launches of one op in order, all with the same `Params`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub launches: Vec<Launch>,
    /// Numbers filled in, addresses not yet.
    pub params: Params,
    /// Bytes of scratch memory that lives until the last launch is done.
    pub workspace: usize,
}
