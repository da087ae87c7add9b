//! Plans for sets that fit on chip: one contiguous run, or long runs of several rows.
//!
//! A set goes to a few lanes, a block or a cluster by the bytes that it takes, which its length alone
//! decides: a batch does not change how one of its rows is summed.

use super::{residency, split, Affinity, BackwardNeeds, Builder, ForwardNeeds};
use crate::cuda::entry::{Access, Element, Kernel};
use crate::cuda::params::Divisor;
use candle_core::Result;

/// Bytes of a set for each of its threads: eight accesses of 16. What a thread does once for a set, some five hundred
/// instructions, is then as many as eight of them cost (`cuda/roofline.txt`).
const THREAD_BYTES: usize = 128;
/// Threads of the widest blocks, as the launch bounds say.
pub(crate) const MAX_BLOCK: usize = 512;
/// The same for blocks of a cluster, `backward_rows` excepted.
pub(crate) const CLUSTER_BLOCK: usize = 256;
/// Threads of a block that has several sets.
const SEVERAL_BLOCK: usize = 256;
/// Where there are clusters, a block alone takes sets up to this: two of them fit a multiprocessor.
const ALONE_BYTES: usize = 96 << 10;
/// Blocks of a cluster.
pub(crate) const CLUSTER: usize = 8;
/// Bytes of a thread that `forward_kept` and `forward_several` have registers for (`KEPT_BYTES`).
pub(crate) const KEPT_BYTES: usize = 128;
/// Threads of its widest blocks.
pub(crate) const KEPT_BLOCK: usize = 256;

/// Elements of x, and of dy, that a thread of `backward_rows` has (`BACKWARD_ELEMENTS`).
pub(crate) fn backward_elements(element: Element) -> usize {
    match element {
        Element::F64 => 8,
        _ => 16,
    }
}

/// Bytes of shared memory through which a group exchanges sums (`Group::BYTES`).
pub(crate) fn slots(accumulator: usize) -> usize {
    2 * (3 * MAX_BLOCK / 32 + 3 * CLUSTER) * accumulator + 16
}

/// Bytes of shared memory for `len` elements (`held_bytes`).
pub(crate) fn held_bytes(element: Element, len: usize) -> usize {
    (len * element.bytes()).next_multiple_of(16)
}

/// Elements of room for one in the accumulation dtype (`HeldGradient::WIDE`).
pub(crate) fn wide(element: Element) -> usize {
    element.accumulator_bytes() / element.bytes()
}

/// Where a set is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    /// Blocks that share the set.
    cluster: usize,
    /// Elements of a block's slice.
    slice: usize,
    /// Threads of a block that share the set.
    lanes: usize,
    block: usize,
    /// Bytes of shared memory, the group's own included.
    shared: usize,
}

impl Held {
    fn sets_per_block(&self) -> usize {
        self.block / self.lanes
    }
}

/// Segments of a set.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segs {
    pub count: usize,
    pub len: usize,
    pub stride: usize,
}

impl Builder<'_> {
    pub(super) fn slots(&self) -> usize {
        slots(self.accumulator())
    }

    pub(super) fn held_bytes(&self, len: usize) -> usize {
        held_bytes(self.r.element, len)
    }

    /// Elements of room that one of dy takes: where something is fused, dz takes its place, unrounded.
    pub(super) fn gradient_step(&self) -> usize {
        if self.r.is_fused() {
            wide(self.r.element)
        } else {
            1
        }
    }

    /// Bytes of shared memory for `len` elements of x and of dy.
    pub(super) fn held_both(&self, len: usize) -> usize {
        self.held_bytes(len) + self.held_bytes(len * self.gradient_step())
    }

    fn has_clusters(&self) -> bool {
        self.device.capability >= 90 && self.r.element != Element::F64
    }

    pub(super) fn runs(&self) -> Segs {
        Segs { count: self.g.rows, len: self.g.run, stride: self.g.width }
    }

    pub(super) fn set_segments(&mut self, segs: Segs) {
        self.schedule.segs = segs.count as u64;
        self.schedule.seg_len = segs.len as u64;
        self.schedule.seg_stride = segs.stride as u64;
        self.schedule.by_seg = Divisor::new(segs.len);
    }

    /// The smallest place for a set: where there are clusters, in a block alone up to `alone` bytes. `bytes` tells what
    /// a slice takes of shared memory.
    fn place(
        &self,
        access: Access,
        several: bool,
        alone: usize,
        bytes: impl Fn(usize) -> usize,
    ) -> Option<Held> {
        let unit = self.unit(access);
        let limit = self.device.shared as usize - self.slots();
        let clusters: &[(usize, usize)] = match self.has_clusters() {
            true => &[(1, alone), (CLUSTER, usize::MAX)],
            false => &[(1, usize::MAX)],
        };
        clusters.iter().find_map(|&(cluster, most)| {
            let slice = (self.g.set_len() / unit).div_ceil(cluster) * unit;
            let max = if cluster == 1 { MAX_BLOCK } else { CLUSTER_BLOCK };
            let least = if several { 8 } else { 64 };
            let lanes = self.lanes_for(slice).clamp(least, max);
            let block = if lanes <= 32 { SEVERAL_BLOCK } else { lanes };
            // Divisors and numbers within a set are of 31 bits, far beyond this.
            let bytes = bytes(slice).checked_mul(block / lanes)?;
            let held = Held { cluster, slice, lanes, block, shared: self.slots() + bytes };
            (bytes <= limit.min(most)).then_some(held)
        })
    }

    fn lanes_for(&self, slice: usize) -> usize {
        (slice * self.r.element.bytes()).div_ceil(THREAD_BYTES).next_power_of_two()
    }

    /// Whether registers may hold sets for the forward: in packs, and without a residual. Bits do not depend on it.
    fn may_keep(&self, access: Access) -> bool {
        self.is_plain()
            && !self.r.residual
            && (self.g.rows == 1 || self.affinity == Affinity::Set)
            && !(access == Access::Scalar || self.r.element == Element::F64)
            && self.g.sets() <= i32::MAX as usize / CLUSTER
    }

    /// Whether a set's share of a thread fits its registers.
    fn fits_registers(&self, access: Access, held: &Held) -> bool {
        let unit = self.unit(access);
        held.block <= KEPT_BLOCK
            && (held.slice / unit).div_ceil(held.lanes) * unit * self.r.element.bytes() <= KEPT_BYTES
    }

    /// Launches a block, or a cluster, for every set. Where a block has several, as many blocks as are resident at once:
    /// the next sets are on their way while these are worked on.
    fn launch_kept(&mut self, access: Access, held: Held) -> Result<()> {
        if held.sets_per_block() == 1 {
            let held = Held { shared: self.slots(), ..held };
            return self.launch_held((Kernel::ForwardKept, Kernel::ForwardKeptCluster), access, held);
        }
        let kernel = Kernel::ForwardSeveral;
        let resident = residency::resident(self.entry(kernel, access)?, self.device, held.block, held.shared);
        let most = resident * self.device.multiprocessors as usize;
        let blocks = self.g.sets().div_ceil(held.sets_per_block()).min(most);
        self.schedule.lanes = held.lanes as u32;
        self.launch(kernel, access, blocks, held.block, held.shared)
    }

    /// Launches a block, or a cluster, for every set or every few sets: while one loads, others that share
    /// the multiprocessor compute and store, and the device balances them.
    fn launch_held(&mut self, (alone, cluster): (Kernel, Kernel), access: Access, held: Held) -> Result<()> {
        let kernel = if held.cluster == 1 { alone } else { cluster };
        let blocks = self.g.sets().div_ceil(held.sets_per_block()).min(i32::MAX as usize / held.cluster);
        self.schedule.lanes = held.lanes as u32;
        self.launch_cluster(kernel, access, blocks * held.cluster, held.block, held.shared, held.cluster)
    }
}

/// Whether the statistics come in parts, so that they have to be written down.
pub(super) fn forward(b: &mut Builder, needs: &ForwardNeeds) -> Result<bool> {
    let access = b.access(b.g.run);
    b.set_segments(b.runs());
    let may_keep = b.may_keep(access);
    let alone = if may_keep { KEPT_BLOCK * KEPT_BYTES } else { ALONE_BYTES };
    let held = b.place(access, true, alone, |slice| b.held_bytes(slice));
    let Some(held) = held.filter(|_| !needs.given) else {
        return split::forward(b, needs);
    };
    match may_keep && b.fits_registers(access, &held) {
        true => b.launch_kept(access, held)?,
        false => b.launch_held((Kernel::ForwardHeld, Kernel::ForwardCluster), access, held)?,
    }
    b.passes(1 + needs.output as usize);
    Ok(false)
}

pub(super) fn backward(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if needs.fixed {
        return split::backward_fixed(b, needs);
    }
    let by_segment = b.affinity == Affinity::Span;
    let access = b.access(b.g.run);
    b.set_segments(b.runs());
    // Whether or not parameters are wanted: dx has the same bits either way.
    if b.affinity == Affinity::Column {
        if let Some(rows) = place_rows(b, access) {
            return backward_rows(b, needs, access, rows);
        }
    }
    let held = b.place(access, b.affinity == Affinity::Set, ALONE_BYTES, |slice| {
        b.held_both(slice) + by_segment as usize * segments(b, slice, access).bytes
    });
    let Some(held) = held else {
        return split::backward(b, needs);
    };
    if b.affinity == Affinity::Column && needs.params() {
        // Sums of columns over the batch, without those of sets.
        split::column_sums(b, needs, false)?;
        b.set_segments(b.runs());
        if !needs.dx {
            return Ok(());
        }
    }
    if by_segment {
        let segments = segments(b, held.slice, access);
        b.schedule.segment_lanes = segments.lanes as u32;
        b.schedule.pieces = segments.pieces as u64;
        b.schedule.chunk_len = segments.piece_len as u64;
    }
    b.launch_held((Kernel::BackwardSets, Kernel::BackwardSetsCluster), access, held)?;
    b.passes(2 + needs.dx as usize);
    match needs.params() && b.affinity != Affinity::Column {
        true => {
            // Copies for every outer block, and for every block of a cluster that has a part of a segment.
            match b.g.outer * if by_segment { held.cluster } else { 1 } {
                1 => Ok(()),
                copies => b.reduce_parts(copies, b.g.params()),
            }
        }
        false => Ok(()),
    }
}

/// Where the rows of `backward_rows` are held: as many threads as the registers of their columns take.
fn place_rows(b: &Builder, access: Access) -> Option<(Held, usize)> {
    let (n, unit, each) = (b.g.set_len(), b.unit(access), backward_elements(b.r.element));
    let clusters: &[usize] = match b.has_clusters() && access == Access::Vector {
        true => &[1, CLUSTER],
        false => &[1],
    };
    let cluster = *clusters.iter().find(|&&cluster| n <= cluster * MAX_BLOCK * each)?;
    let slice = (n / unit).div_ceil(cluster) * unit;
    let lanes = slice.div_ceil(each).next_power_of_two().max(if cluster == 1 { 8 } else { 64 });
    let block = if lanes <= 32 { SEVERAL_BLOCK } else { lanes };
    let stage = b.held_both(slice) * (block / lanes);
    // At the end the groups of a block add up their columns in the same memory.
    let added = if block > lanes { each * lanes * b.accumulator() } else { 0 };
    [2, 1].into_iter().find_map(|stages| {
        let shared = b.slots() + (stages * stage).max(added);
        (shared <= b.device.shared as usize)
            .then_some((Held { cluster, slice, lanes, block, shared }, stages))
    })
}

fn backward_rows(b: &mut Builder, needs: &BackwardNeeds, access: Access, rows: (Held, usize)) -> Result<()> {
    let (held, stages) = rows;
    let kernel = if held.cluster == 1 { Kernel::BackwardRows } else { Kernel::BackwardRowsCluster };
    let entry = b.entry(kernel, access)?;
    let resident = residency::resident(entry, b.device, held.block, held.shared);
    let lines = b.g.sets_per_outer() * b.r.samples();
    let workers = (resident * b.device.multiprocessors as usize / held.cluster / lines).max(1);
    // As many as are resident at once, each with as many rows as the next, give or take one.
    let turns = b.r.tokens().div_ceil(held.sets_per_block()).div_ceil(workers);
    let workers = b.r.tokens().div_ceil(turns * held.sets_per_block());
    b.schedule.lanes = held.lanes as u32;
    b.schedule.stages = stages as u32;
    b.schedule.copies = workers as u64;
    let grid = workers * lines * held.cluster;
    b.launch_cluster(kernel, access, grid, held.block, held.shared, held.cluster)?;
    b.passes(2 + needs.dx as usize);
    // One worker of x's dtype has the gradients themselves: a launch less where a step decodes.
    let whole = workers == 1 && needs.as_x;
    match needs.params() && !whole {
        true => b.reduce_parts(workers, b.g.params() * b.r.samples()),
        false => Ok(()),
    }
}

/// How the segments of a slice are shared out for their sums.
struct Segments {
    lanes: usize,
    pieces: usize,
    piece_len: usize,
    bytes: usize,
}

fn segments(b: &Builder, slice: usize, access: Access) -> Segments {
    let (unit, span) = (b.unit(access), b.shape.span as usize);
    let lanes = (span / unit).next_power_of_two().min(32);
    // As `place` chooses them, whichever cluster it chooses.
    let groups = b.lanes_for(slice).clamp(64, CLUSTER_BLOCK) / lanes;
    // A slice may start and end within a segment.
    let count = (slice.div_ceil(span) + 1).min(b.shape.set_params as usize);
    let wanted = groups.div_ceil(count).min(span.div_ceil(lanes * unit));
    let piece_len = span.div_ceil(wanted).next_multiple_of(unit);
    let pieces = span.div_ceil(piece_len);
    Segments { lanes, pieces, piece_len, bytes: 2 * count * pieces * b.accumulator() }
}
