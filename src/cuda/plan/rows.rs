//! Plans for sets that are one contiguous run, or long runs of several rows.
//!
//! The ladder by the bytes a set takes on chip: a few lanes, a block's registers, a cluster's, shared
//! memory, and chunks of what fits nowhere.

use super::{Affinity, BackwardNeeds, Builder, ForwardNeeds, Part};
use crate::cuda::entry::{Element, Kernel};
use crate::cuda::params::{flags, Divisor};
use candle_core::Result;

/// Bytes of a set that a thread of the forward holds in registers (`FORWARD_BYTES`).
const FORWARD_BYTES: usize = 64;
/// Threads of the widest blocks, as the kernels' launch bounds say.
const MAX_BLOCK: usize = 512;
/// Threads of a block whose warps have sets of their own.
const WARPS_BLOCK: usize = 256;
/// Threads of split kernels.
const SPLIT_BLOCK: usize = 256;
const SPLIT_COLUMNS_BLOCK: usize = 128;
/// Bytes of a chunk: eight 16-byte accesses a thread.
const CHUNK_BYTES: usize = 32 << 10;
/// Where there are clusters, a block alone takes sets up to this: two such blocks fit a multiprocessor.
const SHARED_BESIDE_CLUSTERS: usize = 96 << 10;

/// Elements of x, and of dy, that a thread of the backward holds (`BACKWARD_ELEMENTS`).
fn backward_elements(element: Element) -> usize {
    match element {
        Element::F64 => 8,
        _ => 16,
    }
}

/// Where a set that fits on chip is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// By this many threads of every block of the cluster.
    Registers { lanes: usize, cluster: usize },
    /// In this many bytes of every block of the cluster, slots not counted.
    Shared { bytes: usize, cluster: usize },
}

/// Segments of a set, and chunks of segments.
#[derive(Debug, Clone, Copy)]
struct Chunks {
    segs: usize,
    len: usize,
    stride: usize,
}

impl Builder<'_> {
    /// Bytes of the slots through which warps exchange sums.
    fn slots(&self) -> usize {
        2 * 3 * 32 * self.accumulator()
    }

    fn has_clusters(&self) -> bool {
        self.device.capability >= 90 && self.r.element != Element::F64
    }

    /// 16-byte accesses: all runs start aligned and are multiples.
    fn vector(&self, run: usize) -> bool {
        self.r.aligned && run.is_multiple_of(self.lanes) && self.g.run.is_multiple_of(self.lanes)
    }

    fn set_segments(&mut self, chunks: Chunks) {
        self.params.segs = chunks.segs as u64;
        self.params.seg_len = chunks.len as u64;
        self.params.seg_stride = chunks.stride as u64;
        self.params.by_seg = Divisor::new(chunks.len);
    }

    fn runs(&self) -> Chunks {
        Chunks { segs: self.g.rows, len: self.g.run, stride: self.g.width }
    }

    /// The smallest place for a set of which a thread holds `per_thread` elements, or `None`. `shared`
    /// tells the bytes for a slice of the set; 0 bytes rule shared memory out.
    fn place(&self, per_thread: usize, vector: bool, shared: impl Fn(usize) -> usize) -> Option<Held> {
        let n = self.g.set_len();
        let fits = |threads: usize| per_thread > 0 && n.div_ceil(per_thread) <= threads;
        let lanes = [8, 16, 32, 64, 128, 256, MAX_BLOCK].into_iter().find(|&lanes| fits(lanes));
        if let Some(lanes) = lanes {
            return Some(Held::Registers { lanes, cluster: 1 });
        }
        if vector && self.has_clusters() {
            let cluster = [2, 4, 8].into_iter().find(|&cluster| fits(cluster * MAX_BLOCK));
            if let Some(cluster) = cluster {
                return Some(Held::Registers { lanes: MAX_BLOCK, cluster });
            }
        }
        let limit = self.device.shared as usize - self.slots();
        let alone = if self.has_clusters() { limit.min(SHARED_BESIDE_CLUSTERS) } else { limit };
        let clusters: &[(usize, usize)] =
            if self.has_clusters() { &[(1, alone), (8, limit)] } else { &[(1, alone)] };
        let unit = if vector { self.lanes } else { 1 };
        clusters.iter().find_map(|&(cluster, limit)| {
            let bytes = shared((n / unit).div_ceil(cluster) * unit);
            (bytes > 0 && bytes <= limit).then_some(Held::Shared { bytes, cluster })
        })
    }

    /// Blocks for `work` blocks' worth of work: enough to fill the device `waves` times.
    fn grid(&self, work: usize, block: usize, waves: usize) -> usize {
        let resident = (2048 / block).min(16) * self.device.multiprocessors as usize;
        work.min(waves * resident).max(1)
    }

    /// Threads for a set in shared memory: about four accesses each.
    fn shared_block(&self, slice: usize, vector: bool) -> usize {
        let units = slice / if vector { self.lanes } else { 1 };
        units.div_ceil(4).next_power_of_two().clamp(64, MAX_BLOCK)
    }

    /// Cuts sets into chunks.
    fn cut(&mut self, chunks: Chunks, vector: bool) {
        let target = CHUNK_BYTES / self.r.element.bytes();
        self.set_segments(chunks);
        if chunks.len > target {
            let unit = if vector { self.lanes } else { 1 };
            let len = chunks.len.div_ceil(chunks.len.div_ceil(target)).next_multiple_of(unit);
            let pieces = chunks.len.div_ceil(len);
            self.params.chunk_len = len as u64;
            self.params.pieces = pieces as u64;
            self.params.segs_per_chunk = 1;
            self.params.chunks = (chunks.segs * pieces) as u64;
        } else {
            let each = target / chunks.len;
            self.params.pieces = 1;
            self.params.segs_per_chunk = each as u64;
            self.params.chunks = chunks.segs.div_ceil(each) as u64;
        }
    }

    fn split_block(&self, vector: bool) -> usize {
        let chunks = self.params.chunks as usize;
        let units = self.g.set_len().div_ceil(chunks) / if vector { self.lanes } else { 1 };
        units.next_power_of_two().clamp(32, SPLIT_BLOCK)
    }

    fn launch_split(&mut self, kernel: Kernel, vector: bool) -> Result<()> {
        let (grid, block) = (self.g.sets() * self.params.chunks as usize, self.split_block(vector));
        let slots = self.slots();
        self.launch(kernel, vector, grid, block, slots)
    }
}

/// Whether the statistics come in parts, so that they have to be written down.
pub(super) fn forward(b: &mut Builder, needs: &ForwardNeeds) -> Result<bool> {
    let (runs, vector, es) = (b.runs(), b.vector(b.g.run), b.r.element.bytes());
    if !needs.given {
        b.set_segments(runs);
        match b.place(FORWARD_BYTES / es, vector, |slice| slice * es) {
            Some(Held::Registers { lanes, cluster }) => {
                let kernel = [
                    Kernel::ForwardRegisters,
                    Kernel::ForwardCluster2,
                    Kernel::ForwardCluster4,
                    Kernel::ForwardCluster8,
                ][cluster.ilog2() as usize];
                let block = if lanes <= 32 { WARPS_BLOCK } else { lanes };
                let grid = b.grid(b.g.sets().div_ceil(block / lanes), block, 2);
                b.params.lanes = lanes as u32;
                let slots = b.slots();
                b.launch_cluster(kernel, vector, grid * cluster, block, slots, cluster)?;
                b.passes(1 + needs.output as usize);
                return Ok(false);
            }
            Some(Held::Shared { bytes, cluster }) => {
                let kernel = if cluster == 1 { Kernel::ForwardShared } else { Kernel::ForwardClusterShared };
                let block = b.shared_block(b.g.set_len().div_ceil(cluster), vector);
                let grid = b.grid(b.g.sets(), block, 2);
                let shared = b.slots() + bytes;
                b.launch_cluster(kernel, vector, grid * cluster, block, shared, cluster)?;
                b.passes(1 + needs.output as usize);
                return Ok(false);
            }
            None => {}
        }
    }
    b.cut(runs, vector);
    if !needs.given {
        let chunks = b.params.chunks as usize;
        b.scratch.part_moments = Some(b.reserve(3 * b.g.sets() * chunks));
        b.launch_split(Kernel::SplitMoments, vector)?;
        let width = b.g.sets_per_outer() * chunks;
        b.combine(Kernel::CombineMoments, Part { chunks: 1, width, run: chunks, span: 1 })?;
        b.passes(1);
    }
    if needs.output {
        b.launch_split(Kernel::SplitForward, vector)?;
        b.passes(2);
    }
    Ok(true)
}

pub(super) fn backward(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if needs.fixed {
        return backward_fixed(b, needs);
    }
    let by_segment = b.affinity == Affinity::Span;
    let columns = needs.params() && b.affinity == Affinity::Column;
    let vector = b.vector(if by_segment { b.params.span as usize } else { b.g.run });
    let runs = b.runs();
    b.set_segments(runs);
    let per_thread = if by_segment { 0 } else { backward_elements(b.r.element) };
    let es = b.r.element.bytes();
    let held = b.place(per_thread, vector, |slice| match columns {
        true => 0,
        false => {
            2 * (slice * es).next_multiple_of(16) + by_segment as usize * b.segments(slice, vector).bytes
        }
    });
    match held {
        Some(Held::Registers { lanes, cluster }) => backward_registers(b, needs, lanes, cluster, vector),
        Some(Held::Shared { bytes, cluster }) => {
            let kernel = if cluster == 1 { Kernel::BackwardShared } else { Kernel::BackwardClusterShared };
            let block = b.shared_block(b.g.set_len().div_ceil(cluster), vector);
            if by_segment {
                let segments = b.segments(b.g.set_len().div_ceil(cluster), vector);
                b.params.lanes = segments.lanes as u32;
                b.params.pieces = segments.pieces as u64;
                b.params.chunk_len = segments.piece_len as u64;
            }
            let grid = b.grid(b.g.sets(), block, 2);
            let shared = b.slots() + bytes;
            b.launch_cluster(kernel, vector, grid * cluster, block, shared, cluster)?;
            b.passes(2 + needs.dx as usize);
            reduce_held(b, needs, cluster)
        }
        None if b.affinity == Affinity::Column => backward_columns(b, needs),
        None => {
            let part = sums(b, false)?;
            b.after_sums(part, needs)?;
            if needs.dx {
                b.passes(3);
                b.launch_split(Kernel::SplitBackward, b.vector(part_run(b)))?;
            }
            Ok(())
        }
    }
}

/// Length of the segments that the chunks are made of.
fn part_run(b: &Builder) -> usize {
    b.params.seg_len as usize
}

/// Parameters' gradients of one copy for every outer block and block of a cluster.
fn reduce_held(b: &mut Builder, needs: &BackwardNeeds, cluster: usize) -> Result<()> {
    if !needs.params() {
        return Ok(());
    }
    let cluster = if b.affinity == Affinity::Set { 1 } else { cluster };
    b.reduce_parts(b.g.outer * cluster, b.g.params())
}

fn backward_registers(
    b: &mut Builder,
    needs: &BackwardNeeds,
    lanes: usize,
    cluster: usize,
    vector: bool,
) -> Result<()> {
    let kernel = [
        Kernel::BackwardRegisters,
        Kernel::BackwardCluster2,
        Kernel::BackwardCluster4,
        Kernel::BackwardCluster8,
    ][cluster.ilog2() as usize];
    let columns = needs.params() && b.affinity == Affinity::Column;
    let block = if lanes <= 32 { WARPS_BLOCK } else { lanes };
    let (per_block, lines) = (block / lanes, if columns { b.g.sets_per_outer() } else { 1 });
    let items = b.g.sets() / lines;
    // Each part of the gradients costs a write and a read of all columns: eight rows pay for it.
    let rows = per_block * if columns { 8 } else { 1 };
    let resident = (b.device.multiprocessors as usize * (1024 / block) / cluster / lines).max(1);
    let workers = items.div_ceil(rows).min(if columns { resident } else { 4 * resident }).max(1);
    b.params.lanes = lanes as u32;
    let added = if columns && per_block > 1 { backward_elements(b.r.element) * lanes } else { 0 };
    let shared = b.slots() + added * b.accumulator();
    b.launch_cluster(kernel, vector, workers * lines * cluster, block, shared, cluster)?;
    b.passes(2 + needs.dx as usize);
    match columns {
        true => b.reduce_parts(workers, b.g.params()),
        false => reduce_held(b, needs, cluster),
    }
}

/// How the segments of a slice are shared out for their sums.
struct Segments {
    lanes: usize,
    pieces: usize,
    piece_len: usize,
    bytes: usize,
}

impl Builder<'_> {
    fn segments(&self, slice: usize, vector: bool) -> Segments {
        let (unit, span) = (if vector { self.lanes } else { 1 }, self.params.span as usize);
        let lanes = (span / unit).next_power_of_two().min(32);
        let groups = self.shared_block(slice, vector) / lanes;
        // A slice may start and end within a segment.
        let count = (slice.div_ceil(span) + 1).min(self.params.set_params as usize);
        let wanted = groups.div_ceil(count).min(span.div_ceil(lanes * unit));
        let piece_len = span.div_ceil(wanted).next_multiple_of(unit);
        let pieces = span.div_ceil(piece_len);
        Segments { lanes, pieces, piece_len, bytes: 2 * count * pieces * self.accumulator() }
    }
}

/// Launches the sums of chunks; how they lie.
pub(super) fn sums(b: &mut Builder, write_dx: bool) -> Result<Part> {
    let span = b.params.span as usize;
    let chunks = match b.affinity {
        Affinity::Span => Chunks { segs: b.g.run / span, len: span, stride: span },
        _ => b.runs(),
    };
    let vector = b.vector(chunks.len);
    b.cut(chunks, vector);
    let pieces = b.params.pieces as usize;
    let part = match b.affinity {
        Affinity::Span => {
            let unit = if vector { b.lanes } else { 1 };
            b.params.lanes = (span / unit).next_power_of_two().min(32) as u32;
            let run = chunks.segs * pieces;
            Part { chunks: 1, width: b.g.sets_per_outer() * run, run, span: pieces }
        }
        _ => {
            let run = b.params.chunks as usize;
            Part { chunks: 1, width: b.g.sets_per_outer() * run, run, span: run }
        }
    };
    b.set_part(part);
    b.scratch.part_sums = Some(b.reserve(2 * b.g.outer * part.width));
    b.launch_split(Kernel::SplitSums, vector)?;
    b.passes(2 + write_dx as usize);
    Ok(part)
}

/// Sets beyond the chip whose columns all have their own parameter.
fn backward_columns(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    let vector = b.vector(b.g.run);
    let tile = SPLIT_COLUMNS_BLOCK * backward_elements(b.r.element);
    let tiles = b.g.run.div_ceil(tile);
    let part = Part { chunks: 1, width: b.g.sets_per_outer() * tiles, run: tiles, span: 1 };
    let resident = (b.device.multiprocessors as usize * 4 / part.width).max(1);
    let rows = b.g.outer.div_ceil(b.g.outer.div_ceil(8).min(resident));
    let slabs = b.g.outer.div_ceil(rows);
    b.params.chunk_rows = rows as u64;
    b.params.flags |= flags::PART_WEIGHTED;
    b.set_part(part);
    let sums = needs.dx && !needs.fixed;
    if sums || needs.params() {
        if sums {
            b.scratch.part_sums = Some(b.reserve(2 * b.g.outer * part.width));
        }
        let slots = b.slots();
        b.launch(Kernel::SplitColumnSums, vector, part.width * slabs, SPLIT_COLUMNS_BLOCK, slots)?;
        b.passes(2);
    }
    if needs.params() {
        b.reduce_parts(slabs, b.g.params())?;
    }
    if sums {
        b.scratch.sums = Some(b.reserve(2 * b.g.sets()));
        b.combine(Kernel::CombineSums, part)?;
    }
    if needs.dx {
        b.cut(b.runs(), vector);
        b.launch_split(Kernel::SplitBackward, vector)?;
        b.passes(if needs.fixed { 2 } else { 3 });
    }
    Ok(())
}

/// Statistics that did not depend on x: dx needs no sums.
fn backward_fixed(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if !needs.params() {
        if needs.dx {
            let (runs, vector) = (b.runs(), b.vector(b.g.run));
            b.cut(runs, vector);
            b.launch_split(Kernel::SplitBackward, vector)?;
            b.passes(2);
        }
        return Ok(());
    }
    if b.affinity == Affinity::Column {
        return backward_columns(b, needs);
    }
    let part = sums(b, needs.dx)?;
    b.after_sums(part, needs)
}

pub(super) fn input_gradient(b: &mut Builder) -> Result<()> {
    let (runs, vector) = (b.runs(), b.vector(b.g.run));
    b.cut(runs, vector);
    b.passes(3);
    b.launch_split(Kernel::SplitBackward, vector)
}
