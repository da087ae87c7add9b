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
//! All ranks make the same collective calls in the same order. Every call says what it is for, and the
//! ranks compare that before they use what they received: a rank whose call differs from the others'
//! (another tensor, another dtype, another layer) makes the call fail on all of them.

mod bytes;
mod gradients;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod tcp;

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
/// run `SyncBatchNorm` over an engine of your own: three methods and a rule.
/// The rule: a call is given `what`, words that are the same on every rank when the ranks do the same;
/// when they are not, or the tensors differ in shape or dtype, the call fails on every rank.
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
