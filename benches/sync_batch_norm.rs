//! What synchronizing a batch norm costs: on one rank beside `BatchNorm`, and its collectives by ranks.
//!
//! `cargo bench --bench sync_batch_norm`; `-- --quick` takes fewer rounds. Contenders take turns
//! (`cases/rounds.rs`).

#[path = "cases/rounds.rs"]
#[allow(dead_code)] // the other benchmarks use the rest
mod rounds;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::{BatchNorm, BatchNormOptions, ModuleT};
use rounds::{fastest, Contender, Rounds, Settings};
use std::sync::Arc;
use std::time::Duration;

fn layer(channels: usize) -> Result<BatchNorm> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    BatchNorm::with_options(channels, BatchNormOptions::default(), vb)
}

/// A forward in training, and the backward of a given gradient.
fn step(bn: &BatchNorm, x: &Var, dy: &Tensor) -> Result<()> {
    let loss = (bn.forward_t(x, true)? * dy)?.sum_all()?;
    loss.backward().map(|_| ())
}

fn one_rank(dims: [usize; 4], rounds: usize) -> anyhow::Result<()> {
    let plain = layer(dims[1])?;
    let mut sync = layer(dims[1])?;
    let group: Arc<dyn ProcessGroup> = Arc::new(LocalGroup::new(1)?.remove(0));
    sync.synchronize("bn", group)?;
    let x = Var::from_tensor(&Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?)?;
    let dy = Tensor::randn(0f32, 1f32, &dims, &Device::Cpu)?;
    let same = (plain.forward_t(&x, true)? - sync.forward_t(&x, true)?)?.abs()?.max_all()?;
    assert_eq!(same.to_scalar::<f32>()?, 0.0);
    let mut contenders = [("BatchNorm", &plain), ("SyncBatchNorm", &sync)].map(|(name, layer)| {
        let (x, dy) = (&x, &dy);
        Contender::new(name, move || Ok(step(layer, x, dy)?))
    });
    let settings = Settings { rounds, block: Duration::from_millis(10) };
    let rounds = rounds::measure(&mut contenders, settings)?;
    let (Some(time), Some(ratio)) = (rounds.time("BatchNorm"), rounds.ratio("SyncBatchNorm", "BatchNorm"))
    else {
        unreachable!("both ran");
    };
    println!(
        "{:>18}  {:9.3} ms  {:6.3} ({:.3}-{:.3}){}",
        format!("{dims:?}"),
        time.median / 1e6,
        ratio.median,
        ratio.low,
        ratio.high,
        if ratio.agrees() { "" } else { " ?" }
    );
    Ok(())
}

/// Microseconds of a norm's two collectives, as the slowest rank sees them.
fn collectives(ranks: usize, channels: usize, rounds: usize) -> Result<[f64; 2]> {
    let each = LocalGroup::run(ranks, |group| {
        let (statistics, sums) = (3 * channels + 2, 2 * channels);
        let messages = [statistics, sums].map(|n| Tensor::zeros(n, DType::F32, &Device::Cpu));
        let [statistics, sums] = messages;
        let (statistics, sums) = (statistics?, sums?);
        let mut times = Rounds::of(["gather", "sum"]);
        for _ in 0..rounds {
            // As many calls on every rank: each waits for the others.
            let mut gather = || Ok(group.all_gather("bench", &statistics).map(|_| ())?);
            times.push(0, fastest(&mut gather, 5, 2).map_err(Error::wrap)?);
            let mut sum = || Ok(group.all_reduce_sum("bench", &sums).map(|_| ())?);
            times.push(1, fastest(&mut sum, 5, 2).map_err(Error::wrap)?);
        }
        Ok(["gather", "sum"].map(|name| times.time(name).map_or(f64::NAN, |time| time.median / 1e3)))
    });
    slowest(each)
}

/// Of the ranks, the slowest in each.
fn slowest(each: Result<Vec<[f64; 2]>>) -> Result<[f64; 2]> {
    let each = each?;
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
        let mut times = Rounds::of(["plain", "sync"]);
        for _ in 0..rounds {
            // Both start with all ranks ready, and all ranks compute at once in both.
            for (i, layer) in [&plain, &sync].into_iter().enumerate() {
                together()?;
                times.push(i, fastest(&mut || Ok(step(layer, &x, &dy)?), 1, 1).map_err(Error::wrap)?);
            }
        }
        Ok(["plain", "sync"].map(|name| times.time(name).map_or(f64::NAN, |time| time.median / 1e6)))
    });
    slowest(each)
}

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` and `cargo bench -- --quick` want a sign of life, not a figure.
    let quick = std::env::args().any(|arg| arg == "--test" || arg == "--quick");
    let rounds = if quick { 3 } else { 21 };
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
    Ok(())
}
