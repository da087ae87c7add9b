//! Conversions exhaustively; cuts for all their shapes; levels by name.

use crate::cpu::element::Element;
use crate::cpu::parallel::for_each;
use crate::cpu::simd_level::Level;
use crate::cpu::tile::Cut;
use crate::geometry::{Geometry, WeightBy};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[test]
fn widening_is_exact_for_every_half() {
    for bits in 0..=u16::MAX {
        let (a, b) = (f16::from_bits(bits), bf16::from_bits(bits));
        let same =
            |ours: f32, theirs: f32| ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan();
        assert!(same(a.widen(), a.to_f32()), "f16 {bits:#06x}");
        assert!(same(b.widen(), b.to_f32()), "bf16 {bits:#06x}");
    }
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    // Every half, its neighbours in f32, and the points half way to the next half.
    let halves =
        (0..=u16::MAX).flat_map(|bits| [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()]);
    for x in halves {
        let near = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001];
        for x in near.map(|d| f32::from_bits(x.to_bits().wrapping_add(d))) {
            let (a, b) = (<f16 as Element>::narrow(x), <bf16 as Element>::narrow(x));
            assert!(a == f16::from_f32(x) || a.is_nan() && x.is_nan(), "f16 of {x:e}: {a:e}");
            assert!(b == bf16::from_f32(x) || b.is_nan() && x.is_nan(), "bf16 of {x:e}: {b:e}");
            assert_eq!(a.is_sign_negative(), x.is_sign_negative());
        }
    }
}

/// Each element in one tile; tiles of `Cut::new` that hold whole sets name them in order.
fn check_cut(g: &Geometry, cut: &Cut, whole: bool) {
    let mut seen = vec![0u8; g.elements()];
    let mut sets = vec![];
    for tile in cut.tiles() {
        assert!(!tile.rows.is_empty() && !tile.columns.is_empty(), "{g:?}: empty {tile:?}");
        tile.rows.clone().for_each(|r| tile.columns.clone().for_each(|c| seen[r * g.width + c] += 1));
        sets.extend(tile.sets(g));
        let params = tile.params(g);
        for (row, column) in
            [(tile.rows.start, tile.columns.start), (tile.rows.end - 1, tile.columns.end - 1)]
        {
            assert!(params.contains(&g.param(row % g.rows, column)), "{g:?}: {tile:?} has params {params:?}");
        }
    }
    assert!(seen.iter().all(|n| *n == 1), "{g:?} is not tiled by {cut:?}");
    if whole && g.elements() > 0 {
        assert_eq!(sets, (0..g.sets()).collect::<Vec<_>>(), "{g:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code in it, and hundreds of thousands of tiles")]
fn cuts_tile_every_shape() {
    let column = |span| WeightBy::Column { span };
    // Below and above the serial limit, whole sets and cut ones, odd numbers everywhere.
    let shapes = [
        (1, 1, 0, 0, column(1)),
        (3, 1, 7, 7, column(1)),
        (4097, 1, 129, 129, column(1)),
        (7, 1, 200_001, 200_001, column(1)),
        (2, 1, 3 * 100_003, 100_003, column(100_003)),
        (2, 1, 6 * 65_537, 3 * 65_537, column(65_537)),
        (5, 1, 320 * 49, 10 * 49, column(49)),
        (1, 33, 64 * 784, 784, column(784)),
        (1, 67, 3 * 4096, 4096, column(4096)),
        (1, 3, 3 * 100_003, 100_003, column(100_003)),
        (1, 33, 2048 * 49, 49, column(49)),
        (1, 100_003, 3, 1, column(1)),
        (1, 5003, 321, 1, column(1)),
        (3, 1024, 320, 10, column(1)),
        (9, 768, 197, 1, WeightBy::Row),
        (1, 64, 100_003, 1, WeightBy::Row),
        (2, 50_000, 256, 128, column(1)),
    ];
    for (outer, rows, width, run, weight_by) in shapes {
        let g = Geometry { outer, rows, width, run, weight_by, center: true };
        for bytes in [2, 4, 8, 16] {
            let cut = Cut::new(&g, bytes);
            check_cut(&g, &cut, cut.whole_sets());
            check_cut(&g, &cut.clone().with_tall_tiles(true), cut.whole_sets());
            check_cut(&g, &cut.columns_first(), false);
            check_cut(&g, &Cut::sweep(&g, bytes), false);
        }
    }
}

#[test]
fn levels_are_named_and_the_scalar_one_is_always_there() {
    let names: Vec<_> = Level::available().iter().map(|l| l.name()).collect();
    println!("levels tested on this machine: {names:?}");
    assert_eq!(names.last(), Some(&"scalar"));
    assert!(Level::named("sse9").is_err());
    for name in ["scalar", "avx2", "avx512"] {
        assert_eq!(Level::named(name).is_ok(), names.contains(&name), "{name}");
    }
}

#[test]
fn every_item_is_worked_on_once() {
    for (items, threads) in [(0, 2), (1, 3), (2, 2), (7, 2), (16, 3), (17, 5), (100, 7)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let seen: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
        let count = |i: usize| {
            seen[i].fetch_add(1, Ordering::Relaxed);
        };
        pool.install(|| for_each(0..items, usize::MAX, || (), |(), i| count(i)));
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{items} items, {threads} threads");
    }
}

/// By a thread that leaves long after the caller has found nothing left to do. ThreadSanitizer (`ci/memory.sh thread`) says
/// whether it is ordered: here it finds a caller that does not wait, and a thread that leaves without releasing what it wrote
/// and keeps its `Arc` for some milliseconds, whose count orders it otherwise.
#[test]
fn what_others_write_last_is_seen() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for _ in 0..10 {
        let (mut written, come) = ([0u64; 2], AtomicUsize::new(0));
        pool.install(|| {
            let caller = std::thread::current().id();
            for_each(
                written.iter_mut(),
                usize::MAX,
                || (),
                |(), out| {
                    come.fetch_add(1, Ordering::Relaxed);
                    let start = Instant::now();
                    while come.load(Ordering::Relaxed) < 2 && start.elapsed() < Duration::from_secs(2) {
                        std::thread::yield_now();
                    }
                    if std::thread::current().id() != caller {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    *out = 1;
                },
            );
            assert_eq!(written, [1; 2]);
        });
    }
}

#[test]
fn a_panic_of_any_thread_arrives() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let items = if cfg!(miri) { 6 } else { 40 };
    for bad in 0..items {
        let one = |_: &mut (), i: usize| {
            std::thread::sleep(Duration::from_micros(50));
            assert!(i != bad, "item {bad}");
        };
        let run = || pool.install(|| for_each(0..items, usize::MAX, || (), one));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err(), "item {bad}");
    }
}

/// Where `ALONE` of `parallel.rs` comes from: cargo test --release --lib -- what_a_thread_costs --ignored --nocapture
#[test]
#[ignore = "prints times"]
fn what_a_thread_costs() {
    let median = |mut f: Box<dyn FnMut()>| {
        let mut times: Vec<_> = (0..500)
            .map(|_| {
                std::thread::sleep(Duration::from_micros(200)); // the pool's threads fall asleep
                let start = Instant::now();
                f();
                start.elapsed()
            })
            .collect();
        times.sort();
        times[times.len() / 2]
    };
    rayon::in_place_scope(|scope| scope.spawn(|_| ())); // starts the pool
    let scope = || rayon::in_place_scope(|scope| scope.spawn(|_| ()));
    println!("a scope that waits for a thread: {:?}", median(Box::new(scope)));
    let door = || for_each(0..2, usize::MAX, || (), |(), _| ());
    println!("a thread that may come: {:?}", median(Box::new(door)));
}
