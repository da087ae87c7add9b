//! What the ops ask of a machine that runs kernels: memory, addresses, launches.
//!
//! Apart, because there are two such machines: a CUDA device (`launch.rs`) and the host, for which a
//! C++ compiler has compiled the very same kernels (`emulation.rs`). Everything that decides what runs
//! is above this trait (`mod.rs`, `plan.rs`) and shared.
//!
//! # What an implementation does
//!
//! * `launch` runs kernel `launch.entry` with `grid` blocks of `block` threads, `shared` bytes of
//!   dynamic shared memory and the one argument `params` by value, after everything launched before.
//!   `Entry::name` is the `extern "C"` name of the kernel, `Entry::module` the `.cu` file that has it
//!   (`Module::stem` names the file), and `Entry::index` is dense below `Entry::COUNT`, to key a table
//!   of loaded functions. Cluster kernels carry their cluster size in their code (`__cluster_dims__`);
//!   `grid` is a multiple of it. A kernel may ask for more than 48 KiB of shared memory: its limit has
//!   to be raised to `DeviceProperties::shared` once (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
//! * `allocate` returns uninitialized memory: kernels write every element. Length 0 must work.
//! * `launch.rs` has `pub(super) fn machine(device: &CudaDevice) -> Result<Arc<CudaMachine>>` (or another
//!   pointer): loaded once per device, then looked up. The ops in `mod.rs` call it with the device of x
//!   and hand over everything through this trait.
//! * `address` is the device address of an argument's first element (offset included), 0 for none.
//!   Raw addresses escape the tracking of the owner, so an implementation with several streams must
//!   order them itself.

use super::params::Params;
use super::plan::{DeviceProperties, Launch, Plan};
use crate::request::{Arg, Running};
use candle_core::{DType, Result};

/// Addresses of a channel's running statistics, and their dtypes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunningAddresses {
    pub mean: u64,
    pub mean_dtype: DType,
    pub var: u64,
    pub var_dtype: DType,
}

/// A machine that runs the kernels.
pub(crate) trait Machine {
    /// candle's storage on this machine.
    type Storage;

    /// Looked up once per device, not per call.
    fn properties(&self) -> &DeviceProperties;

    /// `len` uninitialized elements that the caller keeps.
    fn allocate(&self, dtype: DType, len: usize) -> Result<Self::Storage>;

    fn dtype(&self, storage: &Self::Storage) -> DType;

    /// Address of the first element of an argument that kernels read.
    fn address(&self, arg: &Arg<Self::Storage>) -> Result<u64>;

    /// Address of the first element of storage that kernels write.
    fn address_mut(&self, storage: &mut Self::Storage) -> Result<u64>;

    /// Calls `run` with the addresses of running statistics, which kernels move in place.
    fn with_running(
        &self,
        running: Option<&Running>,
        run: &mut dyn FnMut(Option<RunningAddresses>) -> Result<()>,
    ) -> Result<()>;

    /// `follows`: another launch of the same plan was made just before.
    fn launch(&self, launch: &Launch, params: &Params, follows: bool) -> Result<()>;

    /// Every launch of a plan was made: for a machine that counts what they moved.
    fn ran(&self, _plan: &Plan, _params: &Params) -> Result<()> {
        Ok(())
    }

    /// Everything that writes `storage` is launched: for a machine that orders streams by events.
    fn written(&self, _storage: &mut Self::Storage) -> Result<()> {
        Ok(())
    }
}
