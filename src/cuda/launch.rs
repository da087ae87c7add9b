//! The CUDA device as a machine: modules, functions and limits looked up once, memory, launches.
//!
//! Apart from the ops and their plan (`mod.rs`, `plan.rs`), which the host emulation shares: this file
//! is all that knows of drivers and streams.
//!
//! # Streams
//!
//! Kernels get raw addresses. All work goes to the stream of the tensors' own candle device, on which
//! candle allocates, launches and frees too, so memory is in use for as long as a kernel of ours needs
//! it, and is written before anything later reads it. Like candle's own ops, this asks for tensors that
//! are handed from one host thread to another to be synchronized by whoever hands them over: candle's
//! default stream is the calling thread's.
//!
//! No function here synchronizes or copies between host and device, so that all can be captured in a
//! CUDA graph, once the modules are loaded (`warmup`).
#![allow(unsafe_code)]

use super::entry::{module::Module, Entry};
use super::machine::{Machine, RunningAddresses};
use super::params::Params;
use super::plan::{DeviceProperties, Launch};
use crate::request::{Arg, Running};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice as Slice};
use candle_core::{bail, Context, CudaDevice, CudaStorage, DType, Result, Storage};
use cudarc::driver::{result, sys};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr,
    LaunchConfig,
};
use cudarc::nvrtc::Ptx;
use half::{bf16, f16};
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

/// What nvcc made of every `.cu` file, by its stem: machine code for one compute capability, and PTX that
/// a driver compiles for later ones.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

    /// The capability that it was compiled for.
    pub const CAPABILITY: &str = env!("CANDLE_NORM_COMPUTE_CAP");
}

/// A folder with `<stem>.cubin`, `.fatbin` or `.ptx` to load instead of what was compiled in: to compare
/// variants of a kernel where there is a GPU and no Rust.
const MODULES_VARIABLE: &str = "CANDLE_NORM_PTX_DIR";

/// What is looked up once per CUDA context and never unloaded.
struct Loaded {
    context: Arc<CudaContext>,
    properties: DeviceProperties,
    modules: [Mutex<Option<Arc<CudaModule>>>; Module::COUNT],
    functions: [OnceLock<CudaFunction>; Entry::COUNT],
}

/// A candle device with our kernels on it.
pub(super) struct CudaMachine {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    loaded: Arc<Loaded>,
}

/// The machine of `device`. Properties are looked up at the first call, modules when first needed.
pub(super) fn machine(device: &CudaDevice) -> Result<CudaMachine> {
    // By context, not by candle device: devices made for the same GPU share its primary context, and
    // with it the modules. An entry keeps its context alive, so no other can come to its address.
    static LOADED: RwLock<Vec<Arc<Loaded>>> = RwLock::new(Vec::new());
    let stream = device.cuda_stream();
    let find = |all: &[Arc<Loaded>]| {
        let same = |l: &&Arc<Loaded>| l.context.cu_ctx() == stream.context().cu_ctx();
        all.iter().find(same).cloned()
    };
    let poisoned = |_| candle_core::Error::msg("cuda: a thread panicked while it looked up a device");
    let found = find(&LOADED.read().map_err(|_| ()).map_err(poisoned)?);
    let loaded = match found {
        Some(loaded) => loaded,
        None => {
            let mut all = LOADED.write().map_err(|_| ()).map_err(poisoned)?;
            match find(&all) {
                Some(loaded) => loaded,
                None => {
                    let loaded = Arc::new(Loaded::new(&stream)?);
                    all.push(loaded.clone());
                    loaded
                }
            }
        }
    };
    Ok(CudaMachine { device: device.clone(), stream, loaded })
}

/// Sets what the memory pool of `device` keeps when the device is synchronized; `cuda/mod.rs` says why.
pub(super) fn keep_memory(device: &CudaDevice, mut bytes: u64) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    context.bind_to_thread().context("cuda: cannot use the device from this thread")?;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is that of a living context, the pool is the device's own, which is never destroyed,
    // and the attribute is a 64-bit number, which the driver reads before it returns.
    let kept = unsafe {
        result::device::get_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut bytes).cast::<c_void>())
        })
    };
    kept.context("cuda: cannot set what the memory pool keeps")
}

impl CudaMachine {
    /// Loads every module that this device can run, and every function of it.
    pub fn load_all(&self) -> Result<()> {
        let runs = |entry: &Entry| self.loaded.properties.capability >= entry.module().needs_capability();
        Entry::all().filter(runs).try_for_each(|entry| self.loaded.function(entry).map(drop))
    }
}

impl Loaded {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let context = stream.context().clone();
        let attribute = |name| context.attribute(name).context("cuda: cannot read the device's properties");
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let capability = match usable_capability((major * 10 + minor) as u32)? {
            capability if capability >= 90 && !schedules_clusters(stream, shared) => 80,
            capability => capability,
        };
        let properties =
            DeviceProperties { capability, multiprocessors: multiprocessors as u32, shared: shared as u32 };
        Ok(Self {
            context,
            properties,
            modules: std::array::from_fn(|_| Mutex::new(None)),
            functions: std::array::from_fn(|_| OnceLock::new()),
        })
    }

    fn function(&self, entry: Entry) -> Result<&CudaFunction> {
        let cell = &self.functions[entry.index()];
        if cell.get().is_none() {
            let function = self.load(entry)?;
            // Threads that race here have the same function of the same module.
            let _ = cell.set(function);
        }
        cell.get().with_context(|| format!("cuda: kernel {} did not load", entry.name()))
    }

    fn load(&self, entry: Entry) -> Result<CudaFunction> {
        let module = self.module(entry.module())?;
        let function = module
            .load_function(entry.name())
            .with_context(|| format!("cuda: module {} has no {}", entry.module().stem(), entry.name()))?;
        if entry.needs_shared_opt_in() {
            let limit = function.shared_size_bytes().and_then(|fixed| {
                let attribute =
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                function.set_attribute(attribute, self.properties.shared as i32 - fixed)
            });
            limit.with_context(|| format!("cuda: cannot raise the shared memory of {}", entry.name()))?;
        }
        Ok(function)
    }

    fn module(&self, module: Module) -> Result<Arc<CudaModule>> {
        let (stem, have) = (module.stem(), self.properties.capability);
        if have < module.needs_capability() {
            bail!("cuda: module {stem} needs compute capability {}, have {have}", module.needs_capability())
        }
        let Ok(mut loaded) = self.modules[module.index()].lock() else {
            bail!("cuda: a thread panicked while it loaded module {stem}")
        };
        if let Some(module) = &*loaded {
            return Ok(module.clone());
        }
        let module = self.context.load_module(image(stem)?).with_context(|| {
            let compiled = compiled::CAPABILITY;
            format!("cuda: module {stem}, compiled for compute capability {compiled}, does not load")
        })?;
        Ok(loaded.insert(module).clone())
    }
}

/// What the driver loads of `cuda/{stem}.cu`.
fn image(stem: &str) -> Result<Ptx> {
    if let Some(folder) = std::env::var_os(MODULES_VARIABLE) {
        for extension in ["cubin", "fatbin", "ptx"] {
            let file = Path::new(&folder).join(stem).with_extension(extension);
            if file.is_file() {
                return Ok(Ptx::from_file(file));
            }
        }
    }
    match compiled::ALL.iter().find(|(name, _)| *name == stem) {
        Some((_, image)) => Ok(Ptx::from_binary(image.to_vec())),
        None => bail!("cuda: build.rs compiled no cuda/{stem}.cu"),
    }
}

/// Whether clusters of 8 blocks that fill their multiprocessors can run: on a part of a GPU (MIG, or MPS
/// with a share of the multiprocessors) a launch of them would fail. Asked of a kernel that does nothing;
/// a driver that has no answer is taken to say yes, and the launch says what is wrong.
fn schedules_clusters(stream: &Arc<CudaStream>, shared: i32) -> bool {
    const PROBE: &str = ".version 7.8\n.target sm_90\n.address_size 64\n\
        .visible .entry norm_probe() .explicitcluster .reqnctapercluster 8, 1, 1 { ret; }\n";
    let clusters = stream.context().load_module(Ptx::from_src(PROBE)).and_then(|module| {
        let probe = module.load_function("norm_probe")?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        probe.set_attribute(attribute, shared)?;
        let (grid_dim, block_dim, shared_mem_bytes) = ((8, 1, 1), (512, 1, 1), shared as u32);
        probe.occupancy_max_active_clusters(LaunchConfig { grid_dim, block_dim, shared_mem_bytes }, stream)
    });
    clusters.map_or(true, |clusters| clusters > 0)
}

/// The capability to plan for: the kernels run on later devices, but have no more in them than they were
/// compiled for.
fn usable_capability(device: u32) -> Result<u32> {
    let compiled: u32 = compiled::CAPABILITY.parse().context("cuda: compiled for no compute capability")?;
    if device < compiled {
        bail!(
            "cuda: kernels were compiled for compute capability {compiled}, the device has {device}; \
             build with CUDA_COMPUTE_CAP={device}"
        )
    }
    Ok(compiled)
}

/// Runs `$body` with `$slice` bound to the typed slice in `$storage`.
macro_rules! on_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            Slice::F32($slice) => $body,
            Slice::F16($slice) => $body,
            Slice::BF16($slice) => $body,
            Slice::F64($slice) => $body,
            _ => bail!("cuda: expected f16, bf16, f32 or f64 memory"),
        }
    };
}

impl CudaMachine {
    fn alloc<T: DeviceRepr + CudaDType>(&self, len: usize) -> Result<CudaStorage> {
        // One for a tensor without elements: cuMemAlloc, which cudarc calls where the device has no pools,
        // refuses to allocate nothing, and cuMemAllocAsync answers with a null pointer.
        // SAFETY: whoever asked for the memory has every element written by a kernel before it is read
        // (contract of `Machine::allocate`); T is a plain number, any bits of which are valid.
        let slice = unsafe { self.stream.alloc::<T>(len.max(1)) }
            .with_context(|| format!("cuda: cannot allocate {len} elements of {} bytes", size_of::<T>()))?;
        Ok(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }

    fn read<T>(&self, slice: &CudaSlice<T>, offset: usize) -> u64 {
        slice.device_ptr(&self.stream).0 + (offset * size_of::<T>()) as u64
    }

    fn write<T>(&self, slice: &mut CudaSlice<T>) -> u64 {
        slice.device_ptr_mut(&self.stream).0
    }
}

impl Machine for CudaMachine {
    type Storage = CudaStorage;

    fn properties(&self) -> &DeviceProperties {
        &self.loaded.properties
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<CudaStorage> {
        match dtype {
            DType::F32 => self.alloc::<f32>(len),
            DType::F16 => self.alloc::<f16>(len),
            DType::BF16 => self.alloc::<bf16>(len),
            DType::F64 => self.alloc::<f64>(len),
            DType::U8 => self.alloc::<u8>(len),
            other => bail!("cuda: nothing of ours has dtype {other:?}"),
        }
    }

    fn dtype(&self, storage: &CudaStorage) -> DType {
        storage.dtype()
    }

    fn address(&self, arg: &Arg<CudaStorage>) -> Result<u64> {
        Ok(on_slice!(&arg.storage.slice, slice => self.read(slice, arg.offset)))
    }

    fn address_mut(&self, storage: &mut CudaStorage) -> Result<u64> {
        Ok(match &mut storage.slice {
            Slice::U8(slice) => self.write(slice),
            other => on_slice!(other, slice => self.write(slice)),
        })
    }

    fn with_running(
        &self,
        running: Option<&Running>,
        run: &mut dyn FnMut(Option<RunningAddresses>) -> Result<()>,
    ) -> Result<()> {
        let Some(running) = running else { return run(None) };
        // Read guards, held until the kernel is launched: what a kernel writes is device memory, in
        // stream order, and not the storage struct that the lock protects. candle may hold a read lock
        // on neither, since neither is an argument of the op.
        let (mean, mean_layout) = running.mean.storage_and_layout();
        let (var, var_layout) = running.var.storage_and_layout();
        let (Storage::Cuda(mean), Storage::Cuda(var)) = (&*mean, &*var) else {
            bail!("cuda: running statistics are not on the GPU")
        };
        run(Some(RunningAddresses {
            mean: self.address(&Arg { storage: mean, offset: mean_layout.start_offset() })?,
            mean_dtype: mean.dtype(),
            var: self.address(&Arg { storage: var, offset: var_layout.start_offset() })?,
            var_dtype: var.dtype(),
        }))
    }

    fn launch(&self, launch: &Launch, params: &Params, follows: bool) -> Result<()> {
        let function = self.loaded.function(launch.entry)?;
        let mut arguments = [std::ptr::from_ref(params).cast::<c_void>().cast_mut()];
        self.loaded.context.bind_to_thread().context("cuda: cannot use the device from this thread")?;
        // The blocks of a launch may be in place before the launch that the plan has before it has ended: every kernel
        // waits for that itself (`in_turn` of params.cuh), where it was compiled for 9.0 or later.
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream.cu_stream(),
            attrs: &mut early,
            numAttrs: u32::from(follows && self.loaded.properties.capability >= 90),
        };
        // SAFETY: every entry takes one argument, a `Params` by value, whose layout `params.rs` and
        // `params.cuh` state alike; the driver copies it, and `config`, before it returns and writes to neither.
        // `function` is of a module that is never unloaded, in the context bound above, to which the
        // stream belongs. Its addresses are of memory of this stream's tensors (see the top of the
        // file), and the plan that made the launch bounds every access by the geometry they were
        // checked against.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        };
        launched.with_context(|| {
            let Launch { entry, grid, block, shared, .. } = launch;
            format!("cuda: {} with {grid} blocks of {block} threads and {shared} bytes", entry.name())
        })
    }

    fn written(&self, storage: &mut CudaStorage) -> Result<()> {
        // Where cudarc tracks events between streams, taking the address records one behind the launches.
        if self.stream.context().is_managing_stream_synchronization() {
            self.address_mut(storage)?;
        }
        Ok(())
    }
}
