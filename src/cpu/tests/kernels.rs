//! Forward and backward at every level against the oracle.

use super::case::{Case, DY, X};
use super::oracle;
use crate::cpu::loops::Stored;
use crate::cpu::simd_level::Level;
use crate::fusion::Fusion;
use crate::geometry::{Geometry, WeightBy};
use crate::request::Want;
use candle_core::{CpuStorage, DType, Result, WithDType};
use half::{bf16, f16};

pub(super) const EPS: f64 = 1e-5;

pub(super) fn geometry(outer: usize, rows: usize, width: usize, run: usize, weight_by: WeightBy) -> Geometry {
    Geometry { outer, rows, width, run, weight_by, center: true }
}

pub(super) fn span(span: usize) -> WeightBy {
    WeightBy::Column { span }
}

/// Small shapes: for each way of walking, lengths around vectors and panels, and primes.
fn small() -> Vec<Geometry> {
    let mut all = vec![];
    // Layer norm, and group norm with a span: one row per set.
    for n in [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 768, 1009, 4095, 4096, 4097, 8193] {
        all.push(geometry(3, 1, n, n, span(1)));
        all.push(geometry(2, 1, 3 * n, n, span(n)));
        all.push(geometry(2, 1, 6 * n, 3 * n, span(n)));
    }
    // Batch norm: sets of several rows; runs on both sides of the limit for columns.
    for (rows, run) in
        [(2, 5), (3, 20), (9, 20), (8, 49), (33, 49), (7, 49), (5, 63), (5, 64), (9, 196), (3, 4099)]
    {
        all.push(geometry(1, rows, 3 * run, run, span(run)));
    }
    // Channels-last: batch norm, and group norm with short and long runs.
    for (rows, width) in
        [(2, 1), (5, 3), (64, 3), (65, 16), (129, 17), (70, 47), (1000, 7), (31, 64), (130, 200)]
    {
        all.push(geometry(1, rows, width, 1, span(1)));
    }
    for (rows, groups, run) in
        [(4, 2, 3), (65, 3, 5), (49, 4, 8), (130, 7, 10), (20, 2, 60), (20, 2, 65), (3, 3, 130)]
    {
        all.push(geometry(2, rows, groups * run, run, span(1)));
    }
    // Layer norm over a leading dimension: parameters by row.
    for (rows, width) in [(1, 5), (2, 2), (3, 17), (64, 65), (100, 16), (130, 31), (96, 49), (5, 4100)] {
        all.push(geometry(2, rows, width, 1, WeightBy::Row));
    }
    all.retain(|g| !cfg!(miri) || g.elements() < 150);
    all
}

/// Shapes above the limits in `tile.rs`, which are cut in every way there is.
fn large() -> Vec<Geometry> {
    if cfg!(miri) {
        return above_the_limits_of_miri();
    }
    vec![
        geometry(700, 1, 131, 131, span(1)),
        geometry(65, 1, 3001, 3001, span(1)),
        // Large enough, in tests, to be written past the caches.
        geometry(130, 1, 1024, 1024, span(1)),
        // Layer norm with sets that are cut.
        geometry(3, 1, 200_003, 200_003, span(1)),
        // Group norm: whole sets, and cut ones, within spans and over them.
        geometry(4, 1, 64 * 400, 2 * 400, span(400)),
        geometry(1, 1, 4 * 70_000, 2 * 70_000, span(70_000)),
        geometry(1, 1, 2 * 300 * 1001, 300 * 1001, span(1001)),
        geometry(2, 1, 20_000 * 9, 10_000 * 9, span(9)),
        // Batch norm: whole sets, cut ones, and a single channel.
        geometry(1, 16, 32 * 300, 300, span(300)),
        geometry(1, 64, 3 * 1024, 1024, span(1024)),
        geometry(1, 2, 150_001, 150_001, span(150_001)),
        geometry(1, 32, 200 * 49, 49, span(49)),
        // Channels-last: few columns, many, and groups.
        geometry(1, 50_001, 3, 1, span(1)),
        geometry(1, 3001, 100, 1, span(1)),
        geometry(1, 20_011, 33, 1, span(1)),
        geometry(2, 1024, 160, 10, span(1)),
        geometry(1, 3000, 160, 80, span(1)),
        geometry(5, 768, 50, 1, WeightBy::Row),
        geometry(1, 2050, 130, 1, WeightBy::Row),
    ]
}

/// Where `tile.rs` has smaller limits: every kind of cut once more.
fn above_the_limits_of_miri() -> Vec<Geometry> {
    vec![
        geometry(40, 1, 13, 13, span(1)),
        geometry(2, 1, 2003, 2003, span(1)),
        geometry(2, 1, 6 * 30, 2 * 30, span(30)),
        geometry(1, 1, 2 * 1100, 2 * 550, span(550)),
        geometry(1, 8, 3 * 33, 33, span(33)),
        geometry(1, 3, 2 * 601, 601, span(601)),
        geometry(1, 301, 3, 1, span(1)),
        geometry(2, 40, 12, 3, span(1)),
        geometry(1, 130, 9, 1, WeightBy::Row),
    ]
}

/// A norm with nothing around it.
fn plain<T: Stored>(g: Geometry) -> Case {
    Case::new::<T, T::Acc>(g, Fusion::default(), [0.5, 2.0])
}

fn all_to64<T: WithDType>(v: &[T]) -> Vec<f64> {
    v.iter().map(|x| x.to_f64()).collect()
}

pub(super) fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0f64, |m, x| m.max(x.abs()))
}

/// Largest error, relative to the larger of the expected value and a tenth of `scale`.
pub(super) fn worst(got: &[f64], expected: &[f64], scale: f64) -> f64 {
    assert_eq!(got.len(), expected.len());
    let error = |(g, e): (&f64, &f64)| match g == e {
        true => 0.0,
        false => (g - e).abs() / e.abs().max(0.1 * scale),
    };
    got.iter().zip(expected).map(error).fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

/// Unit roundoff of a dtype.
pub(super) fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F32 => f32::EPSILON as f64 / 2.0,
        DType::F16 => f16::EPSILON.to_f64() / 2.0,
        _ => bf16::EPSILON.to_f64() / 2.0,
    }
}

/// Some tens of roundings in the accumulation type; for f64 the oracle's own on top, which does not
/// keep its means to more than f64.
pub(super) fn noise<T: Stored>() -> f64 {
    let oracle = if T::DTYPE == DType::F64 { 400.0 } else { 0.0 };
    (40.0 + oracle) * unit(T::Acc::DTYPE)
}

/// One rounding to T, and the noise.
pub(super) fn tolerance<T: Stored>() -> f64 {
    1.01 * unit(T::DTYPE) + noise::<T>()
}

/// Sums of n terms in lanes and panels: the error grows like a random walk; in f64 it is rather the
/// oracle's, which sums one by one.
pub(super) fn sum_tolerance<T: Stored>(n: usize) -> f64 {
    let growth = if T::DTYPE == DType::F64 { n as f64 } else { 4.0 * (n as f64).sqrt() };
    noise::<T>() + growth * unit(T::Acc::DTYPE)
}

const ALL: Want =
    Want { dx: true, dweight: Some(DType::F64), dbias: Some(DType::F64), dskip: false, dgate: false };

fn check<T: Stored>(level: Level, mut g: Geometry, center: bool) {
    g.center = center;
    let c = plain::<T>(g);
    let [x, dy, w, b, ..] = &c.exact;
    let exact = oracle::statistics(&g, x);
    let what = |part: &str| format!("{part} at {} of {:?}, {g:?}", level.name(), T::DTYPE);

    let (y, stats) = c.forward::<T>(level);
    let expected = oracle::forward(&g, EPS, x, &exact, w, b);
    // A set of one element, or of equal ones, leaves the bias and rounding errors times 1/sqrt(eps).
    let error = worst(&all_to64(&y), &expected, largest(&expected));
    assert!(error < tolerance::<T>(), "{}: {error:e}", what("y"));

    for fixed in [false, true] {
        let expected = oracle::backward(&g, EPS, x, dy, &exact, w, fixed);
        let per_param = sum_tolerance::<T>(g.elements() / g.params().max(1));
        let limits = [tolerance::<T>() + sum_tolerance::<T>(1), per_param, per_param];
        // dx is a difference; of small sets it may vanish, but not the rounding of its terms.
        let terms = &oracle::backward(&g, EPS, x, dy, &exact, w, true)[0];
        // Sums of either sign may cancel, but not the rounding on the way.
        let walk = (g.elements() as f64 / g.params().max(1) as f64).sqrt();
        let scales = [largest(terms), largest(&expected[1]).max(walk), largest(&expected[2]).max(walk)];
        let compare = |got: [Option<Vec<f64>>; 3], wanted: [bool; 3]| {
            for (i, name) in ["dx", "dweight", "dbias"].into_iter().enumerate() {
                let name = what(&format!("{name} (fixed {fixed}, wanted {wanted:?})"));
                assert_eq!(got[i].is_some(), wanted[i], "{name}");
                let Some(got) = &got[i] else { continue };
                let error = worst(got, &expected[i], scales[i]);
                assert!(error < limits[i], "{name}: {error:e} > {:e}", limits[i]);
            }
        };
        compare(c.backward::<T>(level, &stats, fixed, ALL), [true; 3]);
        let lone = Want { dx: true, ..Want::default() };
        compare(c.backward::<T>(level, &stats, fixed, lone), [true, false, false]);
        compare(c.backward::<T>(level, &stats, fixed, Want { dx: false, ..ALL }), [false, true, true]);
    }
}

fn check_all<T: Stored>(shapes: &[Geometry]) {
    for level in Level::available() {
        shapes.iter().for_each(|g| check::<T>(level, *g, true));
    }
}

#[test]
fn without_centering() {
    for level in Level::available() {
        small().into_iter().for_each(|g| check::<f32>(level, g, false));
        large().into_iter().step_by(3).for_each(|g| check::<bf16>(level, g, false));
    }
}

/// Plain norms of every type that is walked, on whole sets and on some that are cut.
pub(super) fn everywhere() {
    let cut = [geometry(1, 2, 150_001, 150_001, span(150_001)), geometry(1, 50_001, 3, 1, span(1))];
    let shapes = [small(), cut.to_vec()].concat();
    check_all::<f32>(&shapes);
    check_all::<f64>(&shapes);
    check_all::<bf16>(&shapes);
}

#[test]
fn f32_small() {
    check_all::<f32>(&small());
}

#[test]
fn f64_small() {
    check_all::<f64>(&small());
}

#[test]
fn f16_small() {
    check_all::<f16>(&small());
}

#[test]
fn bf16_small() {
    check_all::<bf16>(&small());
}

#[test]
fn f32_large() {
    check_all::<f32>(&large());
}

#[test]
fn bf16_large() {
    check_all::<bf16>(&large());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for g in large() {
        let c = plain::<f32>(g);
        let all = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let level = Level::available()[0];
                let (y, stats) = c.forward::<f32>(level);
                let gradients = c.backward::<f32>(level, &stats, false, ALL);
                let fixed = c.backward::<f32>(level, &stats, true, ALL);
                (y, stats, gradients, fixed)
            })
        };
        let one = all(1);
        assert!(one == all(2) && one == all(5), "{g:?}");
    }
    Ok(())
}

/// `T`'s elements of a storage.
fn elements<T: WithDType>(storage: &CpuStorage) -> Vec<T> {
    T::cpu_storage_as_slice(storage).unwrap().to_vec()
}

fn not_finite<T: Stored>(g: Geometry) {
    let (clean, mut dirty) = (plain::<T>(g), plain::<T>(g));
    let [mut x, mut dy] = [X, DY].map(|i| elements::<T>(&dirty.storages[i]));
    // The last element of the first set, and the first one of the last.
    let last = (g.rows - 1) * g.width + g.run - 1;
    (x[last], dy[last]) = (T::from_f64(f64::NAN), T::from_f64(f64::INFINITY));
    x[g.first(g.sets() - 1)] = T::from_f64(f64::INFINITY);
    (dirty.storages[X], dirty.storages[DY]) = (T::to_cpu_storage_owned(x), T::to_cpu_storage_owned(dy));
    for level in Level::available() {
        let run = |case: &Case| {
            let (y, stats) = case.forward::<T>(level);
            let [dx, ..] = case.backward::<T>(level, &stats, false, ALL);
            (all_to64(&y), dx.unwrap())
        };
        let ((y, dx), (dirty_y, dirty_dx)) = (run(&clean), run(&dirty));
        for i in 0..y.len() {
            let set = i / g.block_len() * g.sets_per_outer() + i % g.width / g.run;
            let what = format!("element {i} at {} of {:?}, {g:?}", level.name(), T::DTYPE);
            if set == 0 || set == g.sets() - 1 {
                // Of a single element the deviation from itself is NaN, too.
                assert!(dirty_y[i].is_nan() && dirty_dx[i].is_nan(), "{what}");
            } else {
                assert!(y[i] == dirty_y[i] && dx[i] == dirty_dx[i], "{what}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_set() {
    for g in small().into_iter().filter(|g| g.sets() > 1) {
        not_finite::<f32>(g);
        not_finite::<bf16>(g);
        not_finite::<f16>(g);
    }
}

#[test]
fn far_from_zero() {
    // In the last, what a mean rounded to f32 leaves behind is a few percent of the deviation.
    for (mean, std) in [(1e4, 1.0), (1e3, 0.1), (1e4, 0.01)] {
        // A few elements may by chance lie closer together than f32 can tell apart.
        for g in small().into_iter().filter(|g| g.set_len() > 40) {
            let c = Case::new::<f32, f32>(g, Fusion::default(), [mean, std]);
            let [x, _, w, b, ..] = &c.exact;
            let expected = oracle::forward(&g, EPS, x, &oracle::statistics(&g, x), w, b);
            for level in Level::available() {
                let y = all_to64(&c.forward::<f32>(level).0);
                let square = |v: f64| v * v;
                let off: f64 = y.iter().zip(&expected).map(|(y, e)| square(y - e)).sum();
                let error = (off / expected.iter().map(|e| square(*e)).sum::<f64>()).sqrt();
                assert!(error < 1e-6, "{error:e} at mean {mean:e}, {} of {g:?}", level.name());
            }
        }
    }
}

/// Past the caches, from any place to any, and nothing beside.
#[test]
#[allow(unsafe_code)]
fn a_strip_is_written_in_full_and_nothing_beside_it() {
    use crate::cpu::loops::Conversions;
    use crate::cpu::tile::Tile;
    use crate::cpu::view::{OutTile, Strided};
    let x: Vec<f32> = (0..1400).map(|i| i as f32).collect();
    for level in Level::available() {
        for n in (1..90).chain([255, 256, 257, 511, 513, 1024, 1300]) {
            for at in 0..20 {
                let mut y = vec![-1f32; at + n + 20];
                let tile = Tile { rows: 0..1, columns: 0..n };
                // SAFETY: the vector has `n` elements from `at` on, and nobody else has it.
                let mut out = unsafe { OutTile::new(y[at..].as_mut_ptr(), n, tile, true) };
                Conversions::<f32>::of(level).narrow(Strided::row_of(&x[..n]), out.whole());
                drop(out);
                assert_eq!(y[at..at + n], x[..n], "{} {n} from {at} on", level.name());
                assert!(y[..at].iter().chain(&y[at + n..]).all(|y| *y == -1.), "{} {n} {at}", level.name());
            }
        }
    }
}
