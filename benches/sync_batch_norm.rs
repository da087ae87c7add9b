//! What synchronizing a batch norm costs: on one rank beside `BatchNorm`, and its collectives by ranks.
//!
//! `cargo bench --bench sync_batch_norm`. Contenders take turns in one run and are compared by the median of
//! the ratios of neighbours, so that what else runs on the machine weighs on both.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::{BatchNorm, BatchNormOptions, ModuleT};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn layer(channels: usize) -> Result<BatchNorm> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    BatchNorm::with_options(channels, BatchNormOptions::default(), vb)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn time(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// A forward in training, and the backward of a given gradient.
fn step(bn: &BatchNorm, x: &Var, dy: &Tensor) -> Result<()> {
    let loss = (bn.forward_t(x, true)? * dy)?.sum_all()?;
    loss.backward().map(|_| ())
}

fn one_rank(dims: [usize; 4], rounds: usize) -> Result<()> {
    let plain = layer(dims[1])?;
    let mut sync = layer(dims[1])?;
    let group: Arc<dyn ProcessGroup> = Arc::new(LocalGroup::new(1)?.remove(0));
    sync.synchronize("bn", group)?;
    let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?)?;
    let dy = Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?;
    let same = (plain.forward_t(&x, true)? - sync.forward_t(&x, true)?)?.abs()?.max_all()?;
    assert_eq!(same.to_scalar::<f32>()?, 0.0);
    let (mut times, mut ratios) = (vec![], vec![]);
    for round in 0..rounds {
        // Whoever goes second finds warmer caches: they take turns at that too.
        let (a, b) = if round % 2 == 0 {
            let a = time(|| step(&plain, &x, &dy))?;
            (a, time(|| step(&sync, &x, &dy))?)
        } else {
            let b = time(|| step(&sync, &x, &dy))?;
            (time(|| step(&plain, &x, &dy))?, b)
        };
        times.push(a);
        ratios.push(b / a);
    }
    println!("{:>18}  {:9.3} ms  {:6.3}", format!("{dims:?}"), median(times), median(ratios));
    Ok(())
}

/// Microseconds of a norm's two collectives, as the slowest rank sees them.
fn collectives(ranks: usize, channels: usize, rounds: usize) -> Result<[f64; 2]> {
    let each = LocalGroup::run(ranks, |group| {
        let (statistics, sums) = (3 * channels + 2, 2 * channels);
        let messages = [statistics, sums].map(|n| Tensor::zeros(n, DType::F32, &Device::Cpu));
        let [statistics, sums] = messages;
        let (statistics, sums) = (statistics?, sums?);
        let mut times = [vec![], vec![]];
        for _ in 0..rounds {
            times[0].push(1e3 * time(|| group.all_gather("bench", &statistics).map(|_| ()))?);
            times[1].push(1e3 * time(|| group.all_reduce_sum("bench", &sums).map(|_| ()))?);
        }
        Ok(times.map(median))
    })?;
    Ok([0, 1].map(|i| each.iter().map(|times| times[i]).fold(0.0, f64::max)))
}

/// Milliseconds of a step with `samples` on every rank, and of the same without a group.
fn steps(ranks: usize, dims: [usize; 4], rounds: usize) -> Result<[f64; 2]> {
    let each = LocalGroup::run(ranks, |group| {
        let (plain, mut sync) = (layer(dims[1])?, layer(dims[1])?);
        sync.synchronize("bn", group.clone())?;
        let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?)?;
        let dy = Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?;
        let together = || group.all_reduce_sum("start", &Tensor::zeros(1, DType::F32, &Device::Cpu)?);
        let mut times = [vec![], vec![]];
        for _ in 0..rounds {
            // Both start with all ranks ready, and all ranks compute at once in both.
            together()?;
            times[0].push(time(|| step(&plain, &x, &dy))?);
            together()?;
            times[1].push(time(|| step(&sync, &x, &dy))?);
        }
        Ok(times.map(median))
    })?;
    Ok([0, 1].map(|i| each.iter().map(|times| times[i]).fold(0.0, f64::max)))
}

fn main() -> Result<()> {
    // `cargo test --benches` and `cargo bench -- --quick` want a sign of life, not a figure.
    let quick = std::env::args().any(|arg| arg == "--test" || arg == "--quick");
    let rounds = if quick { 3 } else { 41 };
    let start = Instant::now();
    println!("one rank: forward + backward; SyncBatchNorm / BatchNorm\n");
    for dims in [[2, 16, 4, 4], [32, 64, 28, 28], [16, 256, 14, 14], [32, 512, 7, 7]] {
        one_rank(dims, rounds)?;
    }
    println!(
        "\nthe two collectives of a layer, LocalGroup, microseconds (all-gather of 3 C + 2, sum of 2 C)\n"
    );
    println!("ranks  C =   64          256         2048");
    for ranks in [1, 2, 4, 8] {
        let cells = [64, 256, 2048].map(|channels| collectives(ranks, channels, 10 * rounds));
        let cells: Result<Vec<_>> = cells.into_iter().collect();
        let row: Vec<_> = cells?.iter().map(|[gather, sum]| format!("{gather:5.1} + {sum:5.1}")).collect();
        println!("{ranks:5}  {}", row.join("  "));
    }
    println!("\nforward + backward of [8, 64, 28, 28] on every rank at once, milliseconds\n");
    println!("ranks  BatchNorm  SyncBatchNorm");
    for ranks in [1, 2, 4, 8] {
        let [plain, sync] = steps(ranks, [8, 64, 28, 28], rounds.min(15))?;
        println!("{ranks:5}  {plain:9.3}  {sync:13.3}");
    }
    assert!(start.elapsed() < Duration::from_secs(600));
    Ok(())
}
