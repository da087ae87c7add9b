//! Layers inside a model that trains: gradients reach every parameter, and nothing else moves.
//!
//! candle-nn's `LayerNorm` and `RmsNorm` fail here: they end the graph without a word.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Linear, Module, ModuleT, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_norm::{batch_norm1d, group_norm, instance_norm1d, layer_norm, rms_norm, InstanceNormOptions};
use std::collections::HashMap;

const CPU: &Device = &Device::Cpu;
const BUFFERS: [&str; 2] = ["norm.running_mean", "norm.running_var"];

type Norm = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Linear, norm, linear over `[8, 4, 6]`: no norm here cancels the bias of the first.
struct Model {
    first: Linear,
    norm: Norm,
    last: Linear,
}

impl Model {
    fn new(norm: impl Fn(VarBuilder) -> Result<Norm>) -> Result<(VarMap, Self)> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
        let model = Self {
            first: candle_nn::linear(6, 6, vb.pp("first"))?,
            norm: norm(vb.pp("norm"))?,
            last: candle_nn::linear(6, 2, vb.pp("last"))?,
        };
        Ok((vars, model))
    }

    fn loss(&self) -> Result<Tensor> {
        let x = Tensor::arange(0f32, 192., CPU)?.reshape((8, 4, 6))?.sin()?;
        let y = self.last.forward(&(self.norm)(&self.first.forward(&x)?)?)?;
        let target = Tensor::arange(0f32, 64., CPU)?.reshape((8, 4, 2))?.cos()?;
        (y - target)?.sqr()?.mean_all()
    }
}

type Build = fn(VarBuilder) -> Result<Norm>;

fn norms() -> Vec<(&'static str, Build)> {
    vec![
        ("batch", |vb| {
            let norm = batch_norm1d(4, 1e-5, vb)?;
            Ok(Box::new(move |x: &Tensor| norm.forward_t(x, true)))
        }),
        ("instance", |vb| {
            let options = InstanceNormOptions::default().affine(true).track_running_stats(true);
            let norm = instance_norm1d(4, options, vb)?;
            Ok(Box::new(move |x: &Tensor| norm.forward_t(x, true)))
        }),
        ("layer", |vb| {
            let norm = layer_norm(6, 1e-5, vb)?;
            Ok(Box::new(move |x: &Tensor| norm.forward(x)))
        }),
        ("group", |vb| {
            let norm = group_norm(2, 4, 1e-5, vb)?;
            Ok(Box::new(move |x: &Tensor| norm.forward(x)))
        }),
        ("rms", |vb| {
            let norm = rms_norm(6, 1e-5, vb)?;
            Ok(Box::new(move |x: &Tensor| norm.forward(x)))
        }),
    ]
}

fn snapshot(vars: &VarMap) -> Result<HashMap<String, Vec<f32>>> {
    let vars = vars.data().lock().unwrap();
    let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
    vars.iter().map(|(name, var)| Ok((name.clone(), values(var)?))).collect()
}

#[test]
fn every_parameter_moves() -> Result<()> {
    for (name, norm) in norms() {
        let (vars, model) = Model::new(norm)?;
        let before = snapshot(&vars)?;
        let first = model.loss()?.to_scalar::<f32>()?;
        let mut sgd = candle_nn::SGD::new(vars.all_vars(), 0.1)?;
        for _ in 0..20 {
            sgd.backward_step(&model.loss()?)?;
        }
        let last = model.loss()?.to_scalar::<f32>()?;
        assert!(last < first, "{name}: loss went from {first} to {last}");
        let after = snapshot(&vars)?;
        for (parameter, before) in before.iter().filter(|(name, _)| !BUFFERS.contains(&name.as_str())) {
            let moved = before.iter().zip(&after[parameter]).all(|(a, b)| a != b);
            assert!(moved, "{name}: {parameter} did not move");
        }
    }
    Ok(())
}

#[test]
fn an_optimizer_over_all_variables_leaves_the_buffers_alone() -> Result<()> {
    for (name, norm) in norms() {
        let (vars, model) = Model::new(norm)?;
        let mut adamw = AdamW::new(vars.all_vars(), ParamsAdamW { weight_decay: 0.5, ..Default::default() })?;
        let loss = model.loss()?;
        let before = snapshot(&vars)?;
        adamw.backward_step(&loss)?;
        let after = snapshot(&vars)?;
        for buffer in BUFFERS.iter().filter(|buffer| before.contains_key(**buffer)) {
            assert_eq!(before[*buffer], after[*buffer], "{name}: {buffer}");
        }
        assert_ne!(before["norm.weight"], after["norm.weight"], "{name}");
    }
    Ok(())
}

#[test]
fn a_sequential_of_layers() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
    let instance = instance_norm1d(4, InstanceNormOptions::default(), vb.pp("i"))?;
    let model = candle_nn::seq()
        .add(layer_norm(6, 1e-5, vb.pp("l"))?)
        .add(group_norm(2, 4, 1e-5, vb.pp("g"))?)
        .add_fn(move |x| instance.forward(x))
        .add(rms_norm(6, 1e-5, vb.pp("r"))?);
    let x = Tensor::arange(0f32, 48., CPU)?.reshape((2, 4, 6))?;
    assert_eq!(model.forward(&x)?.dims(), [2, 4, 6]);
    Ok(())
}
