//! Work shared out to rayon's threads.
//!
//! Not by its scopes: these wait for every thread that they have called, even where nothing is left to do by
//! the time it comes. A sleeping thread comes after 15 to 20 us, on a busy machine after milliseconds (the
//! ignored test `what_a_thread_costs` prints it); here who comes too late finds the door closed.
#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of x up to which nobody is called: at 10 bytes a nanosecond one core is done with them, y written,
/// before another has come.
const ALONE: usize = if cfg!(miri) { 512 } else { 128 << 10 };

/// Runs `f` on every item of an op over `bytes` of x, on several threads if there are several of both, with a
/// value of `new` for each.
///
/// The calling thread takes part from the first item on; the pool's may come later, as they have to be woken.
/// Threads start far from each other: neighbours would meet in the same pages of a fresh output, and each
/// would have the kernel clear them.
pub(super) fn for_each<I: Send, S>(
    items: impl ExactSizeIterator<Item = I>,
    bytes: usize,
    new: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, I) + Sync,
) {
    // Its body is compiled once, not for one thread and for several.
    let f: &(dyn Fn(&mut S, I) + Sync) = &f;
    let threads = match items.len() {
        several @ 2.. if bytes > ALONE => rayon::current_num_threads().min(several),
        _ => 1,
    };
    if threads < 2 {
        let mut own = new();
        for item in items {
            f(&mut own, item)
        }
        return;
    }
    let queue = Mutex::new(Queue::new(items, threads));
    // A panic in `f` leaves the queue whole.
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    together(threads - 1, &|| {
        let mut own = new();
        while let Some(item) = next() {
            f(&mut own, item)
        }
    })
}

/// Runs `work` here, and on up to `others` of the pool's threads that come while it lasts.
fn together<'a>(others: usize, work: &'a (dyn Fn() + Sync + 'a)) {
    // SAFETY: the lifetime alone is another; see `Work`.
    let pointer = unsafe {
        std::mem::transmute::<*const (dyn Fn() + Sync + 'a), *const (dyn Fn() + Sync + 'static)>(work)
    };
    let door = Arc::new(Door::default());
    let closing = Closing(&door);
    for _ in 0..others {
        let (door, work) = (Arc::clone(&door), Work(pointer));
        rayon::spawn(move || door.enter(work));
    }
    work();
    drop(closing);
    let panic = door.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(panic) = panic {
        resume_unwind(panic)
    }
}

/// What threads do inside: it lives until the door has been closed, by `Closing` even where it panics.
struct Work(*const (dyn Fn() + Sync));

// SAFETY: what it points to is Sync.
unsafe impl Send for Work {}

/// The way to work that lives on another thread's stack.
#[derive(Default)]
struct Door {
    /// Threads that have come in; the highest bit once it is closed.
    inside: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

const CLOSED: usize = 1 << (usize::BITS - 1);
/// Looks at the door, some microseconds, before others get the processor.
const PATIENCE: usize = 1 << 10;

impl Door {
    /// Works, unless the door is closed.
    fn enter(&self, work: Work) {
        if self.inside.fetch_add(1, Ordering::Acquire) & CLOSED == 0 {
            // SAFETY: closing waits for this thread from here to the end of this function.
            let done = catch_unwind(AssertUnwindSafe(|| unsafe { (*work.0)() }));
            if let Err(panic) = done {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
        }
        self.inside.fetch_sub(1, Ordering::Release);
    }
}

/// Closes the door, and waits for those inside.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_or(CLOSED, Ordering::Relaxed);
        let mut looks = 0;
        while self.0.inside.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            match looks < PATIENCE {
                true => std::hint::spin_loop(),
                false => std::thread::yield_now(),
            }
        }
    }
}

/// Items, which are taken in turn from each of `parts` equal parts.
struct Queue<I> {
    items: Vec<Option<I>>,
    parts: usize,
    taken: usize,
}

impl<I> Queue<I> {
    fn new(from: impl ExactSizeIterator<Item = I>, parts: usize) -> Self {
        let mut items = Vec::with_capacity(from.len());
        for item in from {
            items.push(Some(item));
        }
        Queue { items, parts, taken: 0 }
    }

    fn take(&mut self) -> Option<I> {
        let len = self.items.len().div_ceil(self.parts);
        while self.taken < len * self.parts {
            let place = self.taken % self.parts * len + self.taken / self.parts;
            self.taken += 1;
            // The last parts may be shorter.
            if let Some(item) = self.items.get_mut(place).and_then(Option::take) {
                return Some(item);
            }
        }
        None
    }
}

/// `slice` in neighbouring parts of the given lengths.
pub(super) fn split<T>(mut slice: &mut [T], lens: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    let mut parts = Vec::with_capacity(lens.size_hint().0);
    for len in lens {
        let (part, rest) = slice.split_at_mut(len);
        parts.push(part);
        slice = rest;
    }
    parts
}
