//! What a training step takes from malloc: exact, and the same on every machine.

use anyhow::Result;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed};

/// The system's allocator, counted while a step is measured. While a step is timed, all that it adds is the
/// reading of a flag.
pub struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: isize) {
    if ON.load(Relaxed) {
        PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Brings glibc's malloc to where a program has it after a while. The largest block yet freed, up to 32 MiB,
/// decides which blocks are mapped anew at every call: what a row costs must not depend on the rows before.
pub fn settle() {
    drop(std::hint::black_box(vec![1u8; (32 << 20) - (64 << 10)]));
}

/// Has glibc's malloc keep what is freed, and says whether it does. As it comes it gives memory back once 64 MiB are
/// free at the end of its heap. Whether they are there depends on what lies behind them, and so on the rows before; and
/// to have them back, page by page, can take most of a row's time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed() -> bool {
    let most = i32::MAX;
    // SAFETY: sets two numbers of malloc's, under its lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) & libc::mallopt(libc::M_TRIM_THRESHOLD, most) == 1
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed() -> bool {
    false
}

/// Bytes above what was there before a step.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Between the forward and the backward, the output among them.
    pub kept: usize,
    pub peak: usize,
}

/// Counts a forward and what follows it. Nothing else may run meanwhile.
pub fn of<Y>(forward: impl FnOnce() -> Result<Y>, backward: impl FnOnce(&Y) -> Result<()>) -> Result<Memory> {
    LIVE.store(0, Relaxed);
    PEAK.store(0, Relaxed);
    ON.store(true, Relaxed);
    let y = forward();
    let kept = LIVE.load(Relaxed);
    let done = y.and_then(|y| backward(&y));
    ON.store(false, Relaxed);
    done?;
    Ok(Memory { kept: kept.max(0) as usize, peak: PEAK.load(Relaxed).max(0) as usize })
}
