//! What stands around a norm, in every family of kernels and dtype, against the formulas in f64.
//!
//! Kept separate from `tests`, whose ladder has every kernel: here every fusion meets every family.

use super::tests::{
    assert_close, batch, groups, half_ulp, large, noise, rows, small, to_f64, to_storage, DTYPES, EPS,
};
use super::Emulated;
use crate::cuda::plan::DeviceProperties;
use crate::cuda::{run_backward, run_forward};
use crate::fusion::{Activation, Fusion, Gate};
use crate::geometry::{Geometry, WeightBy};
use crate::request::{Arg, Backward, Blocks, Forward, Norm, Want};
use candle_core::cpu::erf::erf_f64 as erf;
use candle_core::{CpuStorage, DType, Result};

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

fn value(activation: Activation, z: f64) -> f64 {
    match activation {
        Activation::Relu => z.max(0.0),
        Activation::Relu6 => z.clamp(0.0, 6.0),
        Activation::LeakyRelu(slope) => z.max(slope * z),
        Activation::Silu => z * sigmoid(z),
        Activation::Sigmoid => sigmoid(z),
        Activation::HardSwish => z * (z + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Gelu => z * 0.5 * (1.0 + erf(z / 2f64.sqrt())),
        Activation::GeluTanh => {
            let t = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z.powi(3));
            0.5 * z * (1.0 + t.tanh())
        }
    }
}

/// The derivative, from differences of f64: exact to 1e-9. `erf` is a fit in pieces, too rough for those.
fn slope(activation: Activation, z: f64) -> f64 {
    if activation == Activation::Gelu {
        let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
        return 0.5 * (1.0 + erf(z / 2f64.sqrt())) + z * density;
    }
    let h = 1e-6;
    (value(activation, z + h) - value(activation, z - h)) / (2.0 * h)
}

/// One norm with all that may stand around it.
#[derive(Debug, Clone, Copy)]
struct Case {
    geometry: Geometry,
    dtype: DType,
    fusion: Fusion,
    residual: bool,
    skip: bool,
    blocks: Option<Blocks>,
}

/// Its tensors, rounded to their dtypes; x in the order of the geometry.
struct Tensors {
    x: Vec<f64>,
    residual: Vec<f64>,
    skip: Vec<f64>,
    gate: Vec<f64>,
    dy: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Case {
    fn before(&self) -> bool {
        self.fusion.gate == Some(Gate::Before)
    }

    fn norm(&self) -> Norm {
        let mut norm = Norm::new("test", self.geometry, EPS);
        norm.fusion = self.fusion;
        norm.x_blocks = self.blocks;
        norm
    }

    fn round(&self, v: Vec<f64>) -> Vec<f64> {
        to_f64(&to_storage(&v, self.dtype))
    }

    fn tensors(&self) -> Tensors {
        let (n, params) = (self.geometry.elements(), self.norm().params());
        let of = |seed, center| self.round(noise(n, seed, center));
        let f32s = |seed, center| to_f64(&to_storage(&noise(params, seed, center), DType::F32));
        Tensors {
            x: of(1, 3.0),
            residual: of(2, 0.5),
            skip: of(3, 0.2),
            gate: of(4, 0.1),
            dy: of(5, 0.1),
            weight: f32s(6, 1.0 - self.fusion.weight_offset),
            bias: if self.before() { vec![0.0; params] } else { f32s(7, 0.3) },
        }
    }

    /// `(set, parameter)` of an element.
    fn place(&self, i: usize) -> (usize, usize) {
        let g = &self.geometry;
        let (o, row, column) = (i / g.block_len(), i / g.width % g.rows, i % g.width);
        let sample = self.fusion.tokens.map_or(0, |tokens| o / tokens * g.params());
        (o * g.sets_per_outer() + column / g.run, sample + g.param(row, column))
    }

    /// Where the elements of x lie: the blocks apart, NaNs between them.
    fn laid(&self, x: &[f64]) -> Vec<f64> {
        let Some(blocks) = self.blocks else { return x.to_vec() };
        let g = &self.geometry;
        let start = |o: usize| {
            let mut rest = o;
            (0..4).rev().fold(0, |at, d| {
                let index = rest % blocks.dims[d];
                rest /= blocks.dims[d];
                at + index * blocks.strides[d]
            })
        };
        let end = (0..g.outer).map(start).max().unwrap_or(0) + g.block_len();
        let mut laid = vec![f64::NAN; end];
        for o in 0..g.outer {
            let from = o * g.block_len();
            laid[start(o)..][..g.block_len()].copy_from_slice(&x[from..from + g.block_len()]);
        }
        laid
    }
}

/// What an f64 oracle says: y, sum, and gradients of x, skip, gate, weight, bias.
struct Oracle {
    y: Vec<f64>,
    sum: Vec<f64>,
    dx: Vec<f64>,
    dz: Vec<f64>,
    dgate: Vec<f64>,
    dweight: Vec<f64>,
    dbias: Vec<f64>,
}

fn oracle(case: &Case, t: &Tensors) -> Oracle {
    let (g, elements) = (case.geometry, case.geometry.elements());
    let all = || 0..elements;
    let sum = match case.residual {
        true => case.round(all().map(|i| t.x[i] + t.residual[i]).collect()),
        false => t.x.clone(),
    };
    let silu = |v: f64| v * sigmoid(v);
    let sum: Vec<f64> = match case.before() {
        true => all().map(|i| sum[i] * silu(t.gate[i])).collect(),
        false => sum,
    };
    let n = g.set_len() as f64;
    let (mut mean, mut var) = (vec![0.0; g.sets()], vec![0.0; g.sets()]);
    if g.center {
        all().for_each(|i| mean[case.place(i).0] += sum[i] / n);
    }
    all().for_each(|i| var[case.place(i).0] += (sum[i] - mean[case.place(i).0]).powi(2) / n);
    let rstd = |s: usize| 1.0 / (var[s] + EPS).sqrt();
    let xhat = |i: usize| (sum[i] - mean[case.place(i).0]) * rstd(case.place(i).0);
    let weight = |i: usize| t.weight[case.place(i).1] + case.fusion.weight_offset;
    let z =
        |i: usize| xhat(i) * weight(i) + t.bias[case.place(i).1] + if case.skip { t.skip[i] } else { 0.0 };
    let gated = case.fusion.gate == Some(Gate::After);
    let y = all().map(|i| match (case.fusion.activation, gated) {
        (_, true) => z(i) * silu(t.gate[i]),
        (Some(activation), _) => value(activation, z(i)),
        _ => z(i),
    });
    let dz: Vec<f64> = all()
        .map(|i| match (case.fusion.activation, gated) {
            (_, true) => t.dy[i] * silu(t.gate[i]),
            (Some(activation), _) => t.dy[i] * slope(activation, z(i)),
            _ => t.dy[i],
        })
        .collect();
    let dgate = all().map(|i| t.dy[i] * z(i) * slope(Activation::Silu, t.gate[i])).collect();
    let (mut dweight, mut dbias) = (vec![0.0; t.weight.len()], vec![0.0; t.bias.len()]);
    let (mut first, mut second) = (vec![0.0; g.sets()], vec![0.0; g.sets()]);
    for i in all() {
        let (s, p) = case.place(i);
        dweight[p] += dz[i] * xhat(i);
        dbias[p] += dz[i];
        first[s] += if g.center { dz[i] * weight(i) / n } else { 0.0 };
        second[s] += dz[i] * weight(i) * xhat(i) / n;
    }
    let dx = |i: usize| {
        let s = case.place(i).0;
        (dz[i] * weight(i) - first[s] - xhat(i) * second[s]) * rstd(s)
    };
    let dx: Vec<f64> = all().map(dx).collect();
    if case.before() {
        // What was normalized is a product: its gradient goes on to both of its factors.
        let dgate = all().map(|i| dx[i] * t.x[i] * slope(Activation::Silu, t.gate[i])).collect();
        let dx = all().map(|i| dx[i] * silu(t.gate[i])).collect();
        return Oracle { y: y.collect(), dx, sum, dz, dgate, dweight, dbias };
    }
    Oracle { y: y.collect(), dx, sum, dz, dgate, dweight, dbias }
}

fn check(device: DeviceProperties, case: &Case) -> Result<()> {
    let machine = Emulated::of(device);
    let (t, what) = (case.tensors(), |part: &str| format!("{device:?} {case:?} {part}"));
    let expected = oracle(case, &t);
    let stored = |v: &[f64]| to_storage(v, case.dtype);
    let (x, residual, skip, gate, dy) =
        (stored(&case.laid(&t.x)), stored(&t.residual), stored(&t.skip), stored(&t.gate), stored(&t.dy));
    let (weight, bias) = (to_storage(&t.weight, DType::F32), to_storage(&t.bias, DType::F32));
    fn arg(storage: &CpuStorage) -> Arg<'_, CpuStorage> {
        Arg { storage, offset: 0 }
    }
    let (gated, has_bias) = (case.fusion.gate.is_some(), !case.before());
    let got = run_forward(
        &machine,
        Forward {
            weight: Some(arg(&weight)),
            bias: has_bias.then(|| arg(&bias)),
            residual: case.residual.then(|| arg(&residual)),
            skip: case.skip.then(|| arg(&skip)),
            gate: gated.then(|| arg(&gate)),
            keep: true,
            ..Forward::new(case.norm(), arg(&x))
        },
    )?;
    // As in `tests`: a rounding of the result, of a few operations, and of the sums; an activation adds
    // a few more, and its slope is known from differences.
    let accumulated = if case.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let summed = |terms: usize| half_ulp(accumulated) * (4.0 * (terms as f64).sqrt() + 16.0);
    let n = case.geometry.set_len();
    let one = half_ulp(case.dtype) + 32.0 * half_ulp(accumulated) + summed(n);
    let scale = expected.y.iter().fold(4.0f64, |a, b| a.max(b.abs()));
    assert_close(&what("y"), &got.y, &expected.y, one * scale);
    if case.residual {
        // Bit for bit what an addition of its own gives.
        assert_eq!(got.sum.as_ref().map(to_f64), Some(expected.sum.clone()), "{}", what("sum"));
    }
    // The gradients are those of the norm of the sum.
    let stats = got.stats.expect("statistics were asked for");
    let (x, x_blocks) = match got.sum {
        Some(sum) => (sum, None),
        None => (x, case.blocks),
    };
    let norm = Norm { x_blocks, ..case.norm() };
    let backward = |want| {
        let (weight, bias) = (Some(arg(&weight)), has_bias.then(|| arg(&bias)));
        let (skip, gate) = (case.skip.then(|| arg(&skip)), gated.then(|| arg(&gate)));
        run_backward(
            &machine,
            Backward {
                weight,
                bias,
                skip,
                gate,
                want,
                ..Backward::new(norm, arg(&x), arg(&dy), arg(&stats))
            },
        )
    };
    let f32s = Some(DType::F32);
    let dbias = f32s.filter(|_| has_bias);
    let want = Want { dx: true, dweight: f32s, dbias, dskip: case.skip, dgate: gated };
    let all = backward(want)?;
    // dz is rounded on its way where a set is held, which the sums of n of them see.
    let rounding = 1e-8 + 8.0 * one * scale;
    let terms = case.geometry.elements() / t.weight.len();
    let sum =
        (summed(terms) + half_ulp(DType::F32) + 4.0 * half_ulp(case.dtype)) * (terms as f64).sqrt().max(1.0);
    let dz = assert_close_if(&what("dskip"), all.dskip.as_ref(), &expected.dz, rounding);
    assert_eq!(dz, case.skip);
    let dgate = assert_close_if(&what("dgate"), all.dgate.as_ref(), &expected.dgate, rounding);
    assert_eq!(dgate, gated);
    assert!(assert_close_if(&what("dx"), all.dx.as_ref(), &expected.dx, rounding));
    assert!(assert_close_if(&what("dweight"), all.dweight.as_ref(), &expected.dweight, 1e-7 + 4.0 * sum));
    let dbias = assert_close_if(&what("dbias"), all.dbias.as_ref(), &expected.dbias, 1e-7 + 4.0 * sum);
    assert_eq!(dbias, has_bias);
    // Each alone: the same bits.
    let only_dx = backward(Want { dx: true, ..Want::default() })?;
    assert_eq!(only_dx.dx.map(|dx| to_f64(&dx)), all.dx.map(|dx| to_f64(&dx)), "{}", what("dx alone"));
    if case.skip {
        let alone = backward(Want { dskip: true, ..Want::default() })?;
        assert!(assert_close_if(&what("dskip alone"), alone.dskip.as_ref(), &expected.dz, rounding));
    }
    if gated {
        let alone = backward(Want { dgate: true, ..Want::default() })?;
        assert_eq!(alone.dgate.map(|d| to_f64(&d)), all.dgate.map(|d| to_f64(&d)), "{}", what("dgate alone"));
    }
    Ok(())
}

fn assert_close_if(what: &str, got: Option<&CpuStorage>, expected: &[f64], tolerance: f64) -> bool {
    got.inspect(|got| assert_close(what, got, expected, tolerance)).is_some()
}

/// A geometry for every family of kernels, of bytes per set where that decides.
fn families(dtype: DType) -> Vec<(DeviceProperties, Geometry)> {
    let per = 2 * 1024 / dtype.size_in_bytes();
    let columns =
        |outer, rows, width, run, weight_by| Geometry { outer, rows, width, run, weight_by, center: true };
    let [sm80, sm90] = [80, 90].map(large);
    let mut all = vec![
        (sm80, rows(6, 48)),
        (sm80, Geometry { center: false, ..rows(4, 3 * per) }),
        (sm80, rows(4, 31)),
        // Too wide for a block's columns; beyond the chip.
        (sm80, rows(2, 20 * per)),
        (small(70), rows(4, 17 * per)),
        (sm80, groups(2, 2, 3, 32)),
        (sm80, groups(2, 3, 1, 20)),
        (small(70), groups(2, 2, 2, 9 * per)),
        (sm90, batch(4, 3, 40)),
        (small(70), batch(3, 2, 9 * per)),
        (sm80, columns(1, 60, 24, 1, WeightBy::Column { span: 1 })),
        (sm80, columns(2, 17, 40, 1, WeightBy::Row)),
    ];
    if dtype != DType::F64 {
        let few = [rows(2, 15 * per), batch(2, 2, 15 * per), groups(1, 2, 3, 5 * per)];
        all.extend(few.map(|geometry| (small(90), geometry)));
        all.push((sm90, rows(2, 20 * per)));
    }
    all
}

fn case(geometry: Geometry, dtype: DType) -> Case {
    Case { geometry, dtype, fusion: Fusion::default(), residual: false, skip: false, blocks: None }
}

#[test]
fn activations_and_skips() -> Result<()> {
    for dtype in DTYPES {
        for (at, (device, geometry)) in families(dtype).into_iter().enumerate() {
            // Every activation in the smallest, one each in the others, which differ in how they walk.
            let some = if at == 0 {
                &Activation::ALL[..]
            } else {
                &Activation::ALL[at % Activation::ALL.len()..][..1]
            };
            for &activation in some {
                let fusion = Fusion { activation: Some(activation), ..Fusion::default() };
                check(device, &Case { fusion, skip: at % 2 == 0, ..case(geometry, dtype) })?;
            }
            check(device, &Case { skip: true, ..case(geometry, dtype) })?;
        }
    }
    Ok(())
}

#[test]
fn residuals_offsets_and_gates() -> Result<()> {
    for dtype in DTYPES {
        for (device, geometry) in families(dtype) {
            let fusion = Fusion { weight_offset: 1.0, ..Fusion::default() };
            check(device, &Case { fusion, residual: true, ..case(geometry, dtype) })?;
            let fusion = Fusion { gate: Some(Gate::After), ..Fusion::default() };
            check(device, &Case { fusion, ..case(geometry, dtype) })?;
        }
    }
    Ok(())
}

/// Rows that several groups of a block have, that are no multiple of an access, as long as a block takes, one by one
/// and apart.
#[test]
pub(super) fn gates_before_the_norm() -> Result<()> {
    let fusion = Fusion { gate: Some(Gate::Before), ..Fusion::default() };
    for dtype in DTYPES {
        let most = if dtype == DType::F64 { 4096 } else { 8192 };
        for (outer, n) in
            [(3, 1), (7, 31), (300, 48), (40, 640), (5, 1001), (3, 5120 / 2), (3, most), (2, most - 3)]
        {
            let geometry = Geometry { center: false, ..rows(outer, n) };
            for device in [large(70), large(90), DeviceProperties { multiprocessors: 2, ..large(80) }] {
                check(device, &Case { fusion, ..case(geometry, dtype) })?;
            }
        }
        let geometry = Geometry { center: false, ..rows(12, 48) };
        let blocks = Blocks { dims: [1, 2, 3, 2], strides: [0, 12 * 48, 48, 5 * 48] };
        check(large(80), &Case { fusion, blocks: Some(blocks), ..case(geometry, dtype) })?;
        // What no block takes is refused, so that candle's operations have it.
        let long = Geometry { center: false, ..rows(1, most + 1) };
        assert!(check(large(80), &Case { fusion, ..case(long, dtype) }).is_err(), "{dtype:?}");
    }
    Ok(())
}

#[test]
fn parameters_of_every_sample() -> Result<()> {
    for dtype in DTYPES {
        let per = 2 * 1024 / dtype.size_in_bytes();
        for (device, geometry) in [
            (large(80), rows(6, 48)),
            (large(80), rows(12, 31)),
            (large(80), rows(6, 3 * per)),
            (large(80), rows(4, 20 * per)),
            (small(70), rows(4, 17 * per)),
        ] {
            let fusion = Fusion { weight_offset: 1.0, tokens: Some(2), ..Fusion::default() };
            check(device, &Case { fusion, ..case(geometry, dtype) })?;
        }
    }
    Ok(())
}

#[test]
fn blocks_apart() -> Result<()> {
    for dtype in DTYPES {
        let per = 2 * 1024 / dtype.size_in_bytes();
        let (sm80, small) = (large(80), small(70));
        for (device, n) in [(sm80, 48), (sm80, 31), (sm80, 3 * per), (sm80, 20 * per), (small, 17 * per)] {
            // Heads of a query inside a projection, transposed: [2, 3 of 5, 2 tokens].
            let blocks = Blocks { dims: [1, 2, 3, 2], strides: [0, 12 * n, n, 5 * n] };
            check(device, &Case { blocks: Some(blocks), ..case(rows(12, n), dtype) })?;
            check(device, &Case { blocks: Some(blocks), residual: true, ..case(rows(12, n), dtype) })?;
        }
    }
    Ok(())
}
