//! Running statistics, moved at the very end of a forward that has succeeded.

use super::element::Float;
use super::moments::{Stat, Stats};
use crate::request::{Norm, Running};
use candle_core::{DType, Device, Result, Tensor, Var};

/// `running = (1 - momentum) * running + momentum * batch`, the batch's averaged over `outer`.
pub(super) fn update<A: Float>(norm: &Norm, stats: Stats<A>, running: &Running) -> Result<()> {
    let g = &norm.geometry;
    if g.elements() == 0 {
        return Ok(());
    }
    let n = g.set_len() as f64;
    let mean = moved(norm, &running.mean, running.momentum, |s| {
        let Stat { high, low, .. } = stats.of(s);
        high.to64() + low.to64()
    })?;
    let unbiased = n / (n - 1.0);
    let var = moved(norm, &running.var, running.momentum, |s| stats.of(s).var.to64() * unbiased)?;
    running.mean.set(&mean)?;
    running.var.set(&var)
}

fn moved(norm: &Norm, running: &Var, momentum: f64, batch: impl Fn(usize) -> f64) -> Result<Tensor> {
    let g = &norm.geometry;
    let channels = g.sets_per_outer();
    let old = running.as_detached_tensor().to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let new = old.into_iter().enumerate().map(|(c, old)| {
        let batch = (0..g.outer).map(|o| batch(o * channels + c)).sum::<f64>() / g.outer as f64;
        old * (1.0 - momentum) + batch * momentum
    });
    Tensor::from_vec(new.collect(), channels, &Device::Cpu)?.to_dtype(running.dtype())
}
