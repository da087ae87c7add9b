//! What stands around a norm: one call of candle-norm, and what models write with candle-nn.
//!
//! Apart from the plain norms, because each row is a small composition of its own.

use super::contenders::{Args, Layer, Mode, Outputs, EPS, MOMENTUM};
use super::{Norm, Row};
use candle_core::{bail, Result, Tensor};
use candle_nn::{Activation, Module, ModuleT};
use candle_norm::functional::{self as norm, fused};

pub fn candle_norm(row: &Row, args: Args) -> Layer {
    let (kind, n) = (row.case.norm, [row.case.shape[row.case.shape.len() - 1]]);
    Box::new(move |x| {
        let Args { weight, bias, other, mean, var } = &args;
        let (w, b) = (Some(weight), bias.as_ref());
        let other = || other.as_ref().map_or_else(|| bail!("{kind} has another tensor"), Ok);
        let sum = |both: fused::AddNorm| Outputs { y: both.normed, sum: Some(both.sum) };
        match kind {
            Norm::AddLayerNorm => fused::add_layer_norm(x, other()?, &n, w, b, EPS).map(sum),
            Norm::AddRmsNorm => fused::add_rms_norm(x, other()?, &n, w, 0.0, EPS).map(sum),
            Norm::GroupNormSilu { groups } | Norm::GroupNormGelu { groups } => {
                fused::group_norm_act(x, groups, w, b, EPS, None, behind_groups(kind)).map(Outputs::one)
            }
            Norm::BatchNormSkipRelu => {
                let (running, skip) = ((Some(mean), Some(var)), Some(other()?));
                let act = Activation::Relu;
                fused::batch_norm_act(x, running.0, running.1, w, b, true, MOMENTUM, EPS, skip, act)
                    .map(Outputs::one)
            }
            Norm::ModulatedLayerNorm => fused::modulated_layer_norm(x, &n, weight, b, EPS).map(Outputs::one),
            Norm::LayerNorm2d => norm::layer_norm_channels(x, w, b, EPS).map(Outputs::one),
            Norm::GatedRmsNorm => fused::gated_rms_norm(x, other()?, &n, w, EPS, false).map(Outputs::one),
            _ => bail!("{kind} is a plain norm"),
        }
    })
}

/// The activation of a group norm.
fn behind_groups(norm: Norm) -> Activation {
    match norm {
        Norm::GroupNormGelu { .. } => Activation::Gelu,
        _ => Activation::Silu,
    }
}

/// candle-norm's norm of a row without what stands around it: what that may cost is reckoned from here.
pub fn plain(row: &Row, args: Args) -> Layer {
    let (kind, shape) = (row.case.norm, row.case.shape);
    let n = [if kind == Norm::LayerNorm2d { shape[1] } else { shape[shape.len() - 1] }];
    Box::new(move |x| {
        let Args { weight, bias, mean, var, .. } = &args;
        let (w, b) = (Some(weight), bias.as_ref());
        match kind {
            Norm::AddLayerNorm => norm::layer_norm(x, &n, w, b, EPS),
            Norm::AddRmsNorm | Norm::GatedRmsNorm => norm::rms_norm(x, &n, w, EPS),
            Norm::GroupNormSilu { groups } | Norm::GroupNormGelu { groups } => {
                norm::group_norm(x, groups, w, b, EPS)
            }
            Norm::BatchNormSkipRelu => norm::batch_norm(x, Some(mean), Some(var), w, b, true, MOMENTUM, EPS),
            Norm::ModulatedLayerNorm => norm::layer_norm(x, &n, None, None, EPS),
            // As many elements, in rows.
            Norm::LayerNorm2d => norm::layer_norm(&x.reshape(((), n[0]))?, &n, w, b, EPS)?.reshape(x.shape()),
            _ => bail!("{kind} is a plain norm"),
        }
        .map(Outputs::one)
    })
}

pub fn candle_nn(row: &Row, args: Args, mode: Mode) -> Result<Layer> {
    let kind = row.case.norm;
    let Args { weight, bias, other, mean, var } = args;
    let need = |t: Option<Tensor>| t.map_or_else(|| bail!("{kind} has another tensor"), Ok);
    let track = mode == Mode::ForwardBackward;
    Ok(match kind {
        Norm::AddLayerNorm => {
            let (residual, bias) = (need(other)?, need(bias)?);
            let norm = candle_nn::LayerNorm::new(weight.clone(), bias.clone(), EPS);
            Box::new(move |x| {
                let sum = (x + &residual)?;
                let y = match track {
                    true => candle_nn::ops::layer_norm_slow(&sum, &weight, &bias, EPS as f32),
                    false => norm.forward(&sum),
                }?;
                Ok(Outputs { y, sum: Some(sum) })
            })
        }
        Norm::AddRmsNorm => {
            let (residual, norm) = (need(other)?, rms_norm(weight, track));
            Box::new(move |x| {
                let sum = (x + &residual)?;
                Ok(Outputs { y: norm(&sum)?, sum: Some(sum) })
            })
        }
        Norm::GroupNormSilu { groups } | Norm::GroupNormGelu { groups } => {
            let norm = candle_nn::GroupNorm::new(weight, need(bias)?, row.case.shape[1], groups, EPS)?;
            let activation = behind_groups(kind);
            Box::new(move |x| activation.forward(&norm.forward(x)?).map(Outputs::one))
        }
        Norm::BatchNormSkipRelu => {
            let (mean, var) = (mean.as_detached_tensor().copy()?, var.as_detached_tensor().copy()?);
            let (skip, bias) = (need(other)?, need(bias)?);
            let norm = candle_nn::BatchNorm::new(row.case.shape[1], mean, var, weight, bias, EPS)?;
            Box::new(move |x| (norm.forward_t(x, true)? + &skip)?.relu().map(Outputs::one))
        }
        // As `mmdit/blocks.rs` of candle-transformers has it.
        Norm::ModulatedLayerNorm => {
            let (scale, shift) = (weight, need(bias)?);
            let ones = Tensor::ones(row.case.shape[2], scale.dtype(), scale.device())?;
            let norm = candle_nn::LayerNorm::new_no_bias(ones, EPS);
            Box::new(move |x| {
                let scaled = norm.forward(x)?.broadcast_mul(&(&scale + 1.0)?)?;
                scaled.broadcast_add(&shift).map(Outputs::one)
            })
        }
        // As `segment_anything/mod.rs` of candle-transformers has it.
        Norm::LayerNorm2d => {
            let (weight, bias) = (weight.reshape((1, (), 1, 1))?, need(bias)?.reshape((1, (), 1, 1))?);
            Box::new(move |x| {
                let x = x.broadcast_sub(&x.mean_keepdim(1)?)?;
                let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(1)? + EPS)?.sqrt()?)?;
                x.broadcast_mul(&weight)?.broadcast_add(&bias).map(Outputs::one)
            })
        }
        Norm::GatedRmsNorm => {
            let (gate, norm) = (need(other)?, rms_norm(weight, track));
            Box::new(move |x| norm(&(x * gate.silu()?)?).map(Outputs::one))
        }
        _ => bail!("{kind} is a plain norm"),
    })
}

fn rms_norm(weight: Tensor, track: bool) -> impl Fn(&Tensor) -> Result<Tensor> {
    let norm = candle_nn::RmsNorm::new(weight.clone(), EPS);
    move |x| match track {
        true => candle_nn::ops::rms_norm_slow(x, &weight, EPS as f32),
        false => norm.forward(x),
    }
}
