//! Several processes, threads or GPUs training one model: the collectives they need, on four engines.
//!
//! The norms need two operations of a group of ranks, whoever carries them:
//!
//! | engine | feature | ranks are | device tensors |
//! |---|---|---|---|
//! | [`LocalGroup`] | none | threads of this process | go through host memory |
//! | [`TcpGroup`] | none | a few processes, started by `torchrun` or by hand | go through host memory |
#![cfg_attr(
    feature = "mpi",
    doc = "| [`MpiGroup`] | `mpi` | processes started by `mpirun` | go through host memory |"
)]
#![cfg_attr(
    feature = "nccl",
    doc = "| [`NcclGroup`] | `nccl` | processes or threads, one GPU each | stay on the device |"
)]
//!
//! MPI and NCCL are the engines for clusters. TCP is the rendezvous, and the small case: all its traffic
//! meets at rank 0. Threads are for tests, examples and several GPUs in one process.
//!
//! # What a group promises
//!
//! All ranks make the same collective calls in the same order, each rank one at a time. As long as they do,
//! each gets the result. When they do not:
//!
//! * **A rank that makes another call** than its peers (another tensor, dtype or layer; every call says what
//!   it is for, and that is compared before anything received is used) makes the call fail on all ranks, with
//!   the words of each. The group then works on.
//! * **A rank that dies, leaves, stalls, sends what is no message, or joins twice** makes the call under way
//!   fail on all other ranks, or their next one where they have the result already, and every later call at
//!   once: that group is over. The errors name the rank where that can be known.
//! * **Nobody waits longer** than the timeout that the group was made with; over TCP twice as long, since
//!   rank 0 waits for the others and then tells. A rank that comes later than that gets an error as well.
//! * **Nobody gets a wrong result**: a call returns what all ranks brought to that very call, or an error.
//! * **Running statistics move whole or not at all**: [`SyncBatchNorm`](crate::SyncBatchNorm) moves its mean,
//!   variance and count after everything that can fail has succeeded on this rank.
//!
//! What no group can promise is that *all* ranks fail in the same call: one may have its result when another
//! is lost. Ranks that go on after an error start again from a checkpoint, in a new group.
//!
//! How far each engine can keep this: a thread that never returns cannot be ended, so
//! [`LocalGroup::run`] waits for it, though its peers do not; `mpirun` ends the whole job when one of its
//! processes dies; NCCL's collectives run on the GPU, after the call has returned: the control group has by
//! then found that all ranks make the same call, and a rank that is lost afterwards stalls the stream until
//! NCCL reports it to the next call. The tests behind this, with randomly injected faults, are counted in
//! `docs/reliability.md`.
//!
//! # Parts of a group
//!
//! [`ProcessGroup::split`] makes groups of parts of the ranks, as `torch.distributed.new_group` makes the
//! `process_group` that PyTorch's `SyncBatchNorm` takes: batch norm over the ranks of one machine, say.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_norm::distributed::{LocalGroup, ProcessGroup};
//! # fn main() -> candle_core::Result<()> {
//! let sums = LocalGroup::run(4, |group| {
//!     let machine = group.split(group.rank() / 2)?;
//!     let mine = Tensor::new(&[group.rank() as f32], &Device::Cpu)?;
//!     machine.all_reduce_sum("example", &mine)?.to_vec1::<f32>()
//! })?;
//! assert_eq!(sums, [[1.0], [1.0], [5.0], [5.0]]);
//! # Ok(()) }
//! ```

mod bytes;
mod deadline;
mod gradients;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod split;
mod tcp;

pub(crate) use deadline::Deadline;
pub use gradients::{all_reduce_gradients, broadcast_vars, Parameters};
pub use local::LocalGroup;
#[cfg(feature = "mpi")]
pub use mpi::MpiGroup;
#[cfg(feature = "nccl")]
pub use nccl::NcclGroup;
pub use tcp::TcpGroup;

use candle_core::{bail, Error, Result, Tensor};
use std::sync::{Arc, Mutex, MutexGuard};

/// One rank's handle to a group of ranks that exchange tensors.
///
/// Tensors are contiguous or made so, and come back on the device they came from. Implement this to
/// run `SyncBatchNorm` over an engine of your own: four methods and a rule.
/// The rule: a call is given `what`, words that are the same on every rank when the ranks do the same;
/// when they are not, or the tensors differ in shape or dtype, the call fails on every rank. Beyond it see
/// [what a group promises](self#what-a-group-promises).
pub trait ProcessGroup: std::fmt::Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// The tensors of all ranks, stacked in rank order: `[world_size, ..]`.
    ///
    /// # Errors
    /// Where the ranks' calls differ, a rank is gone, or the engine fails.
    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor>;

    /// The sum of the tensors of all ranks, the same bits on each.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor>;

    /// The tensor of rank `root`, on every rank.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather), and where there is no such rank.
    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size(), root)?;
        self.all_gather(&format!("{what}, from rank {root}"), tensor)?.get(root)
    }

    /// The group of those ranks that name the same `color`, in the order of their ranks here.
    ///
    /// All ranks call it at once; one that wants to be in no part names a color of its own. The parts are
    /// independent of each other and of this group, which stays usable, and can be split again.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather), and of an engine that has no parts.
    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        bail!("process-group: {self:?} cannot be split, asked for the part of color {color}")
    }
}

impl<G: ProcessGroup + ?Sized> ProcessGroup for Arc<G> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn world_size(&self) -> usize {
        (**self).world_size()
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        (**self).all_gather(what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        (**self).all_reduce_sum(what, tensor)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        (**self).broadcast(what, tensor, root)
    }

    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        (**self).split(color)
    }
}

fn check_root(world_size: usize, root: usize) -> Result<()> {
    if root >= world_size {
        bail!("process-group: broadcast from rank {root}, expected a rank below {world_size}")
    }
    Ok(())
}

/// The kinds of collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Gather,
    Sum,
    Broadcast(usize),
}

/// A call in words: two ranks make the same call when these are equal.
pub(crate) fn describe(kind: Kind, what: &str, tensor: &Tensor) -> String {
    let (dtype, dims) = (tensor.dtype(), tensor.dims());
    match kind {
        Kind::Gather => format!("all-gather of {dtype:?} {dims:?}: {what}"),
        Kind::Sum => format!("sum of {dtype:?} {dims:?}: {what}"),
        Kind::Broadcast(root) => format!("broadcast of {dtype:?} {dims:?} from rank {root}: {what}"),
    }
}

/// The error of ranks that made different calls, or none.
pub(crate) fn disagreement(calls: &[&str]) -> Option<String> {
    if calls.windows(2).all(|pair| pair[0] == pair[1]) {
        return None;
    }
    let mut message = "process-group: the ranks made different calls".to_string();
    for (rank, call) in calls.iter().enumerate() {
        message.push_str(&format!("\n  rank {rank}: {call}"));
    }
    Some(message)
}

/// As [`disagreement`], of calls whose words may have been cut, beside digests of all their words.
pub(crate) fn differ(calls: &[(u64, String)]) -> Option<String> {
    if calls.windows(2).all(|pair| pair[0].0 == pair[1].0) {
        return None;
    }
    let words: Vec<&str> = calls.iter().map(|(_, words)| words.as_str()).collect();
    let alike = || "process-group: the ranks made different calls (equal in their first words)".to_string();
    Some(disagreement(&words).unwrap_or_else(alike))
}

pub(crate) fn error(message: impl Into<String>) -> Error {
    Error::Msg(message.into())
}

/// FNV-1a: unlike the standard library's hashers the same in every process.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf29ce484222325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100000001b3))
}

/// Locks what a rank that panicked may have held: every change under these locks leaves them whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
