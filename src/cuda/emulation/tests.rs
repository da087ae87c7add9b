//! Every kernel of the ladder on the emulated devices, against the formulas in f64.
//!
//! The suite under `tests/` speaks to the public API on one emulated device; here the geometry and the
//! device are chosen so that every entry point runs, and a count says that it did.

use super::{launches, Emulated};
use crate::cuda::machine::Machine;
use crate::cuda::plan::DeviceProperties;
use crate::cuda::{run_backward, run_forward, run_gradient_sums, run_input_gradient, run_statistics};
use crate::geometry::{Geometry, WeightBy};
use crate::request::{Arg, Backward, Forward, Given, Norm, Normed, Running, Want};
use candle_core::{CpuStorage, DType, Device, Result, Tensor, Var};
use half::{bf16, f16};

pub(super) const EPS: f64 = 1e-5;
pub(super) const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Half a unit in the last place of 1, the rounding of one result.
pub(super) fn half_ulp(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F32 => f32::EPSILON as f64 / 2.0,
        DType::F16 => f16::EPSILON.to_f64() / 2.0,
        _ => bf16::EPSILON.to_f64() / 2.0,
    }
}

pub(super) fn to_storage(v: &[f64], dtype: DType) -> CpuStorage {
    match dtype {
        DType::F64 => CpuStorage::F64(v.to_vec()),
        DType::F32 => CpuStorage::F32(v.iter().map(|&x| x as f32).collect()),
        DType::F16 => CpuStorage::F16(v.iter().map(|&x| f16::from_f64(x)).collect()),
        _ => CpuStorage::BF16(v.iter().map(|&x| bf16::from_f64(x)).collect()),
    }
}

pub(super) fn to_f64(storage: &CpuStorage) -> Vec<f64> {
    match storage {
        CpuStorage::F64(v) => v.clone(),
        CpuStorage::F32(v) => v.iter().map(|&x| x as f64).collect(),
        CpuStorage::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        CpuStorage::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
        _ => Vec::new(),
    }
}

/// Numbers in [-1, 1) around `center`, the same in every run.
pub(super) fn noise(len: usize, seed: u64, center: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| center + next()).collect()
}

/// What a call starts from, rounded to the dtype, behind `offset` elements that are not its own.
struct Data {
    norm: Norm,
    dtype: DType,
    offset: usize,
    x: Vec<f64>,
    dy: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Data {
    fn new(geometry: Geometry, dtype: DType, offset: usize) -> Self {
        let norm = Norm::new("test", geometry, EPS);
        let round = |v: Vec<f64>| to_f64(&to_storage(&v, dtype));
        let (n, params) = (geometry.elements(), geometry.params());
        Self {
            norm,
            dtype,
            offset,
            x: round(noise(n, 1, 3.0)),
            dy: round(noise(n, 2, 0.1)),
            weight: to_f64(&to_storage(&noise(params, 3, 1.0), DType::F32)),
            bias: to_f64(&to_storage(&noise(params, 4, 0.0), DType::F32)),
        }
    }

    fn stored(&self, v: &[f64]) -> CpuStorage {
        to_storage(&[vec![f64::NAN; self.offset], v.to_vec()].concat(), self.dtype)
    }

    /// `(element, set, param)` of all elements.
    fn elements(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let g = self.norm.geometry;
        (0..g.elements()).map(move |i| {
            let (o, row, column) = (i / g.block_len(), i / g.width % g.rows, i % g.width);
            (i, o * g.sets_per_outer() + column / g.run, g.param(row, column))
        })
    }

    /// Mean and variance of every set.
    fn statistics(&self) -> (Vec<f64>, Vec<f64>) {
        let g = self.norm.geometry;
        let n = g.set_len() as f64;
        let (mut mean, mut var) = (vec![0.0; g.sets()], vec![0.0; g.sets()]);
        if g.center {
            self.elements().for_each(|(i, s, _)| mean[s] += self.x[i] / n);
        }
        self.elements().for_each(|(i, s, _)| var[s] += (self.x[i] - mean[s]).powi(2) / n);
        (mean, var)
    }

    fn forward(&self) -> Vec<f64> {
        let (mean, var) = self.statistics();
        let y = |(i, s, p): (usize, usize, usize)| {
            (self.x[i] - mean[s]) / (var[s] + EPS).sqrt() * self.weight[p] + self.bias[p]
        };
        self.elements().map(y).collect()
    }

    /// dx, dweight, dbias and the set sums of dy and dy * xhat.
    fn backward(&self, fixed: bool) -> [Vec<f64>; 4] {
        let g = self.norm.geometry;
        let (mean, var) = self.statistics();
        let n = g.set_len() as f64;
        let (mut dweight, mut dbias) = (vec![0.0; g.params()], vec![0.0; g.params()]);
        let (mut sum, mut dot, mut sums) =
            (vec![0.0; g.sets()], vec![0.0; g.sets()], vec![0.0; 2 * g.sets()]);
        let xhat = |i: usize, s: usize| (self.x[i] - mean[s]) / (var[s] + EPS).sqrt();
        for (i, s, p) in self.elements() {
            dweight[p] += self.dy[i] * xhat(i, s);
            dbias[p] += self.dy[i];
            sums[s] += self.dy[i];
            sums[g.sets() + s] += self.dy[i] * xhat(i, s);
            sum[s] += self.dy[i] * self.weight[p] / n;
            dot[s] += self.dy[i] * self.weight[p] * xhat(i, s) / n;
        }
        let dx = |(i, s, p): (usize, usize, usize)| {
            let mean = if g.center { sum[s] } else { 0.0 };
            let correction = if fixed { 0.0 } else { mean + xhat(i, s) * dot[s] };
            (self.dy[i] * self.weight[p] - correction) / (var[s] + EPS).sqrt()
        };
        [self.elements().map(dx).collect(), dweight, dbias, sums]
    }
}

pub(super) fn assert_close(what: &str, got: &CpuStorage, expected: &[f64], tolerance: f64) {
    let got = to_f64(got);
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        assert!(
            error <= tolerance * (1.0 + expected.abs()),
            "{what}: element {i} is {got}, expected {expected}, error {error:e} of {tolerance:e}"
        );
    }
}

/// Runs forward and backward of a geometry on an emulated device.
pub(super) fn check(device: DeviceProperties, geometry: Geometry, dtype: DType, offset: usize) -> Result<()> {
    let machine = Emulated::of(device);
    let data = Data::new(geometry, dtype, offset);
    let what = |part: &str| format!("{device:?} {geometry:?} {dtype:?} offset {offset} {part}");
    let (x, dy) = (data.stored(&data.x), data.stored(&data.dy));
    let (weight, bias) = (to_storage(&data.weight, DType::F32), to_storage(&data.bias, DType::F32));
    let arg = |storage, offset| Arg { storage, offset };
    let accumulated = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    // One rounding of the result, and of each of a few operations in the accumulation dtype; sums in
    // blocks of 8 to 512 lose a few times the square root of their number of terms.
    let one = half_ulp(dtype) + 16.0 * half_ulp(accumulated);
    let summed = |terms: usize| half_ulp(accumulated) * (4.0 * (terms as f64).sqrt() + 16.0);
    let Normed { y, stats, .. } = run_forward(
        &machine,
        Forward {
            weight: Some(arg(&weight, 0)),
            bias: Some(arg(&bias, 0)),
            keep: true,
            ..Forward::new(data.norm, arg(&x, offset))
        },
    )?;
    let n = geometry.set_len();
    let scale = data.forward().iter().fold(1.0f64, |a, b| a.max(b.abs()));
    assert_close(&what("y"), &y, &data.forward(), one + summed(n) * scale);
    let stats = stats.expect("statistics were asked for");
    let (mean, var) = data.statistics();
    let kept = to_f64(&stats);
    for s in 0..geometry.sets() {
        let (got, got_var) = (kept[s] + kept[geometry.sets() + s], kept[2 * geometry.sets() + s]);
        assert!((got - mean[s]).abs() <= 4.0 * summed(n), "{} {got} {}", what("mean"), mean[s]);
        assert!(
            (got_var - var[s]).abs() <= summed(n) * (1.0 + var[s]),
            "{} {got_var} {}",
            what("var"),
            var[s]
        );
    }
    let backward = |dweight, dbias, dx, fixed| {
        run_backward(
            &machine,
            Backward {
                weight: Some(arg(&weight, 0)),
                fixed,
                want: Want { dx, dweight, dbias, ..Want::default() },
                ..Backward::new(data.norm, arg(&x, offset), arg(&dy, offset), arg(&stats, 0))
            },
        )
    };
    let per_param = geometry.elements() / geometry.params();
    for fixed in [false, true] {
        let [dx, dweight, dbias, _] = data.backward(fixed);
        let f32s = Some(DType::F32);
        let got = backward(f32s, f32s, true, fixed)?;
        // Terms of a parameter's gradient are about 1; the sum rounds once more, to f32.
        let sum = (summed(per_param) + half_ulp(DType::F32)) * (per_param as f64).sqrt().max(1.0);
        let part = |part: &str| what(&format!("{part} fixed {fixed}"));
        assert_close(&part("dx"), got.dx.as_ref().expect("dx"), &dx, 4.0 * (one + summed(n)) * scale);
        assert_close(&part("dweight"), got.dweight.as_ref().expect("dweight"), &dweight, sum);
        assert_close(&part("dbias"), got.dbias.as_ref().expect("dbias"), &dbias, sum);
        // Each gradient alone is the same.
        let alone = backward(None, None, true, fixed)?;
        assert_close(&part("dx alone"), alone.dx.as_ref().expect("dx"), &dx, 4.0 * (one + summed(n)) * scale);
        let alone = backward(f32s, None, false, fixed)?;
        assert_close(&part("dweight alone"), alone.dweight.as_ref().expect("dweight"), &dweight, sum);
        assert!(alone.dx.is_none() && alone.dbias.is_none());
        // Of x's dtype they are the same sums, whichever kernel writes them.
        let own = backward(Some(dtype), Some(dtype), true, fixed)?;
        // Not `from_f64`, which looks at the upper half of an f64 alone.
        let round = |v: f64| match dtype {
            DType::F16 => f16::from_f32(v as f32).to_f32(),
            DType::BF16 => bf16::from_f32(v as f32).to_f32(),
            _ => v as f32,
        };
        let rounded =
            |v: &Option<CpuStorage>| v.as_ref().map(|v| to_f64(v).into_iter().map(round).collect::<Vec<_>>());
        assert_eq!(rounded(&own.dweight), rounded(&got.dweight), "{}", part("dweight of x's dtype"));
        assert_eq!(rounded(&own.dbias), rounded(&got.dbias), "{}", part("dbias of x's dtype"));
        assert_eq!(own.dx.map(|v| to_f64(&v)), got.dx.map(|v| to_f64(&v)), "{}", part("dx"));
    }
    if geometry.one_param_per_set() {
        steps(&machine, &data, &x, &dy, &weight, &stats, one + summed(n))?;
    }
    Ok(())
}

/// The steps of batch norm on their own give what the whole does.
fn steps(
    machine: &Emulated,
    data: &Data,
    x: &CpuStorage,
    dy: &CpuStorage,
    weight: &CpuStorage,
    stats: &CpuStorage,
    tolerance: f64,
) -> Result<()> {
    let arg = |storage, offset| Arg { storage, offset };
    let g = data.norm.geometry;
    let own = run_statistics(machine, data.norm, arg(x, data.offset))?;
    assert_eq!(to_f64(&own), to_f64(stats), "statistics alone");
    let call = || Backward {
        weight: Some(arg(weight, 0)),
        want: Want { dx: true, ..Want::default() },
        ..Backward::new(data.norm, arg(x, data.offset), arg(dy, data.offset), arg(stats, 0))
    };
    let [dx, _, _, expected] = data.backward(false);
    let sums = run_gradient_sums(machine, call())?;
    assert_close("gradient sums", &sums, &expected, tolerance * (g.set_len() as f64).sqrt());
    let got = run_input_gradient(machine, call(), arg(&sums, 0), g.set_len() as f64)?;
    let scale = dx.iter().fold(1.0f64, |a, b| a.max(b.abs()));
    assert_close("input gradient", &got, &dx, 4.0 * tolerance * scale);
    // Given statistics, in rows of the tensor, give the same output as the input's own, and a copy.
    let forward = |given, keep| {
        run_forward(machine, Forward { given, keep, ..Forward::new(data.norm, arg(x, data.offset)) })
    };
    let given =
        Given { mean: arg(stats, 0), mean_low: Some(arg(stats, g.sets())), var: arg(stats, 2 * g.sets()) };
    let Normed { y, stats: copy, .. } = forward(Some(given), true)?;
    let expected = forward(None, false)?.y;
    assert_close("given statistics", &y, &to_f64(&expected), 2.0 * half_ulp(data.dtype));
    assert_eq!(copy.map(|copy| to_f64(&copy)), Some(to_f64(stats)), "copy of given statistics");
    Ok(())
}

pub(super) fn rows(outer: usize, n: usize) -> Geometry {
    Geometry { outer, rows: 1, width: n, run: n, weight_by: WeightBy::Column { span: 1 }, center: true }
}

pub(super) fn groups(outer: usize, groups: usize, channels: usize, space: usize) -> Geometry {
    let (width, weight_by) = (groups * channels * space, WeightBy::Column { span: space });
    Geometry { outer, rows: 1, width, run: channels * space, weight_by, center: true }
}

pub(super) fn batch(samples: usize, channels: usize, space: usize) -> Geometry {
    let weight_by = WeightBy::Column { span: space };
    Geometry { outer: 1, rows: samples, width: channels * space, run: space, weight_by, center: true }
}

/// A device of which a block has a seventh of the shared memory, and which has four multiprocessors: sets
/// of tens of kilobytes go to clusters and beyond the chip there, and workers have several rows each.
pub(super) fn small(capability: u32) -> DeviceProperties {
    DeviceProperties { capability, multiprocessors: 4, shared: 24 << 10 }
}

pub(super) fn large(capability: u32) -> DeviceProperties {
    *Emulated::new(capability).expect("a known capability").properties()
}

fn columns(outer: usize, rows: usize, width: usize, run: usize, weight_by: WeightBy) -> Geometry {
    Geometry { outer, rows, width, run, weight_by, center: true }
}

/// Every rung that a dtype has, by the bytes of a set; odd lengths and odd offsets take the scalar ones.
pub(super) fn ladder(dtype: DType) -> Vec<(DeviceProperties, Geometry, usize)> {
    let per = 2 * 1024 / dtype.size_in_bytes(); // elements in 2 KiB
    let rms = |g: Geometry| Geometry { center: false, ..g };
    let own = WeightBy::Column { span: 1 };
    let [sm70, sm80, sm90] = [70, 80, 90].map(large);
    let mut all = vec![
        // Lanes of a warp: one element, less than an access, several sets a block, rows beyond a grid's.
        (sm70, rows(3, 1), 0),
        (sm70, rows(37, 7), 0),
        (sm70, rows(300, per / 4), 0),
        (sm90, rms(rows(9, per / 2)), 0),
        (sm80, rows(5, per), 1),
        // A block's registers.
        (sm80, rows(3, 3 * per), 0),
        (sm90, rms(rows(2, 4 * per + 1)), 0),
        (sm80, groups(2, 3, 4, 15), 0),
        (sm80, groups(3, 2, 5, 16), 0),
        (sm80, groups(2, 2, 3, 1), 0),
        (sm90, batch(4, 3, 40), 0),
        (sm90, batch(3, 2, 49), 1),
        // Shared memory: 20 KiB and more a set and no cluster; segments with parameters of their own.
        (sm80, rows(2, 20 * per), 0),
        (sm80, rows(2, 20 * per + 3), 0),
        (sm90, groups(2, 2, 3, 2 * per), 0),
        (sm90, groups(2, 1, 7, per / 16 * 5 + 1), 0),
        // Beyond the chip: rows, segments, segments longer than a chunk.
        (small(70), rows(9, 13 * per), 0),
        (small(70), rows(2, 33 * per), 0),
        (small(70), rows(2, 33 * per + 1), 0),
        (small(70), groups(2, 2, 5, 4 * per), 0),
        (small(70), groups(1, 2, 2, 9 * per), 0),
        (small(70), groups(1, 2, 3, 9 * per + 1), 0),
        (small(70), groups(1, 1, 26 * per / 31, 31), 0),
        (small(70), batch(5, 2, 9 * per), 0),
        (small(70), batch(2, 1, 17 * per), 0),
        (small(70), batch(2, 1, 17 * per + 1), 0),
        (small(70), batch(26, 2, per), 0),
        (small(70), batch(3, 2, 9 * per + 1), 1),
        (small(70), batch(9, 1, 9 * per + 1), 1),
        // Columns: channels last, short runs, parameters by row.
        (sm80, columns(1, 300, 24, 1, own), 0),
        (sm80, columns(2, 50, 15, 5, own), 0),
        (sm80, columns(1, 2100, 64, 16, own), 0),
        (sm80, batch(20, 12, 4), 1),
        (sm80, columns(2, 17, 80, 1, WeightBy::Row), 0),
        (sm90, rms(columns(1, 70, 33, 1, WeightBy::Row)), 0),
    ];
    if dtype != DType::F64 {
        all.extend([
            (sm90, rows(2, 12 * per), 0),
            (sm90, rows(2, 20 * per), 0),
            (sm90, rows(2, 40 * per), 0),
            (sm90, rows(3, 8 * per), 0),
            (sm90, rms(rows(2, 18 * per)), 0),
            // Wider than the registers of a cluster, the first of them in 16 bits.
            (sm90, rows(2, 66 * per), 0),
            (sm90, rows(1, 65536 + per), 0),
            (small(90), rms(rows(2, 40 * per)), 0),
            (small(90), rows(2, 20 * per), 0),
            (small(90), rows(2, 33 * per + 1), 0),
            (small(90), groups(2, 2, 3, 5 * per), 0),
            (small(90), groups(2, 1, 3, 5 * per + 1), 0),
            // Segments in pieces.
            (small(90), groups(1, 2, 3, 11 * per), 0),
            (small(90), groups(1, 1, 3, 11 * per + 1), 0),
            (small(90), batch(2, 2, 10 * per), 0),
        ]);
    }
    if dtype.size_in_bytes() == 2 {
        // Accesses of 8 bytes.
        all.extend([
            (sm80, rows(5, 100), 0),
            (sm80, rows(3, 64), 4),
            (sm90, batch(4, 3, 196), 0),
            (sm80, groups(2, 2, 3, 36), 0),
            (small(70), rows(2, 33 * per + 4), 0),
            (small(70), batch(3, 2, 9 * per + 4), 0),
            (small(90), batch(4, 2, 9 * per + 4), 0),
            (sm90, rms(rows(1, 66 * per)), 0),
            (sm80, rows(2, 4 * per + 4), 0),
            (sm90, rows(1, 130 * per + 4), 0),
        ]);
    }
    all
}

#[test]
fn every_kernel_runs_and_is_right() -> Result<()> {
    let climb = |dtype| {
        ladder(dtype)
            .into_iter()
            .try_for_each(|(device, geometry, offset)| check(device, geometry, dtype, offset))
    };
    std::thread::scope(|scope| {
        let all = DTYPES.map(|dtype| scope.spawn(move || climb(dtype)));
        all.into_iter().try_for_each(|one| one.join().expect("no panic"))
    })?;
    running_statistics()?;
    super::fused::gates_before_the_norm()?;
    let never: Vec<_> =
        launches().into_iter().filter(|(_, count)| *count == 0).map(|(entry, _)| entry.name()).collect();
    assert!(never.is_empty(), "kernels that no case reaches: {never:?}");
    Ok(())
}

/// Batch norm moves them in the kernel that has the set, in the one that combines its parts; instance
/// norm averages over samples.
fn running_statistics() -> Result<()> {
    for dtype in DTYPES {
        for (device, geometry) in [
            (large(90), batch(4, 3, 40)),
            (small(70), batch(5, 2, 5_000)),
            (large(80), batch(40, 3, 1)),
            (large(80), groups(4, 3, 1, 33)),
        ] {
            let data = Data::new(geometry, dtype, 0);
            let x = data.stored(&data.x);
            let channels = geometry.sets_per_outer();
            let running = Running {
                mean: Var::from_tensor(&Tensor::full(0.5f32, channels, &Device::Cpu)?)?,
                var: Var::from_tensor(&Tensor::full(2f64, channels, &Device::Cpu)?)?,
                momentum: 0.25,
            };
            run_forward(
                &Emulated::of(device),
                Forward {
                    running: Some(&running),
                    ..Forward::new(data.norm, Arg { storage: &x, offset: 0 })
                },
            )?;
            let (mean, var) = data.statistics();
            let (n, outer) = (geometry.set_len() as f64, geometry.outer);
            let average =
                |v: &[f64], c: usize| (0..outer).map(|o| v[o * channels + c]).sum::<f64>() / outer as f64;
            let got_mean = running.mean.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let got_var = running.var.to_vec1::<f64>()?;
            for c in 0..channels {
                let (mean, var) = (average(&mean, c), average(&var, c) * n / (n - 1.0));
                let (mean, var) = (0.75 * 0.5 + 0.25 * mean, 0.75 * 2.0 + 0.25 * var);
                // Rounded to f32 once, as statistics and as running mean.
                let tolerance = 8.0 * f32::EPSILON as f64;
                assert!(
                    (got_mean[c] - mean).abs() < tolerance,
                    "{geometry:?} {dtype:?}: {got_mean:?} {mean}"
                );
                assert!(
                    (got_var[c] - var).abs() < tolerance * 8.0,
                    "{geometry:?} {dtype:?}: {got_var:?} {var}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn empty_batches_write_zeros() -> Result<()> {
    let machine = Emulated::new(80)?;
    let geometry = rows(0, 6);
    let data = Data::new(geometry, DType::F32, 0);
    let x = data.stored(&[]);
    let stats = machine.allocate(DType::F32, 0)?;
    let (x, stats) = (Arg { storage: &x, offset: 0 }, Arg { storage: &stats, offset: 0 });
    let want = Want { dx: true, dweight: Some(DType::F16), dbias: Some(DType::F64), ..Want::default() };
    let got = run_backward(&machine, Backward { want, ..Backward::new(data.norm, x, x, stats) })?;
    assert_eq!(got.dweight.map(|g| to_f64(&g)), Some(vec![0.0; 6]));
    assert_eq!(got.dbias.map(|g| to_f64(&g)), Some(vec![0.0; 6]));
    // A rank without samples still sends statistics, which weigh nothing.
    let none = Norm { geometry: batch(0, 3, 5), ..data.norm };
    let stats = run_statistics(&machine, none, x)?;
    assert_eq!(to_f64(&stats), vec![0.0; 9]);
    Ok(())
}
