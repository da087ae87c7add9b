//! What must hold on every rank of a group, whatever carries it.
//!
//! Apart from the tests that run them: over threads in the suite, over MPI in `tests/mpi.rs`. A case runs
//! on every rank at once, and compares its share with one process that has the whole batch.

use super::support::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::batch_norm::BatchNormOptions;
use candle_norm::distributed::{all_reduce_gradients, broadcast_vars, ProcessGroup};
use candle_norm::{BatchNorm, ModuleT, SyncBatchNorm};
use std::sync::Arc;

pub type Group = Arc<dyn ProcessGroup>;
pub type Case = fn(&Group) -> Result<()>;

pub const ALL: &[(&str, Case)] = &[
    ("collectives", collectives),
    ("large_collectives", large_collectives),
    ("equals_one_process_f64", equals_one_process_f64),
    ("equals_one_process_f32", equals_one_process_f32),
    ("equals_one_process_half", equals_one_process_half),
    ("options_as_batch_norm", options_as_batch_norm),
    ("large_mean", large_mean),
    ("pytorch_recorded", pytorch_recorded),
    ("one_value_per_channel_is_global", one_value_per_channel_is_global),
    ("one_collective_each_way", one_collective_each_way),
    ("disagreement_fails_everywhere", disagreement_fails_everywhere),
    ("wrong_input_on_one_rank_fails_everywhere", wrong_input_on_one_rank_fails_everywhere),
    ("gradients_averaged", gradients_averaged),
    ("variables_broadcast", variables_broadcast),
    ("training_follows_one_process", super::training::training_follows_one_process),
    ("parts_are_groups", parts_are_groups),
    ("batch_norm_over_parts", batch_norm_over_parts),
];

fn collectives(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::U32, DType::U8] {
        let mine = Tensor::new(&[[rank as f64 + 1.0, 2.0]], &Device::Cpu)?.to_dtype(dtype)?;
        let all = group.all_gather("test", &mine)?;
        assert_eq!((all.dims(), all.dtype()), ([ranks, 1, 2].as_slice(), dtype));
        let expected: Vec<f64> = (0..ranks).flat_map(|r| [r as f64 + 1.0, 2.0]).collect();
        assert_eq!(numbers(&all)?, expected);
        let sum = group.all_reduce_sum("test", &mine)?;
        assert_eq!((sum.dims(), sum.dtype()), ([1, 2].as_slice(), dtype));
        assert_eq!(numbers(&sum)?, [(ranks * (ranks + 1) / 2) as f64, 2.0 * ranks as f64]);
        let last = group.broadcast("test", &mine, ranks - 1)?;
        assert_eq!(numbers(&last)?, [ranks as f64, 2.0]);
    }
    // A view is sent as what it shows, and nothing at all as nothing.
    let view = Tensor::arange(0f32, 6f32, &Device::Cpu)?.reshape((2, 3))?.t()?.narrow(0, 1, 2)?;
    assert_eq!(group.all_gather("view", &view)?.get(ranks - 1)?.to_vec2::<f32>()?, [[1., 4.], [2., 5.]]);
    let nothing = Tensor::zeros((0, 3), DType::F32, &Device::Cpu)?;
    assert_eq!(group.all_gather("nothing", &nothing)?.dims(), [ranks, 0, 3]);
    assert!(group.broadcast("no such rank", &view, ranks).is_err());
    Ok(())
}

/// Beyond what fits in one message of any engine.
fn large_collectives(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank() as f64, group.world_size());
    let n = 100_003;
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let mine = (Tensor::ones(n, dtype, &Device::Cpu)? * (rank + 1.0))?;
        let all = group.all_gather("large", &mine)?;
        assert_eq!(all.dims(), [ranks, n]);
        for (r, row) in numbers(&all)?.chunks(n).enumerate() {
            assert!(row.iter().all(|x| *x == r as f64 + 1.0));
        }
        let total = (ranks * (ranks + 1) / 2) as f64;
        assert!(numbers(&group.all_reduce_sum("large", &mine)?)?.iter().all(|x| *x == total));
        assert!(numbers(&group.broadcast("large", &mine, 0)?)?.iter().all(|x| *x == 1.0));
    }
    Ok(())
}

fn equals_one_process_f64(group: &Group) -> Result<()> {
    for samples in batches(group.world_size()) {
        for channels_last in [false, true] {
            let problem =
                Problem { dtype: DType::F64, samples: samples.clone(), channels_last, ..Problem::default() };
            compare(group, &problem, BatchNormOptions::default())?;
        }
    }
    Ok(())
}

fn equals_one_process_f32(group: &Group) -> Result<()> {
    for samples in batches(group.world_size()) {
        for channels_last in [false, true] {
            let problem = Problem { samples: samples.clone(), channels_last, ..Problem::default() };
            compare(group, &problem, BatchNormOptions::default())?;
        }
    }
    Ok(())
}

fn equals_one_process_half(group: &Group) -> Result<()> {
    for samples in batches(group.world_size()) {
        for dtype in [DType::F16, DType::BF16] {
            let problem = Problem { dtype, samples: samples.clone(), ..Problem::default() };
            compare(group, &problem, BatchNormOptions::default())?;
        }
    }
    Ok(())
}

fn options_as_batch_norm(group: &Group) -> Result<()> {
    let default = BatchNormOptions::default;
    let all = [
        default().momentum(None),
        default().affine(false),
        default().bias(false),
        default().track_running_stats(false),
        default().momentum(0.7).eps(0.1),
    ];
    for samples in batches(group.world_size()) {
        for options in all {
            let problem = Problem { dtype: DType::F64, samples: samples.clone(), ..Problem::default() };
            compare(group, &problem, options)?;
        }
    }
    Ok(())
}

/// Mean 1e4 and std 1 in f32: a mean rounded to f32 would be off by 5e-4.
fn large_mean(group: &Group) -> Result<()> {
    for samples in batches(group.world_size()) {
        let problem = Problem { samples, shift: 1e4, ..Problem::default() };
        compare(group, &problem, BatchNormOptions::default())?;
    }
    Ok(())
}

/// What PyTorch 2.11 computes for the whole batch (`tests/golden/generate_sync.py`), cut unevenly.
fn pytorch_recorded(group: &Group) -> Result<()> {
    let recorded = recorded()?;
    let get = |name: &str| recorded.get(name).cloned().ok_or_else(|| missing(name));
    let (rank, ranks) = (group.rank(), group.world_size());
    let total = get("step0.x")?.dim(0)?;
    // The last rank takes what the others leave.
    let start = rank * total / (ranks + 1);
    let end = if rank + 1 == ranks { total } else { (rank + 1) * total / (ranks + 1) };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let bn = SyncBatchNorm::new(get("weight")?.dim(0)?, BatchNormOptions::default(), group.clone(), vb)?;
    set(&vars, "weight", &get("weight")?)?;
    set(&vars, "bias", &get("bias")?)?;
    for step in 0..3 {
        let part = |name: &str| get(&format!("step{step}.{name}"))?.narrow(0, start, end - start);
        let x = Var::from_tensor(&part("x")?)?;
        let y = bn.forward_t(&x, true)?;
        let gradients = (&y * part("dy")?)?.sum_all()?.backward()?;
        let gradient = |t: &Tensor| gradients.get(t).cloned().ok_or_else(|| missing("gradient"));
        let whole = |name: &str| get(&format!("step{step}.{name}"));
        near("y", &y, &part("y")?, 1e-12)?;
        near("dx", &gradient(&x)?, &part("dx")?, 1e-12)?;
        for (name, param) in [("dweight", bn.weight()), ("dbias", bn.bias())] {
            let mine = gradient(param.ok_or_else(|| missing(name))?)?;
            near(name, &group.all_reduce_sum(name, &mine)?, &whole(name)?, 1e-12)?;
        }
        near("running_mean", bn.running_mean(), &whole("running_mean")?, 1e-12)?;
        near("running_var", bn.running_var(), &whole("running_var")?, 1e-12)?;
    }
    let tracked = bn.num_batches_tracked().ok_or_else(|| missing("num_batches_tracked"))?;
    assert_eq!(tracked.to_scalar::<i64>()?, 3);
    near("evaluation", &bn.forward_t(&get("step0.x")?, false)?, &get("evaluation")?, 1e-12)
}

fn one_value_per_channel_is_global(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let bn = layer(group, 2, BatchNormOptions::default(), DType::F64)?;
    let input = |samples: usize| Tensor::full(rank as f64, (samples, 2), &Device::Cpu);
    // One value each: enough from two ranks on.
    let alone = bn.forward_t(&input(1)?, true);
    assert_eq!(alone.is_ok(), ranks > 1);
    if ranks > 1 {
        let mean = (ranks - 1) as f64 / 2.0;
        let var = (0..ranks).map(|r| (r as f64 - mean).powi(2)).sum::<f64>() / ranks as f64;
        let expected = (rank as f64 - mean) / (var + 1e-5).sqrt();
        assert!((numbers(&alone?)?[0] - expected).abs() < 1e-12);
    }
    let before = numbers(bn.running_mean())?;
    // One value on rank 0 alone: too few, and every rank says so.
    let error = bn.forward_t(&input(usize::from(rank == 0))?, true).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("expected more than 1 value per channel"), "{error}");
    // None anywhere: nothing to do, nothing moves.
    assert_eq!(bn.forward_t(&input(0)?, true)?.dims(), [0, 2]);
    assert_eq!(numbers(bn.running_mean())?, before);
    Ok(())
}

fn one_collective_each_way(group: &Group) -> Result<()> {
    let counting = Arc::new(Counting::new(group.clone()));
    let bn = layer(&(counting.clone() as Group), 4, BatchNormOptions::default(), DType::F32)?;
    let x = Var::randn(0f32, 1f32, (2, 4, 3, 3), &Device::Cpu)?;
    let single = group.world_size() == 1;
    let calls = |expected: &[(&str, usize)]| {
        let expected: Vec<_> =
            expected.iter().filter(|_| !single).map(|(s, n)| (s.to_string(), *n)).collect();
        assert_eq!(counting.take(), expected);
    };
    bn.forward_t(&x, false)?.sum_all()?.backward()?;
    calls(&[]);
    let y = bn.forward_t(&x, true)?;
    calls(&[("gather", 3 * 4 + 2)]);
    y.sum_all()?.backward()?;
    calls(&[("sum", 2 * 4)]);
    // Nobody wants dx: weight and bias need no one else.
    bn.forward_t(&x.as_detached_tensor(), true)?.sum_all()?.backward()?;
    calls(&[("gather", 3 * 4 + 2)]);
    Ok(())
}

/// Channels, dtype, or the layer itself: an error on every rank, and the group works on.
fn disagreement_fails_everywhere(group: &Group) -> Result<()> {
    if group.world_size() == 1 {
        return Ok(());
    }
    let odd = group.rank() == group.world_size() - 1;
    let build = |name: &str, channels: usize| -> Result<BatchNorm> {
        let mut bn = layer(group, channels, BatchNormOptions::default(), DType::F32)?;
        bn.synchronize(name, group.clone())?;
        Ok(bn)
    };
    let fails = |bn: &BatchNorm, channels: usize, dtype: DType, words: &str| -> Result<()> {
        let x = Tensor::randn(0f32, 1f32, (3, channels, 2), &Device::Cpu)?.to_dtype(dtype)?;
        let error = bn.forward_t(&x, true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("different calls") && error.contains(words), "{error}");
        assert_eq!(numbers(bn.running_mean())?, vec![0.0; channels]);
        Ok(())
    };
    let channels = if odd { 5 } else { 4 };
    fails(&build("bn", channels)?, channels, DType::F32, "5 channels")?;
    fails(&build("bn", 4)?, 4, if odd { DType::BF16 } else { DType::F32 }, "BF16")?;
    fails(&build("bn", 4)?, 4, if odd { DType::F64 } else { DType::F32 }, "F64")?;
    fails(&build(if odd { "layer2.bn" } else { "layer1.bn" }, 4)?, 4, DType::F32, "layer2.bn")?;
    // A gather meets a sum.
    let x = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let outcome = if odd { group.all_gather("x", &x) } else { group.all_reduce_sum("x", &x) };
    assert!(outcome.map(|_| ()).unwrap_err().to_string().contains("different calls"));
    // Different vars, too.
    let vars = vec![Var::zeros(if odd { (2, 3) } else { (3, 2) }, DType::F32, &Device::Cpu)?];
    assert!(broadcast_vars(&vars, group).is_err());
    collectives(group)
}

fn wrong_input_on_one_rank_fails_everywhere(group: &Group) -> Result<()> {
    let bn = layer(group, 4, BatchNormOptions::default(), DType::F32)?;
    let channels = if group.rank() == 0 { 3 } else { 4 };
    let error = bn.forward_t(&Tensor::zeros((2, channels, 2), DType::F32, &Device::Cpu)?, true);
    let error = error.map(|_| ()).unwrap_err().to_string();
    // The peers are told what went wrong.
    assert!(error.contains("expected 4 channels in dimension 1"), "{error}");
    collectives(group)
}

fn gradients_averaged(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank() as f64, group.world_size() as f64);
    let mean_rank = (ranks - 1.0) / 2.0;
    // A map per rank: `all_vars` has another order in each.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let names: Vec<String> = (0..20).map(|i| format!("p{i}")).collect();
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (i, name) in names.iter().enumerate() {
        let dtype = [DType::F32, DType::F64, DType::BF16][i % 3];
        let p = vb.get_with_hints_dtype((2, 3), name, candle_nn::Init::Const(1.), dtype)?;
        loss = (loss + (p.sum_all()?.to_dtype(DType::F64)? * (i as f64 + 1.0 + 8.0 * rank))?)?;
    }
    // Of the same shape, without a gradient: stays so.
    vb.get_with_hints((2, 3), "running_mean", candle_nn::Init::Const(0.))?;
    for by_name in [true, false] {
        let mut gradients = loss.backward()?;
        if by_name {
            all_reduce_gradients(&mut gradients, &vars, group)?;
        } else {
            all_reduce_gradients(&mut gradients, &vars.all_vars(), group)?;
        }
        for (i, name) in names.iter().enumerate() {
            let var = get(&vars, name)?;
            let gradient = gradients.get(&var).ok_or_else(|| missing(name))?;
            assert_eq!((gradient.dims(), gradient.dtype()), (var.dims(), var.dtype()));
            // Small integers and halves, exact in bf16 too.
            assert_eq!(numbers(gradient)?, vec![i as f64 + 1.0 + 8.0 * mean_rank; 6], "{name}");
        }
        assert!(gradients.get(get(&vars, "running_mean")?.as_tensor()).is_none());
    }
    Ok(())
}

/// Interleaved parts that work at their own pace, parts of parts, and parts of one.
fn parts_are_groups(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let part = group.split(rank % 2)?;
    let members: Vec<usize> = (0..ranks).filter(|r| r % 2 == rank % 2).collect();
    assert_eq!((part.world_size(), part.rank()), (members.len(), rank / 2));
    let mine = Tensor::new(&[rank as f64], &Device::Cpu)?;
    let total: usize = members.iter().sum();
    // One part makes more calls than the other, and the whole goes on between them.
    for _ in 0..2 + rank % 2 {
        assert_eq!(numbers(&part.all_reduce_sum("part", &mine)?)?, [total as f64]);
        let all = numbers(&part.all_gather("part", &mine)?)?;
        assert_eq!(all, members.iter().map(|r| *r as f64).collect::<Vec<_>>());
    }
    assert_eq!(numbers(&group.all_reduce_sum("whole", &mine)?)?, [(ranks * (ranks - 1) / 2) as f64]);
    let last = part.world_size() - 1;
    assert_eq!(numbers(&part.broadcast("part", &mine, last)?)?, [members[last] as f64]);
    // Split again, with two splits of one group alive.
    let half = part.split(part.rank() / 2)?;
    let alone = group.split(100 + rank)?;
    assert_eq!(alone.world_size(), 1);
    let pair: Vec<usize> = members.chunks(2).nth(part.rank() / 2).unwrap_or_default().to_vec();
    assert_eq!(numbers(&half.all_reduce_sum("pair", &mine)?)?, [pair.iter().sum::<usize>() as f64]);
    assert_eq!(numbers(&alone.all_reduce_sum("alone", &mine)?)?, [rank as f64]);
    // A part whose ranks differ fails, and nobody else; then it works on.
    let what = if rank == 0 { "a" } else { "b" };
    let outcome = part.all_gather(what, &mine);
    assert_eq!(outcome.is_err(), rank % 2 == 0 && part.world_size() > 1);
    assert!(group.split(usize::MAX).is_err());
    collectives(&part)
}

/// Each part as one process with the part's batch, whatever the other does.
fn batch_norm_over_parts(group: &Group) -> Result<()> {
    let rank = group.rank();
    let part = group.split(rank % 2)?;
    for samples in batches(part.world_size()) {
        let problem = Problem { dtype: DType::F64, samples, shift: rank as f64 % 2.0, ..Problem::default() };
        compare(&part, &problem, BatchNormOptions::default())?;
    }
    collectives(group)
}

fn variables_broadcast(group: &Group) -> Result<()> {
    let bn = layer(group, 3, BatchNormOptions::default(), DType::F32)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    vb.get_with_hints(5, "a", candle_nn::Init::Const(group.rank() as f64))?;
    vb.get_with_hints_dtype((), "steps", candle_nn::Init::Const(group.rank() as f64 + 7.0), DType::I64)?;
    broadcast_vars(&vars, group)?;
    assert_eq!(numbers(get(&vars, "a")?.as_tensor())?, [0.0; 5]);
    assert_eq!(get(&vars, "steps")?.to_scalar::<i64>()?, 7);
    drop(bn);
    Ok(())
}
