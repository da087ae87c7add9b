//! A process group whose ranks are threads of one process.
//!
//! It needs no feature and no launcher: tests, examples, and several GPUs driven from one process. The
//! ranks meet under one lock; the last to arrive computes the result, in rank order, for all of them.

use super::{check_root, describe, disagreement, error, lock, Kind, ProcessGroup};
use candle_core::{Device, Result, Tensor};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// One rank of a group of threads.
///
/// A rank that drops its handle, by returning or by panicking, fails every call that its peers wait in
/// or make later. A peer that neither calls nor leaves fails them after the group's timeout. Once a
/// group failed in one of these ways all its calls return the error; a group whose ranks merely made
/// different calls goes on.
///
/// Tensors on a GPU go through host memory, which waits for the device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::distributed::{LocalGroup, ProcessGroup};
/// # fn main() -> candle_core::Result<()> {
/// let sums = LocalGroup::run(3, |group| {
///     let mine = Tensor::new(&[group.rank() as f32 + 1.0], &Device::Cpu)?;
///     group.all_reduce_sum("example", &mine)?.to_vec1::<f32>()
/// })?;
/// assert_eq!(sums, [[6.0], [6.0], [6.0]]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LocalGroup {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    timeout: Duration,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

#[derive(Debug)]
struct Meeting {
    /// What each rank brought to the round that is being collected.
    brought: Vec<Option<Contribution>>,
    /// Number of the round that is being collected, and the result of the one before. A round closes
    /// only when all ranks came, hence when all have fetched the result before.
    round: u64,
    result: Option<Outcome>,
    left: Vec<bool>,
    /// Why the group can no longer be used.
    broken: Option<String>,
}

#[derive(Debug)]
struct Contribution {
    call: String,
    kind: Kind,
    tensor: Tensor,
}

type Outcome = std::result::Result<Tensor, String>;

impl LocalGroup {
    /// How long a rank waits for its peers unless told otherwise: 5 minutes. It has to cover what one
    /// rank may do alone between two calls (a validation, a checkpoint), not a call.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

    /// The handles of a group of `ranks` threads, in rank order.
    ///
    /// # Errors
    /// If `ranks` is 0.
    pub fn new(ranks: usize) -> Result<Vec<Self>> {
        Self::with_timeout(ranks, Self::DEFAULT_TIMEOUT)
    }

    /// As [`new`](Self::new), with the time a rank waits for its peers in one call.
    ///
    /// # Errors
    /// If `ranks` is 0.
    pub fn with_timeout(ranks: usize, timeout: Duration) -> Result<Vec<Self>> {
        if ranks == 0 {
            return Err(error("local-group: got 0 ranks, expected at least 1"));
        }
        let meeting = Meeting {
            brought: (0..ranks).map(|_| None).collect(),
            round: 0,
            result: None,
            left: vec![false; ranks],
            broken: None,
        };
        let shared = Arc::new(Shared { timeout, meeting: Mutex::new(meeting), changed: Condvar::new() });
        Ok((0..ranks).map(|rank| Self { rank, shared: shared.clone() }).collect())
    }

    /// Runs `f` as `ranks` threads and returns what each returned, in rank order.
    ///
    /// A rank leaves the group when `f` returns, even if a handle of it lives on.
    ///
    /// # Errors
    /// The error of the rank that failed first.
    ///
    /// # Panics
    /// With the panic of the rank that panicked, if one did.
    pub fn run<T: Send>(ranks: usize, f: impl Fn(Arc<Self>) -> Result<T> + Sync) -> Result<Vec<T>> {
        Self::run_with_timeout(ranks, Self::DEFAULT_TIMEOUT, f)
    }

    /// As [`run`](Self::run), with the time a rank waits for its peers in one call.
    ///
    /// # Errors
    /// The error of the rank that failed first.
    ///
    /// # Panics
    /// With the panic of the rank that panicked, if one did.
    pub fn run_with_timeout<T: Send>(
        ranks: usize,
        timeout: Duration,
        f: impl Fn(Arc<Self>) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let groups = Self::with_timeout(ranks, timeout)?;
        // Of many errors the first is the cause: peers fail only once the failing rank has left.
        let first = Mutex::new(None);
        let one = |group: Self| {
            let group = Arc::new(group);
            let outcome = catch_unwind(AssertUnwindSafe(|| f(group.clone())));
            let value = match outcome {
                Ok(Ok(value)) => Some(value),
                Ok(Err(e)) => {
                    lock(&first).get_or_insert(e);
                    None
                }
                Err(panic) => {
                    group.leave();
                    resume_unwind(panic)
                }
            };
            group.leave();
            value
        };
        let values: Vec<Option<T>> = std::thread::scope(|scope| {
            let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(|| one(group))).collect();
            let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        match first.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(e) => Err(e),
            None => Ok(values.into_iter().flatten().collect()),
        }
    }

    /// Gives up this rank's place: calls that peers wait in or make later fail.
    fn leave(&self) {
        lock(&self.shared.meeting).left[self.rank] = true;
        self.shared.changed.notify_all();
    }

    fn exchange(&self, kind: Kind, what: &str, tensor: &Tensor) -> Result<Tensor> {
        let call = describe(kind, what, tensor);
        let host = tensor.detach().contiguous()?.to_device(&Device::Cpu)?;
        let result = self.meet(call, kind, host).map_err(error)?;
        result.to_device(tensor.device())
    }

    fn meet(&self, call: String, kind: Kind, tensor: Tensor) -> Outcome {
        let mut meeting = lock(&self.shared.meeting);
        if let Some(broken) = &meeting.broken {
            return Err(broken.clone());
        }
        let round = meeting.round;
        meeting.brought[self.rank] = Some(Contribution { call, kind, tensor });
        if meeting.brought.iter().all(Option::is_some) {
            let brought: Vec<_> = meeting.brought.iter_mut().filter_map(Option::take).collect();
            meeting.result = Some(combine(&brought));
            meeting.round += 1;
            self.shared.changed.notify_all();
        }
        let deadline = Instant::now() + self.shared.timeout;
        loop {
            if meeting.round > round {
                // The next round cannot close before this rank brings to it.
                return meeting.result.clone().unwrap_or_else(|| Err("local-group: no result".into()));
            }
            if let Some(broken) = &meeting.broken {
                return Err(broken.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(reason) = meeting.hopeless(left.is_zero().then_some(self.shared.timeout)) {
                meeting.broken = Some(reason.clone());
                self.shared.changed.notify_all();
                return Err(reason);
            }
            meeting = match self.shared.changed.wait_timeout(meeting, left) {
                Ok((meeting, _)) => meeting,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Meeting {
    /// Why the present round will not close: a missing rank is gone, or the time is up.
    fn hopeless(&self, timed_out: Option<Duration>) -> Option<String> {
        let missing = |rank: &usize| self.brought[*rank].is_none();
        let waiting = self.brought.iter().flatten().next()?;
        if let Some(gone) = (0..self.left.len()).filter(missing).find(|rank| self.left[*rank]) {
            return Some(format!(
                "local-group: rank {gone} left the group while others wait in {}",
                waiting.call
            ));
        }
        let timeout = timed_out?;
        let missing: Vec<usize> = (0..self.left.len()).filter(missing).collect();
        Some(format!("local-group: ranks {missing:?} did not join {} within {timeout:?}", waiting.call))
    }
}

/// The result of a round; `brought` is in rank order.
fn combine(brought: &[Contribution]) -> Outcome {
    let calls: Vec<&str> = brought.iter().map(|c| c.call.as_str()).collect();
    if let Some(message) = disagreement(&calls) {
        return Err(message);
    }
    let compute = || -> Result<Tensor> {
        let mut tensors = brought.iter().map(|c| &c.tensor);
        match brought[0].kind {
            Kind::Gather => Tensor::stack(&tensors.collect::<Vec<_>>(), 0),
            Kind::Broadcast(root) => Ok(brought[root].tensor.clone()),
            Kind::Sum => {
                let first =
                    tensors.next().map_or_else(|| Err(error("local-group: no ranks")), |t| Ok(t.clone()));
                tensors.try_fold(first?, |sum, tensor| sum + tensor)
            }
        }
    };
    compute().map_err(|e| e.to_string())
}

impl ProcessGroup for LocalGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        lock(&self.shared.meeting).left.len()
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Gather, what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Sum, what, tensor)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size(), root)?;
        self.exchange(Kind::Broadcast(root), what, tensor)
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        self.leave();
    }
}
