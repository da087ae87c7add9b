//! The floor: a copy of as many bytes as x has, on as many threads.
//!
//! Source and target are reused from call to call, so unlike a norm's output the target is never
//! freshly mapped: a share of this bandwidth is a share of what the memory can do.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Up to this, in units of 16 bytes, one thread copies all.
const ALONE: usize = 256 * 1024 / 16;

type Way = fn(&mut [u128], &[u128]);

pub struct Copy {
    // Aligned to 16 bytes, as stores past the caches must be.
    from: Vec<u128>,
    to: Vec<u128>,
    way: Way,
    /// Units that a thread copies at a time.
    chunk: usize,
}

impl Copy {
    /// Which way is fastest depends on the size and on the machine: whichever was when tried is the floor.
    pub fn of(bytes: usize) -> Self {
        let units = bytes.div_ceil(16);
        let from = (0..units as u128).map(|i| i % 251).collect();
        let mut copy = Self { from, to: vec![1; units], way: library, chunk: ALONE };
        let share = units.div_ceil(rayon::current_num_threads()).max(1);
        let ways = [library as Way, vector, streaming];
        let tried = ways.into_iter().flat_map(|way| [(way, ALONE), (way, share)]);
        let fastest = tried.min_by_key(|&(way, chunk)| {
            (copy.way, copy.chunk) = (way, chunk);
            copy.shortest()
        });
        (copy.way, copy.chunk) = fastest.unwrap_or((library, ALONE));
        copy
    }

    /// Of the calls in a few milliseconds.
    fn shortest(&mut self) -> Duration {
        let start = Instant::now();
        let mut best = Duration::MAX;
        for _ in 0..100 {
            let begin = Instant::now();
            self.run();
            best = best.min(begin.elapsed());
            if start.elapsed() > Duration::from_millis(5) {
                break;
            }
        }
        best
    }

    pub fn run(&mut self) {
        let (from, way) = (black_box(&self.from), self.way);
        if from.len() <= ALONE {
            way(&mut self.to, from);
        } else {
            let pairs = self.to.par_chunks_mut(self.chunk).zip(from.par_chunks(self.chunk));
            pairs.for_each(|(to, from)| way(to, from));
        }
        black_box(&mut self.to);
    }
}

fn library(to: &mut [u128], from: &[u128]) {
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
use x86::{streaming, vector};

#[cfg(not(target_arch = "x86_64"))]
use self::{library as streaming, library as vector};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_store_si128, _mm_stream_si128};

    /// Through the caches.
    pub fn vector(to: &mut [u128], from: &[u128]) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: both are references to 16 bytes; a u128 lies at a multiple of 16, which the store
            // needs; every x86-64 has SSE2.
            unsafe { _mm_store_si128(target(to), _mm_loadu_si128(std::ptr::from_ref(from).cast())) };
        }
    }

    /// Past the caches.
    pub fn streaming(to: &mut [u128], from: &[u128]) {
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: as above.
            unsafe { _mm_stream_si128(target(to), _mm_loadu_si128(std::ptr::from_ref(from).cast())) };
        }
        // SAFETY: every x86-64 has it. It makes the stores visible to whoever is synchronized with next.
        unsafe { _mm_sfence() };
    }

    fn target(to: &mut u128) -> *mut __m128i {
        std::ptr::from_mut(to).cast()
    }
}
