//! The host as a machine: the CUDA kernels, compiled by a C++ compiler, on the CPU's memory.
//!
//! For tests without a GPU. With the feature on, CPU tensors go through the same plans and kernels as
//! CUDA tensors do elsewhere. `CANDLE_NORM_EMULATED_SM` (70, 80 or 90) picks the device to plan for.
//! All memory starts as NaNs, so that an output that no kernel writes is seen.
#![allow(unsafe_code)]

use super::entry::Entry;
use super::machine::{Machine, RunningAddresses};
use super::params::Params;
use super::plan::{DeviceProperties, Launch};
use crate::request::{Arg, Running};
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Result, Storage, Tensor, Var};
use half::{bf16, f16};
use std::ffi::{c_char, c_void, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

#[cfg(test)]
mod agree;
#[cfg(test)]
mod fused;
#[cfg(test)]
mod tests;

type Kernel = *const c_void;

extern "C" {
    fn norm_emulation_find(name: *const c_char) -> Kernel;
    fn norm_emulation_launch(
        kernel: Kernel,
        grid: u32,
        block: u32,
        shared: usize,
        cluster: u32,
        params: *const c_void,
    );
}

/// How often every entry point was launched, by its index.
static LAUNCHES: [AtomicU64; Entry::COUNT] = [const { AtomicU64::new(0) }; Entry::COUNT];

/// Launches of every entry point so far.
#[cfg(test)]
pub(super) fn launches() -> Vec<(Entry, u64)> {
    Entry::all().map(|entry| (entry, LAUNCHES[entry.index()].load(Ordering::Relaxed))).collect()
}

/// A device that is not there.
pub(super) struct Emulated {
    properties: DeviceProperties,
}

impl Emulated {
    /// A data-center device of compute capability 7.0, 8.0 or 9.0.
    pub fn new(capability: u32) -> Result<Self> {
        let (multiprocessors, shared) = match capability {
            70 => (80, 96 << 10),
            80 => (108, 163 << 10),
            90 => (132, 227 << 10),
            other => bail!("CANDLE_NORM_EMULATED_SM: got {other}, expected 70, 80 or 90"),
        };
        Ok(Self { properties: DeviceProperties { capability, multiprocessors, shared } })
    }
}

/// The machine that the environment asks for.
pub(super) fn machine() -> Result<Emulated> {
    static CAPABILITY: OnceLock<String> = OnceLock::new();
    let capability = CAPABILITY
        .get_or_init(|| std::env::var("CANDLE_NORM_EMULATED_SM").unwrap_or_else(|_| "90".to_string()));
    match capability.parse() {
        Ok(capability) => Emulated::new(capability),
        Err(_) => bail!("CANDLE_NORM_EMULATED_SM: got {capability:?}, expected 70, 80 or 90"),
    }
}

/// Runs `$body` with `$values` bound to the elements of `$storage`.
macro_rules! on_values {
    ($storage:expr, $values:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32($values) => $body,
            CpuStorage::F16($values) => $body,
            CpuStorage::BF16($values) => $body,
            CpuStorage::F64($values) => $body,
            CpuStorage::U8($values) => $body,
            _ => bail!("cuda emulation: expected f16, bf16, f32 or f64 memory"),
        }
    };
}

/// Running statistics of one kind: a copy that a kernel may write, to be put back.
struct Lent<'a> {
    var: &'a Var,
    storage: CpuStorage,
}

impl<'a> Lent<'a> {
    fn new(var: &'a Var) -> Result<Self> {
        let copy = var.as_detached_tensor().copy()?;
        let (storage, _) = copy.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok(Self { var, storage: storage.clone() }),
            _ => bail!("cuda emulation: running statistics are not on the CPU"),
        }
    }

    fn put_back(self) -> Result<()> {
        let shape = self.var.shape().clone();
        self.var.set(&Tensor::from_storage(Storage::Cpu(self.storage), shape, BackpropOp::none(), false))
    }
}

impl Machine for Emulated {
    type Storage = CpuStorage;

    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
            DType::F16 => CpuStorage::F16(vec![f16::NAN; len]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; len]),
            DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
            DType::U8 => CpuStorage::U8(vec![0xff; len]),
            other => bail!("cuda emulation: nothing of ours has dtype {other:?}"),
        })
    }

    fn dtype(&self, storage: &CpuStorage) -> DType {
        storage.dtype()
    }

    fn address(&self, arg: &Arg<CpuStorage>) -> Result<u64> {
        on_values!(arg.storage, values => Ok(values[arg.offset..].as_ptr().expose_provenance() as u64))
    }

    fn address_mut(&self, storage: &mut CpuStorage) -> Result<u64> {
        on_values!(storage, values => Ok(values.as_mut_ptr().expose_provenance() as u64))
    }

    fn with_running(
        &self,
        running: Option<&Running>,
        run: &mut dyn FnMut(Option<RunningAddresses>) -> Result<()>,
    ) -> Result<()> {
        let Some(running) = running else { return run(None) };
        let (mut mean, mut var) = (Lent::new(&running.mean)?, Lent::new(&running.var)?);
        run(Some(RunningAddresses {
            mean: self.address_mut(&mut mean.storage)?,
            mean_dtype: running.mean.dtype(),
            var: self.address_mut(&mut var.storage)?,
            var_dtype: running.var.dtype(),
        }))?;
        mean.put_back()?;
        var.put_back()
    }

    fn launch(&self, launch: &Launch, params: &Params) -> Result<()> {
        let name = CString::new(launch.entry.name()).map_err(candle_core::Error::wrap)?;
        // SAFETY: `name` is a C string that outlives the call, which looks it up in a table.
        let kernel = unsafe { norm_emulation_find(name.as_ptr()) };
        if kernel.is_null() {
            bail!("cuda emulation: no kernel {}", launch.entry.name())
        }
        LAUNCHES[launch.entry.index()].fetch_add(1, Ordering::Relaxed);
        let Launch { grid, block, shared, cluster, .. } = *launch;
        // SAFETY: `kernel` is a function of one `Params` by address, whose layout `params.rs` and
        // `params.cuh` state alike. Its addresses are of storages that outlive the call, and the plan
        // bounds every access by the geometry that those were checked against.
        unsafe {
            norm_emulation_launch(
                kernel,
                grid,
                block,
                shared as usize,
                cluster,
                std::ptr::from_ref(params).cast(),
            )
        };
        Ok(())
    }
}
