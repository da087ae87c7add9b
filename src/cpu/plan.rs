//! How an op runs: which walk, over which tiles, and whether its output goes past the caches.
//!
//! From shape, element size and what is asked for alone; what goes past the caches also by their size and the number of
//! threads. Apart, because these choices are made here, and can be read and tested as a table; whether a tile is staged is
//! for `forward.rs` and `backward.rs` to say.

use super::affine::Form;
use super::tile::{by_columns, Cut};
use crate::geometry::Geometry;
use std::sync::OnceLock;

/// The way through a tile (`walks/`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Walk {
    /// Set after set, each a single run in the tile: layer and RMS norm, and the forward of group and instance norm.
    Runs,
    /// Set after set, what is of one in the tile: several rows, a part of it, or a run of several spans backward.
    Sets,
    /// Row after row, the sets side by side, by span: batch norm over small images, and known statistics.
    Rows,
    /// Row after row, every column summed for itself: channels-last, and a weight per row.
    Columns,
}

/// One pass over a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Visit {
    pub walk: Walk,
    pub cut: Cut,
}

/// Where a pass takes the statistics from, or the backward's means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The tile, which holds whole sets.
    Tile,
    /// The caller, or the pass before.
    Given,
}

/// Elements of a run up to which sets are walked side by side: less than a page.
const LONGEST_RUN_ABREAST: usize = 512;

impl Visit {
    fn new(g: &Geometry, form: Form, cut: Cut, from: Origin, backward: bool) -> Visit {
        // Sets one behind the other, without gaps.
        let single = g.rows == 1 && cut.whole_runs() && (form != Form::PerColumn || g.run == g.width);
        // Several sets to a tile, of several rows, and one parameter each.
        let side_by_side =
            g.outer == 1 && g.rows > 1 && g.run <= LONGEST_RUN_ABREAST && g.one_param_per_set();
        let spans = matches!(form, Form::PerSpan(_));
        let walk = match from {
            _ if by_columns(g) => Walk::Columns,
            Origin::Tile if side_by_side => Walk::Rows,
            Origin::Given if spans => Walk::Rows,
            // A set's sums are by span in the backward.
            _ if single && !(backward && spans) => Walk::Runs,
            _ => Walk::Sets,
        };
        Visit { walk, cut }
    }

    /// The walk over the same tiles that makes z of known statistics.
    pub fn back_to_z(&self, g: &Geometry, form: Form) -> Walk {
        Visit::new(g, form, self.cut.clone(), Origin::Given, false).walk
    }

    /// Sums of sets that are cut.
    fn sums(g: &Geometry, cut: Cut) -> Visit {
        Visit { walk: if by_columns(g) { Walk::Columns } else { Walk::Sets }, cut }
    }
}

/// A forward: the statistics first, where sets are cut; then y.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForwardPlan {
    pub statistics: Option<Visit>,
    pub y: Visit,
    pub from: Origin,
}

impl ForwardPlan {
    /// `bytes` of an element of x; `given`: the statistics are known.
    pub fn new(g: &Geometry, form: Form, bytes: usize, given: bool) -> ForwardPlan {
        let cut = Cut::new(g, bytes);
        if !given && cut.whole_sets() {
            return ForwardPlan {
                statistics: None,
                y: Visit::new(g, form, cut, Origin::Tile, false),
                from: Origin::Tile,
            };
        }
        let statistics = (!given).then(|| Visit::sums(g, cut));
        let y = Visit::new(g, form, Cut::sweep(g, bytes), Origin::Given, false);
        ForwardPlan { statistics, y, from: Origin::Given }
    }

    /// The statistics alone.
    pub fn statistics(g: &Geometry, bytes: usize) -> Visit {
        Visit::sums(g, Cut::new(g, bytes))
    }
}

/// A backward: the sums of sets that are cut; then dx. One of the two makes the parameters' gradients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BackwardPlan {
    pub sums: Option<Visit>,
    pub dx: Option<Visit>,
    /// Where dx takes its means from; `None`: the statistics did not depend on x, there are none.
    pub means: Option<Origin>,
}

/// What a backward is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub dx: bool,
    pub params: bool,
    /// The statistics did not depend on x.
    pub fixed: bool,
}

impl BackwardPlan {
    /// `bytes` of an element of x and of dy.
    pub fn new(g: &Geometry, form: Form, bytes: usize, asked: Asked) -> BackwardPlan {
        let spans = matches!(form, Form::PerSpan(_));
        let visit = |cut, from| Some(Visit::new(g, form, cut, from, true));
        let by_column = asked.params && form == Form::PerColumn;
        let sweep = || Cut::sweep(g, bytes).with_tall_tiles(by_column);
        if !asked.dx && !asked.params {
            return BackwardPlan { sums: None, dx: None, means: None };
        }
        if !asked.dx && spans {
            return BackwardPlan { sums: Some(BackwardPlan::param_sums(g, bytes)), dx: None, means: None };
        }
        if !asked.dx || asked.fixed {
            return BackwardPlan { sums: None, dx: visit(sweep(), Origin::Given), means: None };
        }
        let cut = Cut::new(g, bytes).with_tall_tiles(by_column);
        if cut.whole_sets() {
            return BackwardPlan { sums: None, dx: visit(cut, Origin::Tile), means: Some(Origin::Tile) };
        }
        let dx = if form == Form::PerColumn { cut.columns_first() } else { sweep() };
        let sums = Some(Visit::sums(g, cut));
        BackwardPlan { sums, dx: visit(dx, Origin::Given), means: Some(Origin::Given) }
    }

    /// Whether dx, of `bytes` an element as x and dy are, is written past the caches.
    pub fn dx_past_caches(&self, bytes: usize) -> bool {
        self.dx.as_ref().is_some_and(|visit| visit.past_caches(bytes, 3 * bytes))
    }

    /// dx alone, from known means.
    pub fn from_means(g: &Geometry, form: Form, bytes: usize) -> BackwardPlan {
        let dx = Some(Visit::new(g, form, Cut::sweep(g, bytes), Origin::Given, true));
        BackwardPlan { sums: None, dx, means: Some(Origin::Given) }
    }

    /// Gradients of the parameters alone.
    pub fn param_sums(g: &Geometry, bytes: usize) -> Visit {
        Visit::sums(g, Cut::new(g, bytes))
    }
}

/// Bytes from which what a loop writes in one piece goes past the caches: a line that two stores share, of which one goes
/// through the caches, costs more than is saved; hence the 16 bytes, too. LayerNorm of 65536x128 on a Zen 4, f32 (512 bytes):
/// 1.2 to 1.4 times as fast past the caches; bf16 (256): up to 1.5 times slower.
const PAST_ROW: usize = 512;

impl Visit {
    /// Whether an output is written past the caches, of `bytes` an element. `all`: of it and of x, of a residual and its sum,
    /// or of dy; skip and gate are not counted. Where these do not fit together, an output that goes through the caches has
    /// lost its beginning when somebody reads it from there, and what is read is lost, too. LayerNorm of 4096x1024 f32 on two
    /// threads of a Zen 4, 32 MiB of cache for 16 MiB each of x and y: 1.7 times as fast past them, and with y read afterwards
    /// 1.2 times; at 12 MiB in all no difference. Batch norm of 64x256x14x14, 13 MB each: 1.7 times.
    pub fn past_caches(&self, bytes: usize, all: usize) -> bool {
        let g = self.cut.geometry();
        let row = bytes
            * match self.walk {
                Walk::Rows | Walk::Columns => self.cut.columns(),
                Walk::Runs | Walk::Sets => g.run,
            };
        row.is_multiple_of(16) && row >= PAST_ROW && g.elements() * all >= past_from()
    }
}

/// Bytes of the last-level cache that a thread can have at most. A virtual machine reports all of its host's,
/// which hundreds of others may use: 480 MiB for two threads. Of a server's an even share is 4 MiB a core, 12 MiB
/// on those with the most (EPYC 9684X: 1152 MiB for 96).
const OF_A_THREAD: usize = 16 << 20;

/// Bytes that the caches will not keep: three quarters of what the threads have of the last-level one, which is 32 MiB where
/// the system does not tell.
fn past_from() -> usize {
    if cfg!(test) {
        return 256 << 10; // within reach of tests
    }
    static CACHE: OnceLock<usize> = OnceLock::new();
    let cache = *CACHE.get_or_init(|| {
        let cache = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok();
        let kib = cache.and_then(|size| size.trim().strip_suffix('K')?.parse::<usize>().ok());
        kib.unwrap_or(32 << 10) * 1024
    });
    past_from_of(cache, rayon::current_num_threads())
}

/// The same, of a cache that `threads` share.
pub(super) fn past_from_of(cache: usize, threads: usize) -> usize {
    cache.min(OF_A_THREAD.saturating_mul(threads)) / 4 * 3
}
