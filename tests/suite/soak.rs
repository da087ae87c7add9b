//! Training for a long time, with every norm: memory that does not grow, no threads left, statistics that
//! are still what f64 says.
//!
//! ```text
//! CANDLE_NORM_SOAK=1200 cargo test --test suite soak -- --ignored --nocapture
//! ```
//!
//! The variable is the time in seconds; without it the test takes ten. The inputs do not depend on what is
//! learned, so that the running statistics of an f32 model and of an f64 model stay comparable for ever.

use crate::common::{data, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::distributed::{all_reduce_gradients, LocalGroup, ProcessGroup};
use candle_norm::{
    batch_norm, group_norm, instance_norm::InstanceNormOptions, layer_norm, rms_norm, BatchNorm,
    BatchNormOptions, GroupNorm, InstanceNorm, LayerNorm, Module, ModuleT, RmsNorm, SyncBatchNorm,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DIMS: [usize; 4] = [4, 12, 9, 7];
/// Different batches, over and over.
const BATCHES: u64 = 16;

/// A norm of each kind, one after the other.
struct Model {
    vars: VarMap,
    batch: BatchNorm,
    sync: SyncBatchNorm,
    instance: InstanceNorm,
    group: GroupNorm,
    layer: LayerNorm,
    rms: RmsNorm,
}

impl Model {
    fn new(dtype: DType, group: Arc<LocalGroup>) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let tracked = InstanceNormOptions::default().affine(true).track_running_stats(true);
        Ok(Self {
            batch: batch_norm(DIMS[1], 1e-5, vb.pp("batch"))?,
            sync: SyncBatchNorm::new(DIMS[1], BatchNormOptions::default(), group, vb.pp("sync"))?,
            instance: InstanceNorm::with_options(DIMS[1], tracked, vb.pp("instance"))?,
            group: group_norm(3, DIMS[1], 1e-5, vb.pp("group"))?,
            layer: layer_norm(DIMS[3], 1e-5, vb.pp("layer"))?,
            rms: rms_norm(DIMS[3], 1e-5, vb.pp("rms"))?,
            vars,
        })
    }

    /// A step of descent; every norm that keeps statistics sees the batch itself.
    fn step(&self, x: &Tensor, dy: &Tensor, group: &Arc<LocalGroup>) -> Result<()> {
        let x = Var::from_tensor(x)?;
        let mut y = self.batch.forward_t(&x, true)?;
        y = (y + self.sync.forward_t(&x, true)?)?;
        y = (y + self.instance.forward_t(&x, true)?)?;
        y = self.rms.forward(&self.layer.forward(&self.group.forward(&y)?)?)?;
        let mut gradients = (y * dy)?.mean_all()?.backward()?;
        all_reduce_gradients(&mut gradients, &self.vars, group)?;
        for var in self.vars.all_vars() {
            if let Some(gradient) = gradients.get(&var) {
                var.set(&(var.as_detached_tensor() - (gradient * 1e-3)?)?)?;
            }
        }
        // Evaluation between the steps, as in any training.
        self.batch.forward_t(&x, false)?;
        self.instance.forward_t(&x, false).map(|_| ())
    }

    fn statistics(&self) -> Vec<(String, Vec<f64>)> {
        let vars = self.vars.data().lock().unwrap();
        let mut all: Vec<_> = vars.iter().filter(|(name, _)| name.contains("running")).collect();
        all.sort_by_key(|(name, _)| *name);
        all.into_iter().map(|(name, var)| (name.clone(), values(var))).collect()
    }
}

/// Resident bytes and threads of this process.
fn usage() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let number = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    (number("VmRSS:") << 10, number("Threads:"))
}

#[test]
#[ignore = "takes as long as CANDLE_NORM_SOAK says"]
#[cfg(target_os = "linux")]
fn soak() -> Result<()> {
    let seconds = std::env::var("CANDLE_NORM_SOAK").map_or(10, |value| value.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    // The pool of threads starts with the first parallel work, and stays.
    Tensor::randn(0f32, 1f32, (64, 4096), &Device::Cpu)
        .and_then(|x| candle_norm::functional::rms_norm(&x, &[4096], None, 1e-5))?;
    let (_, threads) = usage();
    let steps = LocalGroup::run(2, |group| {
        let models = [DType::F32, DType::F64].map(|dtype| Model::new(dtype, group.clone()));
        let [single, double] = models;
        let (single, double) = (single?, double?);
        let n = DIMS.iter().product();
        let (mut steps, mut warm) = (0u64, 0);
        loop {
            let seed = 2 * (steps % BATCHES) + group.rank() as u64;
            let x = Tensor::from_vec(data(seed, n, 3.0, 2.0), &DIMS, &Device::Cpu)?;
            let dy = Tensor::from_vec(data(seed + 1000, n, 0.0, 1.0), &DIMS, &Device::Cpu)?;
            for (model, dtype) in [(&single, DType::F32), (&double, DType::F64)] {
                // Of values that f32 holds, so that both see the same.
                let cast = |t: &Tensor| t.to_dtype(DType::F32)?.to_dtype(dtype);
                model.step(&cast(&x)?, &cast(&dy)?, &group)?;
            }
            steps += 1;
            if steps == 300 {
                warm = usage().0;
            }
            // All ranks stop in the same step.
            let over =
                Tensor::new(&[f32::from(u8::from(Instant::now() > end && steps > 600))], &Device::Cpu)?;
            if group.all_reduce_sum("over", &over)?.to_vec1::<f32>()?[0] > 0.0 {
                break;
            }
        }
        let (resident, _) = usage();
        println!(
            "rank {}: {steps} steps, {} KiB resident after 300, {} at the end",
            group.rank(),
            warm >> 10,
            resident >> 10
        );
        assert!(resident < warm + (16 << 20), "memory grew from {warm} to {resident} bytes");
        for ((name, got), (_, expected)) in single.statistics().into_iter().zip(double.statistics()) {
            for (got, expected) in got.iter().zip(expected) {
                // A step rounds at most four times, each by u of the value, and takes in a tenth of a batch's
                // own error, (12 + 2 sqrt(n)) u of at most twice the value; a tenth is forgotten each step, so
                // the sum of all steps' errors is ten times one step's.
                let per_step = 4.0 + 0.1 * 2.0 * (12.0 + 2.0 * (n as f64).sqrt());
                let bound = 10.0 * per_step * f64::powi(2.0, -24) * expected.abs().max(1.0);
                assert!(
                    (got - expected).abs() <= bound,
                    "{name}: {got}, in f64 {expected}, within {bound:e}"
                );
            }
        }
        Ok(steps)
    })?;
    assert_eq!(steps[0], steps[1]);
    let (_, left) = usage();
    assert!(left <= threads, "{left} threads at the end, {threads} at the start");
    println!("soak: {} steps of 2 ranks and 2 dtypes in {seconds} s, {left} threads", steps[0]);
    Ok(())
}
