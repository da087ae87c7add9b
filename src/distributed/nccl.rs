//! A process group over NCCL: tensors stay on their GPUs and nothing waits for them.
//!
//! Apart, because it is the only file that calls NCCL. A second group, the *control*, carries what is not a
//! tensor: NCCL's unique id at the start, and before every call its words. NCCL itself would hang or mix
//! numbers where ranks differ; so it is called only after the control has found them equal. The control
//! exchanges a few bytes between hosts and never waits for a GPU.
#![allow(unsafe_code)]

use super::tcp::env_number;
use super::{check_root, describe, error, lock, Kind, ProcessGroup, TcpGroup};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, DType, Device, Layout, Result, Storage, Tensor};
use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use cudarc::nccl::{result, sys};
use half::{bf16, f16};
use std::ffi::{c_char, c_int, c_void, CStr};
use std::sync::{Arc, Mutex};

/// One GPU of a group of GPUs, in one process or many, on one machine or many.
///
/// A collective is queued on the stream of its tensor's candle device, behind what made the tensor, and the
/// call returns at once. Tensors in host memory go through the control group. An error that NCCL finds
/// after a call has returned comes out of the next call, which ends the communicator on this rank.
#[derive(Debug)]
pub struct NcclGroup {
    control: Arc<dyn ProcessGroup>,
    checked: bool,
    device: Device,
    ordinal: usize,
    link: Mutex<Link>,
}

/// The communicator: null once it has been given up.
#[derive(Debug)]
struct Link {
    comm: sys::ncclComm_t,
    broken: Option<String>,
}

// SAFETY: NCCL allows calls on a communicator from any thread, one at a time; the mutex around `Link`
// sees to that.
unsafe impl Send for Link {}

impl NcclGroup {
    /// The rank that `torchrun` or its like describes: [`TcpGroup::from_env`] as the control, and the GPU
    /// `LOCAL_RANK` of this machine, or `RANK` where that is not set. Returns the device to build the
    /// model on.
    ///
    /// # Errors
    /// As [`TcpGroup::from_env`], of CUDA and of NCCL.
    pub fn from_env() -> Result<(Self, Device)> {
        let ordinal = env_number("LOCAL_RANK").or_else(|_| env_number("RANK"))?;
        let device = Device::new_cuda(ordinal)?;
        Ok((Self::new(Arc::new(TcpGroup::from_env()?), &device)?, device))
    }

    /// A group of the ranks of `control`, this one with the GPU of `device`: [`MpiGroup`](super::MpiGroup)
    /// under `mpirun`, [`TcpGroup::from_file`] with a shared file, [`LocalGroup`](super::LocalGroup) for
    /// several GPUs in one process. All ranks call this at once, each with a GPU of its own.
    ///
    /// # Errors
    /// A device that is no GPU; errors of the control and of NCCL.
    pub fn new(control: Arc<dyn ProcessGroup>, device: &Device) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            bail!("nccl: got device {:?}, expected a CUDA device", device.location())
        };
        let stream = cuda.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // Rank 0's id counts; the others bring bytes of the same shape.
        let mut bytes = [0u8; 128];
        let id = match control.rank() {
            0 => result::get_uniqueid().map_err(|e| words("ncclGetUniqueId", e.0, None)),
            _ => Ok(sys::ncclUniqueId { internal: [0; 128] }),
        };
        // A rank that fails here stays in the exchange, with zeros, so that the others hear of it.
        if let Ok(id) = &id {
            bytes = id.internal.map(|c| c as u8);
        }
        let bytes = Tensor::from_slice(&bytes, 128, &Device::Cpu)?;
        let shared = control.broadcast("NCCL's unique id", &bytes, 0)?.to_vec1::<u8>()?;
        id?;
        if shared.iter().all(|byte| *byte == 0) {
            bail!("nccl: rank 0 could not make a unique id")
        }
        let mut internal = [0 as c_char; 128];
        internal.iter_mut().zip(&shared).for_each(|(to, from)| *to = *from as c_char);
        let id = sys::ncclUniqueId { internal };
        let mut comm = std::ptr::null_mut();
        let (ranks, rank) = (control.world_size() as c_int, control.rank() as c_int);
        // SAFETY: `comm` is a live local, the id is rank 0's, and the CUDA context is bound above.
        unsafe { result::comm_init_rank(&mut comm, ranks, id, rank) }
            .map_err(|e| words("ncclCommInitRank", e.0, None))?;
        let ordinal = stream.context().ordinal();
        let link = Mutex::new(Link { comm, broken: None });
        Ok(Self { control, checked: true, device: device.clone(), ordinal, link })
    }

    /// Whether calls are compared before they are made, which they are unless told otherwise. Without, a
    /// call costs no exchange between the hosts, and ranks that differ hang or get wrong numbers. The same
    /// on all ranks.
    pub fn checked(mut self, checked: bool) -> Self {
        self.checked = checked;
        self
    }

    fn exchange(&self, kind: Kind, what: &str, tensor: &Tensor) -> Result<Tensor> {
        let call = describe(kind, what, tensor);
        if self.checked {
            let nothing = Tensor::zeros(0, DType::U8, &Device::Cpu)?;
            self.control.all_gather(&call, &nothing)?;
        }
        let tensor = tensor.detach().contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!("nccl: {call} has a tensor that is not on a GPU")
        };
        let mut link = lock(&self.link);
        link.check_health()?;
        let (out, n) = match tensor.dtype() {
            DType::F64 => self.run::<f64>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclFloat64),
            DType::F32 => self.run::<f32>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclFloat32),
            DType::F16 => self.run::<f16>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclFloat16),
            DType::BF16 => {
                self.run::<bf16>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclBfloat16)
            }
            DType::I64 => self.run::<i64>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclInt64),
            DType::U32 => self.run::<u32>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclUint32),
            DType::U8 => self.run::<u8>(&mut link, kind, storage, layout, sys::ncclDataType_t::ncclUint8),
            other => bail!("nccl: no messages of dtype {other:?}"),
        }?;
        let mut dims = tensor.dims().to_vec();
        if kind == Kind::Gather {
            dims.insert(0, self.world_size());
        }
        debug_assert_eq!(n, dims.iter().product::<usize>());
        Ok(Tensor::from_storage(Storage::Cuda(out), dims, BackpropOp::none(), false))
    }

    /// Queues the collective behind the tensor's own work.
    fn run<T: CudaDType + DeviceRepr>(
        &self,
        link: &mut Link,
        kind: Kind,
        storage: &CudaStorage,
        layout: &Layout,
        dtype: sys::ncclDataType_t,
    ) -> Result<(CudaStorage, usize)> {
        use candle_core::backend::BackendStorage;
        let device = storage.device();
        let stream = device.cuda_stream();
        if stream.context().ordinal() != self.ordinal {
            bail!("nccl: got a tensor on GPU {}, expected GPU {}", stream.context().ordinal(), self.ordinal)
        }
        stream.context().bind_to_thread().w()?;
        let n = layout.shape().elem_count();
        let total = if kind == Kind::Gather { n * self.world_size() } else { n };
        let start = if n == 0 { 0 } else { layout.start_offset() };
        let input = storage.as_cuda_slice::<T>()?.slice(start..start + n);
        // SAFETY: T is a number type, for which every bit pattern is a value, and NCCL writes all `total`
        // elements on this stream before anything that is queued later reads them.
        let mut output = unsafe { device.alloc::<T>(total)? };
        // NCCL wants at least one element; of none there is nothing to do, on any rank alike.
        if total > 0 {
            let (send, _read) = input.device_ptr(&stream);
            let (receive, _written) = output.device_ptr_mut(&stream);
            let (send, receive) = (send as *const c_void, receive as *mut c_void);
            let (comm, queue) = (link.comm, stream.cu_stream() as sys::cudaStream_t);
            let sum = sys::ncclRedOp_t::ncclSum;
            // SAFETY: `check_health` has seen that the communicator is alive, `send` has n elements and
            // `receive` `total`; both belong to allocations that outlive their use, as they are freed in
            // the order of this same stream.
            let outcome = unsafe {
                match kind {
                    Kind::Gather => result::all_gather(send, receive, n, dtype, comm, queue),
                    Kind::Sum => result::all_reduce(send, receive, n, dtype, sum, comm, queue),
                    Kind::Broadcast(root) => {
                        result::broadcast(send, receive, n, dtype, root as c_int, comm, queue)
                    }
                }
            };
            if let Err(e) = outcome {
                return Err(link.give_up(words("a collective", e.0, Some(comm))));
            }
        }
        Ok((CudaStorage::wrap_cuda_slice(output, device.clone()), total))
    }
}

impl Link {
    /// An error of this communicator that came up since the last call.
    fn check_health(&mut self) -> Result<()> {
        if let Some(broken) = &self.broken {
            return Err(error(broken.clone()));
        }
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is alive, since nothing is broken; `state` is a live local.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        for code in [asked, state] {
            if code != sys::ncclResult_t::ncclSuccess {
                return Err(self.give_up(words("an earlier collective", code, Some(self.comm))));
            }
        }
        Ok(())
    }

    /// Ends the communicator, so that collectives of it that hang on the GPU end too.
    fn give_up(&mut self, e: candle_core::Error) -> candle_core::Error {
        self.broken = Some(e.to_string());
        // SAFETY: the communicator is alive, and not used again: `broken` is set.
        // The error to report is the one that led here.
        let _ = unsafe { result::comm_abort(self.comm) };
        self.comm = std::ptr::null_mut();
        e
    }
}

/// An NCCL return code as an error, in NCCL's words.
fn words(call: &str, code: sys::ncclResult_t, comm: Option<sys::ncclComm_t>) -> candle_core::Error {
    let text = |pointer: *const c_char| match pointer.is_null() {
        true => String::new(),
        // SAFETY: not null, and NCCL returns strings that end with a zero and are never freed.
        false => unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned(),
    };
    // SAFETY: any code is accepted.
    let what = text(unsafe { sys::ncclGetErrorString(code) });
    // SAFETY: NCCL ignores its argument here, and accepts null.
    let last = text(unsafe { sys::ncclGetLastError(comm.unwrap_or(std::ptr::null_mut())) });
    let last = if last.is_empty() { last } else { format!(" ({last})") };
    error(format!("nccl: {call} failed: {what}{last}"))
}

impl ProcessGroup for NcclGroup {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn world_size(&self) -> usize {
        self.control.world_size()
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        match tensor.device() {
            Device::Cuda(_) => self.exchange(Kind::Gather, what, tensor),
            _ => self.control.all_gather(what, tensor),
        }
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        match tensor.device() {
            Device::Cuda(_) => self.exchange(Kind::Sum, what, tensor),
            _ => self.control.all_reduce_sum(what, tensor),
        }
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size(), root)?;
        match tensor.device() {
            Device::Cuda(_) => self.exchange(Kind::Broadcast(root), what, tensor),
            _ => self.control.broadcast(what, tensor, root),
        }
    }

    /// The control's part, with a communicator of its own.
    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        let part = Self::new(self.control.split(color)?, &self.device)?;
        Ok(Arc::new(part.checked(self.checked)))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.broken.is_none() {
            // SAFETY: the communicator is alive and `&mut self` is its last use. There is nobody to tell
            // of a failure.
            let _ = unsafe { result::comm_destroy(self.comm) };
        }
    }
}
