//! Running statistics of a layer: mean, variance, and how many batches they have seen.
//!
//! Apart from the layers, because batch, synchronized and instance norm hold the same three buffers.
//! They are variables, so that a `VarMap` saves and loads them; nothing here takes part in a graph,
//! so no optimizer moves them.

use super::params::{self, fill};
use crate::request::accumulation_dtype;
use candle_core::{bail, DType, Device, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

const COUNT: &str = "num_batches_tracked";

/// The buffers. All clones of a layer share them.
#[derive(Debug, Clone)]
pub(crate) struct RunningStatistics {
    pub mean: Var,
    pub var: Var,
    /// Batches seen, a scalar i64 that stays on the CPU: counting must not wait for a GPU.
    pub count: Option<Var>,
}

impl RunningStatistics {
    /// The buffers under PyTorch's three names, created where a `VarMap` has none yet.
    ///
    /// A map gets a name for the count only where results depend on it, in a `cumulative` average:
    /// candle-nn's checkpoints lack it, and `VarMap::load` fails on a name that a checkpoint lacks.
    pub fn get(op: &str, channels: usize, cumulative: bool, vb: &VarBuilder) -> Result<Self> {
        let (mean, var) = Self::moments(op, channels, vb)?;
        let on_cpu = vb.clone().set_device(Device::Cpu);
        let held = vb.contains_tensor(COUNT);
        let stored =
            (held || cumulative).then(|| on_cpu.get_with_hints_dtype((), COUNT, Init::Const(0.), DType::I64));
        let count = match stored {
            Some(Ok(count)) => Var::from_tensor(&count)?,
            Some(Err(error)) if held => return Err(params::missing(op, COUNT, &().into(), error)),
            // Checkpoints older than the name, from candle among others, start to count here.
            _ => new_count()?,
        };
        if count.dtype() != DType::I64 || count.rank() != 0 {
            let (dtype, shape) = (count.dtype(), count.dims());
            bail!("{op}: {COUNT} has dtype {dtype:?} and shape {shape:?}, expected a scalar I64")
        }
        Ok(Self { mean, var, count: Some(count) })
    }

    /// The buffers under candle-nn's two names; a count only where the builder holds one already,
    /// so that a `VarMap` gets no name that candle-nn's checkpoints lack.
    pub fn get_like_candle_nn(op: &str, channels: usize, vb: &VarBuilder) -> Result<Self> {
        let (mean, var) = Self::moments(op, channels, vb)?;
        let on_cpu = vb.clone().set_device(Device::Cpu);
        let count = on_cpu
            .contains_tensor(COUNT)
            .then(|| on_cpu.get_with_hints_dtype((), COUNT, Init::Const(0.), DType::I64))
            // candle-nn does not read the name, so what lies there cannot fail.
            .and_then(Result::ok)
            .filter(|count| count.dtype() == DType::I64)
            .map(|count| Var::from_tensor(&count))
            .transpose()?;
        Ok(Self { mean, var, count })
    }

    /// Buffers of a layer that tracks nothing: constants for its getters.
    pub fn constant(channels: usize, dtype: DType, device: &Device) -> Result<Self> {
        let dtype = accumulation_dtype(dtype);
        let (mean, var) = (Var::zeros(channels, dtype, device)?, Var::ones(channels, dtype, device)?);
        Ok(Self { mean, var, count: None })
    }

    /// Tensors as they come; one that is a variable is shared.
    pub fn share(mean: &Tensor, var: &Tensor) -> Result<Self> {
        Ok(Self { mean: Var::from_tensor(mean)?, var: Var::from_tensor(var)?, count: None })
    }

    /// Tensors that a new layer takes over: of a dtype that can average, shared where they are variables of
    /// one, and counted from here.
    pub fn adopt(mean: &Tensor, var: &Tensor) -> Result<Self> {
        let averaging = |t: &Tensor| t.to_dtype(accumulation_dtype(t.dtype()));
        let statistics = Self::share(&averaging(mean)?, &averaging(var)?)?;
        Ok(Self { count: Some(new_count()?), ..statistics })
    }

    fn moments(op: &str, channels: usize, vb: &VarBuilder) -> Result<(Var, Var)> {
        // A half-precision average would stop moving long before it arrives.
        let dtype = accumulation_dtype(vb.dtype());
        let get = |name, init| {
            vb.get_with_hints_dtype(channels, name, Init::Const(init), dtype)
                .map_err(|e| params::missing(op, name, &channels.into(), e))
        };
        let (mean, var) = (get("running_mean", 0.)?, get("running_var", 1.)?);
        Ok((Var::from_tensor(&mean)?, Var::from_tensor(&var)?))
    }

    /// Weight of the next batch: `momentum`, or what makes the statistics a plain average.
    pub fn factor(&self, momentum: Option<f64>) -> Result<f64> {
        match (momentum, &self.count) {
            (Some(momentum), _) => Ok(momentum),
            (None, Some(count)) => Ok(1.0 / count.to_scalar::<i64>()?.saturating_add(1) as f64),
            (None, None) => bail!("{COUNT}: expected a count for a cumulative average, got none"),
        }
    }

    /// Counts a batch whose forward has succeeded.
    pub fn count_batch(&self) -> Result<()> {
        match &self.count {
            Some(count) => {
                count.set(&Tensor::new(count.to_scalar::<i64>()?.saturating_add(1), count.device())?)
            }
            None => Ok(()),
        }
    }

    /// Mean 0, variance 1, nothing seen.
    pub fn reset(&self) -> Result<()> {
        fill(&self.mean, 0.0)?;
        fill(&self.var, 1.0)?;
        self.count.as_ref().map_or(Ok(()), |count| count.set(&count.zeros_like()?))
    }
}

fn new_count() -> Result<Var> {
    Var::zeros((), DType::I64, &Device::Cpu)
}
