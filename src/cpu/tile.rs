//! How a tensor is cut into tiles: by its shape and element size alone.
//!
//! Never by the number of threads: the cut decides the order of every sum, and so its last bits. Whether and
//! where a set itself is cut is decided by the set alone, never by how many there are: the result of a row does
//! not change with the rows beside it.
//! A tile is a rectangle of the tensor seen as a matrix of `outer * rows` rows and `width` columns.

use crate::geometry::{Geometry, WeightBy};
use std::ops::Range;

/// Miri is thousands of times slower: under it, tensors of a few KiB are cut as megabytes are elsewhere.
const SMALLER: usize = if cfg!(miri) { 256 } else { 1 };
/// Bytes of input in a tile: enough for a thread to forget the cost of fetching work, few enough for
/// the second-level cache to hold what is read twice, and written.
const TILE_BYTES: usize = (256 << 10) / SMALLER;
/// Sets above `TILE_BYTES` are summed in one sweep and normalized in another; above this where a block has many.
const WHOLE_SET_OF_MANY_BYTES: usize = (512 << 10) / SMALLER;
/// Below this, all is done in one tile, on the calling thread: handing work over costs microseconds.
const SERIAL_BYTES: usize = (64 << 10) / SMALLER;
/// Tiles wanted at least from a tensor above `SERIAL_BYTES`, for threads to share.
const MIN_TILES: usize = 16;
/// Rows that repay a tile's own sums for every column.
const TALL: usize = 64;
/// Rows that repay the merging of a column's pieces.
const MERGED_ROWS: usize = 256;
/// Columns that are walked side by side where sets are columns: full cache lines, full vectors.
const COLUMNS_ABREAST: usize = 64;

/// Shorter runs are all tail of a vector; where a set has many rows, these repay the merging of columns.
const SHORT_RUN: usize = 16;

/// Whether each column is summed for itself, along the rows; else elements are summed along the runs.
pub(super) fn by_columns(g: &Geometry) -> bool {
    g.rows > 1 && g.run < SHORT_RUN || g.weight_by == WeightBy::Row
}

/// A rectangle of the matrix `[outer * rows, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

impl Tile {
    /// The sets it touches: neighbours, in the order of sets.
    pub fn sets(&self, g: &Geometry) -> Range<usize> {
        if self.rows.is_empty() || self.columns.is_empty() {
            return 0..0;
        }
        let (first, last) = (self.rows.start / g.rows, (self.rows.end - 1) / g.rows);
        let spo = g.sets_per_outer();
        first * spo + self.columns.start / g.run..last * spo + (self.columns.end - 1) / g.run + 1
    }

    /// The parameters it touches.
    pub fn params(&self, g: &Geometry) -> Range<usize> {
        match g.weight_by {
            _ if self.rows.is_empty() || self.columns.is_empty() => 0..0,
            WeightBy::Column { span } => self.columns.start / span..(self.columns.end - 1) / span + 1,
            // Rows of several blocks: all of a block's.
            WeightBy::Row if self.rows.len() >= g.rows => 0..g.rows,
            WeightBy::Row => self.rows.start % g.rows..(self.rows.end - 1) % g.rows + 1,
        }
    }
}

/// The smallest tile of whole sets.
struct MinTile {
    columns: usize,
    /// How many lie side by side in a block; at most one where that would depend on the sets beside.
    across: usize,
}

impl MinTile {
    fn of(g: &Geometry) -> MinTile {
        let (side_by_side, width) = (COLUMNS_ABREAST / g.run.max(1) * g.run, g.width);
        if !by_columns(g) {
            return MinTile { columns: g.run, across: g.sets_per_outer() };
        }
        if g.weight_by == WeightBy::Row {
            // The width is other dimensions' (perhaps the batch), so it decides nothing.
            return MinTile { columns: side_by_side, across: 1 };
        }
        let columns = side_by_side.max(g.run).min(width);
        MinTile { columns, across: width.checked_div(columns).unwrap_or(0) }
    }

    /// Whether sets stay whole: small ones, and larger ones where a block has enough to share out.
    fn whole(&self, g: &Geometry, bytes: usize) -> bool {
        let size = g.rows * self.columns * bytes;
        let many = self.across >= MIN_TILES / 2 || g.weight_by == WeightBy::Row;
        size < TILE_BYTES || size <= WHOLE_SET_OF_MANY_BYTES && many
    }
}

/// A grid of tiles over a tensor: `outers == 1` or rows are whole, `sets == 1` or runs are whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cut {
    g: Geometry,
    /// Blocks in a tile.
    outers: usize,
    /// Rows of a block in a tile.
    rows: usize,
    /// Sets side by side in a tile.
    sets: usize,
    /// Columns of a run in a tile.
    run: usize,
}

impl Cut {
    /// The cut for an op that visits each set twice. `bytes`: of an element of x, and of dy.
    pub fn new(g: &Geometry, bytes: usize) -> Cut {
        let mut cut = Cut { g: *g, outers: g.outer, rows: g.rows, sets: g.sets_per_outer(), run: g.run };
        let least = MinTile::of(g);
        if !least.whole(g, bytes) {
            cut.outers = 1;
            cut.split(
                (g.rows * least.columns * bytes / MIN_TILES).clamp(SERIAL_BYTES / 4, TILE_BYTES) / bytes,
            );
            return cut;
        }
        let total = g.elements() * bytes;
        if total <= SERIAL_BYTES {
            return cut;
        }
        let target = (total / MIN_TILES).clamp(SERIAL_BYTES / 4, TILE_BYTES) / bytes;
        let block = g.block_len();
        if block <= target {
            cut.outers = even(g.outer, target / block);
            return cut;
        }
        cut.outers = 1;
        cut.sets = even(cut.sets, (target / g.rows).max(least.columns) / g.run);
        cut
    }

    /// The cut for an op that visits each element once, in the order of memory.
    pub fn sweep(g: &Geometry, bytes: usize) -> Cut {
        let mut cut = Cut { g: *g, outers: g.outer, rows: g.rows, sets: g.sets_per_outer(), run: g.run };
        let total = g.elements() * bytes;
        if total <= SERIAL_BYTES {
            return cut;
        }
        let target = (total / MIN_TILES).clamp(SERIAL_BYTES / 4, TILE_BYTES) / bytes;
        if g.block_len() <= target {
            cut.outers = even(g.outer, target / g.block_len());
            return cut;
        }
        cut.outers = 1;
        cut.rows = even(g.rows, target / g.width);
        if g.width > target {
            cut.sets = even(cut.sets, target / g.run);
        }
        if g.run > target {
            cut.run = cut.even_run(target);
        }
        cut
    }

    /// Cuts inside sets, into about `target` elements.
    fn split(&mut self, target: usize) {
        let g = self.g;
        if by_columns(&g) {
            let columns = (target / MERGED_ROWS).max(COLUMNS_ABREAST) / g.run * g.run;
            self.sets = even(self.sets, columns / g.run);
            // Columns that are sets of their own may be few or many: the rows do not follow them.
            let columns = if g.weight_by == WeightBy::Row { columns } else { self.sets * g.run };
            self.rows = even(g.rows, (target / columns).max(1));
            return;
        }
        self.sets = 1;
        if g.run >= target {
            self.rows = 1;
            self.run = self.even_run(target);
        } else {
            self.rows = even(g.rows, (target / g.run).max(1));
        }
    }

    /// Near `target`, and whole spans or a part of one.
    fn even_run(&self, target: usize) -> usize {
        let span = match self.g.weight_by {
            WeightBy::Column { span } => span,
            WeightBy::Row => 1,
        };
        if span == self.g.run {
            // Whole cache lines of any dtype, whole vectors of any level.
            even(span, target).next_multiple_of(64)
        } else if span <= target {
            even(self.g.run / span, target / span) * span
        } else {
            // Parts of a span must not straddle two: an exact divisor, or the whole span.
            let parts = span.div_ceil(target);
            (parts..2 * parts).find(|p| span % p == 0).map_or(span, |p| span / p)
        }
    }

    /// With more rows per tile, if a tile has sums for every column: they are worth a row or two of
    /// traffic each. `by_column`: it has.
    pub fn with_tall_tiles(mut self, by_column: bool) -> Cut {
        if by_column && self.whole_sets() && self.outers < self.g.outer && self.g.rows == 1 {
            self.outers = even(self.g.outer, self.outers.max(TALL.min(self.g.outer / MIN_TILES)));
        }
        self
    }

    /// The cut for a sweep that only needs each element once, of a tensor that `self` cuts inside
    /// sets: with columns kept together over all blocks where runs are cut, so that a tile sums a
    /// column's parameter gradient over all of them.
    pub fn columns_first(&self) -> Cut {
        if self.rows < self.g.rows {
            return self.clone();
        }
        Cut { outers: self.g.outer, ..self.clone() }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.g
    }

    /// The columns of a tile, at most.
    pub fn columns(&self) -> usize {
        self.run.min(self.g.run) * self.sets
    }

    /// Whether every run lies within one tile.
    pub fn whole_runs(&self) -> bool {
        self.run >= self.g.run
    }

    /// Whether every set lies within one tile.
    pub fn whole_sets(&self) -> bool {
        self.rows >= self.g.rows && self.whole_runs()
    }

    fn grid(&self) -> (usize, usize) {
        if self.g.elements() == 0 {
            return (0, 0);
        }
        let g = &self.g;
        let down = match self.rows < g.rows {
            true => g.outer * g.rows.div_ceil(self.rows),
            false => g.outer.div_ceil(self.outers),
        };
        let across = match self.run < g.run {
            true => g.sets_per_outer() * g.run.div_ceil(self.run),
            false => g.sets_per_outer().div_ceil(self.sets),
        };
        (down, across)
    }

    /// All tiles, in the order in which partial results are merged.
    pub fn tiles(&self) -> Vec<Tile> {
        (0..self.count()).map(|i| self.tile(i)).collect()
    }

    pub fn count(&self) -> usize {
        let (down, across) = self.grid();
        down * across
    }

    /// The tile in place `i < count()`.
    pub fn tile(&self, i: usize) -> Tile {
        let (_, across) = self.grid();
        Tile {
            rows: part(i / across, self.rows, self.g.rows, self.outers, self.g.outer),
            columns: part(i % across, self.run, self.g.run, self.sets, self.g.sets_per_outer()),
        }
    }
}

/// Part `i` of `count` units of `unit` elements: `step` elements of one unit, or `units` whole ones.
fn part(i: usize, step: usize, unit: usize, units: usize, count: usize) -> Range<usize> {
    if step < unit {
        let per_unit = unit.div_ceil(step);
        let (at, from) = (i / per_unit * unit, i % per_unit * step);
        at + from..at + (from + step).min(unit)
    } else {
        i * units * unit..((i + 1) * units).min(count) * unit
    }
}

/// The largest step up to `most` that cuts `count` into as few and as equal parts as that allows.
fn even(count: usize, most: usize) -> usize {
    let parts = count.div_ceil(most.max(1)).max(1);
    count.div_ceil(parts).max(1)
}
