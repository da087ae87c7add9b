//! Plans for sets that do not fit on chip, and for statistics that are given: chunk by chunk.

use super::held::{backward_elements, Segs};
use super::{BackwardNeeds, Builder, ForwardNeeds, Part, WeightsPer};
use crate::cuda::entry::{Access, Kernel};
use crate::cuda::params::flags;
use candle_core::Result;

/// Threads of split kernels.
pub(crate) const BLOCK: usize = 256;
pub(crate) const COLUMNS_BLOCK: usize = 128;
/// Accesses of a thread to x, if a chunk is long enough: of the forward what its registers hold (`CHUNK_BYTES`), of the
/// backward as many as what it does once for a chunk costs.
const FORWARD_ACCESSES: usize = 4;
const BACKWARD_ACCESSES: usize = 8;
/// Bytes of x in a chunk of the forward (64 a thread, which registers hold: `CHUNK_BYTES`), and of x or dy in one of
/// the backward: six and more blocks share a multiprocessor.
pub(crate) const FORWARD_BYTES: usize = 16 << 10;
const BACKWARD_BYTES: usize = 16 << 10;

impl Builder<'_> {
    /// Cuts sets into chunks of up to `bytes`.
    fn cut(&mut self, segs: Segs, access: Access, bytes: usize) {
        let (target, unit) = (bytes / self.r.element.bytes(), self.unit(access));
        self.set_segments(segs);
        if segs.len > target {
            let len = segs.len.div_ceil(segs.len.div_ceil(target)).next_multiple_of(unit);
            let pieces = segs.len.div_ceil(len);
            self.schedule.chunk_len = len as u64;
            self.schedule.pieces = pieces as u64;
            self.schedule.segs_per_chunk = 1;
            self.schedule.chunks = (segs.count * pieces) as u64;
        } else {
            let each = (target / segs.len).min(segs.count);
            self.schedule.chunk_len = (each * segs.len) as u64;
            self.schedule.pieces = 1;
            self.schedule.segs_per_chunk = each as u64;
            self.schedule.chunks = segs.count.div_ceil(each) as u64;
        }
    }

    /// A block for every chunk of x, and `with_dy` of dy.
    fn launch_split(&mut self, kernel: Kernel, access: Access, with_dy: bool) -> Result<()> {
        let len = self.schedule.chunk_len as usize;
        let accesses = if with_dy { BACKWARD_ACCESSES } else { FORWARD_ACCESSES };
        let units = (len / self.unit(access)).div_ceil(accesses);
        let block = units.next_power_of_two().clamp(32, BLOCK);
        let grid = self.g.sets() * self.schedule.chunks as usize;
        let shared = self.slots() + if with_dy { self.held_both(len) } else { self.held_bytes(len) };
        self.launch(kernel, access, grid, block, shared)
    }
}

/// Whether the statistics come in parts, so that they have to be written down.
pub(super) fn forward(b: &mut Builder, needs: &ForwardNeeds) -> Result<bool> {
    let access = b.access(b.g.run);
    b.cut(b.runs(), access, FORWARD_BYTES);
    if !needs.given {
        let chunks = b.schedule.chunks as usize;
        b.scratch.part_moments = Some(b.reserve(3 * b.g.sets() * chunks));
        b.launch_split(Kernel::SplitMoments, access, false)?;
        let width = b.g.sets_per_outer() * chunks;
        b.combine(Kernel::CombineMoments, Part { chunks: 1, width, run: chunks, span: 1 })?;
        b.passes(1);
    }
    if needs.output {
        b.launch_split(Kernel::SplitForward, access, false)?;
        b.passes(2);
    }
    Ok(true)
}

pub(super) fn backward(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if b.weights_per == WeightsPer::Column {
        return backward_columns(b, needs);
    }
    let part = sums(b, false)?;
    b.after_sums(part, needs)?;
    if needs.dx {
        b.passes(3);
        let access = b.access(b.schedule.seg_len as usize);
        b.launch_split(Kernel::SplitBackward, access, true)?;
    }
    Ok(())
}

/// Launches the sums of chunks; how they lie.
pub(super) fn sums(b: &mut Builder, write_dx: bool) -> Result<Part> {
    let span = b.shape.span as usize;
    let segs = match b.weights_per {
        WeightsPer::Span => Segs { count: b.g.run / span, len: span, stride: span },
        _ => b.runs(),
    };
    let access = b.access(segs.len);
    b.cut(segs, access, BACKWARD_BYTES / b.gradient_step());
    let pieces = b.schedule.pieces as usize;
    let (run, span) = match b.weights_per {
        WeightsPer::Span => {
            b.schedule.segment_lanes = (span / b.unit(access)).next_power_of_two().min(32) as u32;
            (segs.count * pieces, pieces)
        }
        _ => (b.schedule.chunks as usize, b.schedule.chunks as usize),
    };
    let part = Part { chunks: 1, width: b.g.sets_per_outer() * run, run, span };
    b.set_part(part);
    b.shape.flags |= flags::SUMS_WRITE;
    b.scratch.part_sums = Some(b.reserve(2 * b.g.outer * part.width));
    b.launch_split(Kernel::SplitSums, access, true)?;
    b.passes(2 + write_dx as usize);
    Ok(part)
}

/// Launches the sums of the columns of sets whose columns all have their own parameter, over the batch
/// and, `with_sets`, over the sets; how the latter lie.
pub(super) fn column_sums(b: &mut Builder, needs: &BackwardNeeds, with_sets: bool) -> Result<Part> {
    let access = match b.access(b.g.run) {
        Access::Vector => Access::Vector,
        _ => Access::Scalar,
    };
    b.set_segments(b.runs());
    let tile = COLUMNS_BLOCK * backward_elements(b.r.element);
    let tiles = b.g.run.div_ceil(tile);
    let part = Part { chunks: 1, width: b.g.sets_per_outer() * tiles, run: tiles, span: 1 };
    let resident = (b.device.multiprocessors as usize * 4 / part.width / b.r.samples()).max(1);
    let tokens = b.r.tokens();
    let rows = tokens.div_ceil(tokens.div_ceil(8).min(resident));
    let slabs = tokens.div_ceil(rows);
    b.schedule.chunk_rows = rows as u64;
    b.schedule.copies = slabs as u64;
    b.shape.flags |= flags::PART_WEIGHTED;
    b.set_part(part);
    if with_sets {
        b.scratch.part_sums = Some(b.reserve(2 * b.g.outer * part.width));
    }
    if with_sets || !needs.dx {
        b.shape.flags |= flags::SUMS_WRITE;
    }
    let shared = b.slots() + 2 * b.held_both(tile);
    let grid = part.width * slabs * b.r.samples();
    b.launch(Kernel::SplitColumnSums, access, grid, COLUMNS_BLOCK, shared)?;
    b.passes(2);
    if needs.params() {
        b.reduce_parts(slabs, b.g.params() * b.r.samples())?;
    }
    Ok(part)
}

/// Sets beyond the chip whose columns all have their own parameter.
fn backward_columns(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    let sums = needs.dx && !needs.fixed;
    if sums || needs.params() {
        let part = column_sums(b, needs, sums)?;
        if sums {
            b.scratch.sums = Some(b.reserve(2 * b.g.sets()));
            b.combine(Kernel::CombineSums, part)?;
        }
    }
    if needs.dx || (needs.around && !needs.params()) {
        launch_input_gradient(b, needs.fixed, needs.dx)?;
    }
    Ok(())
}

/// Statistics that did not depend on x: dx needs no sums.
pub(super) fn backward_fixed(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if !needs.params() {
        if needs.dx || needs.around {
            launch_input_gradient(b, true, needs.dx)?;
        }
        return Ok(());
    }
    if b.weights_per == WeightsPer::Column {
        return backward_columns(b, needs);
    }
    let part = sums(b, needs.dx)?;
    b.after_sums(part, needs)
}

fn launch_input_gradient(b: &mut Builder, fixed: bool, dx: bool) -> Result<()> {
    let access = b.access(b.g.run);
    b.cut(b.runs(), access, BACKWARD_BYTES / b.gradient_step());
    b.gradient_passes(!fixed, dx);
    b.launch_split(Kernel::SplitBackward, access, true)
}

pub(super) fn input_gradient(b: &mut Builder) -> Result<()> {
    launch_input_gradient(b, false, true)
}
