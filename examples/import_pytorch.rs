//! Loads models that PyTorch saved, compares with PyTorch's outputs, fine-tunes with frozen batch norm, and
//! folds batch norm into the convolutions.
//!
//! ```text
//! cargo run --release --example import_pytorch
//! ```
//!
//! `import_pytorch/make.py` made the files.

#[path = "import_pytorch/models.rs"]
mod models;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var};
use candle_nn::{AdamW, Conv1d, Optimizer, VarBuilder, VarMap};
use candle_norm::{batch_norm::BatchNormOptions, BatchNorm, FoldBatchNorm};
use models::{ResNet, Transformer};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Largest difference from PyTorch that counts as equal: a few hundred roundings of numbers around 1.
const TOLERANCE: f32 = 2e-5;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/import_pytorch").join(name)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

/// Both formats give both models PyTorch's outputs.
fn load_and_compare(recorded: &HashMap<String, Tensor>) -> Result<()> {
    for format in ["safetensors", "pth"] {
        let open = |model: &str| -> Result<VarBuilder<'static>> {
            let path = file(&format!("{model}.{format}"));
            Ok(match format {
                "pth" => VarBuilder::from_pth(path, DType::F32, &Device::Cpu)?,
                _ => VarBuilder::from_buffered_safetensors(std::fs::read(path)?, DType::F32, &Device::Cpu)?,
            })
        };
        let resnet = ResNet::new(open("resnet")?)?;
        let transformer = Transformer::new(open("transformer")?)?;
        let outputs = [
            ("resnet", resnet.forward_t(&recorded["resnet.input"], false)?),
            ("transformer", transformer.forward(&recorded["transformer.input"])?),
        ];
        for (model, output) in outputs {
            let difference = difference(&output, &recorded[&format!("{model}.output")])?;
            println!("{model}.{format}: largest difference from PyTorch {difference:.1e}");
            ensure!(difference < TOLERANCE, "{model}.{format} differs from PyTorch by {difference}");
        }
    }
    Ok(())
}

/// Trains the ResNet on other labels, in training mode but with batch norm's statistics frozen.
fn fine_tune(recorded: &HashMap<String, Tensor>) -> Result<()> {
    let mut vars = VarMap::new();
    let mut resnet = ResNet::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    vars.load(file("resnet.safetensors"))?;
    for norm in resnet.batch_norms_mut() {
        norm.set_frozen_statistics(true)?;
    }
    let snapshot = |part: &str| -> Result<Vec<(Var, Tensor)>> {
        let vars = vars.data().lock().expect("no thread panicked with the lock");
        let part = vars.iter().filter(|(name, _)| name.contains(part));
        part.map(|(_, var)| Ok((var.clone(), var.as_tensor().copy()?))).collect()
    };
    let (statistics, weights) = (snapshot("running_")?, snapshot("bn1.weight")?);
    let labels = recorded["resnet.labels"].to_dtype(DType::U32)?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 3e-3)?;
    for step in 0..=30 {
        let logits = resnet.forward_t(&recorded["resnet.input"], true)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &labels)?;
        optimizer.backward_step(&loss)?;
        if step % 10 == 0 {
            println!("fine-tuning, step {step:2}: loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    for (var, before) in &statistics {
        ensure!(difference(var, before)? == 0.0, "a frozen running statistic moved");
    }
    for (var, before) in &weights {
        ensure!(difference(var, before)? > 0.0, "a weight of batch norm did not train");
    }
    println!("{} running statistics as they were, weights of batch norm trained", statistics.len());
    Ok(())
}

/// Convolution and batch norm as one convolution: the same outputs, half the layers.
fn fold(recorded: &HashMap<String, Tensor>) -> Result<()> {
    let data = std::fs::read(file("resnet.safetensors"))?;
    let resnet = ResNet::new(VarBuilder::from_buffered_safetensors(data, DType::F32, &Device::Cpu)?)?;
    let input = &recorded["resnet.input"];
    let folded = difference(&resnet.forward_t(input, false)?, &resnet.fold()?.forward_t(input, false)?)?;
    println!("ResNet with batch norm folded into its convolutions: largest difference {folded:.1e}");
    ensure!(folded < TOLERANCE, "folding changed the output by {folded}");

    // The same for Conv1d, with a batch norm that has no weight and bias of its own.
    let device = Device::Cpu;
    let (mean, var) = (Tensor::randn(0f32, 1., 6, &device)?, Tensor::rand(0.5f32, 2., 6, &device)?);
    let weights = HashMap::from([("running_mean".to_string(), mean), ("running_var".to_string(), var)]);
    let options = BatchNormOptions::default().affine(false);
    let norm = BatchNorm::with_options(6, options, VarBuilder::from_tensors(weights, DType::F32, &device))?;
    let conv = Conv1d::new(Tensor::randn(0f32, 0.3, (6, 4, 3), &device)?, None, Default::default());
    let x = Tensor::randn(0f32, 1., (2, 4, 20), &device)?;
    let apart = norm.forward_t(&conv.forward(&x)?, false)?;
    let folded = difference(&apart, &conv.fold_batch_norm(&norm)?.forward(&x)?)?;
    println!("Conv1d and a batch norm without affine: largest difference {folded:.1e}");
    ensure!(folded < TOLERANCE, "folding changed the output by {folded}");
    Ok(())
}

fn main() -> Result<()> {
    let recorded = candle_core::safetensors::load(file("recorded.safetensors"), &Device::Cpu)?;
    load_and_compare(&recorded)?;
    fine_tune(&recorded)?;
    fold(&recorded)
}
