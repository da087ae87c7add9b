//! The plan as a table, and whether every walk of it runs in these tests.

use super::fused;
use super::kernels;
use super::ran;
use crate::cpu::affine::Form;
use crate::cpu::loops::{Conversions, Finishes, Fused, Loops};
use crate::cpu::plan::{past_from_of, Asked, BackwardPlan, ForwardPlan, Origin, Visit, Walk};
use crate::cpu::simd_level::Level;
use crate::fusion::{Activation, Fusion, Gate};
use crate::geometry::{Geometry, WeightBy};
use half::bf16;

fn walk(visit: &Option<Visit>) -> Option<Walk> {
    visit.as_ref().map(|v| v.walk)
}

/// Norm, `[outer, rows, width, run]`, span (0: by row); the forward's walks (statistics, y), with known
/// statistics, and the backward's (sums, dx) in training and evaluation.
type Row = (&'static str, [usize; 4], usize, (Option<Walk>, Walk), Walk, (Option<Walk>, Walk), Walk);

const TABLE: [Row; 12] = {
    use Walk::{Columns, Rows, Runs, Sets};
    [
        ("layer 4096x768", [4096, 1, 768, 768], 1, (None, Runs), Runs, (None, Runs), Runs),
        (
            "layer 3x1000000",
            [3, 1, 1_000_000, 1_000_000],
            1,
            (Some(Sets), Sets),
            Sets,
            (Some(Sets), Sets),
            Sets,
        ),
        ("layer, leading", [2, 768, 50, 1], 0, (None, Columns), Columns, (None, Columns), Columns),
        ("group 8x320x32x32", [8, 1, 327_680, 10_240], 1024, (None, Runs), Rows, (None, Sets), Rows),
        (
            "group 1x2x3000x100",
            [1, 1, 600_000, 300_000],
            150_000,
            (Some(Sets), Rows),
            Rows,
            (Some(Sets), Rows),
            Rows,
        ),
        (
            "group, channels last",
            [8, 1024, 320, 10],
            1,
            (None, Columns),
            Columns,
            (Some(Columns), Columns),
            Columns,
        ),
        ("group, channels last, wide", [2, 64, 320, 80], 1, (None, Sets), Sets, (None, Sets), Sets),
        ("instance 2x64x64x64", [2, 1, 262_144, 4096], 4096, (None, Runs), Rows, (None, Sets), Rows),
        ("batch 32x512x7x7", [1, 32, 25_088, 49], 49, (None, Rows), Rows, (None, Rows), Rows),
        ("batch 16x32x28x28", [1, 16, 25_088, 784], 784, (None, Sets), Rows, (None, Sets), Rows),
        (
            "batch 64x3x224x224",
            [1, 64, 150_528, 50_176],
            50_176,
            (Some(Sets), Rows),
            Rows,
            (Some(Sets), Rows),
            Rows,
        ),
        (
            "batch, channels last",
            [1, 50_000, 64, 1],
            1,
            (Some(Columns), Columns),
            Columns,
            (Some(Columns), Columns),
            Columns,
        ),
    ]
};

#[test]
fn plans_as_a_table() {
    for (name, [outer, rows, width, run], span, (statistics, y), given, (sums, dx), fixed) in TABLE {
        let weight_by = if span == 0 { WeightBy::Row } else { WeightBy::Column { span } };
        let g = Geometry { outer, rows, width, run, weight_by, center: true };
        let form = Form::of(&g, true);
        let plan = ForwardPlan::new(&g, form, 4, false);
        assert_eq!((walk(&plan.statistics), plan.y.walk), (statistics, y), "{name}");
        assert_eq!(plan.from, if statistics.is_some() { Origin::Given } else { Origin::Tile }, "{name}");
        assert!(plan.y.cut.whole_sets() || plan.from == Origin::Given, "{name}");
        let plan = ForwardPlan::new(&g, form, 4, true);
        assert_eq!((walk(&plan.statistics), plan.y.walk, plan.from), (None, given, Origin::Given), "{name}");
        let asked = |fixed| Asked { dx: true, params: true, fixed };
        let plan = BackwardPlan::new(&g, form, 8, asked(false));
        assert_eq!((walk(&plan.sums), walk(&plan.dx)), (sums, Some(dx)), "{name}");
        let plan = BackwardPlan::new(&g, form, 8, asked(true));
        assert_eq!((walk(&plan.sums), walk(&plan.dx), plan.means), (None, Some(fixed), None), "{name}");
    }
}

#[test]
fn a_cache_that_hundreds_share_is_not_one_threads() {
    let mib = |n: usize| n << 20;
    assert_eq!(past_from_of(mib(32), 2), mib(24));
    assert_eq!(past_from_of(mib(480), 2), mib(24));
    assert_eq!(past_from_of(mib(480), 60), mib(360));
}

/// A tile's own sums for every column are worth some rows, whatever else is asked for.
#[test]
fn tiles_that_sum_columns_are_tall() {
    let g = Geometry {
        outer: 2048,
        rows: 1,
        width: 4096,
        run: 4096,
        weight_by: WeightBy::Column { span: 1 },
        center: true,
    };
    for (dx, fixed) in [(true, false), (true, true), (false, false), (false, true)] {
        let plan = BackwardPlan::new(&g, Form::of(&g, true), 8, Asked { dx, params: true, fixed });
        let tiles = plan.dx.map(|visit| visit.cut.count());
        assert_eq!(tiles, Some(32), "dx {dx}, fixed {fixed}");
    }
}

/// `[outer, rows, width, run]`, span, bytes of an element, and whether y goes past the caches: in tests, from 256 KiB on of
/// what is read and written.
#[test]
fn what_goes_past_the_caches() {
    for (name, [outer, rows, width, run], per, bytes, past) in [
        ("layer 64x1024", [64, 1, 1024, 1024], 1, 4, true),
        ("layer 16x1024, which the caches hold", [16, 1, 1024, 1024], 1, 4, false),
        ("layer 4096x128", [4096, 1, 128, 128], 1, 4, true),
        ("layer 4096x128 bf16, short rows", [4096, 1, 128, 128], 1, 2, false),
        ("layer 64x1001, rows of no whole pieces", [64, 1, 1001, 1001], 1, 4, false),
        ("batch 32x256x7x7, rows of many runs", [1, 32, 256 * 49, 49], 49, 4, true),
        ("batch 9x3x7x7", [1, 900, 147, 49], 49, 4, false),
        ("batch 32x16x29x29, run by run", [1, 32, 16 * 841, 841], 841, 4, false),
        ("batch 32x16x28x28 bf16", [1, 32, 16 * 784, 784], 784, 2, true),
        ("batch, channels-last", [1, 2000, 128, 1], 1, 4, true),
        ("batch, channels-last, in tiles of 64 columns", [1, 1568, 2048, 1], 1, 2, false),
        ("batch, few channels last", [1, 9000, 64, 1], 1, 4, false),
    ] {
        let weight_by = WeightBy::Column { span: per };
        let g = Geometry { outer, rows, width, run, weight_by, center: true };
        let plan = ForwardPlan::new(&g, Form::of(&g, true), bytes, false);
        assert_eq!(plan.y.past_caches(bytes, 2 * bytes), past, "{name}: {:?}", plan.y.walk);
    }
}

/// Fails on a level's walk or loop that no test has reached: one for each type, which has code of its own. What it counts on
/// it runs by itself: which tests ran before depends on the number of threads.
#[test]
fn every_walk_and_loop_runs_at_every_level() {
    kernels::everywhere();
    fused::residuals();
    let fusion = Fusion { activation: Some(Activation::Silu), ..Fusion::default() };
    fused::everywhere(Fusion::default(), true);
    fused::everywhere(fusion, false);
    fused::everywhere(Fusion { activation: Some(Activation::HardSwish), ..fusion }, true);
    fused::everywhere(Fusion { gate: Some(Gate::Before), ..Fusion::default() }, false);
    let walks = ["forward Runs", "forward Sets", "forward Rows", "forward Columns", "backward Runs"]
        .into_iter()
        .chain(["backward Sets", "backward Rows", "backward Columns"])
        .chain(["moments Sets", "moments Columns", "sums Sets", "sums Columns"]);
    let loops: Vec<_> = walks.chain(Loops::<f32>::NAMES.iter().copied()).collect();
    for level in Level::available() {
        // f64 has no code for the widest.
        let f64s = if level.name() == "avx512" { "avx2" } else { level.name() };
        for what in &loops {
            assert!(ran::has::<f32>(level.name(), what), "{what} of f32 at {}", level.name());
            assert!(ran::has::<bf16>(level.name(), what), "{what} of bf16 at {}", level.name());
            assert!(ran::has::<f64>(f64s, what), "{what} of f64 at {f64s}");
        }
        let finishes = Finishes::<f32>::NAMES.iter().filter(|_| level.finishes_in_registers());
        for what in Conversions::<f32>::NAMES.iter().chain(finishes) {
            assert!(ran::has::<half::f16>(level.name(), what), "{what} of f16 at {}", level.name());
            assert!(ran::has::<bf16>(level.name(), what), "{what} of bf16 at {}", level.name());
        }
        for what in Fused::<f32>::NAMES {
            assert!(ran::has::<f32>(level.name(), what), "{what} of f32 at {}", level.name());
            assert!(ran::has::<f64>(f64s, what), "{what} of f64 at {f64s}");
        }
    }
}
