//! How many blocks of a kernel share a multiprocessor.
//!
//! Kept separate because it is what a device says, not what a norm needs. Registers come from
//! `cuda/registers.txt`, which `ci/registers.sh` compares with what the compiler says.

use super::DeviceProperties;
use crate::cuda::entry::Entry;
use std::sync::LazyLock;

const TABLE: &str = include_str!("../../../cuda/registers.txt");
/// Of a kernel that the table does not know.
const UNKNOWN: usize = 128;
const REGISTERS: usize = 65536;

/// `(capability, registers)` of every entry.
static REGISTERS_OF: LazyLock<Vec<Vec<(u32, usize)>>> = LazyLock::new(|| {
    let row = |line: &'static str| {
        let mut words = line.split_whitespace();
        Some((words.next()?, (words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
    };
    let rows: Vec<_> = TABLE.lines().filter_map(row).collect();
    let of = |entry: Entry| rows.iter().filter(|row| row.0 == entry.name()).map(|row| row.1).collect();
    Entry::all().map(of).collect()
});

/// Registers of a thread: the row of the greatest capability that the device has, of the least if none.
fn registers(entry: Entry, capability: u32) -> usize {
    let rows = &REGISTERS_OF[entry.index()];
    let best = rows.iter().max_by_key(|row| if row.0 <= capability { row.0 as i32 } else { -(row.0 as i32) });
    best.map_or(UNKNOWN, |row| row.1)
}

/// Blocks of `block` threads and `shared` bytes on one multiprocessor.
pub(super) fn resident(entry: Entry, device: &DeviceProperties, block: usize, shared: usize) -> usize {
    let threads = match device.capability {
        75 => 1024,
        86 | 87 | 89 | 120 => 1536,
        _ => 2048,
    };
    // A warp's registers come in units of 256, a block costs a kilobyte of shared memory more.
    let warps = REGISTERS / (registers(entry, device.capability) * 32).next_multiple_of(256);
    let by_memory = (device.shared as usize + 1024) / (shared + 1024);
    (warps / (block / 32)).min(threads / block).min(by_memory).clamp(1, 32)
}
