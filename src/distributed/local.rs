//! A process group whose ranks are threads of one process.
//!
//! It needs no feature and no launcher: tests, examples, and several GPUs driven from one process. The
//! ranks meet under one lock; the last to arrive computes the result, in rank order, for all of them.

use super::split::{colors, Part};
use super::{check_root, describe, disagreement, error, lock, Deadline, Kind, ProcessGroup};
use candle_core::{Device, Result, Tensor};
use std::collections::HashMap;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// One rank of a group of threads.
///
/// A rank that drops its handle, by returning or by panicking, fails every call that its peers wait in
/// or make later. A peer that neither calls nor leaves fails them after the group's timeout. Once a
/// group failed in one of these ways all its calls return the error; a group whose ranks merely made
/// different calls goes on. A rank makes one call at a time: a second one, from another thread, while the
/// first waits ends the group.
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
    /// Splits made so far: the same number on every rank, as all make them together.
    splits: AtomicUsize,
    /// The parts that this rank is in: it leaves them when it leaves the group.
    parts: Mutex<Vec<Weak<LocalGroup>>>,
}

/// A part, and how many of its members have yet to fetch it.
type Forming = (Arc<Shared>, usize);

#[derive(Debug)]
struct Shared {
    /// Parts that not all of their members have fetched: by split and first member, with those to come.
    parts: Mutex<HashMap<(usize, usize), Forming>>,
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
        let shared = Arc::new(Shared::new(ranks, timeout));
        Ok((0..ranks).map(|rank| Self::of(rank, shared.clone())).collect())
    }

    fn of(rank: usize, shared: Arc<Shared>) -> Self {
        Self { rank, shared, splits: AtomicUsize::new(0), parts: Mutex::new(vec![]) }
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

    /// Gives up this rank's place, here and in parts of the group: calls that peers wait in or make later
    /// fail.
    fn leave(&self) {
        lock(&self.shared.meeting).left[self.rank] = true;
        self.shared.changed.notify_all();
        let parts = std::mem::take(&mut *lock(&self.parts));
        parts.iter().filter_map(Weak::upgrade).for_each(|part| part.leave());
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
        if let Some(waiting) = &meeting.brought[self.rank] {
            let reason = format!(
                "local-group: rank {} joined {} twice, the second time for {call}",
                self.rank, waiting.call
            );
            meeting.broken = Some(reason.clone());
            self.shared.changed.notify_all();
            return Err(reason);
        }
        let round = meeting.round;
        meeting.brought[self.rank] = Some(Contribution { call, kind, tensor });
        if meeting.brought.iter().all(Option::is_some) {
            let brought: Vec<_> = meeting.brought.iter_mut().filter_map(Option::take).collect();
            meeting.result = Some(combine(&brought));
            meeting.round += 1;
            self.shared.changed.notify_all();
        }
        let by = Deadline::after(self.shared.timeout);
        loop {
            if meeting.round > round {
                // The next round cannot close before this rank brings to it.
                return meeting.result.clone().unwrap_or_else(|| Err("local-group: no result".into()));
            }
            if let Some(broken) = &meeting.broken {
                return Err(broken.clone());
            }
            let left = by.left();
            if let Some(reason) = meeting.hopeless(left.is_none().then_some(self.shared.timeout)) {
                meeting.broken = Some(reason.clone());
                self.shared.changed.notify_all();
                return Err(reason);
            }
            meeting = match self.shared.changed.wait_timeout(meeting, left.unwrap_or_default()) {
                Ok((meeting, _)) => meeting,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Shared {
    fn new(ranks: usize, timeout: Duration) -> Self {
        let meeting = Meeting {
            brought: (0..ranks).map(|_| None).collect(),
            round: 0,
            result: None,
            left: vec![false; ranks],
            broken: None,
        };
        Self { parts: Mutex::default(), timeout, meeting: Mutex::new(meeting), changed: Condvar::new() }
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
            Kind::Gather => Tensor::stack(&tensors.cloned().collect::<Vec<_>>(), 0),
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

    fn split(&self, color: usize) -> Result<Arc<dyn ProcessGroup>> {
        let Part { rank, members } = colors(self, color)?;
        let split = self.splits.fetch_add(1, Ordering::Relaxed);
        let mut waiting = lock(&self.shared.parts);
        let key = (split, members[0]);
        let part = || (Arc::new(Shared::new(members.len(), self.shared.timeout)), members.len());
        let (shared, to_come) = waiting.entry(key).or_insert_with(part);
        let part = Arc::new(Self::of(rank, shared.clone()));
        *to_come -= 1;
        if *to_come == 0 {
            waiting.remove(&key);
        }
        lock(&self.parts).push(Arc::downgrade(&part));
        Ok(part)
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        self.leave();
    }
}
