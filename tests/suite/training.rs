//! A small model with each norm in its middle learns, all of it.

use crate::case::Norm;
use crate::common::{bits, data, device, tensor};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{linear, Module, Optimizer, VarBuilder, VarMap, SGD};
use candle_norm::functional as f;

const HIDDEN: usize = 12;

/// `[N, 12]` as `[N, channels, spatial]` for the norms that need more than one value in a set.
fn norm(norm: Norm, x: &Tensor, weight: &Tensor, bias: &Tensor, running: &(Var, Var)) -> Result<Tensor> {
    let (mean, var) = (Some(&running.0), Some(&running.1));
    let (n, w, b) = (x.dim(0)?, Some(weight), Some(bias));
    let split = || x.reshape((n, 4, HIDDEN / 4));
    let y = match norm {
        Norm::Batch { training } => f::batch_norm(&split()?, mean, var, w, b, training, 0.1, 1e-5)?,
        Norm::Instance { use_input_stats } => {
            f::instance_norm(&split()?, mean, var, w, b, use_input_stats, 0.1, 1e-5)?
        }
        Norm::Group { groups } => f::group_norm(&split()?, groups, w, b, 1e-5)?,
        Norm::Layer { .. } => f::layer_norm(x, &[HIDDEN], w, b, 1e-5)?,
        Norm::Rms { .. } | Norm::Channels { .. } => {
            f::rms_norm(x, &[HIDDEN], w, 1e-5)?.broadcast_add(bias)?
        }
    };
    y.reshape((n, HIDDEN))
}

/// Losses of 40 steps on `Linear -> norm -> Linear`; panics if a parameter stands still in the first.
fn train(kind: Norm) -> Result<Vec<f32>> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device());
    let features = match kind {
        Norm::Layer { .. } | Norm::Rms { .. } => HIDDEN,
        _ => 4,
    };
    let ones = candle_nn::Init::Const(1.0);
    let first = linear(5, HIDDEN, vb.pp("first"))?;
    let weight = vb.pp("norm").get_with_hints(features, "weight", ones)?;
    let bias = vb.pp("norm").get_with_hints(features, "bias", candle_nn::Init::Const(0.0))?;
    let last = linear(HIDDEN, 3, vb.pp("last"))?;
    let constant = |value: f32| Var::from_tensor(&Tensor::full(value, features, device())?);
    let running = (constant(0.0)?, constant(1.0)?);

    let x = tensor(&data(1, 16 * 5, 0.0, 1.0), &[16, 5], DType::F32)?;
    let target = tensor(&data(2, 16 * 3, 0.0, 1.0), &[16, 3], DType::F32)?;
    let mut sgd = SGD::new(varmap.all_vars(), 0.1)?;
    let names: Vec<(String, Var)> = {
        let vars = varmap.data().lock().expect("nobody panicked");
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    };
    assert_eq!(names.len(), 6);
    let mut losses = Vec::new();
    for step in 0..40 {
        let before: Vec<_> = names.iter().map(|(_, var)| bits(var)).collect();
        let y = last.forward(&norm(kind, &first.forward(&x)?, &weight, &bias, &running)?.relu()?)?;
        let loss = (y - &target)?.sqr()?.mean_all()?;
        sgd.backward_step(&loss)?;
        losses.push(loss.to_scalar::<f32>()?);
        if step == 0 {
            for ((name, var), before) in names.iter().zip(&before) {
                assert!(&bits(var) != before, "{name} stood still with {kind:?}");
            }
        }
    }
    Ok(losses)
}

#[test]
fn every_parameter_moves_and_the_loss_falls() -> Result<()> {
    for kind in [
        Norm::Batch { training: true },
        Norm::Batch { training: false },
        Norm::Instance { use_input_stats: true },
        Norm::Instance { use_input_stats: false },
        Norm::Layer { normalized: 1 },
        Norm::Group { groups: 2 },
        Norm::Rms { normalized: 1 },
    ] {
        let losses = train(kind)?;
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.8 * first, "{first} to {last} with {kind:?}");
    }
    Ok(())
}
