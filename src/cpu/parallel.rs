//! Work shared out to rayon's threads.

use std::sync::Mutex;

/// Runs `f` on every item, on several threads if there are several of both, with a value of `new` for each.
///
/// The calling thread takes part from the first item on; the pool's may come later, as they have to be woken.
/// Threads start far from each other: neighbours would meet in the same pages of a fresh output, and each
/// would have the kernel clear them.
pub(super) fn for_each<I: Send, S>(
    items: Vec<I>,
    new: impl Fn() -> S + Send + Sync,
    f: impl Fn(&mut S, I) + Send + Sync,
) {
    let threads = rayon::current_num_threads().min(items.len());
    if threads < 2 {
        let mut own = new();
        return items.into_iter().for_each(|item| f(&mut own, item));
    }
    let queue = Mutex::new(spread(items, threads).into_iter());
    // A panic in `f` leaves the queue whole; rayon hands the panic on.
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    let work = || {
        let mut own = new();
        while let Some(item) = next() {
            f(&mut own, item)
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work()
    })
}

/// Items in turn from each of `parts` equal parts.
fn spread<I>(items: Vec<I>, parts: usize) -> Vec<I> {
    let len = items.len().div_ceil(parts);
    let mut rest: Vec<Option<I>> = items.into_iter().map(Some).collect();
    let order = (0..len).flat_map(|i| (0..parts).map(move |part| part * len + i));
    order.filter_map(|i| rest.get_mut(i)?.take()).collect()
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
