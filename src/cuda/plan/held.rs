//! Plans for sets that fit on chip: one contiguous run, or long runs of several rows.
//!
//! A set goes to a few lanes, a block or a cluster by the bytes that it takes, which its length alone
//! decides: a batch does not change how one of its rows is summed.

use super::{residency, split, BackwardNeeds, Builder, ForwardNeeds, WeightsPer};
use crate::cuda::entry::{Access, Element, Kernel};
use crate::cuda::params::Divisor;
use crate::geometry::WeightBy;
use crate::request::Norm;
use candle_core::{bail, Result};

/// Bytes of a set for each of its threads: eight accesses of 16. What a thread does once for a set, some five hundred
/// instructions, is then as many as eight of them cost (`cuda/roofline.txt`).
const THREAD_BYTES: usize = 128;
/// The same of a forward with accesses of 16 bytes, in a block alone.
const THREAD_BYTES_VECTOR: usize = 64;
/// Threads of the widest blocks, as the launch bounds say.
pub(crate) const MAX_BLOCK: usize = 512;
/// The same for blocks of a cluster, `backward_rows` excepted.
pub(crate) const CLUSTER_BLOCK: usize = 256;
/// Threads of a block that has several sets.
const SEVERAL_BLOCK: usize = 256;
/// The same where a device would else have blocks for a part of its multiprocessors alone (`spread`).
const FEW_SETS_BLOCK: usize = 64;
/// Where there are clusters, a block alone takes sets up to this: two of them fit a multiprocessor.
const ALONE_BYTES: usize = 96 << 10;
/// Blocks of a cluster.
pub(crate) const CLUSTER: usize = 8;
/// Bytes of a thread that `forward_kept` and `forward_several` have registers for (`KEPT_BYTES`).
pub(crate) const KEPT_BYTES: usize = 128;
/// The same of accesses of 16 bytes, but for clusters.
pub(crate) const KEPT_BYTES_VECTOR: usize = 64;
/// The same of single elements of two bytes, which take a register each.
pub(crate) const KEPT_SINGLE_BYTES: usize = 32;
/// Threads of its widest blocks, which take sets of 32 KB.
pub(crate) const KEPT_BLOCK: usize = 256;
pub(crate) const KEPT_BLOCK_VECTOR: usize = 512;

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

/// Bytes from one group's slice to the next where a block has several (`apart`): few lanes read 128 bytes together with those
/// of groups beside them, which must come from other banks.
pub(crate) fn apart(element: Element, len: usize) -> usize {
    (len * element.bytes()).next_multiple_of(128) + 32
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
    /// a slice takes of shared memory, which some lanes have; `least`: of them. `each`: bytes of a thread of a block alone.
    fn place(
        &self,
        access: Access,
        each: usize,
        least: usize,
        alone: usize,
        bytes: impl Fn(usize, usize) -> usize,
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
            // The blocks of a cluster exchange the values of one set.
            let lanes = match cluster {
                1 => self.lanes_for(slice, each).clamp(least, max),
                _ => self.lanes_for(slice, THREAD_BYTES).clamp(64, max),
            };
            let block = if lanes <= 32 { SEVERAL_BLOCK } else { lanes };
            // Divisors and numbers within a set are of 31 bits, far beyond this.
            let one = bytes(slice, lanes);
            let all = one.checked_mul(block / lanes)?;
            let held = Held { cluster, slice, lanes, block, shared: self.slots() + all };
            (one <= most && all <= limit).then_some(held)
        })
    }

    /// Smaller blocks of several sets, where there would be too few for a device; bits do not depend on them.
    fn spread(&self, held: Held) -> Held {
        let blocks = self.g.sets().div_ceil(held.sets_per_block());
        if held.sets_per_block() == 1 || blocks >= self.device.multiprocessors as usize {
            return held;
        }
        let parts = held.block / FEW_SETS_BLOCK;
        Held { block: FEW_SETS_BLOCK, shared: self.slots() + (held.shared - self.slots()) / parts, ..held }
    }

    /// Threads for a slice, of `each` bytes.
    fn lanes_for(&self, slice: usize, each: usize) -> usize {
        // Where the length leaves accesses of two bytes, a thread has a quarter of them: of an H100's time for 4096
        // rows of 1023 bf16 three quarters, where rows of f32 would take 1.1 times theirs.
        let span = if self.weights_per == WeightsPer::Span { self.shape.span as usize } else { 4 };
        let odd = !(self.g.run.is_multiple_of(4) && span.is_multiple_of(4)) && self.r.element.bytes() == 2;
        let each = if odd { each / 4 } else { each };
        (slice * self.r.element.bytes()).div_ceil(each).next_power_of_two()
    }

    /// Whether registers may hold sets for the forward: without a residual. Bits do not depend on it.
    fn may_keep(&self) -> bool {
        self.is_plain()
            && !self.r.residual
            && (self.g.rows == 1 || self.weights_per == WeightsPer::Set)
            && self.r.element != Element::F64
            && self.g.sets() <= i32::MAX as usize / CLUSTER
    }

    /// Whether a set's share of a thread fits its registers.
    fn fits_registers(&self, access: Access, held: &Held) -> bool {
        let unit = self.unit(access);
        // Single elements, for which there is no kernel of clusters and none of several sets.
        let single = access == Access::Scalar;
        let (bytes, block) = match access {
            Access::Scalar if self.r.element.bytes() == 2 => (KEPT_SINGLE_BYTES, KEPT_BLOCK),
            Access::Vector if held.cluster == 1 => (KEPT_BYTES_VECTOR, KEPT_BLOCK_VECTOR),
            _ => (KEPT_BYTES, KEPT_BLOCK),
        };
        held.block <= block
            && (held.slice / unit).div_ceil(held.lanes) * unit * self.r.element.bytes() <= bytes
            && (!single || (held.cluster == 1 && held.sets_per_block() == 1))
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
    let may_keep = b.may_keep();
    let alone = if may_keep && access != Access::Scalar { KEPT_BLOCK * KEPT_BYTES } else { ALONE_BYTES };
    let each = match access {
        Access::Vector if b.r.element != Element::F64 => THREAD_BYTES_VECTOR,
        _ => THREAD_BYTES,
    };
    let held = b.place(access, each, 2, alone, |slice, lanes| match lanes <= 32 {
        true => apart(b.r.element, slice),
        false => b.held_bytes(slice),
    });
    let Some(held) = held.filter(|_| !needs.given) else {
        return split::forward(b, needs);
    };
    let held = b.spread(held);
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
    let by_segment = b.weights_per == WeightsPer::Span;
    let access = b.access(b.g.run);
    b.set_segments(b.runs());
    // Whether or not parameters are wanted: dx has the same bits either way.
    if b.weights_per == WeightsPer::Column {
        if let Some(rows) = place_rows(b, access) {
            return backward_rows(b, needs, access, rows);
        }
    }
    let least = if b.weights_per == WeightsPer::Set { 8 } else { 64 };
    let held = b.place(access, THREAD_BYTES, least, ALONE_BYTES, |slice, _| {
        b.held_both(slice) + by_segment as usize * segments(b, slice, access).bytes
    });
    let Some(held) = held else {
        return split::backward(b, needs);
    };
    if b.weights_per == WeightsPer::Column && needs.params() {
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
    match needs.params() && b.weights_per != WeightsPer::Column {
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

/// Where the rows of `backward_rows` and `backward_plain` are held, and by which of them.
struct Rows {
    kernel: Kernel,
    held: Held,
    /// Rows in memory at once, of each group of threads.
    stages: usize,
}

/// As many threads as the registers of a row's columns take.
fn place_rows(b: &Builder, access: Access) -> Option<Rows> {
    let (n, unit, element) = (b.g.set_len(), b.unit(access), b.r.element);
    let each = backward_elements(element);
    let plain = !b.r.is_fused() && element != Element::F64;
    // Kernels, blocks of a cluster, columns and threads at most.
    let kernels: &[_] = match access {
        Access::Scalar if plain => &[(Kernel::BackwardPlain, 1, each, MAX_BLOCK)],
        // Twice as many f32 of a row would leave no memory for the next row.
        Access::Vector if plain && element.bytes() == 2 => &[
            (Kernel::BackwardRows, 1, each, MAX_BLOCK),
            (Kernel::BackwardPlainWide, 1, 2 * each, MAX_BLOCK),
            (Kernel::BackwardPlainCluster, CLUSTER, 2 * each, CLUSTER_BLOCK),
        ],
        _ => &[
            (Kernel::BackwardRows, 1, each, MAX_BLOCK),
            (Kernel::BackwardRowsCluster, CLUSTER, each, MAX_BLOCK),
        ],
    };
    let clusters = b.has_clusters() && access == Access::Vector;
    let fits = |&&(_, cluster, each, block): &&_| (cluster == 1 || clusters) && n <= cluster * block * each;
    let &(kernel, cluster, each, _) = kernels.iter().find(fits)?;
    let slice = (n / unit).div_ceil(cluster) * unit;
    let lanes = slice.div_ceil(each).next_power_of_two().max(if cluster == 1 { 8 } else { 64 });
    let block = if lanes <= 32 { SEVERAL_BLOCK } else { lanes };
    let room = b.held_both(slice) * (block / lanes);
    // Of the next rows, and of the weights for which a thread has no registers.
    let (stage, weights) = match kernel {
        Kernel::BackwardPlain => (0, 0),
        Kernel::BackwardPlainWide | Kernel::BackwardPlainCluster => (room, block * each * b.accumulator()),
        _ => (room, 0),
    };
    // At the end the groups of a block add up their columns in the same memory.
    let added = if block > lanes { each * lanes * b.accumulator() } else { 0 };
    [2, 1].into_iter().find_map(|stages| {
        let shared = b.slots() + (stages * stage + weights).max(added);
        let held = Held { cluster, slice, lanes, block, shared };
        (shared <= b.device.shared as usize).then_some(Rows { kernel, held, stages })
    })
}

fn backward_rows(b: &mut Builder, needs: &BackwardNeeds, access: Access, rows: Rows) -> Result<()> {
    let Rows { kernel, held, stages } = rows;
    b.schedule.stages = stages as u32;
    b.passes(2 + needs.dx as usize);
    share_rows(b, needs, kernel, access, held)
}

/// Launches blocks that go from row to row and add up the gradients of parameters.
fn share_rows(
    b: &mut Builder,
    needs: &BackwardNeeds,
    kernel: Kernel,
    access: Access,
    held: Held,
) -> Result<()> {
    let entry = b.entry(kernel, access)?;
    let resident = residency::resident(entry, b.device, held.block, held.shared);
    let lines = b.g.sets_per_outer() * b.r.samples();
    let workers = (resident * b.device.multiprocessors as usize / held.cluster / lines).max(1);
    // As many as are resident at once, each with as many rows as the next, give or take one.
    let turns = b.r.tokens().div_ceil(held.sets_per_block()).div_ceil(workers);
    let workers = b.r.tokens().div_ceil(turns * held.sets_per_block());
    b.schedule.lanes = held.lanes as u32;
    b.schedule.copies = workers as u64;
    let grid = workers * lines * held.cluster;
    b.launch_cluster(kernel, access, grid, held.block, held.shared, held.cluster)?;
    // One worker of x's dtype has the gradients themselves: a launch less where a step decodes.
    let whole = workers == 1 && needs.as_x;
    match needs.params() && !whole {
        true => b.reduce_parts(workers, b.g.params() * b.r.samples()),
        false => Ok(()),
    }
}

/// Whether there are kernels for a gate before this norm: an RMS norm of rows, which a block's registers take. What
/// is longer, 8192 elements (4096 of f64), would have to be held unrounded somewhere else, and is left to candle's
/// operations.
pub(crate) fn takes_gate_before(norm: &Norm, element: Element) -> bool {
    let (g, f) = (&norm.geometry, &norm.fusion);
    let rows = !g.center && g.rows == 1 && g.run == g.width && g.weight_by == WeightBy::Column { span: 1 };
    let alone = f.activation.is_none() && f.residual.is_none() && f.tokens.is_none() && !f.skip;
    rows && alone && g.run <= MAX_BLOCK * backward_elements(element)
}

/// Where the rows of the gated kernels are held: in registers.
fn place_gated(b: &Builder) -> (Access, Held) {
    let access = match b.access(b.g.run) {
        Access::Vector => Access::Vector,
        _ => Access::Scalar,
    };
    let (n, each) = (b.g.set_len(), backward_elements(b.r.element));
    let lanes = n.div_ceil(each).next_power_of_two().max(8);
    let block = if lanes <= 32 { SEVERAL_BLOCK } else { lanes };
    // Through which groups add up their columns at the end, as in `place_rows`.
    let added = if block > lanes { each * lanes * b.accumulator() } else { 0 };
    (access, Held { cluster: 1, slice: n, lanes, block, shared: b.slots() + added })
}

pub(super) fn gated_forward(b: &mut Builder, needs: &ForwardNeeds) -> Result<()> {
    if needs.given || !needs.output || needs.momentum.is_some() || b.r.bias || !b.r.gate {
        bail!("{}: a gate before the norm has own statistics and no bias, got {needs:?}, {:?}", b.r.name, b.r)
    }
    b.set_segments(b.runs());
    let (access, held) = place_gated(b);
    b.passes(2);
    b.launch_held((Kernel::GatedForward, Kernel::GatedForward), access, held)
}

pub(super) fn gated_backward(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if needs.fixed || needs.dbias || !b.r.gate {
        bail!("{}: a gate before the norm has own statistics and no bias, got {needs:?}, {:?}", b.r.name, b.r)
    }
    b.set_segments(b.runs());
    let (access, held) = place_gated(b);
    b.passes(2 + needs.dx as usize);
    share_rows(b, needs, Kernel::GatedBackward, access, held)
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
    let groups = b.lanes_for(slice, THREAD_BYTES).clamp(64, CLUSTER_BLOCK) / lanes;
    // A slice may start and end within a segment.
    let count = (slice.div_ceil(span) + 1).min(b.shape.set_params as usize);
    let wanted = groups.div_ceil(count).min(span.div_ceil(lanes * unit));
    let piece_len = span.div_ceil(wanted).next_multiple_of(unit);
    let pieces = span.div_ceil(piece_len);
    Segments { lanes, pieces, piece_len, bytes: 2 * count * pieces * b.accumulator() }
}
