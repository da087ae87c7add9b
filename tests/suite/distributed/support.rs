//! Problems for the distributed cases: data, the single-process answer, and how near is near.

use super::cases::Group;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::batch_norm::BatchNormOptions;
use candle_norm::distributed::ProcessGroup;
use candle_norm::{BatchNorm, ModuleT};
use std::collections::HashMap;
use std::sync::Mutex;

pub const CHANNELS: usize = 5;
const SPACE: (usize, usize) = (3, 4);
const STEPS: u64 = 3;

/// Samples per rank: even, uneven, and some without any.
pub fn batches(ranks: usize) -> Vec<Vec<usize>> {
    let cut = |of: [usize; 5]| of[..ranks.min(5)].iter().copied().chain((5..ranks).map(|r| r % 3)).collect();
    vec![cut([3, 3, 3, 3, 3]), cut([2, 5, 1, 4, 3]), cut([4, 0, 0, 2, 0])]
}

#[derive(Debug, Clone)]
pub struct Problem {
    pub dtype: DType,
    pub samples: Vec<usize>,
    pub channels_last: bool,
    pub shift: f64,
}

impl Default for Problem {
    fn default() -> Self {
        Self { dtype: DType::F32, samples: vec![], channels_last: false, shift: 3.0 }
    }
}

pub fn missing(what: &str) -> Error {
    Error::Msg(format!("test: no {what}"))
}

pub fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

pub fn get(vars: &VarMap, name: &str) -> Result<Var> {
    vars.data().lock().unwrap().get(name).cloned().ok_or_else(|| missing(name))
}

pub fn set(vars: &VarMap, name: &str, value: &Tensor) -> Result<()> {
    let var = get(vars, name)?;
    var.set(&value.to_dtype(var.dtype())?)
}

/// A synchronized layer of its own variables.
pub fn layer(group: &Group, channels: usize, options: BatchNormOptions, dtype: DType) -> Result<BatchNorm> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu);
    let mut bn = BatchNorm::with_options(channels, options, vb)?;
    bn.synchronize("bn", group.clone())?;
    Ok(bn)
}

/// Uniform numbers of mean 0 and variance 1, the same on every rank (SplitMix64).
pub fn uniform(seed: u64, dims: &[usize]) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e3779b97f4a7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e3779b97f4a7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let values = (0..dims.iter().product()).map(|_| (next() - 0.5) * 12f64.sqrt()).collect();
    Tensor::from_vec::<_, f64>(values, dims, &Device::Cpu)
}

/// Relative to the largest expected magnitude, at least 1.
pub fn near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (numbers(got)?, numbers(expected)?);
    let scale = expected.iter().fold(1f64, |scale, x| scale.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let off = (got - expected).abs();
        assert!(off <= tolerance * scale, "{what}[{i}]: {got} against {expected}, off by {off:e}");
    }
    Ok(())
}

/// How far the parts may be from the f64 answer for the same (rounded) input, relative to its largest.
struct Tolerances {
    output: f64,
    /// Sums over the n values of a channel.
    sums: f64,
    statistics: f64,
}

impl Problem {
    fn total(&self) -> usize {
        self.samples.iter().sum()
    }

    fn tolerances(&self) -> Tolerances {
        let n = (self.total() * SPACE.0 * SPACE.1) as f64;
        if self.dtype == DType::F64 {
            return Tolerances { output: 1e-12, sums: 1e-12, statistics: 1e-12 };
        }
        // Accumulated in f32. x - mean, rstd, weight and bias add a rounding each (8 in all), the mean of n
        // terms about sqrt(n) of its terms' size, and their sum, whose size is sqrt(n) of theirs, less
        // than n. Halves round outputs once more.
        let eps = f32::EPSILON as f64;
        let rounding = match self.dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            _ => 0.0,
        };
        Tolerances {
            output: rounding + eps * (n.sqrt() + 8.0),
            sums: eps * n,
            statistics: eps * (n.sqrt() + 8.0),
        }
    }

    /// `(x, dy)` of a step for the whole batch, values rounded to the dtype, in f64.
    fn data(&self, step: u64) -> Result<(Tensor, Tensor)> {
        let dims = [self.total(), CHANNELS, SPACE.0, SPACE.1];
        let rounded = |t: Tensor| t.to_dtype(self.dtype)?.to_dtype(DType::F64);
        let x = (uniform(2 * step + 1, &dims)? + self.shift)?;
        Ok((rounded(x)?, rounded(uniform(2 * step + 2, &dims)?)?))
    }

    /// The rows of rank `rank`, in the problem's dtype and memory order.
    fn part(&self, whole: &Tensor, rank: usize) -> Result<Tensor> {
        let start = self.samples[..rank].iter().sum();
        let part = whole.narrow(0, start, self.samples[rank])?.to_dtype(self.dtype)?;
        if self.channels_last {
            return part.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2));
        }
        part.contiguous()
    }
}

fn with_values(options: BatchNormOptions, dtype: DType) -> Result<(BatchNorm, VarMap)> {
    let vars = VarMap::new();
    let bn = BatchNorm::with_options(CHANNELS, options, VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
    for (seed, name, param) in [(91, "weight", bn.weight()), (92, "bias", bn.bias())] {
        if param.is_some() {
            // Through f32, so that both dtypes hold the same values.
            set(&vars, name, &uniform(seed, &[CHANNELS])?.to_dtype(DType::F32)?)?;
        }
    }
    Ok((bn, vars))
}

/// Several training steps on parts of a batch over the ranks, against one process in f64 with all of it.
pub fn compare(group: &Group, problem: &Problem, options: BatchNormOptions) -> Result<()> {
    let wide = if problem.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let (mut bn, _) = with_values(options, wide)?;
    bn.synchronize("bn", group.clone())?;
    let (whole, _) = with_values(options, DType::F64)?;
    let tolerances = problem.tolerances();
    for step in 0..STEPS {
        let (x, dy) = problem.data(step)?;
        // The leaf lies in memory as the layer's input does; the layer sees it permuted back.
        let part = problem.part(&x, group.rank())?;
        let (leaf, order) = match problem.channels_last {
            true => (Var::from_tensor(&part.permute((0, 2, 3, 1))?.contiguous()?)?, [0, 3, 1, 2]),
            false => (Var::from_tensor(&part)?, [0, 1, 2, 3]),
        };
        let input = leaf.permute(order)?;
        let x = Var::from_tensor(&x)?;
        let (y, expected) = (bn.forward_t(&input, true)?, whole.forward_t(&x, true)?);
        assert_eq!(y.dtype(), problem.dtype);
        let mine = |t: &Tensor| problem.part(t, group.rank());
        let narrowed = |t: &Tensor| {
            let start = problem.samples[..group.rank()].iter().sum();
            t.narrow(0, start, problem.samples[group.rank()])
        };
        near("y", &y, &narrowed(&expected)?, tolerances.output)?;
        let gradients = (&y * mine(&dy)?)?.sum_all()?.backward()?;
        let all = (&expected * &dy)?.sum_all()?.backward()?;
        let of = |gradients: &candle_core::backprop::GradStore, t: &Tensor| {
            gradients.get(t).cloned().ok_or_else(|| missing("gradient"))
        };
        let dx = of(&gradients, &leaf)?.permute(order)?;
        near("dx", &dx, &narrowed(&of(&all, &x)?)?, tolerances.output)?;
        for (what, param, expected) in
            [("dweight", bn.weight(), whole.weight()), ("dbias", bn.bias(), whole.bias())]
        {
            let (Some(param), Some(expected)) = (param, expected) else { continue };
            let sum = group.all_reduce_sum(what, &of(&gradients, param)?)?;
            near(what, &sum, &of(&all, expected)?, tolerances.sums)?;
        }
        near("running_mean", bn.running_mean(), whole.running_mean(), tolerances.statistics)?;
        near("running_var", bn.running_var(), whole.running_var(), tolerances.statistics)?;
        same_bits_everywhere(group, bn.running_mean())?;
        same_bits_everywhere(group, bn.running_var())?;
    }
    let count = |bn: &BatchNorm| bn.num_batches_tracked().map(|t| t.to_scalar::<i64>()).transpose();
    assert_eq!(count(&bn)?, count(&whole)?);
    Ok(())
}

pub fn same_bits_everywhere(group: &Group, t: &Tensor) -> Result<()> {
    let bits = |t: &Tensor| numbers(t).map(|v| v.into_iter().map(f64::to_bits).collect::<Vec<_>>());
    let all = group.all_gather("bits", t)?;
    for rank in 0..group.world_size() {
        assert_eq!(bits(&all.get(rank)?)?, bits(t)?, "rank {rank} has other bits");
    }
    Ok(())
}

pub fn recorded() -> Result<HashMap<String, Tensor>> {
    let path = crate::common::golden("sync_batch_norm.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu)
}

/// A group that notes the kind and the number of elements of each call.
#[derive(Debug)]
pub struct Counting {
    inner: Group,
    calls: Mutex<Vec<(String, usize)>>,
}

impl Counting {
    pub fn new(inner: Group) -> Self {
        Self { inner, calls: Mutex::new(vec![]) }
    }

    pub fn take(&self) -> Vec<(String, usize)> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn note(&self, kind: &str, tensor: &Tensor) {
        self.calls.lock().unwrap().push((kind.into(), tensor.elem_count()));
    }
}

impl ProcessGroup for Counting {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.note("gather", tensor);
        self.inner.all_gather(what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.note("sum", tensor);
        self.inner.all_reduce_sum(what, tensor)
    }
}
