//! Every norm in its plainest form.
//!
//! PLACEHOLDER until the fused kernels land: serial, scalar, f64 inside.

use crate::call::{accumulation_dtype, Arg, Backward, Forward, Gradients, Norm, Running};
use candle_core::{bail, CpuStorage, DType, Result};
use half::{bf16, f16};

fn load(arg: &Arg<CpuStorage>, len: usize) -> Result<Vec<f64>> {
    let at = arg.offset..arg.offset + len;
    Ok(match arg.storage {
        CpuStorage::F64(v) => v[at].to_vec(),
        CpuStorage::F32(v) => v[at].iter().map(|x| *x as f64).collect(),
        CpuStorage::F16(v) => v[at].iter().map(|x| x.to_f64()).collect(),
        CpuStorage::BF16(v) => v[at].iter().map(|x| x.to_f64()).collect(),
        _ => bail!("unexpected dtype"),
    })
}

fn store(v: Vec<f64>, dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F64 => CpuStorage::F64(v),
        DType::F32 => CpuStorage::F32(v.into_iter().map(|x| x as f32).collect()),
        DType::F16 => CpuStorage::F16(v.into_iter().map(f16::from_f64).collect()),
        DType::BF16 => CpuStorage::BF16(v.into_iter().map(bf16::from_f64).collect()),
        _ => bail!("unexpected dtype"),
    })
}

fn dtype(s: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    s.dtype()
}

/// `(index, set, param)` of every element.
fn elements(norm: &Norm) -> impl Iterator<Item = (usize, usize, usize)> {
    let g = norm.geometry;
    (0..g.elements()).map(move |i| {
        let (o, row, column) = (i / g.block_len(), i / g.width % g.rows, i % g.width);
        (i, o * g.sets_per_outer() + column / g.run, g.param(row, column))
    })
}

fn own_statistics(norm: &Norm, x: &[f64]) -> Vec<f64> {
    let g = norm.geometry;
    let (sets, n) = (g.sets(), g.set_len() as f64);
    let mut stats = vec![0.0; 3 * sets];
    if g.center {
        elements(norm).for_each(|(i, s, _)| stats[s] += x[i] / n);
        elements(norm).for_each(|(i, s, _)| stats[sets + s] += (x[i] - stats[s]) / n);
    }
    for (i, s, _) in elements(norm) {
        let d = x[i] - stats[s] - stats[sets + s];
        stats[2 * sets + s] += d * d / n;
    }
    stats
}

pub(crate) fn forward(call: Forward<CpuStorage>) -> Result<(CpuStorage, Option<CpuStorage>)> {
    let g = call.norm.geometry;
    let (sets, params) = (g.sets(), g.params());
    let x = load(&call.x, g.elements())?;
    let param = |p: Option<Arg<CpuStorage>>, or| p.map_or(Ok(vec![or; params]), |p| load(&p, params));
    let (w, b) = (param(call.weight, 1.0)?, param(call.bias, 0.0)?);
    let stats = match &call.given {
        Some(given) => {
            let low = given.mean_low.map_or(Ok(vec![0.0; sets]), |low| load(&low, sets))?;
            [load(&given.mean, sets)?, low, load(&given.var, sets)?].concat()
        }
        None => own_statistics(&call.norm, &x),
    };
    let mut y = vec![0.0; x.len()];
    for (i, s, p) in elements(&call.norm) {
        let rstd = 1.0 / (stats[2 * sets + s] + call.norm.eps).sqrt();
        y[i] = (x[i] - stats[s] - stats[sets + s]) * rstd * w[p] + b[p];
    }
    if let Some(running) = call.running {
        if g.elements() > 0 {
            move_running(&call.norm, &stats, running)?;
        }
    }
    let dtype = dtype(call.x.storage);
    let kept = call.keep.then(|| store(split_mean(stats), accumulation_dtype(dtype))).transpose()?;
    Ok((store(y, dtype)?, kept))
}

/// Splits the f64 mean into two f32, as the contract has it.
fn split_mean(mut stats: Vec<f64>) -> Vec<f64> {
    let sets = stats.len() / 3;
    for s in 0..sets {
        let mean = stats[s];
        stats[s] = mean as f32 as f64;
        stats[sets + s] += mean - stats[s];
    }
    stats
}

fn move_running(norm: &Norm, stats: &[f64], running: &Running) -> Result<()> {
    let g = norm.geometry;
    let (sets, channels, n) = (g.sets(), g.sets_per_outer(), g.set_len() as f64);
    for (var, row, scale) in [(&running.mean, 0, 1.0), (&running.var, 2, n / (n - 1.0))] {
        let old = var.as_detached_tensor().to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let new: Vec<f64> = (0..channels)
            .map(|c| {
                let batch =
                    (0..g.outer).map(|o| stats[row * sets + o * channels + c]).sum::<f64>() / g.outer as f64;
                old[c] * (1.0 - running.momentum) + batch * scale * running.momentum
            })
            .collect();
        let new = candle_core::Tensor::from_vec(new, channels, &candle_core::Device::Cpu)?;
        var.set(&new.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// The input's own statistics, `[3, sets]`.
pub(crate) fn statistics(norm: Norm, x: Arg<CpuStorage>) -> Result<CpuStorage> {
    let dtype = dtype(x.storage);
    let stats = own_statistics(&norm, &load(&x, norm.geometry.elements())?);
    store(split_mean(stats), accumulation_dtype(dtype))
}

/// Sums over each set of `dy` and of `dy * xhat`, `[2, sets]`, for norms with one parameter a set.
pub(crate) fn gradient_sums(call: Backward<CpuStorage>) -> Result<CpuStorage> {
    let g = call.norm.geometry;
    let sets = g.sets();
    let (x, dy) = (load(&call.x, g.elements())?, load(&call.dy, g.elements())?);
    let stats = load(&call.stats, 3 * sets)?;
    let mut sums = vec![0.0; 2 * sets];
    for (i, s, _) in elements(&call.norm) {
        let rstd = 1.0 / (stats[2 * sets + s] + call.norm.eps).sqrt();
        sums[s] += dy[i];
        sums[sets + s] += dy[i] * (x[i] - stats[s] - stats[sets + s]) * rstd;
    }
    store(sums, accumulation_dtype(dtype(call.x.storage)))
}

/// `dx` from the sums of `gradient_sums` over `count` elements a set, some of them elsewhere.
pub(crate) fn input_gradient(
    call: Backward<CpuStorage>,
    sums: Arg<CpuStorage>,
    count: f64,
) -> Result<CpuStorage> {
    let g = call.norm.geometry;
    let sets = g.sets();
    let (x, dy) = (load(&call.x, g.elements())?, load(&call.dy, g.elements())?);
    let w = call.weight.map_or(Ok(vec![1.0; g.params()]), |p| load(&p, g.params()))?;
    let (stats, sums) = (load(&call.stats, 3 * sets)?, load(&sums, 2 * sets)?);
    let mut dx = vec![0.0; x.len()];
    for (i, s, p) in elements(&call.norm) {
        let rstd = 1.0 / (stats[2 * sets + s] + call.norm.eps).sqrt();
        let xhat = (x[i] - stats[s] - stats[sets + s]) * rstd;
        let mean = if g.center { sums[s] / count } else { 0.0 };
        dx[i] = w[p] * rstd * (dy[i] - mean - xhat * sums[sets + s] / count);
    }
    store(dx, dtype(call.x.storage))
}

pub(crate) fn backward(call: Backward<CpuStorage>) -> Result<Gradients<CpuStorage>> {
    let g = call.norm.geometry;
    let (sets, params, n) = (g.sets(), g.params(), g.set_len() as f64);
    let (x, dy) = (load(&call.x, g.elements())?, load(&call.dy, g.elements())?);
    let w = call.weight.map_or(Ok(vec![1.0; params]), |p| load(&p, params))?;
    let stats = load(&call.stats, 3 * sets)?;
    let (mut dw, mut db) = (vec![0.0; params], vec![0.0; params]);
    let (mut sum, mut dot) = (vec![0.0; sets], vec![0.0; sets]);
    let at = |i: usize, s: usize| {
        let rstd = 1.0 / (stats[2 * sets + s] + call.norm.eps).sqrt();
        ((x[i] - stats[s] - stats[sets + s]) * rstd, rstd)
    };
    for (i, s, p) in elements(&call.norm) {
        let (xhat, _) = at(i, s);
        dw[p] += dy[i] * xhat;
        db[p] += dy[i];
        sum[s] += dy[i] * w[p] / n;
        dot[s] += dy[i] * w[p] * xhat / n;
    }
    let mut dx = vec![0.0; x.len()];
    for (i, s, p) in elements(&call.norm) {
        let (xhat, rstd) = at(i, s);
        let mean = if g.center { sum[s] } else { 0.0 };
        let correction = if call.fixed { 0.0 } else { mean + xhat * dot[s] };
        dx[i] = rstd * (dy[i] * w[p] - correction);
    }
    Ok(Gradients {
        dx: call.want.dx.then(|| store(dx, dtype(call.x.storage))).transpose()?,
        dweight: call.want.dweight.map(|d| store(dw, d)).transpose()?,
        dbias: call.want.dbias.map(|d| store(db, d)).transpose()?,
    })
}
