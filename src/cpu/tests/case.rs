//! A norm over random tensors, and the calls of it that all tests here make.

use super::kernels::EPS;
use crate::cpu::loops::Stored;
use crate::cpu::simd_level::Level;
use crate::cpu::{backward, forward};
use crate::fusion::Fusion;
use crate::geometry::Geometry;
use crate::request::{Arg, Backward, Forward, Norm, Want};
use candle_core::{CpuStorage, WithDType};
use rand::{rngs::StdRng, Rng, SeedableRng};

/// A norm's tensors, as they are and in f64.
pub(super) struct Case {
    pub norm: Norm,
    pub storages: [CpuStorage; 6],
    pub exact: [Vec<f64>; 6],
}

pub(super) const X: usize = 0;
pub(super) const DY: usize = 1;
pub(super) const W: usize = 2;
pub(super) const B: usize = 3;
/// Skip or gate.
pub(super) const OTHER: usize = 4;
pub(super) const RESIDUAL: usize = 5;

impl Case {
    /// With parameters of type P, and x of the given mean and standard deviation.
    pub fn new<T: WithDType, P: WithDType>(
        geometry: Geometry,
        fusion: Fusion,
        [mean, std]: [f64; 2],
    ) -> Self {
        let rng = &mut StdRng::seed_from_u64(geometry.elements() as u64);
        let norm = Norm { fusion, ..Norm::new("test", geometry, EPS) };
        let n = geometry.elements();
        let mut pairs = [
            random::<T>(rng, n, mean, std),
            random::<T>(rng, n, 0.1, 1.0),
            random::<P>(rng, norm.params(), 1.0, 0.3),
            random::<P>(rng, norm.params(), 0.2, 0.5),
            random::<T>(rng, n, 0.1, 1.5),
            random::<T>(rng, n, -0.2, 1.0),
        ];
        let exact = pairs.each_mut().map(|(_, exact)| std::mem::take(exact));
        Case { norm, storages: pairs.map(|(storage, _)| storage), exact }
    }

    pub fn call(&self, skip: bool) -> Forward<'_, CpuStorage> {
        let other = Some(arg(&self.storages[OTHER]));
        Forward {
            weight: Some(arg(&self.storages[W])),
            bias: Some(arg(&self.storages[B])),
            skip: other.filter(|_| skip),
            gate: other.filter(|_| self.norm.fusion.gate.is_some()),
            keep: true,
            ..Forward::new(self.norm, arg(&self.storages[X]))
        }
    }

    pub fn call_back<'a>(
        &'a self,
        skip: bool,
        stats: &'a CpuStorage,
        fixed: bool,
        want: Want,
    ) -> Backward<'a, CpuStorage> {
        let Forward { norm, x, weight, bias, skip, gate, .. } = self.call(skip);
        let new = Backward::new(norm, x, arg(&self.storages[DY]), arg(stats));
        Backward { weight, bias, skip, gate, fixed, want, ..new }
    }

    pub fn forward<T: Stored>(&self, level: Level) -> (Vec<T>, Vec<T::Acc>) {
        let outcome = forward::forward::<T>(level, &self.call(false)).unwrap();
        (outcome.y, outcome.stats.unwrap())
    }

    /// Gradients of x, weight and bias.
    pub fn backward<T: Stored>(
        &self,
        level: Level,
        stats: &[T::Acc],
        fixed: bool,
        want: Want,
    ) -> [Option<Vec<f64>>; 3] {
        let stats = T::Acc::to_cpu_storage(stats);
        let g = backward::backward::<T>(level, &self.call_back(false, &stats, fixed, want)).unwrap();
        [g.dx, g.dweight, g.dbias].map(|s| s.map(|s| to64(&s)))
    }
}

/// Uniform of the given mean and standard deviation.
pub(super) fn random<T: WithDType>(
    rng: &mut StdRng,
    n: usize,
    mean: f64,
    std: f64,
) -> (CpuStorage, Vec<f64>) {
    let v: Vec<T> =
        (0..n).map(|_| T::from_f64(mean + std * 12f64.sqrt() * (rng.random::<f64>() - 0.5))).collect();
    let exact = v.iter().map(|x| x.to_f64()).collect();
    (T::to_cpu_storage_owned(v), exact)
}

pub(super) fn arg(storage: &CpuStorage) -> Arg<'_, CpuStorage> {
    Arg { storage, offset: 0 }
}

pub(super) fn to64(s: &CpuStorage) -> Vec<f64> {
    match s {
        CpuStorage::F64(v) => v.clone(),
        CpuStorage::F32(v) => v.iter().map(|x| *x as f64).collect(),
        CpuStorage::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        CpuStorage::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
        _ => unreachable!(),
    }
}
