//! Trains a small ResNet on handwritten digits, the batch shared by several ranks, beside one process that
//! has the whole batch, and prints how far the two are apart.
//!
//! ```text
//! cargo run --release --example data_parallel -- --ranks 4                 # threads of this process
//! cargo build --release --features mpi --example data_parallel             # processes, over MPI
//! mpirun -n 4 target/release/examples/data_parallel
//! export CANDLE_NORM_TOKEN=$(openssl rand -hex 32)                         # processes, over TCP
//! torchrun --no-python --nproc-per-node 4 target/release/examples/data_parallel
//! ```
//!
//! The recipe for a model of your own is in `Rank::new` and `Rank::step`: convert the batch norms, start
//! from rank 0's variables, average the gradients.

#[path = "digits/data.rs"]
mod data;
#[path = "data_parallel/resnet.rs"]
mod resnet;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, ModuleT, Tensor};
use candle_nn::{loss::cross_entropy, Optimizer, VarBuilder, VarMap, SGD};
use candle_norm::convert_sync_batchnorm;
use candle_norm::distributed::{all_reduce_gradients, broadcast_vars, LocalGroup, ProcessGroup, TcpGroup};
use clap::Parser;
use data::Digits;
use indicatif::{ProgressBar, ProgressStyle};
use resnet::ResNet;
use std::sync::Arc;

#[derive(Parser)]
#[command(about = "Trains a small ResNet on several ranks, beside one process with the whole batch")]
struct Args {
    /// Ranks, as threads of this process; under mpirun or torchrun its processes are the ranks
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Images in a step, on all ranks together; where that does not divide, some ranks take one more
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Steps of training
    #[arg(long, default_value_t = 60)]
    steps: usize,
    /// Residual blocks in each of the two stages
    #[arg(long, default_value_t = 2)]
    blocks: usize,
    /// Step of the gradient descent
    #[arg(long, default_value_t = 0.1)]
    learning_rate: f64,
    /// Train in f32 instead of f64. Within some tens of steps an activation within rounding of zero mostly
    /// falls on the other side of its ReLU, and from there the two trainings part; with SiLU in the place
    /// of ReLU they stay within 3e-6 for 60 steps
    #[arg(long)]
    single: bool,
    /// Lines to print of the steps
    #[arg(long, default_value_t = 12)]
    lines: usize,
}

/// A model, its variables and its optimizer.
struct Trainer {
    vars: VarMap,
    net: ResNet,
    optimizer: SGD,
}

impl Trainer {
    fn new(args: &Args) -> Result<Self> {
        let vars = VarMap::new();
        let dtype = if args.single { DType::F32 } else { DType::F64 };
        let net = ResNet::new(args.blocks, VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
        Ok(Self { optimizer: SGD::new(vars.all_vars(), args.learning_rate)?, vars, net })
    }

    fn loss(&self, batch: &Digits) -> Result<Tensor> {
        let logits = self.net.forward_t(&batch.images, true)?;
        Ok(cross_entropy(&logits, &batch.labels)?)
    }

    /// Largest difference to the same variable of `other`.
    fn difference(&self, other: &Self) -> Result<f64> {
        let (vars, others) = (self.vars.data().lock().unwrap(), other.vars.data().lock().unwrap());
        let mut largest = 0f64;
        for (name, var) in vars.iter() {
            let off = (var.as_tensor() - others[name].as_tensor())?.abs()?.to_dtype(DType::F64)?;
            largest = largest.max(off.flatten_all()?.max(0)?.to_scalar()?);
        }
        Ok(largest)
    }
}

/// One rank of the training.
struct Rank {
    group: Arc<dyn ProcessGroup>,
    trainer: Trainer,
}

impl Rank {
    fn new(group: Arc<dyn ProcessGroup>, args: &Args) -> Result<Self> {
        let mut trainer = Trainer::new(args)?;
        let norms = convert_sync_batchnorm(&mut trainer.net, group.clone())?;
        ensure!(norms == 2 + 4 * args.blocks, "found {norms} batch norms, expected {}", 2 + 4 * args.blocks);
        // Every rank has drawn weights of its own.
        broadcast_vars(&trainer.vars, &group)?;
        Ok(Self { group, trainer })
    }

    /// One step on this rank's share of `batch`; the mean loss over all of it.
    fn step(&mut self, batch: &Digits) -> Result<f64> {
        let (rank, ranks, all) = (self.group.rank(), self.group.world_size(), batch.len()?);
        let start = |rank: usize| all / ranks * rank + rank.min(all % ranks);
        let share = start(rank)..start(rank + 1);
        let mine = Digits {
            images: batch.images.narrow(0, share.start, share.len())?,
            labels: batch.labels.narrow(0, share.start, share.len())?,
        };
        // Shares may differ by an image: each counts for as many images as it has.
        let loss = (self.trainer.loss(&mine)? * (share.len() * ranks) as f64)? / all as f64;
        let loss = loss?;
        let mut gradients = loss.backward()?;
        all_reduce_gradients(&mut gradients, &self.trainer.vars, &self.group)?;
        self.trainer.optimizer.step(&gradients)?;
        let sum = self.group.all_reduce_sum("loss", &loss.detach().to_dtype(DType::F64)?)?;
        Ok(sum.to_scalar::<f64>()? / ranks as f64)
    }
}

fn train(group: Arc<dyn ProcessGroup>, args: &Args) -> Result<()> {
    let (first, ranks) = (group.rank() == 0, group.world_size());
    ensure!(args.batch_size >= ranks, "expected at least one image for each of {ranks} ranks");
    let (images, _) = Digits::load(1)?;
    let dtype = if args.single { DType::F32 } else { DType::F64 };
    let images = Digits { images: images.images.to_dtype(dtype)?, labels: images.labels };
    let mut rank = Rank::new(group, args)?;
    // Rank 0 also trains the whole batch alone, from the same variables.
    let mut alone = first.then(|| Trainer::new(args)).transpose()?;
    if let Some(alone) = &alone {
        let vars = rank.trainer.vars.data().lock().unwrap();
        for (name, var) in alone.vars.data().lock().unwrap().iter() {
            var.set(vars[name].as_tensor())?;
        }
    }
    let bar = if first { ProgressBar::new(args.steps as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} step {pos}/{len}  {msg}")?);
    if first {
        println!("{ranks} ranks, {} images a step", args.batch_size);
        println!("step  loss on {ranks:2} ranks  loss on one   difference  largest difference of a variable");
    }
    for step in 0..args.steps {
        let start = step * args.batch_size % (images.len()? - args.batch_size);
        let which: Vec<u32> = (start..start + args.batch_size).map(|i| i as u32).collect();
        let batch = images.select(&which)?;
        let loss = rank.step(&batch)?;
        if let Some(alone) = &mut alone {
            let whole = alone.loss(&batch)?;
            alone.optimizer.step(&whole.backward()?)?;
            let whole = whole.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            bar.set_message(format!("loss {loss:.4}"));
            if step % args.steps.div_ceil(args.lines.max(1)) == 0 || step + 1 == args.steps {
                let off = rank.trainer.difference(alone)?;
                let line =
                    format!("{:4}  {loss:16.6}  {whole:11.6}  {:11.1e}  {off:.1e}", step + 1, loss - whole);
                // Through the bar where there is a terminal, so that they do not overwrite each other.
                if bar.is_hidden() {
                    println!("{line}");
                } else {
                    bar.println(line);
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The processes of a launcher, if one has started this one.
fn launched() -> Result<Option<Arc<dyn ProcessGroup>>> {
    let set = |name: &str| std::env::var_os(name).is_some();
    if set("OMPI_COMM_WORLD_SIZE") || set("PMI_SIZE") || set("PMIX_RANK") {
        #[cfg(feature = "mpi")]
        return Ok(Some(Arc::new(candle_norm::distributed::MpiGroup::world()?)));
        #[cfg(not(feature = "mpi"))]
        anyhow::bail!(
            "started by mpirun, but built without the feature mpi: every process would train alone"
        );
    }
    if set("RANK") && set("WORLD_SIZE") && set("MASTER_ADDR") {
        return Ok(Some(Arc::new(TcpGroup::from_env()?)));
    }
    Ok(None)
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(group) = launched()? {
        return train(group, &args);
    }
    LocalGroup::run(args.ranks, |group| train(group, &args).map_err(candle_core::Error::wrap))
        .context("a rank failed")?;
    Ok(())
}
