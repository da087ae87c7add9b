//! The watch over the emulated kernels' accesses: which memory is theirs, what they read and wrote.
//!
//! Kept apart because a build without `CANDLE_NORM_RACE` has nothing of it: there the calls to
//! `cuda/emulation/race.cpp` do nothing. With it, a launch fails where threads race or reach memory that
//! is no tensor of theirs, a plan where x, dy and the output move more often than it says, and an op
//! where some element of an output is not written exactly once.

use crate::cuda::entry::Kernel;
use crate::cuda::params::Params;
use crate::cuda::plan::{Launch, Plan};
use candle_core::{bail, DType, Result};
use std::ffi::{c_char, c_void};
#[cfg(test)]
use std::ffi::{CStr, CString};

extern "C" {
    fn norm_watch() -> bool;
    fn norm_watch_memory(at: *const c_void, bytes: usize, granule: u32, writable: bool, name: *const c_char);
    fn norm_watch_done();
    fn norm_watch_traffic(at: *const c_void, read: *mut u64, written: *mut u64);
    #[cfg(test)]
    fn norm_watch_site(n: usize) -> *const c_char;
    #[cfg(test)]
    fn norm_watch_leave_out(site: *const c_char);
    fn norm_watch_written(at: *const c_void, element: *mut usize, times: *mut u32) -> bool;
}

fn pointer(address: u64) -> *const c_void {
    std::ptr::without_provenance(address as usize)
}

/// Whether this build watches.
pub(super) fn is_on() -> bool {
    // SAFETY: it returns a constant.
    unsafe { norm_watch() }
}

fn memory(address: u64, len: usize, dtype: DType, writable: bool) {
    let bytes = len * dtype.size_in_bytes();
    // Scratch memory holds accumulators.
    let granule = if dtype == DType::U8 { 4 } else { dtype.size_in_bytes() as u32 };
    let name = if writable { c"an output" } else { c"an input" };
    // SAFETY: the address is kept to be compared with, never read; the name is a literal.
    unsafe { norm_watch_memory(pointer(address), bytes, granule, writable, name.as_ptr()) }
}

/// Kernels may read these elements until the op is over.
pub(super) fn reads(address: u64, len: usize, dtype: DType) {
    memory(address, len, dtype, false);
}

/// Kernels may write these elements, and read them, until the op is over.
pub(super) fn writes(address: u64, len: usize, dtype: DType) {
    memory(address, len, dtype, true);
}

/// Kernels may read and write these bytes, of which nothing but their number is kept.
#[cfg(test)]
pub(super) fn counts(address: u64, bytes: usize) {
    // SAFETY: as in `memory`.
    unsafe { norm_watch_memory(pointer(address), bytes, 0, true, c"a buffer".as_ptr()) }
}

/// Bytes read from the tensor that starts here, and written to it, since the op began.
pub(super) fn traffic(address: u64) -> (u64, u64) {
    let (mut read, mut written) = (0, 0);
    // SAFETY: it writes the two numbers, and compares the address.
    unsafe { norm_watch_traffic(pointer(address), &mut read, &mut written) };
    (read, written)
}

/// The op is over: what is read or written next belongs to another.
pub(super) fn over() {
    // SAFETY: it sets a flag.
    unsafe { norm_watch_done() }
}

/// The plan's launches moved what it says.
pub(super) fn moved(plan: &Plan, params: &Params) -> Result<()> {
    if !is_on() {
        return Ok(());
    }
    let dy = if params.arguments.dy == params.arguments.x { 0 } else { traffic(params.arguments.dy).0 };
    // Where a residual is added, the later passes read the sum.
    let arguments = &params.arguments;
    let moved = traffic(arguments.x).0 + traffic(arguments.sum).0 + dy + traffic(arguments.out).1;
    over();
    // Every byte once a pass; groups of lanes without a set of their own read their block's first.
    let expected = plan.traffic as u64;
    let idle: u64 = plan.launches.iter().map(|launch| idle_reads(launch, params)).sum();
    if moved < expected || moved > expected + idle {
        bail!(
            "cuda emulation: {moved} bytes of x, dy and the output moved, expected {expected} by the plan {:?}",
            plan.launches
        )
    }
    Ok(())
}

/// Bytes that a launch may read again at most because its blocks hold several sets and some have fewer.
fn idle_reads(launch: &Launch, params: &Params) -> u64 {
    let (inputs, element) = match launch.entry.kernel() {
        Kernel::ForwardHeld => (1, launch.entry.element()),
        Kernel::GatedForward => (1, launch.entry.element()),
        Kernel::BackwardSets => (2, launch.entry.element()),
        _ => return 0,
    };
    let groups = u64::from(launch.block / params.schedule.lanes);
    u64::from(launch.grid) * (groups - 1) * params.shape.set_len * inputs * element.bytes() as u64
}

/// Every element of the output that starts here was written once.
pub(super) fn written_once(dtype: DType, address: u64) -> Result<()> {
    let (mut element, mut times) = (0, 0);
    // SAFETY: it writes the two numbers, and compares the address.
    match unsafe { norm_watch_written(pointer(address), &mut element, &mut times) } {
        true => bail!(
            "cuda emulation: element {element} of an output ({dtype:?}) written {times} times, expected once"
        ),
        false => Ok(()),
    }
}

/// Barriers that this thread's launches came to, `file:line` each, some more than once.
#[cfg(test)]
pub(super) fn barriers() -> impl Iterator<Item = String> {
    (0..).map_while(|n| {
        // SAFETY: null, or a C string that lives until this thread's next launch.
        let name = unsafe { norm_watch_site(n).as_ref().map(|name| CStr::from_ptr(name)) };
        name.map(|name| name.to_string_lossy().into_owned())
    })
}

/// The barrier at this place orders nothing from now on, on this thread.
#[cfg(test)]
pub(super) fn leave_out(barrier: &str) {
    let barrier = CString::new(barrier).expect("a name without zeros");
    // SAFETY: it copies the name.
    unsafe { norm_watch_leave_out(barrier.as_ptr()) }
}
