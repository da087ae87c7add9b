//! The floor: a copy of as many bytes as x has, on as many threads.
//!
//! Source and target are reused from call to call, so unlike a norm's output the target is never
//! freshly mapped: a share of this bandwidth is a share of what the memory can do.

use rayon::prelude::*;
use std::hint::black_box;

/// Bytes that one thread copies at a time; at or below it one thread copies all.
const CHUNK: usize = 256 * 1024;

pub struct Copy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copy {
    pub fn of(bytes: usize) -> Self {
        Self { from: (0..bytes).map(|i| (i % 251) as u8).collect(), to: vec![1; bytes] }
    }

    pub fn run(&mut self) {
        let from = black_box(&self.from);
        if from.len() <= CHUNK {
            self.to.copy_from_slice(from);
        } else {
            let pairs = self.to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
            pairs.for_each(|(to, from)| to.copy_from_slice(from));
        }
        black_box(&mut self.to);
    }
}
