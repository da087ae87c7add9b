//! The emulation sees each fault planted in `cuda/emulation/planted.cpp`, and misses every barrier of the
//! kernels that is left out.
//!
//! What needs the watch over accesses runs in a build with `CANDLE_NORM_RACE=1` (`ci/race.sh`); elsewhere
//! the test says that it did not.

use super::tests::{check, ladder};
use super::{find, norm_emulation_launch, norm_emulation_seed, watch};
use crate::cuda::params::{Arguments, Params};
use candle_core::{DType, Result};
use std::collections::BTreeSet;
use std::ffi::CStr;

/// The kernel over `grid` blocks of 64 threads: what the emulation says, and whether it moved x twice or
/// failed to write the output once.
fn run(name: &str, grid: u32) -> Result<Option<String>> {
    let kernel = find(&format!("norm_planted_{name}"))?;
    // What is beyond the first 64 is there, and not theirs.
    let (x, mut out) = (vec![3f32; 8192], vec![0f32; 64]);
    let (at, to) = (x.as_ptr().expose_provenance() as u64, out.as_mut_ptr().expose_provenance() as u64);
    watch::reads(at, 64, DType::F32);
    watch::writes(to, out.len(), DType::F32);
    let arguments = Arguments { x: at, out: to, ..Arguments::default() };
    let params = Params { arguments, ..Params::default() };
    // SAFETY: a kernel of one `Params` by address, which stays within the vectors, and within the room
    // behind the shared memory that builds have in which `beyond_shared` runs.
    let fault = unsafe {
        let fault = norm_emulation_launch(kernel, grid, 64, 512, std::ptr::from_ref(&params).cast());
        (!fault.is_null()).then(|| CStr::from_ptr(fault).to_string_lossy().into_owned())
    };
    let read = watch::traffic(at).0;
    let written = watch::written_once(DType::F32, to);
    watch::over();
    Ok(fault.or_else(|| written.err().map(|error| error.to_string())).or_else(|| {
        // Each block reads it once.
        (watch::is_on() && read != 256 * u64::from(grid)).then(|| format!("x: {read} bytes read"))
    }))
}

/// Faults that every build sees: threads that do not come together.
const APART: &[(&str, u32, &str)] = &[
    ("two_shuffles", 1, "threads meet at planted.cpp"),
    ("two_barriers", 1, "threads meet at planted.cpp"),
    ("left", 1, "63 of 64 come"),
    ("no_arrival", 2, "has not arrived"),
    ("one_block_arrives", 2, "to which others do not come"),
];

/// Faults that show in the order of accesses.
const RACES: &[(&str, u32, &str)] = &[
    ("no_barrier", 1, "without a barrier"),
    ("no_warp_barrier", 1, "without a barrier"),
    ("reused", 1, "without a barrier"),
    ("two_writers", 1, "without a barrier"),
    ("written_twice", 1, "element 5 of an output (F32) written 2 times"),
    ("unwritten", 1, "element 7 of an output (F32) written 0 times"),
    ("beyond_shared", 1, "a write to memory of no tensor"),
    ("stray", 1, "a read of memory of no tensor"),
    ("read_twice", 1, "x: 512 bytes read"),
    ("input_written", 1, "a write to an input, which is only read"),
    ("two_blocks", 2, "shared by two clusters of one launch"),
    ("across_blocks", 2, "shared by two clusters of one launch"),
    ("relaxed_publish", 2, "without a barrier"),
    ("block_barrier_only", 2, "without a barrier"),
    ("early_leave", 2, "ends without a cluster barrier after that"),
    ("early_visit", 2, "before the cluster's first barrier"),
];

#[test]
fn planted_faults_are_seen() -> Result<()> {
    for (name, grid) in [("nothing", 1), ("warp_barrier", 1), ("cluster", 2), ("relaxed_leave", 2)] {
        assert_eq!(run(name, grid)?, None, "{name}");
    }
    let races = if watch::is_on() { RACES } else { &[] };
    for seed in 0..4 {
        // SAFETY: it sets a number of this thread's.
        unsafe { norm_emulation_seed(seed) };
        for (name, grid, words) in APART.iter().chain(races) {
            let said = run(name, *grid)?.unwrap_or_default();
            assert!(said.contains(words), "{name}, seed {seed}: said {said:?}, expected {words:?}");
        }
    }
    if !watch::is_on() {
        println!("not watched, so not run: {} races", RACES.len());
    }
    Ok(())
}

/// Each barrier of the kernels, left out, is a race that some case of the ladder shows: neither is a
/// barrier there for nothing, nor does the watch overlook one.
#[test]
fn every_barrier_is_needed() -> Result<()> {
    if !watch::is_on() {
        println!("not watched, so not run");
        return Ok(());
    }
    let mut cases = ladder(DType::F32);
    // Larger ones have the same barriers.
    cases.retain(|(_, geometry, _)| geometry.elements() < 1 << 15);
    let run = || {
        cases.iter().try_for_each(|&(device, geometry, offset)| check(device, geometry, DType::F32, offset))
    };
    run()?;
    let barriers: BTreeSet<String> = watch::barriers().filter(|at| !at.starts_with("planted")).collect();
    assert!(barriers.len() > 5, "too few barriers to be all of them: {barriers:?}");
    let mut needless = vec![];
    for barrier in &barriers {
        watch::leave_out(barrier);
        match run() {
            Ok(()) => needless.push(barrier),
            Err(error) => println!("{barrier} left out: {error}"),
        }
    }
    watch::leave_out("");
    assert!(needless.is_empty(), "left out and not missed: {needless:?}");
    Ok(())
}
