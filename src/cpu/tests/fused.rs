//! What is fused into a norm, on every walk, against a scalar oracle in f64.

use super::case::*;
use super::kernels::*;
use super::oracle;
use crate::cpu::loops::Stored;
use crate::cpu::simd_level::Level;
use crate::cpu::{backward, forward};
use crate::fusion::{Activation, Fusion, Gate};
use crate::geometry::{Geometry, WeightBy};
use crate::kernels::Kernels;
use crate::request::{Arg, Backward, Blocks, Forward, Norm, Want};
use candle_core::{CpuStorage, DType, WithDType};
use half::{bf16, f16};
use rand::{rngs::StdRng, SeedableRng};

/// Shapes for every walk, of whole sets and of cut ones.
fn shapes() -> Vec<Geometry> {
    vec![
        geometry(24, 1, 70, 70, span(1)),
        geometry(6, 1, 3001, 3001, span(1)),
        geometry(2, 1, 6 * 40, 2 * 40, span(40)),
        geometry(2, 1, 4 * 1100, 2 * 1100, span(1100)),
        geometry(1, 9, 3 * 20, 20, span(20)),
        geometry(1, 5, 3 * 600, 600, span(600)),
        geometry(2, 20, 2 * 60, 60, span(1)),
        geometry(1, 65, 17, 1, span(1)),
        geometry(2, 33, 18, 1, WeightBy::Row),
        geometry(1, 1, 200_003, 200_003, span(1)),
        geometry(1, 1, 150_000, 150_000, span(75_000)),
        geometry(1, 20_011, 9, 1, span(1)),
    ]
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// The activation, written apart from the kernels.
fn value(activation: Activation, z: f64) -> f64 {
    match activation {
        Activation::Relu => z.max(0.0),
        Activation::Relu6 => z.clamp(0.0, 6.0),
        Activation::LeakyRelu(slope) => z.max(0.0) + slope * z.min(0.0),
        Activation::Silu => z * sigmoid(z),
        Activation::Sigmoid => sigmoid(z),
        Activation::HardSwish => z * (z + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Gelu => 0.5 * z * (1.0 + candle_core::cpu::erf::erf_f64(z / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            0.5 * z * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z.powi(3))).tanh())
        }
    }
}

fn slope(f: impl Fn(f64) -> f64, z: f64) -> f64 {
    (f(z + 1e-6) - f(z - 1e-6)) / 2e-6
}

impl Case {
    /// Whatever is not fused, `f` over samples of their own parameters: what they return, one behind the other.
    fn by_sample<const N: usize>(
        &self,
        f: impl Fn(&Geometry, std::ops::Range<usize>, std::ops::Range<usize>) -> [Vec<f64>; N],
    ) -> [Vec<f64>; N] {
        let g = self.norm.geometry;
        let tokens = self.norm.fusion.tokens.unwrap_or(g.outer);
        let own = Geometry { outer: tokens, ..g };
        let mut all = [(); N].map(|()| vec![]);
        for sample in 0..g.outer / tokens {
            let n = own.elements();
            let parts = f(
                &own,
                sample * n..(sample + 1) * n,
                match self.norm.fusion.tokens {
                    Some(_) => sample * g.params()..(sample + 1) * g.params(),
                    None => 0..g.params(),
                },
            );
            all.iter_mut().zip(parts).for_each(|(all, part)| all.extend(part));
        }
        all
    }

    fn weight(&self) -> Vec<f64> {
        self.exact[W].iter().map(|w| w + self.norm.fusion.weight_offset).collect()
    }

    /// What is normalized.
    fn input(&self) -> Vec<f64> {
        let both = self.exact[X].iter().zip(&self.exact[OTHER]);
        match self.norm.fusion.gate {
            Some(Gate::Before) => both.map(|(x, gate)| x * gate * sigmoid(*gate)).collect(),
            _ => self.exact[X].clone(),
        }
    }

    fn z(&self, skip: bool) -> Vec<f64> {
        let (u, w) = (self.input(), self.weight());
        let [z] = self.by_sample(|g, e, p| {
            let stats = oracle::statistics(g, &u[e.clone()]);
            [oracle::forward(g, EPS, &u[e], &stats, &w[p.clone()], &self.exact[B][p])]
        });
        z.iter().zip(&self.exact[OTHER]).map(|(z, s)| if skip { z + s } else { *z }).collect()
    }

    /// y, and its slope by z.
    fn y(&self, skip: bool) -> [Vec<f64>; 2] {
        let fusion = self.norm.fusion;
        let z = self.z(skip);
        let both = |gate: f64| gate * sigmoid(gate);
        let f = |(z, gate): (&f64, &f64)| match (fusion.activation, fusion.gate) {
            (Some(a), _) => [value(a, *z), slope(|z| value(a, z), *z)],
            (None, Some(Gate::After)) => [z * both(*gate), both(*gate)],
            _ => [*z, 1.0],
        };
        let pairs: Vec<_> = z.iter().zip(&self.exact[OTHER]).map(f).collect();
        [0, 1].map(|i| pairs.iter().map(|p| p[i]).collect())
    }
}

/// With parameters of x's type.
fn case<T: WithDType>(g: Geometry, fusion: Fusion) -> Case {
    Case::new::<T, T>(g, fusion, [0.5, 2.0])
}

/// dy without the elements where z is near a corner of an activation: rounding decides the slope there.
fn without_corners<T: WithDType>(case: &mut Case, skip: bool) {
    let z = case.z(skip);
    let near = |z: f64| [0.0, 6.0, 3.0, -3.0].iter().any(|corner| (z - corner).abs() < 1e-3);
    let dy = &mut case.exact[DY];
    dy.iter_mut().zip(z).filter(|(_, z)| near(*z)).for_each(|(dy, _)| *dy = 0.0);
    case.storages[DY] = T::to_cpu_storage_owned(dy.iter().map(|dy| T::from_f64(*dy)).collect());
}

fn check<T: Stored>(level: Level, g: Geometry, fusion: Fusion, skip: bool) {
    let mut case = case::<T>(g, fusion);
    without_corners::<T>(&mut case, skip);
    // With the feature the kernels of `CpuStorage` are the emulated ones.
    assert!(cfg!(feature = "cuda-emulation") || <CpuStorage as Kernels>::fuses(&case.norm, T::DTYPE));
    let what =
        |part: &str| format!("{part} at {} of {:?}, {g:?}, {fusion:?}, {skip}", level.name(), T::DTYPE);
    let outcome = forward::forward::<T>(level, &case.call(skip)).unwrap();
    let y: Vec<f64> = outcome.y.iter().map(|y| y.to_f64()).collect();
    let [expected, slope] = case.y(skip);
    let error = worst(&y, &expected, largest(&expected));
    // Two more roundings than of a plain norm for each thing that is fused.
    let limit = tolerance::<T>() + noise::<T>();
    assert!(error < limit, "{}: {error:e} > {limit:e}", what("y"));

    let (u, w) = (case.input(), case.weight());
    let dz: Vec<f64> = case.exact[DY].iter().zip(&slope).map(|(dy, slope)| dy * slope).collect();
    let stats = T::Acc::to_cpu_storage_owned(outcome.stats.unwrap());
    // What is not asked for, and the ways that its absence opens.
    for [fixed, tensors, params] in
        [[false, true, true], [true; 3], [false, true, false], [false, false, true]]
    {
        let [du, dw, db] = case.by_sample(|g, e, p| {
            let stats = oracle::statistics(g, &u[e.clone()]);
            oracle::backward(g, EPS, &u[e.clone()], &dz[e], &stats, &w[p], fixed)
        });
        let gate = &case.exact[OTHER];
        let before = fusion.gate == Some(Gate::Before);
        let silu = |g: f64| g * sigmoid(g);
        let dx: Vec<f64> =
            du.iter().zip(gate).map(|(du, g)| if before { du * silu(*g) } else { *du }).collect();
        let z = case.z(false);
        let dgate: Vec<f64> = (0..gate.len())
            .map(|i| {
                let by = if before { du[i] * case.exact[X][i] } else { case.exact[DY][i] * z[i] };
                by * self::slope(silu, gate[i])
            })
            .collect();
        let want = Want {
            dx: tensors,
            dweight: params.then_some(DType::F64),
            dbias: params.then_some(DType::F64),
            dskip: tensors && skip,
            dgate: tensors && fusion.gate.is_some(),
        };
        let got = backward::backward::<T>(level, &case.call_back(skip, &stats, fixed, want)).unwrap();
        let per_param = g.elements() / g.params().max(1);
        let walk = (per_param as f64).sqrt();
        let terms = |x: &[f64]| largest(x).max(1.0);
        let one = 2.0 * (tolerance::<T>() + sum_tolerance::<T>(1));
        let sums = 2.0 * sum_tolerance::<T>(per_param);
        let all = [
            ("dx", want.dx, got.dx, &dx, one, terms(&dx)),
            ("dweight", params, got.dweight, &dw, sums, largest(&dw).max(walk)),
            ("dbias", params, got.dbias, &db, sums, largest(&db).max(walk)),
            ("dskip", want.dskip, got.dskip, &dz, one, terms(&dz)),
            ("dgate", want.dgate, got.dgate, &dgate, one, terms(&dgate)),
        ];
        for (name, wanted, got, expected, limit, scale) in all {
            assert_eq!(got.is_some(), wanted, "{}", what(name));
            let Some(got) = got else { continue };
            // Finite differences of the oracle's slopes are good to about 1e-9.
            let (error, limit) = (worst(&to64(&got), expected, scale), limit + 2e-8);
            assert!(error < limit, "{}: {error:e} > {limit:e}", what(&format!("{name} (fixed {fixed})")));
        }
    }
}

pub(super) fn everywhere(fusion: Fusion, skip: bool) {
    for level in Level::available() {
        for g in shapes() {
            check::<f32>(level, g, fusion, skip);
            check::<bf16>(level, g, fusion, skip);
            if g.elements() < 50_000 {
                check::<f16>(level, g, fusion, skip);
                check::<f64>(level, g, fusion, skip);
            }
        }
    }
}

#[test]
fn activations() {
    use Activation::*;
    let fusion = |activation| Fusion { activation: Some(activation), ..Fusion::default() };
    // In registers, along with each walk's map; and one of those that are not.
    everywhere(fusion(Silu), false);
    everywhere(fusion(Relu), false);
    everywhere(fusion(HardSwish), true);
    for activation in [Relu6, LeakyRelu(0.1), Sigmoid, Gelu, GeluTanh] {
        for (level, g) in
            Level::available().into_iter().flat_map(|l| shapes().into_iter().take(3).map(move |g| (l, g)))
        {
            check::<f32>(level, g, fusion(activation), false);
            check::<bf16>(level, g, fusion(activation), false);
            check::<f64>(level, g, fusion(activation), false);
        }
    }
}

#[test]
fn skip() {
    everywhere(Fusion::default(), true);
    everywhere(Fusion { activation: Some(Activation::Relu), ..Fusion::default() }, true);
}

#[test]
fn gates() {
    for gate in [Gate::Before, Gate::After] {
        everywhere(Fusion { gate: Some(gate), ..Fusion::default() }, false);
    }
}

#[test]
fn offset() {
    everywhere(Fusion { weight_offset: 1.0, ..Fusion::default() }, false);
}

#[test]
fn parameters_of_samples() {
    for level in Level::available() {
        for (tokens, g) in [(8, geometry(24, 1, 70, 70, span(1))), (1, geometry(6, 1, 3001, 3001, span(1)))] {
            for activation in [None, Some(Activation::Silu)] {
                let fusion =
                    Fusion { tokens: Some(tokens), weight_offset: 1.0, activation, ..Fusion::default() };
                check::<f32>(level, g, fusion, false);
                check::<bf16>(level, g, fusion, false);
                check::<f16>(level, g, fusion, false);
            }
        }
        let fusion = Fusion { tokens: Some(100), ..Fusion::default() };
        check::<f32>(level, geometry(700, 1, 131, 131, span(1)), fusion, false);
        // Sets that are cut.
        let fusion = Fusion { tokens: Some(2), activation: Some(Activation::Silu), ..fusion };
        check::<f32>(level, geometry(6, 1, 200_003, 200_003, span(1)), fusion, false);
    }
}

/// The sum is rounded, and normalized as if it had been there.
fn residual<T: Stored>(level: Level, g: Geometry) {
    let case = case::<T>(g, Fusion::default());
    let call = Forward { residual: Some(arg(&case.storages[RESIDUAL])), ..case.call(false) };
    let fused = forward::forward::<T>(level, &call).unwrap();
    let sum: Vec<T> = case.exact[X]
        .iter()
        .zip(&case.exact[RESIDUAL])
        .map(|(x, r)| T::narrow(T::from_f64(*x).widen() + T::from_f64(*r).widen()))
        .collect();
    let what = format!("{} of {:?}, {g:?}", level.name(), T::DTYPE);
    let sum = T::to_cpu_storage_owned(sum);
    assert!(to64(&fused.sum.unwrap()) == to64(&sum), "sum at {what}");
    let plain = forward::forward::<T>(level, &Forward { x: arg(&sum), ..case.call(false) }).unwrap();
    assert!(fused.y == plain.y && fused.stats == plain.stats, "y at {what}");
}

#[test]
pub(super) fn residuals() {
    for level in Level::available() {
        for g in shapes() {
            residual::<f32>(level, g);
            residual::<bf16>(level, g);
            residual::<f16>(level, g);
            residual::<f64>(level, g);
        }
    }
}

/// Half types in an f32 stream: the sum is f32's, and y is that of the sum, rounded once.
fn stream<T: Stored<Acc = f32>>(level: Level, g: Geometry) {
    let (case, wide) = (self::case::<T>(g, Fusion::default()), self::case::<f32>(g, Fusion::default()));
    let residual = Some(arg(&wide.storages[RESIDUAL]));
    let normed = forward::forward::<T>(level, &Forward { residual, ..case.call(false) }).unwrap();
    let both = case.exact[X].iter().zip(&wide.exact[RESIDUAL]);
    let sum = CpuStorage::F32(both.map(|(x, r)| *x as f32 + *r as f32).collect());
    assert!(to64(&normed.sum.unwrap()) == to64(&sum));
    let plain = forward::forward::<f32>(level, &Forward { x: arg(&sum), ..case.call(false) }).unwrap();
    let rounded: Vec<T> = plain.y.into_iter().map(T::narrow).collect();
    assert!(normed.y == rounded && normed.stats == plain.stats, "{g:?} at {}", level.name());
}

#[test]
#[cfg(not(feature = "cuda-emulation"))] // which has kernels of its own for `CpuStorage`
fn residuals_of_another_type() {
    let takes = |x: DType, residual: DType, n: usize| {
        let fusion = Fusion { residual: Some(residual), ..Fusion::default() };
        let norm = Norm { fusion, ..Norm::new("test", geometry(24, 1, n, n, span(1)), EPS) };
        <CpuStorage as Kernels>::fuses(&norm, x)
    };
    for level in Level::available() {
        for g in [geometry(24, 1, 70, 70, span(1)), geometry(65, 1, 3001, 3001, span(1))] {
            stream::<bf16>(level, g);
            stream::<f16>(level, g);
        }
    }
    assert!(takes(DType::BF16, DType::F32, 70) && !takes(DType::BF16, DType::F32, 500_000));
    // Rounded to f32 on the way, and so twice.
    assert!(!takes(DType::F64, DType::BF16, 70) && !takes(DType::F16, DType::F64, 70));
}

#[test]
fn rows_that_lie_apart() {
    // 3 x 2 x 4 rows of 70 in rows of 100, the last two dimensions swapped.
    let g = geometry(24, 1, 70, 70, span(1));
    let blocks = Blocks { dims: [1, 3, 2, 4], strides: [0, 800, 100, 200] };
    let rng = &mut StdRng::seed_from_u64(7);
    let (apart, exact) = random::<f32>(rng, 2400, 0.5, 2.0);
    let x: Vec<f32> = (0..24)
        .flat_map(|o| {
            let at = o / 8 * 800 + o / 4 % 2 * 100 + o % 4 * 200;
            exact[at..at + 70].iter().map(|x| *x as f32).collect::<Vec<_>>()
        })
        .collect();
    let x = CpuStorage::F32(x);
    for level in Level::available() {
        let case = case::<f32>(g, Fusion::default());
        let norm = Norm { x_blocks: Some(blocks), ..case.norm };
        let run = |norm, x| forward::forward::<f32>(level, &Forward { norm, x, ..case.call(false) }).unwrap();
        let (a, b) = (run(norm, arg(&apart)), run(case.norm, arg(&x)));
        assert!(a.y == b.y && a.stats == b.stats);
        let stats = CpuStorage::F32(a.stats.unwrap());
        let want = Want { dx: true, dweight: Some(DType::F32), ..Want::default() };
        let run = |norm, x: Arg<'_, CpuStorage>| {
            let new = Backward::new(norm, x, arg(&case.storages[DY]), arg(&stats));
            let call = Backward { weight: Some(arg(&case.storages[W])), want, ..new };
            let got = backward::backward::<f32>(level, &call).unwrap();
            [got.dx, got.dweight].map(|g| to64(&g.unwrap()))
        };
        assert!(run(norm, arg(&apart)) == run(case.norm, arg(&x)));
    }
}
