//! Batch norm over the batches of all ranks: the two collectives inside its op.
//!
//! Apart from `op.rs`, which knows one process. The road is batch norm's own, opened in two places:
//!
//! ```text
//! forward:  statistics -> all-gather, merge in rank order -> normalize
//! backward: gradient sums -> sum over ranks -> input gradient
//! ```
//!
//! A message forward is `[2 + 3 C]`: the count in two parts, then mean, mean_low and var. Backward it is
//! `[2, C]`. On a GPU nothing here waits for the device, but for one case: a rank that has at most one
//! value per channel must look at the global count.

use super::device::{self, BackwardTensors};
use super::op::{normalize, Statistics};
use super::parts::Parts;
use crate::distributed::ProcessGroup;
use crate::request::{accumulation_dtype, Gradients, Norm, Running, Want};
use candle_core::{bail, DType, Device, Result, Tensor};
use std::sync::Arc;

/// The group a batch norm shares its statistics with, and the words by which ranks tell their layers apart.
#[derive(Debug, Clone)]
pub(crate) struct Synchronized {
    pub group: Arc<dyn ProcessGroup>,
    pub layer: Arc<str>,
}

/// Statistics of all ranks, and what the backward needs.
pub(crate) struct Merged {
    sync: Synchronized,
    /// `[3, channels]`.
    pub stats: Tensor,
    /// Values per channel on all ranks, `[1]`, in the dtype of `stats`.
    count: Tensor,
}

impl Synchronized {
    /// Passes an outcome on. A failure takes part in the collective that the peers wait in, under words
    /// that no healthy rank uses, so that it fails there with the cause.
    pub fn or_tell<T>(&self, outcome: Result<T>) -> Result<T> {
        if let Err(error) = &outcome {
            let words = format!("{} failed: {error}", self.layer);
            // Fails on purpose, unless all ranks fail alike; either way the cause is what to return.
            let _ = Tensor::zeros(0, DType::F32, &Device::Cpu)
                .and_then(|nothing| self.group.all_gather(&words, &nothing));
        }
        outcome
    }

    fn words(&self, step: &str, channels: usize, x: &Tensor) -> String {
        format!("{}: {step} of {channels} channels, {:?} input", self.layer, x.dtype())
    }
}

/// Normalizes with the statistics of all ranks, and moves the running ones.
pub(crate) fn normalize_shared(
    norm: Norm,
    x: &Tensor,
    parts: Parts<Tensor>,
    sync: Synchronized,
    running: Option<Running>,
) -> Result<Tensor> {
    let channels = norm.geometry.params();
    let message = sync.or_tell(message(&norm, &x.detach(), channels))?;
    let words = sync.words("statistics", channels, x);
    let gathered = sync.group.all_gather(&words, &message)?;
    let (stats, count) = merge(&gathered, channels)?;
    let mut empty = false;
    if x.elem_count() <= channels {
        let total = count.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
        if total == 1.0 {
            bail!(
                "{}: expected more than 1 value per channel on all ranks together when training, \
                 got input size {:?} on rank {}",
                norm.name,
                x.dims(),
                sync.group.rank()
            )
        }
        empty = total == 0.0;
    }
    let moved = running.filter(|_| !empty).map(|running| (stats.clone(), count.clone(), running));
    let y = normalize(norm, x, parts, Statistics::Merged(Merged { sync, stats, count }))?;
    if let Some((stats, count, running)) = moved {
        move_running(&stats, &count, &running)?;
    }
    Ok(y)
}

/// Count and statistics of this rank's input; zeros where it has no samples.
fn message(norm: &Norm, x: &Tensor, channels: usize) -> Result<Tensor> {
    let (dtype, device) = (accumulation_dtype(x.dtype()), x.device());
    if x.elem_count() == 0 {
        return Tensor::zeros(2 + 3 * channels, dtype, device);
    }
    let count = norm.geometry.set_len();
    // Filled on the device: a copy from the host would keep a CUDA graph from being captured.
    let fill = |value: usize| Tensor::zeros(1, dtype, device)?.affine(1.0, value as f64);
    let stats = device::statistics(norm, x)?.flatten_all()?;
    Tensor::cat(&[fill(count / COUNT_BASE)?, fill(count % COUNT_BASE)?, stats], 0)
}

/// f32 holds integers up to here exactly, so the two parts hold counts up to its square.
const COUNT_BASE: usize = 1 << 24;

/// `(statistics [3, C], count [1])` of all ranks from their messages `[ranks, 2 + 3 C]`.
fn merge(gathered: &Tensor, channels: usize) -> Result<(Tensor, Tensor)> {
    match gathered.device() {
        Device::Cpu => merge_on_host(gathered, channels),
        _ => merge_on_device(gathered, channels),
    }
}

/// Chan's merge, rank by rank: with `d` the difference of the means,
/// `mean += d n_r / n`, `m2 += m2_r + d^2 n n_r / (n + n_r)`.
/// Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
/// variances" (1979).
fn merge_on_host(gathered: &Tensor, channels: usize) -> Result<(Tensor, Tensor)> {
    let ranks = gathered.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let half = gathered.dtype() != DType::F64;
    let mut merged = vec![0f64; 3 * channels];
    let mut total = 0f64;
    for rank in &ranks {
        let n = rank[0] * COUNT_BASE as f64 + rank[1];
        if n == 0.0 {
            continue;
        }
        let (before, share) = (total, n / (total + n));
        total += n;
        for c in 0..channels {
            let [mean, low, var] = [0, 1, 2].map(|row| row * channels + c);
            let d = (rank[2 + mean] - merged[mean]) + (rank[2 + low] - merged[low]);
            let (sum, lost) = two_sum(merged[mean], d * share);
            merged[mean] = sum;
            merged[low] += lost;
            merged[var] += rank[2 + var] * n + d * d * before * share;
        }
    }
    for c in 0..channels {
        let [mean, low, var] = [0, 1, 2].map(|row| row * channels + c);
        if half {
            let exact = merged[mean] + merged[low];
            merged[mean] = exact as f32 as f64;
            merged[low] = exact - merged[mean];
        }
        merged[var] = if total > 0.0 { merged[var] / total } else { 0.0 };
    }
    let dtype = gathered.dtype();
    let stats = Tensor::from_vec(merged, (3, channels), &Device::Cpu)?.to_dtype(dtype)?;
    Ok((stats, Tensor::from_vec(vec![total], 1, &Device::Cpu)?.to_dtype(dtype)?))
}

/// `a + b` rounded, and what rounding lost (Knuth).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    (sum, (a - (sum - b_part)) + (b - b_part))
}

/// The same in candle's ops and f64, all ranks at once: means are taken relative to rank 0's, then
/// weighed by the counts.
fn merge_on_device(gathered: &Tensor, channels: usize) -> Result<(Tensor, Tensor)> {
    let (ranks, dtype) = (gathered.dim(0)?, gathered.dtype());
    let wide = gathered.to_dtype(DType::F64)?;
    let counts = ((wide.narrow(1, 0, 1)? * COUNT_BASE as f64)? + wide.narrow(1, 1, 1)?)?;
    let total = counts.sum_keepdim(0)?;
    // 0 samples on all ranks: any divisor gives 0.
    // Not `Tensor::maximum`, which is generic: candle's loops for it would be compiled here again.
    let shares = counts.broadcast_div(&total.broadcast_maximum(&total.ones_like()?)?)?;
    let rows = wide.narrow(1, 2, 3 * channels)?.reshape((ranks, 3, channels))?;
    let row = |i| rows.narrow(1, i, 1)?.squeeze(1);
    let means = (row(0)? + row(1)?)?;
    let pivot = means.narrow(0, 0, 1)?;
    let from_pivot = means.broadcast_sub(&pivot)?;
    let weigh = |t: &Tensor| t.broadcast_mul(&shares)?.sum_keepdim(0);
    let shift = weigh(&from_pivot)?;
    let spread = from_pivot.broadcast_sub(&shift)?.sqr()?;
    let var = weigh(&(row(2)? + spread)?)?;
    let mean = (pivot + shift)?;
    let high = mean.to_dtype(dtype)?;
    let low = (mean - high.to_dtype(DType::F64)?)?.to_dtype(dtype)?;
    let stats = Tensor::cat(&[high, low, var.to_dtype(dtype)?], 0)?;
    Ok((stats, total.flatten_all()?.to_dtype(dtype)?))
}

/// Moves the running statistics, the variance unbiased by the global count.
fn move_running(stats: &Tensor, count: &Tensor, running: &Running) -> Result<()> {
    let unbias = count.div(&(count - 1.0)?)?;
    let mean = (stats.get(0)? + stats.get(1)?)?;
    running.move_towards(&mean, &stats.get(2)?.broadcast_mul(&unbias)?)
}

impl Merged {
    /// The sums of this rank are its dbias and dweight, those of all ranks make dx. Nothing is exchanged
    /// where nobody tracks x.
    pub fn backward(
        &self,
        norm: Norm,
        x: &Tensor,
        weight: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<Gradients<Tensor>> {
        let channels = self.stats.dim(1)?;
        let (tracked, x) = (x.track_op(), x.detach());
        let call = BackwardTensors {
            norm,
            x: &x,
            dy: &dy.contiguous()?,
            parts: &Parts::affine(weight.cloned(), None),
            stats: &self.stats,
            fixed: false,
            want: Want { dx: tracked, ..Default::default() },
        };
        let empty = x.elem_count() == 0;
        let sums = if empty {
            Tensor::zeros((2, channels), self.stats.dtype(), x.device())
        } else {
            device::gradient_sums(&call)
        };
        let affine = |sums: &Tensor| -> Result<Gradients<Tensor>> {
            Ok(Gradients { dweight: Some(sums.get(1)?), dbias: Some(sums.get(0)?), ..Gradients::default() })
        };
        if !tracked {
            return affine(&sums?);
        }
        let sums = self.sync.or_tell(sums)?;
        let all = self.sync.group.all_reduce_sum(&self.sync.words("gradient sums", channels, &x), &sums)?;
        let dx = if empty {
            x.zeros_like()?
        } else {
            // Divided here, because on a GPU the count is known to the device alone.
            device::input_gradient(&call, &all.broadcast_div(&self.count)?, 1.0)?
        };
        Ok(Gradients { dx: Some(dx), ..affine(&sums)? })
    }

    /// Refuses a gradient that would be differentiated again.
    pub fn refuse_second_order(&self, norm: &Norm) -> Result<()> {
        self.sync.or_tell(Err(candle_core::Error::Msg(format!(
            "{}: gradients of gradients are not supported over several ranks, and \
             CANDLE_GRAD_DO_NOT_DETACH or a tracked output gradient asks for them",
            norm.name
        ))))
    }
}

#[cfg(test)]
mod tests;
