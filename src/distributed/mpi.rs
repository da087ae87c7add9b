//! A process group over MPI: the engine for clusters of CPUs, started by `mpirun`.
//!
//! Apart, because it is the only file that calls MPI. It calls the C interface: the `mpi` crate's own
//! collectives drop the return codes, and here an MPI error becomes a `candle::Error` in MPI's words.
//!
//! Every call begins with one all-gather of fixed-size frames: a description of the call, and the payload
//! if it fits. So the usual message of a norm costs one collective, and ranks that make different calls
//! all see it, since their frames have one size whatever they hold. Larger payloads follow in a second.
#![allow(unsafe_code)]

use super::bytes::{combine, from_bytes, result_dims, to_bytes};
use super::split::{colors, Part};
use super::{check_root, describe, differ, digest, error, lock, Deadline, Kind, ProcessGroup};
use candle_core::{bail, DType, Device, Result, Tensor};
use mpi::environment::{self, Universe};
use mpi::ffi;
use mpi::Threading;
use std::ffi::c_int;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// The ranks of an MPI job.
///
/// [`MpiGroup::world`] initializes MPI unless the program has done so, and ends it with the last handle.
/// Calls come from any thread, one at a time; a rank that waits for its peers longer than the timeout
/// gets an error, and the group then fails all its calls. Tensors on a GPU go through host memory.
#[derive(Debug)]
pub struct MpiGroup {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    link: Mutex<Link>,
}

/// What a collective needs for itself while it runs.
struct Link {
    comm: ffi::MPI_Comm,
    broken: Option<String>,
    /// When the call under way has to be done.
    by: Deadline,
    /// MPI ends with the last of these; none if it was initialized by somebody else.
    environment: Option<Arc<Universe>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("broken", &self.broken).finish_non_exhaustive()
    }
}

// SAFETY: a communicator handle is an integer or a pointer into the MPI library, not tied to a thread.
// `world` accepts MPI_THREAD_SERIALIZED or more only, and the mutex around `Link` serializes all use.
unsafe impl Send for Link {}

static ENVIRONMENT: Mutex<Weak<Universe>> = Mutex::new(Weak::new());
/// One MPI call at a time in the whole process, as MPI_THREAD_SERIALIZED asks.
static CALLING: Mutex<()> = Mutex::new(());

impl MpiGroup {
    /// How long a rank waits for its peers in one call unless told otherwise: 5 minutes.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

    /// The group of all processes of the job.
    ///
    /// All of them call this at the same point, as it duplicates the world communicator.
    ///
    /// # Errors
    /// MPI that was initialized with less than serialized threads, or has ended; errors of MPI.
    pub fn world() -> Result<Self> {
        Self::world_with_timeout(Self::DEFAULT_TIMEOUT)
    }

    /// As [`world`](Self::world), with the time a rank waits for its peers in one call.
    ///
    /// # Errors
    /// As [`world`](Self::world).
    pub fn world_with_timeout(timeout: Duration) -> Result<Self> {
        let environment = environment()?;
        let _calling = lock(&CALLING);
        // SAFETY: MPI is initialized and not finalized (`environment` checked), RSMPI_COMM_WORLD is its
        // constant, and the out pointers are to live locals.
        let (comm, rank, size) = unsafe {
            let (mut comm, mut rank, mut size) = (ffi::RSMPI_COMM_WORLD, 0, 0);
            check("MPI_Comm_dup", ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm))?;
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(comm, &mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(comm, &mut size))?;
            // Without this MPI ends the process on an error.
            let returns = ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN);
            check("MPI_Comm_set_errhandler", returns)?;
            (comm, rank, size)
        };
        Ok(Self::of(comm, rank as usize, size as usize, timeout, environment))
    }

    fn of(
        comm: ffi::MPI_Comm,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        environment: Option<Arc<Universe>>,
    ) -> Self {
        let link = Mutex::new(Link { comm, broken: None, by: Deadline::after(timeout), environment });
        Self { rank, world_size, timeout, link }
    }

    fn exchange(&self, kind: Kind, what: &str, tensor: &Tensor) -> Result<Tensor> {
        let words = describe(kind, what, tensor);
        let host = tensor.detach().to_device(&Device::Cpu)?.flatten_all()?.contiguous()?;
        let payload = to_bytes(&host)?;
        let mut link = lock(&self.link);
        if let Some(broken) = &link.broken {
            return Err(error(broken.clone()));
        }
        // One for the whole call, however many collectives it takes.
        link.by = Deadline::after(self.timeout);
        let frames = self.gather(&mut link, &Frame::new(&words, &payload).0)?;
        let frames: Vec<&[u8]> = frames.chunks_exact(Frame::SIZE).collect();
        let calls: Vec<(u64, String)> = frames.iter().map(|frame| Frame::call(frame)).collect();
        if let Some(words) = differ(&calls) {
            return Err(error(words));
        }
        let (dtype, n) = (host.dtype(), host.elem_count());
        let result = if payload.len() <= Frame::ROOM {
            let inline = frames.iter().map(|frame| &frame[Frame::PAYLOAD][..payload.len()]);
            combine(kind, inline, dtype, n)
        } else {
            match kind {
                Kind::Gather => combine(kind, std::iter::once(&*self.gather(&mut link, &payload)?), dtype, n),
                Kind::Sum => self.sum(&mut link, payload, dtype, n),
                Kind::Broadcast(root) => from_bytes(&self.send(&mut link, payload, root)?, dtype, &[n]),
            }
        }?;
        result.reshape(result_dims(kind, tensor, self.world_size))?.to_device(tensor.device())
    }

    /// The bytes of all ranks one after the other; each brings equally many.
    fn gather(&self, link: &mut Link, mine: &[u8]) -> Result<Vec<u8>> {
        let Ok(n) = c_int::try_from(mine.len()) else {
            bail!("mpi: a message has {} bytes, expected less than 2^31", mine.len())
        };
        let Some(total) = mine.len().checked_mul(self.world_size) else {
            bail!("mpi: messages of {} bytes from {} ranks are too large", mine.len(), self.world_size)
        };
        let all = vec![0u8; total];
        self.complete(link, "MPI_Iallgather", (mine.to_vec(), all), |link, (mine, all), request| {
            // SAFETY: both buffers are owned by `complete`, which frees them only after the request is
            // done, and have the lengths given: n bytes, and n bytes for each rank.
            unsafe {
                let byte = ffi::RSMPI_UINT8_T;
                let (send, receive) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
                ffi::MPI_Iallgather(send, n, byte, receive, n, byte, link.comm, request)
            }
        })
        .map(|(_, all)| all)
    }

    /// The bytes of rank `root`.
    fn send(&self, link: &mut Link, mine: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(mine.len());
        for part in mine.chunks(CHUNK) {
            let sent = self.complete(link, "MPI_Ibcast", part.to_vec(), |link, part, request| {
                // SAFETY: the buffer is owned by `complete` until the request is done and has the
                // length given, at most CHUNK, which fits a c_int.
                unsafe {
                    let (data, n) = (part.as_mut_ptr().cast(), part.len() as c_int);
                    ffi::MPI_Ibcast(data, n, ffi::RSMPI_UINT8_T, root as c_int, link.comm, request)
                }
            })?;
            all.extend(sent);
        }
        Ok(all)
    }

    /// A large sum: reduced on rank 0 and sent from there, so that all ranks have the same bits, which
    /// MPI's own all-reduce recommends and does not promise.
    fn sum(&self, link: &mut Link, payload: Vec<u8>, dtype: DType, n: usize) -> Result<Tensor> {
        // SAFETY: reads of constants that MPI sets up when the program starts.
        let (element, sum) = unsafe {
            match dtype {
                DType::F32 => (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM),
                DType::F64 => (ffi::RSMPI_DOUBLE, ffi::RSMPI_SUM),
                DType::I64 => (ffi::RSMPI_INT64_T, ffi::RSMPI_SUM),
                // MPI has no numbers of these kinds; gathered, candle adds them.
                _ => {
                    let all = self.gather(link, &payload)?;
                    return combine(Kind::Sum, all.chunks_exact(payload.len()), dtype, n);
                }
            }
        };
        let mut total = Vec::with_capacity(payload.len());
        for part in payload.chunks(CHUNK) {
            let buffers = (part.to_vec(), vec![0u8; part.len()]);
            let (_, reduced) =
                self.complete(link, "MPI_Ireduce", buffers, |link, (mine, all), request| {
                    // SAFETY: both buffers are owned by `complete` until the request is done and hold
                    // n elements: CHUNK is a multiple of every element size, and fits a c_int.
                    unsafe {
                        let n = (mine.len() / dtype.size_in_bytes()) as c_int;
                        let (send, receive) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
                        ffi::MPI_Ireduce(send, receive, n, element, sum, 0, link.comm, request)
                    }
                })?;
            total.extend(self.send(link, reduced, 0)?);
        }
        from_bytes(&total, dtype, &[n])
    }

    /// Starts a collective and waits for it, with an eye on the clock. Owns the buffers meanwhile.
    fn complete<B>(
        &self,
        link: &mut Link,
        name: &str,
        mut buffers: B,
        start: impl FnOnce(&Link, &mut B, &mut ffi::MPI_Request) -> c_int,
    ) -> Result<B> {
        // SAFETY: a constant of MPI's.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        let started = {
            let _calling = lock(&CALLING);
            start(link, &mut buffers, &mut request)
        };
        let mut outcome = check(name, started);
        let mut done = outcome.is_err();
        while !done {
            let mut flag = 0;
            let tested = {
                let _calling = lock(&CALLING);
                // SAFETY: `request` came from a collective that succeeded in starting; `flag` is a live local.
                unsafe { ffi::MPI_Test(&mut request, &mut flag, ffi::RSMPI_STATUS_IGNORE) }
            };
            outcome = check(name, tested);
            done = outcome.is_err() || flag != 0;
            if !done && link.by.is_over() {
                outcome = Err(error(format!(
                    "mpi: rank {} waited {:?} for its peers in {name}",
                    self.rank, self.timeout
                )));
                break;
            }
            if !done {
                std::thread::yield_now();
            }
        }
        if let Err(e) = outcome {
            link.broken = Some(e.to_string());
            // MPI may still write to them.
            std::mem::forget(buffers);
            return Err(e);
        }
        Ok(buffers)
    }
}

/// Bytes in one call to MPI: a multiple of every element size whose count fits a `c_int`.
const CHUNK: usize = 1 << 30;

/// A message of fixed size: digest of the call's words, their beginning, and a payload that fits.
struct Frame(Vec<u8>);

impl Frame {
    const SIZE: usize = 4096;
    const DIGEST: std::ops::Range<usize> = 0..8;
    const WORDS: std::ops::Range<usize> = 8..264;
    const PAYLOAD: std::ops::RangeFrom<usize> = 264..;
    /// 958 f32: the statistics of 318 channels.
    const ROOM: usize = Self::SIZE - 264;

    fn new(words: &str, payload: &[u8]) -> Self {
        let mut frame = vec![0u8; Self::SIZE];
        frame[Self::DIGEST].copy_from_slice(&digest(words.as_bytes()).to_le_bytes());
        let shown = words.len().min(Self::WORDS.len());
        frame[Self::WORDS][..shown].copy_from_slice(&words.as_bytes()[..shown]);
        if payload.len() <= Self::ROOM {
            frame[Self::PAYLOAD][..payload.len()].copy_from_slice(payload);
        }
        Self(frame)
    }

    /// Digest and first words.
    fn call(frame: &[u8]) -> (u64, String) {
        let mut digest = [0; 8];
        digest.copy_from_slice(&frame[Self::DIGEST]);
        let words = String::from_utf8_lossy(&frame[Self::WORDS]).trim_end_matches('\0').to_string();
        (u64::from_le_bytes(digest), words)
    }
}

/// MPI, initialized by us if nobody did.
fn environment() -> Result<Option<Arc<Universe>>> {
    let mut shared = lock(&ENVIRONMENT);
    if let Some(universe) = shared.upgrade() {
        return Ok(Some(universe));
    }
    if environment::is_finalized() {
        bail!("mpi: MPI has been finalized, and cannot be initialized again in this process")
    }
    let ours = environment::initialize_with_threading(Threading::Serialized);
    let provided = ours.as_ref().map_or_else(environment::threading_support, |(_, provided)| *provided);
    if provided < Threading::Serialized {
        bail!("mpi: MPI was initialized with threading {provided:?}, expected Serialized or Multiple")
    }
    Ok(ours.map(|(universe, _)| {
        let universe = Arc::new(universe);
        *shared = Arc::downgrade(&universe);
        universe
    }))
}

/// An MPI return code as a result, in MPI's words.
fn check(call: &str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut words = [0 as std::ffi::c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has MPI_MAX_ERROR_STRING characters and one, and the length is a live local.
    // Called with CALLING held or before any other thread can call.
    unsafe { ffi::MPI_Error_string(code, words.as_mut_ptr(), &mut length) };
    let words: Vec<u8> = words.iter().take(length.max(0) as usize).map(|c| *c as u8).collect();
    bail!("mpi: {call} failed: {}", String::from_utf8_lossy(&words))
}

impl ProcessGroup for MpiGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Gather, what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Sum, what, tensor)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size, root)?;
        self.exchange(Kind::Broadcast(root), what, tensor)
    }

    /// MPI's own split follows at once on the exchange of the colors. It knows no timeout, so a rank that is
    /// lost just between the two holds up the others.
    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        let Part { rank, members } = colors(self, color)?;
        let link = lock(&self.link);
        if let Some(broken) = &link.broken {
            return Err(error(broken.clone()));
        }
        let _calling = lock(&CALLING);
        // SAFETY: the communicator is alive and nothing is under way on it (the lock on `link`); the out
        // pointer is to a live local. Ranks are below a c_int: MPI counts them in it.
        let comm = unsafe {
            let mut comm = link.comm;
            // The first member's rank stands for the color, which may not fit a c_int.
            let (color, key) = (members[0] as c_int, rank as c_int);
            check("MPI_Comm_split", ffi::MPI_Comm_split(link.comm, color, key, &mut comm))?;
            let returns = ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN);
            check("MPI_Comm_set_errhandler", returns)?;
            comm
        };
        Ok(Arc::new(Self::of(comm, rank, members.len(), self.timeout, link.environment.clone())))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.broken.is_some() {
            // A collective may be under way that will never end, and ending MPI would wait for it. The
            // process ends without; mpirun then ends the job.
            std::mem::forget(self.environment.take());
            return;
        }
        if !environment::is_finalized() {
            let _calling = lock(&CALLING);
            // SAFETY: the communicator is ours (MPI_Comm_dup) and nothing is under way on it: `&mut self`.
            // A failure leaks a communicator, and there is nobody to tell.
            let _ = unsafe { ffi::MPI_Comm_free(&mut self.comm) };
        }
    }
}
