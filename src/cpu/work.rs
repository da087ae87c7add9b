//! Work shared out to rayon's threads.

use std::sync::Mutex;

/// Runs `f` on every item, on several threads if there are several of both.
///
/// The calling thread takes part from the first item on; the pool's may come later, as they have to be woken.
pub(super) fn each<I: Send>(items: Vec<I>, f: impl Fn(I) + Send + Sync) {
    let threads = rayon::current_num_threads().min(items.len());
    if threads < 2 {
        return items.into_iter().for_each(f);
    }
    let queue = Mutex::new(items.into_iter());
    // A panic in `f` leaves the queue whole; rayon hands the panic on.
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    let work = || {
        while let Some(item) = next() {
            f(item)
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work()
    })
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
