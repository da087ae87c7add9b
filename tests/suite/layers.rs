//! The layers: their names in a checkpoint, their buffers, their arguments and their errors.
//!
//! What they compute is the functions' business, and is tested there.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{batch_norm, batch_norm1d, batch_norm2d, batch_norm3d};
use candle_norm::{group_norm, layer_norm, rms_norm};
use candle_norm::{instance_norm, instance_norm1d, instance_norm2d, instance_norm3d};
use candle_norm::{BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RmsNorm};
use candle_norm::{BatchNormConfig, LayerNormConfig};
use candle_norm::{BatchNormOptions, GroupNormOptions, InstanceNormOptions};
use candle_norm::{LayerNormOptions, RmsNormOptions};
use std::collections::HashMap;

const CPU: &Device = &Device::Cpu;

fn builder(dtype: DType) -> (VarMap, VarBuilder<'static>) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, CPU);
    (vars, vb)
}

fn names(vars: &VarMap) -> Vec<String> {
    let mut names: Vec<String> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    names
}

/// Values without a pattern that a norm could hide: a small linear congruential generator.
fn noise(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, CPU)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn count(bn: &BatchNorm) -> i64 {
    bn.num_batches_tracked().expect("a count").to_scalar().expect("a scalar")
}

fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn checkpoints_have_pytorch_names() -> Result<()> {
    let (affine, buffers) = (["bias", "weight"], ["running_mean", "running_var"]);
    let all = ["bias", "running_mean", "running_var", "weight"];
    let counted = ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"];
    let expect = |make: &dyn Fn(VarBuilder) -> Result<()>, expected: &[&str]| {
        let (vars, vb) = builder(DType::F32);
        make(vb)?;
        assert_eq!(names(&vars), expected);
        Ok::<(), candle_core::Error>(())
    };
    let bn = BatchNormOptions::default();
    expect(&|vb| batch_norm2d(4, bn, vb).map(drop), &all)?;
    expect(&|vb| batch_norm2d(4, bn.momentum(None), vb).map(drop), &counted)?;
    expect(&|vb| batch_norm1d(4, bn.affine(false), vb).map(drop), &buffers)?;
    expect(&|vb| batch_norm3d(4, bn.bias(false), vb).map(drop), &all[1..])?;
    expect(&|vb| BatchNorm::with_options(4, bn.track_running_stats(false), vb).map(drop), &affine)?;
    let instance = InstanceNormOptions::default();
    expect(&|vb| instance_norm2d(4, instance, vb).map(drop), &[])?;
    expect(&|vb| instance_norm1d(4, instance.affine(true), vb).map(drop), &affine)?;
    expect(&|vb| instance_norm3d(4, instance.track_running_stats(true), vb).map(drop), &buffers)?;
    let layer = LayerNormOptions::default();
    expect(&|vb| LayerNorm::with_options(4, layer, vb).map(drop), &affine)?;
    expect(&|vb| LayerNorm::with_options(4, layer.bias(false), vb).map(drop), &["weight"])?;
    expect(&|vb| LayerNorm::with_options(4, layer.elementwise_affine(false), vb).map(drop), &[])?;
    let rms = RmsNormOptions::default();
    expect(&|vb| RmsNorm::with_options(4, rms, vb).map(drop), &["weight"])?;
    expect(&|vb| RmsNorm::with_options(4, rms.elementwise_affine(false), vb).map(drop), &[])?;
    let group = GroupNormOptions::default();
    expect(&|vb| GroupNorm::with_options(2, 4, group, vb).map(drop), &affine)?;
    expect(&|vb| GroupNorm::with_options(2, 4, group.affine(false), vb).map(drop), &[])
}

#[test]
fn candle_nn_constructors_add_only_candle_nn_names() -> Result<()> {
    let (vars, vb) = builder(DType::F32);
    batch_norm(4, BatchNormConfig::default(), vb.pp("b"))?;
    layer_norm(4, LayerNormConfig::default(), vb.pp("l"))?;
    rms_norm(4, 1e-6, vb.pp("r"))?;
    group_norm(2, 4, 1e-5, vb.pp("g"))?;
    let expected = [
        "b.bias",
        "b.running_mean",
        "b.running_var",
        "b.weight",
        "g.bias",
        "g.weight",
        "l.bias",
        "l.weight",
        "r.weight",
    ];
    assert_eq!(names(&vars), expected);
    Ok(())
}

#[test]
fn candle_nn_batch_norm_counts_where_a_count_is_there() -> Result<()> {
    let (_vars, vb) = builder(DType::F32);
    let counting = batch_norm1d(2, BatchNormOptions::default().momentum(None), vb.clone())?;
    let same = batch_norm(2, 1e-5, vb)?;
    same.forward_t(&noise(&[4, 2], 1)?, true)?;
    assert_eq!(count(&counting), 1);
    assert_eq!(values(counting.running_mean())?, values(same.running_mean())?);
    Ok(())
}

#[test]
fn gamma_and_beta_stand_for_weight_and_bias() -> Result<()> {
    let tensors = HashMap::from([
        ("gamma".to_string(), Tensor::new(&[2f32, 3.], CPU)?),
        ("beta".to_string(), Tensor::new(&[5f32, 7.], CPU)?),
    ]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, CPU);
    for norm in [
        LayerNorm::with_options(2, LayerNormOptions::default(), vb.clone())?,
        layer_norm(2, LayerNormConfig::default(), vb.clone())?,
    ] {
        assert_eq!(values(norm.weight())?, [2., 3.]);
        assert_eq!(values(norm.bias().expect("a bias"))?, [5., 7.]);
    }
    assert_eq!(values(rms_norm(2, 1e-6, vb)?.weight())?, [2., 3.]);
    Ok(())
}

#[test]
fn a_var_map_saves_and_loads_running_statistics() -> Result<()> {
    // A cumulative average goes on from the count.
    let options = BatchNormOptions::default().momentum(None);
    let (vars, vb) = builder(DType::F32);
    let trained = batch_norm1d(3, options, vb)?;
    for step in 0..3 {
        trained.forward_t(&noise(&[8, 3], step)?, true)?;
    }
    let file = std::env::temp_dir().join(format!("candle-norm-layers-{}.safetensors", std::process::id()));
    vars.save(&file)?;

    let (mut vars, vb) = builder(DType::F32);
    let loaded = batch_norm1d(3, options, vb)?;
    vars.load(&file)?;
    let bytes = std::fs::read(&file)?;
    let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, CPU)?;
    let opened = batch_norm1d(3, options, vb)?;
    std::fs::remove_file(&file)?;

    let x = noise(&[5, 3], 9)?;
    let expected = values(&trained.forward_t(&x, false)?)?;
    for bn in [loaded, opened] {
        assert_eq!(count(&bn), 3);
        assert_eq!(values(&bn.forward_t(&x, false)?)?, expected);
    }
    Ok(())
}

/// candle-nn's checkpoints have no count, and `VarMap::load` wants every name that the map has.
#[test]
fn a_var_map_loads_a_checkpoint_of_candle_nn() -> Result<()> {
    let (theirs, vb) = builder(DType::F32);
    let trained = candle_nn::batch_norm(3, 1e-5, vb.pp("bn"))?;
    trained.forward_t(&noise(&[8, 3], 1)?, true)?;
    let file = std::env::temp_dir().join(format!("candle-norm-theirs-{}.safetensors", std::process::id()));
    theirs.save(&file)?;

    let (mut vars, vb) = builder(DType::F32);
    let bn = batch_norm2d(3, 1e-5, vb.pp("bn"))?;
    vars.load(&file)?;
    std::fs::remove_file(&file)?;
    assert_eq!(count(&bn), 0);
    assert_eq!(values(bn.running_mean())?, values(trained.running_mean())?);
    bn.forward_t(&noise(&[2, 3, 2, 2], 2)?, true)?;
    assert_eq!(count(&bn), 1);
    Ok(())
}

#[test]
fn a_checkpoint_without_a_count_starts_at_zero() -> Result<()> {
    let tensors = HashMap::from([
        ("running_mean".to_string(), Tensor::new(&[1f32, 2.], CPU)?),
        ("running_var".to_string(), Tensor::new(&[3f32, 4.], CPU)?),
    ]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, CPU);
    let bn = batch_norm1d(2, BatchNormOptions::default().affine(false), vb)?;
    assert_eq!(count(&bn), 0);
    assert_eq!(values(bn.running_var())?, [3., 4.]);
    Ok(())
}

#[test]
fn a_count_that_is_none_is_an_error() -> Result<()> {
    let (_vars, vb) = builder(DType::F32);
    vb.get_with_hints_dtype((), "num_batches_tracked", candle_nn::Init::Const(0.), DType::F32)?;
    let message = error(batch_norm1d(2, 1e-5, vb));
    assert!(message.contains("num_batches_tracked has dtype F32"), "{message}");
    Ok(())
}

#[test]
fn no_momentum_is_a_plain_average() -> Result<()> {
    let (_vars, vb) = builder(DType::F64);
    let bn = batch_norm1d(2, BatchNormOptions::default().momentum(None), vb)?;
    let (mut means, mut vars) = (vec![0.0; 2], vec![0.0; 2]);
    for step in 1..=4 {
        assert_eq!(bn.momentum(), 1.0 / step as f64);
        let x = noise(&[5, 2], step)?.to_dtype(DType::F64)?;
        bn.forward_t(&x, true)?;
        let columns = x.t()?.to_vec2::<f64>()?;
        for (channel, column) in columns.iter().enumerate() {
            let mean = column.iter().sum::<f64>() / 5.0;
            means[channel] += mean;
            vars[channel] += column.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0;
        }
        assert_eq!(count(&bn), step as i64);
        for channel in 0..2 {
            // A running average of values below 1, rounded a few times a step.
            let near = |got: f64, sum: f64| (got - sum / step as f64).abs() < 32.0 * f64::EPSILON;
            assert!(near(values(bn.running_mean())?[channel], means[channel]));
            assert!(near(values(bn.running_var())?[channel], vars[channel]));
        }
    }
    Ok(())
}

#[test]
fn without_running_statistics_the_batch_serves_both() -> Result<()> {
    let (_vars, vb) = builder(DType::F32);
    let bn = batch_norm2d(3, BatchNormOptions::default().track_running_stats(false), vb)?;
    let x = (noise(&[2, 3, 4, 4], 1)? + 7.0)?;
    assert_eq!(values(&bn.forward_t(&x, true)?)?, values(&bn.forward_t(&x, false)?)?);
    assert_eq!(values(bn.running_mean())?, [0., 0., 0.]);
    assert!(bn.num_batches_tracked().is_none());
    let cumulative = BatchNormOptions::default().track_running_stats(false).momentum(None);
    assert!(batch_norm2d(3, cumulative, builder(DType::F32).1)?.momentum().is_nan(), "no number to give");
    Ok(())
}

#[test]
fn frozen_statistics_stay_and_the_affine_trains() -> Result<()> {
    let (vars, vb) = builder(DType::F32);
    let bn = batch_norm1d(3, BatchNormOptions::default().frozen_statistics(true), vb)?;
    let x = (noise(&[6, 3], 1)? + 2.0)?;
    let y = bn.forward_t(&x, true)?;
    assert_eq!(values(&y)?, values(&bn.forward_t(&x, false)?)?);
    assert_eq!(values(bn.running_mean())?, [0., 0., 0.]);
    assert_eq!(count(&bn), 0);
    let gradients = y.sqr()?.sum_all()?.backward()?;
    let with_gradient = |name: &str| {
        let vars = vars.data().lock().unwrap();
        gradients.get(&vars[name]).is_some()
    };
    assert!(with_gradient("weight") && with_gradient("bias"));
    assert!(!with_gradient("running_mean") && !with_gradient("running_var"));

    let mut bn = bn;
    bn.set_frozen_statistics(false)?;
    bn.forward_t(&x, true)?;
    assert_eq!(count(&bn), 1);
    Ok(())
}

#[test]
fn a_weight_without_a_bias_in_group_and_instance_norm() -> Result<()> {
    let x = noise(&[2, 4, 3], 3)?;
    let weight = Tensor::new(&[2f32, 3., 4., 5.], CPU)?;
    let (vars, vb) = builder(DType::F32);
    let group = GroupNorm::with_options(2, 4, GroupNormOptions::default().bias(false), vb.pp("g"))?;
    let options = InstanceNormOptions::default().affine(true).bias(false);
    let instance = instance_norm1d(4, options, vb.pp("i"))?;
    assert_eq!(names(&vars), ["g.weight", "i.weight"]);
    vars.data().lock().unwrap().values().try_for_each(|var| var.set(&weight))?;
    let expected = candle_norm::functional::group_norm(&x, 2, Some(&weight), None, 1e-5)?;
    assert_eq!(values(&group.forward(&x)?)?, values(&expected)?);
    let expected =
        candle_norm::functional::instance_norm(&x, None, None, Some(&weight), None, true, 0.1, 1e-5)?;
    assert_eq!(values(&instance.forward(&x)?)?, values(&expected)?);
    assert_eq!(group.to_string(), "GroupNorm(2, 4, eps=1e-05, affine=True, bias=False)");
    assert!(instance.to_string().ends_with("affine=True, track_running_stats=False, bias=False)"));
    Ok(())
}

/// The layer, the shape it wants and candle's own words.
#[test]
fn a_tensor_that_a_checkpoint_lacks() -> Result<()> {
    let tensors = HashMap::from([("ln.weight".to_string(), Tensor::ones(4, DType::F32, CPU)?)]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, CPU);
    let missing = [
        (error(layer_norm(4, 1e-5, vb.pp("ln"))), "layer-norm: expected bias of shape [4]", "ln.bias"),
        (error(rms_norm(4, 1e-5, vb.pp("r"))), "rms-norm: expected weight of shape [4]", "r.weight"),
        (error(group_norm(2, 4, 1e-5, vb.pp("g"))), "group-norm: expected weight of shape [4]", "g.weight"),
        (
            error(batch_norm(4, 1e-5, vb.pp("b"))),
            "batch-norm: expected running_mean of shape [4]",
            "running_mean",
        ),
        (
            error(instance_norm2d(4, InstanceNormOptions::default().affine(true), vb.pp("i"))),
            "instance-norm: expected weight of shape [4]",
            "i.weight",
        ),
    ];
    for (message, ours, theirs) in missing {
        assert!(message.contains(ours) && message.contains(theirs), "{message}");
    }
    Ok(())
}

#[test]
fn a_negative_eps_is_refused_when_a_layer_is_made() -> Result<()> {
    let vb = || builder(DType::F32).1;
    let messages = [
        error(layer_norm(6, -1e-5, vb())),
        error(candle_norm::layer_norm_no_bias(6, -1e-5, vb())),
        error(rms_norm(6, -1e-5, vb())),
        error(group_norm(2, 6, -1e-5, vb())),
        error(batch_norm(6, -1e-5, vb())),
        error(LayerNorm::no_affine(6, -1e-5)),
        error(batch_norm(6, BatchNormConfig { momentum: 1.5, ..Default::default() }, vb())),
    ];
    for message in messages {
        assert!(
            message.contains("eps must not be negative, got -0.00001") || message.contains("got 1.5"),
            "{message}"
        );
    }
    Ok(())
}

#[test]
fn a_weight_without_a_bias() -> Result<()> {
    let (vars, vb) = builder(DType::F32);
    let bn = batch_norm1d(2, BatchNormOptions::default().bias(false), vb)?;
    vars.data().lock().unwrap()["weight"].set(&Tensor::new(&[2f32, 3.], CPU)?)?;
    let x = noise(&[4, 2], 3)?;
    let expected = candle_norm::functional::batch_norm(&x, None, None, bn.weight(), None, true, 0.1, 1e-5)?;
    assert_eq!(values(&bn.forward_t(&x, true)?)?, values(&expected)?);
    let (_, bias) = bn.weight_and_bias().expect("both, for who folds");
    assert_eq!(values(bias)?, [0., 0.]);
    Ok(())
}

#[test]
fn running_statistics_are_f32_in_half_models_and_f64_in_f64() -> Result<()> {
    for (model, running) in [
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
    ] {
        let (_vars, vb) = builder(model);
        let bn = batch_norm1d(3, 1e-5, vb.pp("bn"))?;
        let same = batch_norm(3, 1e-5, vb.pp("nn"))?;
        let x = noise(&[4, 3], 1)?.to_dtype(model)?;
        for bn in [bn, same] {
            assert_eq!(bn.weight().expect("a weight").dtype(), model);
            assert_eq!((bn.running_mean().dtype(), bn.running_var().dtype()), (running, running));
            assert_eq!(bn.forward_t(&x, true)?.dtype(), model);
            assert_eq!(bn.forward_t(&x, false)?.dtype(), model);
        }
    }
    Ok(())
}

#[test]
fn tensors_that_are_variables_are_shared() -> Result<()> {
    let (mean, var) = (Var::zeros(2, DType::F32, CPU)?, Var::ones(2, DType::F32, CPU)?);
    let bn = BatchNorm::new_no_bias(2, mean.as_tensor().clone(), var.as_tensor().clone(), 1e-5)?;
    bn.clone().forward_train(&Tensor::new(&[[1f32, 2.], [3., 4.]], CPU)?)?;
    assert_eq!(mean.to_vec1::<f32>()?, [0.2, 0.3]);
    Ok(())
}

#[test]
fn displays_are_pytorch_reprs() -> Result<()> {
    let (_vars, vb) = builder(DType::F32);
    let vb = || vb.pp("a");
    let bn = BatchNormOptions::default();
    let none = bn.eps(1e-3).momentum(None).affine(false).track_running_stats(false);
    let instance = InstanceNormOptions::default();
    let shown = [
        batch_norm2d(64, bn, vb())?.to_string(),
        batch_norm1d(3, none, vb())?.to_string(),
        instance_norm3d(5, instance, builder(DType::F32).1)?.to_string(),
        instance_norm(5, instance.affine(true).track_running_stats(true), builder(DType::F32).1)?.to_string(),
        LayerNorm::with_options(64, 1e-5, vb())?.to_string(),
        LayerNorm::with_options((3, 4), LayerNormOptions::default().elementwise_affine(false), vb())?
            .to_string(),
        RmsNorm::with_options(7, RmsNormOptions::default(), builder(DType::F32).1)?.to_string(),
        RmsNorm::with_options((7, 2), 1e-6, builder(DType::F32).1)?.to_string(),
        GroupNorm::with_options(4, 64, GroupNormOptions::default().eps(1e-12), vb())?.to_string(),
    ];
    // Printed by PyTorch 2.11, but for the fourth: PyTorch's instance norm always names a rank.
    let expected = [
        "BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "BatchNorm1d(3, eps=0.001, momentum=None, affine=False, track_running_stats=False)",
        "InstanceNorm3d(5, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False)",
        "InstanceNorm(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "LayerNorm((64,), eps=1e-05, elementwise_affine=True)",
        "LayerNorm((3, 4), eps=1e-05, elementwise_affine=False)",
        "RMSNorm((7,), eps=None, elementwise_affine=True)",
        "RMSNorm((7, 2), eps=1e-06, elementwise_affine=True)",
        "GroupNorm(4, 64, eps=1e-12, affine=True)",
    ];
    assert_eq!(shown, expected);
    Ok(())
}

#[test]
fn ranks_are_checked_as_pytorch_checks_them() -> Result<()> {
    let (_vars, vb) = builder(DType::F32);
    let batch = [
        (batch_norm1d(2, 1e-5, vb.clone())?, vec![2, 3]),
        (batch_norm2d(2, 1e-5, vb.clone())?, vec![4]),
        (batch_norm3d(2, 1e-5, vb.clone())?, vec![5]),
        (BatchNorm::with_options(2, 1e-5, vb)?, vec![2, 3, 4, 5, 6]),
    ];
    for rank in 1..=6 {
        let x = noise(&[2; 6][..rank], 1)?;
        for (bn, ranks) in &batch {
            assert_eq!(bn.forward_t(&x, true).is_ok(), ranks.contains(&rank), "{bn} on rank {rank}");
        }
    }
    let vb = builder(DType::F32).1;
    let instance = [
        (instance_norm1d(2, 1e-5, vb.clone())?, vec![2, 3]),
        (instance_norm2d(2, 1e-5, vb.clone())?, vec![3, 4]),
        (instance_norm3d(2, 1e-5, vb.clone())?, vec![4, 5]),
        (InstanceNorm::with_options(2, 1e-5, vb)?, vec![3, 4, 5, 6]),
    ];
    for rank in 1..=6 {
        let x = noise(&[2; 6][..rank], 1)?;
        for (norm, ranks) in &instance {
            assert_eq!(norm.forward(&x).is_ok(), ranks.contains(&rank), "{norm} on rank {rank}");
        }
    }
    Ok(())
}

#[test]
fn errors_say_what_came_and_what_was_expected() -> Result<()> {
    let vb = || builder(DType::F32).1;
    let x = |shape: &[usize]| noise(shape, 1);
    let contains = |message: String, part: &str| assert!(message.contains(part), "{message}");
    contains(
        error(batch_norm2d(3, 1e-5, vb())?.forward_t(&x(&[2, 3, 4])?, true)),
        "batch-norm: input has shape [2, 3, 4], expected 4 dimensions",
    );
    contains(error(batch_norm1d(3, 1e-5, vb())?.forward_t(&x(&[2, 4])?, false)), "expected 3 channels");
    contains(error(batch_norm1d(3, -1.0, vb())), "eps must not be negative, got -1");
    contains(
        error(batch_norm1d(3, BatchNormOptions::default().momentum(1.5), vb())),
        "momentum must be between 0 and 1, got 1.5",
    );
    let frozen = BatchNormOptions::default().track_running_stats(false).frozen_statistics(true);
    contains(error(batch_norm1d(3, frozen, vb())), "frozen_statistics expects track_running_stats");
    contains(
        error(GroupNorm::with_options(3, 8, 1e-5, vb())),
        "num_groups must divide num_channels, got 3 groups and 8 channels",
    );
    contains(error(group_norm(0, 8, 1e-5, vb())), "num_groups must divide num_channels, got 0 groups");
    contains(error(group_norm(2, 8, 1e-5, vb())?.forward(&x(&[2, 4])?)), "expected 8 channels");
    contains(error(LayerNorm::with_options((), 1e-5, vb())), "at least one dimension");
    contains(
        error(layer_norm(3, 1e-5, vb())?.forward(&x(&[2, 4])?)),
        "layer-norm: weight has shape [3], expected [4] or what broadcasts against the input's [2, 4]",
    );
    contains(error(rms_norm(3, 1e-5, vb())?.forward(&x(&[2, 4])?)), "rms-norm: weight has shape [3]");
    contains(error(instance_norm1d(3, 1e-5, vb())?.forward(&x(&[3, 1])?)), "more than 1 spatial element");
    let affine = InstanceNormOptions::default().affine(true);
    contains(
        error(instance_norm1d(3, affine, vb())?.forward(&x(&[2, 4])?)),
        "instance-norm: input has shape [2, 4], expected 3 channels in dimension 0",
    );
    Ok(())
}

#[test]
fn a_failed_forward_leaves_the_running_statistics() -> Result<()> {
    let (vars, vb) = builder(DType::F32);
    let bn = batch_norm1d(2, BatchNormOptions::default().momentum(None), vb)?;
    bn.forward_t(&noise(&[4, 2], 1)?, true)?;
    let state = || -> Result<Vec<(String, Vec<f64>)>> {
        let vars = vars.data().lock().unwrap();
        let mut all = vars.iter().map(|(k, v)| Ok((k.clone(), values(v)?))).collect::<Result<Vec<_>>>()?;
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    };
    let before = state()?;
    assert!(bn.forward_t(&noise(&[1, 2], 1)?, true).is_err(), "one value per channel");
    assert!(bn.forward_t(&noise(&[4, 3], 1)?, true).is_err(), "channels");
    assert!(bn.forward_t(&noise(&[4, 2, 2, 2], 1)?, true).is_err(), "rank");
    assert!(bn.forward_t(&noise(&[4, 2], 1)?.to_dtype(DType::U32)?, true).is_err(), "dtype");
    assert_eq!(state()?, before);
    Ok(())
}

#[test]
fn instance_norm_without_a_batch_dimension() -> Result<()> {
    let tracking = InstanceNormOptions::default().affine(true).track_running_stats(true);
    let (batched, one) = (
        instance_norm2d(3, tracking, builder(DType::F32).1)?,
        instance_norm2d(3, tracking, builder(DType::F32).1)?,
    );
    let x = noise(&[3, 4, 5], 2)?;
    for train in [true, false] {
        let expected = batched.forward_t(&x.unsqueeze(0)?, train)?.squeeze(0)?;
        let y = one.forward_t(&x, train)?;
        assert_eq!(y.dims(), x.dims());
        assert_eq!(values(&y)?, values(&expected)?);
    }
    let mean = |norm: &InstanceNorm| values(norm.running_mean().expect("tracked"));
    assert_eq!(mean(&one)?, mean(&batched)?);
    assert_ne!(mean(&one)?, [0., 0., 0.]);
    // PyTorch registers the count for instance norm and leaves it at zero.
    assert_eq!(one.num_batches_tracked().expect("a count").to_scalar::<i64>()?, 0);
    Ok(())
}

#[test]
fn instance_norm_that_holds_nothing_takes_any_channels() -> Result<()> {
    let norm = instance_norm1d(64, 1e-5, builder(DType::F32).1)?;
    assert_eq!(norm.forward(&noise(&[2, 3, 4], 1)?)?.dims(), [2, 3, 4]);
    Ok(())
}

#[test]
fn running_statistics_for_an_instance_norm_that_tracks_none() -> Result<()> {
    let tensors = HashMap::from([("style.running_mean".to_string(), Tensor::zeros(2, DType::F32, CPU)?)]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, CPU);
    let message = error(instance_norm2d(2, InstanceNormOptions::default(), vb.pp("style")));
    for part in ["running_mean under \"style\"", "track_running_stats=false", "0.4.0"] {
        assert!(message.contains(part), "{message}");
    }
    // A builder of zeros says that it has every name.
    instance_norm2d(2, InstanceNormOptions::default(), VarBuilder::zeros(DType::F32, CPU))?;
    Ok(())
}

#[test]
fn a_builder_of_zeros_makes_every_layer() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, CPU);
    let bn = batch_norm1d(2, 1e-5, vb.clone())?;
    bn.forward_t(&noise(&[4, 2], 1)?, true)?;
    assert_eq!(count(&bn), 1);
    batch_norm(2, 1e-5, vb.clone())?.forward_t(&noise(&[4, 2], 1)?, true)?;
    layer_norm(2, 1e-5, vb.clone())?.forward(&noise(&[4, 2], 1)?)?;
    group_norm(1, 2, 1e-5, vb)?.forward(&noise(&[4, 2], 1)?)?;
    Ok(())
}

#[test]
fn rms_norm_without_eps_takes_the_machine_epsilon() -> Result<()> {
    // Small enough that eps decides: mean square 2.5e-6, and in f64 2.5e-14.
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, CPU);
    let norm = RmsNorm::with_options(2, RmsNormOptions::default().elementwise_affine(false), vb)?;
    let x = [1e-3, 2e-3];
    let expected = |eps: f64| x[0] / (2.5e-6 + eps).sqrt();
    let y = norm.forward(&Tensor::new(&x, CPU)?.to_dtype(DType::F32)?)?;
    assert!((values(&y)?[0] - expected(f32::EPSILON.into())).abs() < 1e-6);
    let y = norm.forward(&Tensor::new(&x, CPU)?)?;
    assert!((values(&y)?[0] - expected(f64::EPSILON)).abs() < 1e-14);
    Ok(())
}

#[test]
fn reset_parameters_restores_what_the_constructor_made() -> Result<()> {
    let (vars, vb) = builder(DType::F32);
    let bn = batch_norm1d(2, 1e-5, vb.pp("b"))?;
    let instance = instance_norm1d(
        2,
        InstanceNormOptions::default().affine(true).track_running_stats(true),
        vb.pp("i"),
    )?;
    let layer = LayerNorm::with_options(2, 1e-5, vb.pp("l"))?;
    let group = GroupNorm::with_options(1, 2, 1e-5, vb.pp("g"))?;
    let rms = RmsNorm::with_options(2, 1e-5, vb.pp("r"))?;
    let state = || -> Result<HashMap<String, Vec<f64>>> {
        vars.data().lock().unwrap().iter().map(|(k, v)| Ok((k.clone(), values(v)?))).collect()
    };
    let made = state()?;
    for var in vars.all_vars() {
        var.set(&var.ones_like()?.affine(5., 0.)?)?;
    }
    bn.reset_parameters()?;
    instance.reset_parameters()?;
    layer.reset_parameters()?;
    group.reset_parameters()?;
    rms.reset_parameters()?;
    assert_eq!(state()?, made);

    let fixed = LayerNorm::new_no_bias(Tensor::new(&[5f32, 5.], CPU)?, 1e-5);
    assert!(error(fixed.reset_parameters()).contains("weight is a tensor, expected a variable"));
    Ok(())
}

#[test]
fn outputs_are_contiguous_for_permuted_inputs() -> Result<()> {
    let vb = || builder(DType::F32).1;
    let x = noise(&[2, 5, 4], 1)?.transpose(1, 2)?;
    let bn = batch_norm1d(4, 1e-5, vb())?;
    let outputs = [
        bn.forward_t(&x, true)?,
        bn.forward_t(&x, false)?,
        instance_norm1d(4, 1e-5, vb())?.forward(&x)?,
        group_norm(2, 4, 1e-5, vb())?.forward(&x)?,
        layer_norm(5, 1e-5, vb())?.forward(&x)?,
        rms_norm(5, 1e-5, vb())?.forward(&x)?,
    ];
    outputs.iter().enumerate().for_each(|(i, y)| assert!(y.is_contiguous(), "output {i}"));
    Ok(())
}

#[test]
fn layers_are_send_sync_clone_debug_and_display() {
    fn check<T: Send + Sync + Clone + std::fmt::Debug + std::fmt::Display + 'static>() {}
    check::<BatchNorm>();
    check::<GroupNorm>();
    check::<InstanceNorm>();
    check::<LayerNorm>();
    check::<RmsNorm>();
}
