//! Work shared out to rayon's threads.

use rayon::prelude::*;

/// Runs `f` on every item, on several threads if there are several of both.
pub(super) fn each<I: Send>(items: Vec<I>, f: impl Fn(I) + Send + Sync) {
    // Handing work to a pool of one thread would only move it.
    if items.len() < 2 || rayon::current_num_threads() == 1 {
        items.into_iter().for_each(f)
    } else {
        items.into_par_iter().for_each(f)
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
