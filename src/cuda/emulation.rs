//! The host as a machine: the CUDA kernels, compiled by a C++ compiler, on the CPU's memory.
//!
//! For tests without a GPU. With the feature on, CPU tensors go through the same plans and kernels as
//! CUDA tensors do elsewhere. `CANDLE_NORM_EMULATED_SM` (70, 80 or 90) picks the device to plan for.
//! All memory starts as NaNs, so that an output that no kernel writes is seen. A launch that a GPU would
//! refuse is an error, and so is what `watch` sees.
#![allow(unsafe_code)]

use super::entry::Entry;
use super::machine::{Machine, RunningAddresses};
use super::params::Params;
use super::plan::{DeviceProperties, Launch, Plan};
use crate::request::{Arg, Running};
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Result, Storage, Tensor, Var};
use half::{bf16, f16};
use std::ffi::{c_char, c_void, CStr, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

#[cfg(test)]
mod agree;
#[cfg(test)]
mod fused;
#[cfg(test)]
mod ledger;
#[cfg(test)]
mod planted;
#[cfg(test)]
mod tests;
mod watch;

/// What a kernel registers with: its launch bounds beside its name. `emulation::Entry` of `device.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Registered {
    name: *const c_char,
    function: *const c_void,
    /// Threads of a block at most.
    threads: u32,
    /// Blocks that a multiprocessor holds at least.
    blocks: u32,
    /// Blocks of a cluster.
    cluster: u32,
}

extern "C" {
    fn norm_emulation_find(name: *const c_char) -> *const Registered;
    fn norm_emulation_launch(
        kernel: *const Registered,
        grid: u32,
        block: u32,
        shared: usize,
        params: *const c_void,
    ) -> *const c_char;
    #[cfg(test)]
    fn norm_emulation_seed(seed: u64);
    #[cfg(test)]
    fn norm_emulation_sample(clusters: u32, period: u32);
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

    /// A device as no shop has it.
    #[cfg(test)]
    fn of(properties: DeviceProperties) -> Self {
        Self { properties }
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
        on_values!(arg.storage, values => {
            let values = &values[arg.offset..];
            let address = values.as_ptr().expose_provenance() as u64;
            watch::reads(address, values.len(), arg.storage.dtype());
            Ok(address)
        })
    }

    fn address_mut(&self, storage: &mut CpuStorage) -> Result<u64> {
        let dtype = storage.dtype();
        on_values!(storage, values => {
            let address = values.as_mut_ptr().expose_provenance() as u64;
            watch::writes(address, values.len(), dtype);
            Ok(address)
        })
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

    fn launch(&self, launch: &Launch, params: &Params, _follows: bool) -> Result<()> {
        let kernel = find(launch.entry.name())?;
        self.check(launch, kernel)?;
        LAUNCHES[launch.entry.index()].fetch_add(1, Ordering::Relaxed);
        let Launch { grid, block, shared, .. } = *launch;
        // SAFETY: `kernel` is a function of one `Params` by address, whose layout `params.rs` and
        // `params.cuh` state alike (a test compares them). Its addresses are of storages that outlive the
        // call, and the plan bounds every access by the geometry that those were checked against. The
        // message is a C string that lives until this thread's next launch.
        let fault = unsafe {
            let fault = norm_emulation_launch(
                kernel,
                grid,
                block,
                shared as usize,
                std::ptr::from_ref(params).cast(),
            );
            (!fault.is_null()).then(|| CStr::from_ptr(fault).to_string_lossy().into_owned())
        };
        let Some(fault) = fault else { return Ok(()) };
        // The op ends here: its memory is another's next.
        watch::over();
        bail!("cuda emulation: {}: {fault}", launch.entry.name())
    }

    fn ran(&self, plan: &Plan, params: &Params) -> Result<()> {
        watch::moved(plan, params)
    }

    fn written(&self, storage: &mut CpuStorage) -> Result<()> {
        let first = on_values!(storage, values => values.as_ptr().expose_provenance() as u64);
        watch::written_once(storage.dtype(), first)
    }
}

/// The kernel as it registered itself.
fn find(name: &str) -> Result<&'static Registered> {
    let c_name = CString::new(name).map_err(candle_core::Error::wrap)?;
    // SAFETY: `c_name` is a C string that outlives the call, which looks it up in a table. The entries of
    // that table never move or change once the program runs.
    match unsafe { norm_emulation_find(c_name.as_ptr()).as_ref() } {
        Some(kernel) => Ok(kernel),
        None => bail!("cuda emulation: no kernel {name}"),
    }
}

impl Emulated {
    /// What a GPU refuses: a launch beyond the kernel's bounds or the device's.
    fn check(&self, launch: &Launch, kernel: &Registered) -> Result<()> {
        let Launch { entry, grid, block, shared, cluster } = *launch;
        let name = entry.name();
        let have = self.properties;
        if block == 0 || block % 32 != 0 || block > kernel.threads {
            bail!("cuda emulation: {name}: {block} threads, expected warps of at most {}", kernel.threads)
        }
        if cluster != kernel.cluster || grid == 0 || grid % cluster != 0 || grid > i32::MAX as u32 {
            bail!(
                "cuda emulation: {name}: {grid} blocks in clusters of {cluster}, expected clusters of {}",
                kernel.cluster
            )
        }
        let shared_limit = if entry.needs_shared_opt_in() { have.shared } else { 48 << 10 };
        if shared > shared_limit {
            bail!("cuda emulation: {name}: {shared} bytes of shared memory, expected at most {shared_limit}")
        }
        let needs = entry.module().needs_capability().max(if cluster > 1 { 90 } else { 0 });
        if have.capability < needs {
            bail!("cuda emulation: {name}: capability {}, expected {needs}", have.capability)
        }
        Ok(())
    }
}
