//! Plans where lanes own columns and walk rows: channels-last, short runs, parameters by row.

use super::{BackwardNeeds, Builder, ForwardNeeds, Part, WeightsPer};
use crate::cuda::entry::{Access, Kernel};
use crate::cuda::params::{flags, Divisor};
use crate::geometry::WeightBy;
use candle_core::Result;

pub(crate) const BLOCK: usize = 256;
/// Bytes of a tile: eight 16-byte accesses a thread, twice as many where a block of rows has `MANY_BYTES`: parts of moments
/// are then half as many (32x256x56x56 bf16 on an H100 1.1 times as fast), and there are tiles for all of a device.
const TILE_BYTES: usize = 32 << 10;
const MANY_BYTES: usize = 1 << 20;
/// Parts of a set at most, so that merging them stays small beside the passes over the data.
const MAX_CHUNKS: usize = 1024;

impl Builder<'_> {
    /// Cuts a block into tiles along the columns, and rows into chunks. Whether accesses are of 16 bytes,
    /// and the number of tiles side by side.
    ///
    /// Where columns are samples (parameters by row), the way a column is summed must not depend on how
    /// many there are: always 32 lanes, and chunks as for the widest accesses.
    fn tiles(&mut self) -> (Access, usize) {
        // Four elements of 16 bits: a thread has registers for every column of its own.
        let widest = if self.r.element.bytes() == 2 { Access::HalfVector } else { Access::Vector };
        let access = match self.width_access() {
            Access::Scalar => Access::Scalar,
            _ => widest,
        };
        let (unit, widest) = (self.unit(access), self.unit(widest));
        let samples = self.g.weight_by == WeightBy::Row;
        let lanes = match samples {
            true => 32,
            false => self.g.width.div_ceil(unit).next_power_of_two().min(32),
        };
        let row = lanes * if samples { widest } else { unit } * self.r.element.bytes();
        let many = !samples && self.g.rows * self.g.width * self.r.element.bytes() >= MANY_BYTES;
        let tile_bytes = if many { 2 * TILE_BYTES } else { TILE_BYTES };
        let tile_rows = (tile_bytes / row).max(4 * BLOCK / lanes);
        let chunk_rows = tile_rows.max(self.g.rows.div_ceil(MAX_CHUNKS));
        self.schedule.lanes = lanes as u32;
        self.schedule.chunk_rows = chunk_rows as u64;
        self.schedule.chunks = self.g.rows.div_ceil(chunk_rows) as u64;
        self.schedule.by_seg = Divisor::new(self.g.run);
        (access, self.g.width.div_ceil(lanes * unit))
    }

    fn launch_tiles(
        &mut self,
        kernel: Kernel,
        (access, tiles): (Access, usize),
        shared: usize,
    ) -> Result<()> {
        let grid = tiles * self.schedule.chunks as usize * self.g.outer;
        self.launch(kernel, access, grid, BLOCK, shared)
    }

    /// Parts of columns: every column of every chunk.
    fn column_part(&self) -> Part {
        let span = self.shape.span as usize;
        Part { chunks: self.schedule.chunks as usize, width: self.g.width, run: self.g.run, span }
    }

    /// Bytes of shared memory in which half a block leaves `values` accumulators and `counts` counts
    /// for each of its columns.
    fn fold(&self, access: Access, values: usize, counts: usize) -> usize {
        BLOCK / 2 * (self.unit(access) * values * self.accumulator() + 4 * counts)
    }
}

pub(super) fn forward(b: &mut Builder, needs: &ForwardNeeds) -> Result<bool> {
    let tiles = b.tiles();
    if !needs.given {
        let part = b.column_part();
        b.scratch.part_moments = Some(b.reserve(3 * b.g.outer * part.chunks * part.width));
        b.set_part(part);
        b.launch_tiles(Kernel::ColumnMoments, tiles, b.fold(tiles.0, 3, 1))?;
        b.combine(Kernel::CombineMoments, part)?;
        b.passes(1);
    }
    if needs.output {
        b.launch_tiles(Kernel::ColumnForward, tiles, 0)?;
        b.passes(2);
    }
    Ok(true)
}

/// Launches the sums of columns; how they lie.
pub(super) fn sums(b: &mut Builder, write_dx: bool) -> Result<Part> {
    let tiles = b.tiles();
    let part = b.column_part();
    b.set_part(part);
    b.shape.flags |= flags::SUMS_WRITE;
    b.scratch.part_sums = Some(b.reserve(2 * b.g.outer * part.chunks * part.width));
    b.launch_tiles(Kernel::ColumnSums, tiles, b.fold(tiles.0, 2, 0))?;
    b.passes(2 + write_dx as usize);
    Ok(part)
}

pub(super) fn backward(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    if b.weights_per == WeightsPer::Row {
        return backward_rows(b, needs);
    }
    let own = needs.dx && !needs.fixed;
    if own || needs.params() {
        let part = sums(b, needs.dx && needs.fixed)?;
        b.after_sums(part, needs)?;
    }
    if own || ((needs.dx || needs.around) && !needs.params()) {
        launch_input_gradient(b, needs.fixed, needs.dx)?;
    }
    Ok(())
}

/// Parameters by row: their gradients come with dx, since both need the statistics of columns.
fn backward_rows(b: &mut Builder, needs: &BackwardNeeds) -> Result<()> {
    b.shape.flags |= flags::PART_WEIGHTED;
    if needs.dx && !needs.fixed {
        let part = sums(b, false)?;
        b.scratch.sums = Some(b.reserve(2 * b.g.sets()));
        b.combine(Kernel::CombineSums, part)?;
    }
    let tiles = b.tiles();
    b.launch_tiles(Kernel::ColumnBackward, tiles, 0)?;
    b.gradient_passes(!needs.fixed || needs.params(), needs.dx);
    match needs.params() {
        true => b.reduce_parts(b.g.outer * tiles.1, b.g.rows),
        false => Ok(()),
    }
}

pub(super) fn input_gradient(b: &mut Builder) -> Result<()> {
    launch_input_gradient(b, false, true)
}

fn launch_input_gradient(b: &mut Builder, fixed: bool, dx: bool) -> Result<()> {
    let tiles = b.tiles();
    b.gradient_passes(!fixed, dx);
    b.launch_tiles(Kernel::ColumnBackward, tiles, 0)
}
