//! Every public norm of candle-nn, as a table of calls; made twice, for candle-nn and for candle-norm.
//!
//! Apart from the comparison, which sees nothing but these tables.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use std::collections::HashMap;

/// What a call computes, in mathematics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    /// Over the last dimension.
    Last {
        center: bool,
        bias: bool,
    },
    Group,
    Batch {
        center: bool,
        affine: bool,
        momentum: Momentum,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Momentum {
    Default,
    Given,
}

/// The arguments that calls choose from.
pub struct Args {
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
    pub running: (Tensor, Tensor),
    pub train: bool,
    pub eps: f64,
    pub momentum: f64,
}

impl Args {
    /// A checkpoint of the weight, the bias and the running statistics.
    pub fn checkpoint(&self) -> VarBuilder<'static> {
        let named = [
            ("weight", &self.weight),
            ("bias", &self.bias),
            ("running_mean", &self.running.0),
            ("running_var", &self.running.1),
        ];
        let tensors: HashMap<_, _> = named.into_iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
        VarBuilder::from_tensors(tensors, self.weight.dtype(), self.weight.device())
    }

    pub fn channels(&self) -> usize {
        self.x.dims().get(1).copied().unwrap_or(1)
    }

    pub fn last(&self) -> usize {
        self.weight.dims().last().copied().unwrap_or(1)
    }
}

pub struct Answer {
    pub y: Tensor,
    pub running: Option<(Tensor, Tensor)>,
    /// What the getters say.
    pub says: String,
}

pub type Entry = (&'static str, Family, fn(&Args) -> Result<Answer>);

/// Groups of every group norm.
pub const GROUPS: usize = 2;

macro_rules! side {
    ($name:ident, $norms:ident) => {
        pub mod $name {
            use super::{Answer, Args, Entry, Family::*, Momentum::*, GROUPS};
            use candle_core::Result;
            use $norms::{batch_norm, group_norm, layer_norm, layer_norm_no_bias, ops, rms_norm};
            use $norms::{BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, LayerNormConfig, RmsNorm};
            use $norms::{Module, ModuleT};

            fn tensor(y: Result<candle_core::Tensor>) -> Result<Answer> {
                Ok(Answer { y: y?, running: None, says: String::new() })
            }

            fn layer(norm: LayerNorm, a: &Args) -> Result<Answer> {
                let (weight, bias) = (norm.weight().dims(), norm.bias().map(|b| b.dims()));
                let says = format!("{weight:?} {bias:?} {} {}", norm.eps(), norm.remove_mean());
                Ok(Answer { y: norm.forward(&a.x)?, running: None, says })
            }

            fn rms(norm: RmsNorm, a: &Args) -> Result<Answer> {
                let says = format!("{:?} {}", norm.weight().dims(), norm.eps());
                Ok(Answer { y: norm.forward(&a.x)?, running: None, says })
            }

            fn batch(norm: BatchNorm, a: &Args) -> Result<Answer> {
                let affine = norm.weight_and_bias().map(|(w, b)| (w.dims().to_vec(), b.dims().to_vec()));
                let y = norm.forward_t(&a.x, a.train)?;
                let says = format!("{} {} {affine:?}", norm.eps(), norm.momentum());
                Ok(Answer {
                    y,
                    running: Some((norm.running_mean().clone(), norm.running_var().clone())),
                    says,
                })
            }

            fn from_config(a: &Args, center: bool, affine: bool) -> Result<Answer> {
                let config =
                    BatchNormConfig { eps: a.eps, remove_mean: center, affine, momentum: a.momentum };
                batch(batch_norm(a.channels(), config, a.checkpoint())?, a)
            }

            fn layer_from_config(a: &Args, remove_mean: bool, affine: bool) -> Result<Answer> {
                let config = LayerNormConfig { eps: a.eps, remove_mean, affine };
                layer(layer_norm(a.last(), config, a.checkpoint())?, a)
            }

            const LAYER: super::Family = Last { center: true, bias: true };
            const NO_BIAS: super::Family = Last { center: true, bias: false };
            const RMS: super::Family = Last { center: false, bias: false };
            const RMS_BIAS: super::Family = Last { center: false, bias: true };

            pub const TABLE: &[Entry] = &[
                ("LayerNorm::new", LAYER, |a| {
                    layer(LayerNorm::new(a.weight.clone(), a.bias.clone(), a.eps), a)
                }),
                ("LayerNorm::new_no_bias", NO_BIAS, |a| {
                    layer(LayerNorm::new_no_bias(a.weight.clone(), a.eps), a)
                }),
                ("LayerNorm::rms_norm", RMS, |a| layer(LayerNorm::rms_norm(a.weight.clone(), a.eps), a)),
                ("layer_norm", LAYER, |a| layer_from_config(a, true, true)),
                ("layer_norm without affine", NO_BIAS, |a| layer_from_config(a, true, false)),
                ("layer_norm without remove_mean", RMS_BIAS, |a| layer_from_config(a, false, true)),
                ("layer_norm without both", RMS, |a| layer_from_config(a, false, false)),
                ("layer_norm_no_bias", NO_BIAS, |a| {
                    layer(layer_norm_no_bias(a.last(), a.eps, a.checkpoint())?, a)
                }),
                ("RmsNorm::new", RMS, |a| rms(RmsNorm::new(a.weight.clone(), a.eps), a)),
                ("RmsNorm::forward_diff", RMS, |a| {
                    tensor(RmsNorm::new(a.weight.clone(), a.eps).forward_diff(&a.x))
                }),
                ("RmsNorm::into_inner", RMS, |a| {
                    layer(RmsNorm::new(a.weight.clone(), a.eps).into_inner(), a)
                }),
                ("rms_norm", RMS, |a| rms(rms_norm(a.last(), a.eps, a.checkpoint())?, a)),
                ("ops::layer_norm", LAYER, |a| {
                    tensor(ops::layer_norm(&a.x, &a.weight, &a.bias, a.eps as f32))
                }),
                ("ops::layer_norm_slow", LAYER, |a| {
                    tensor(ops::layer_norm_slow(&a.x, &a.weight, &a.bias, a.eps as f32))
                }),
                ("ops::rms_norm", RMS, |a| tensor(ops::rms_norm(&a.x, &a.weight, a.eps as f32))),
                ("ops::rms_norm_slow", RMS, |a| tensor(ops::rms_norm_slow(&a.x, &a.weight, a.eps as f32))),
                ("GroupNorm::new", Group, |a| {
                    let (weight, bias) = (a.weight.clone(), a.bias.clone());
                    tensor(GroupNorm::new(weight, bias, a.channels(), GROUPS, a.eps)?.forward(&a.x))
                }),
                ("group_norm", Group, |a| {
                    tensor(group_norm(GROUPS, a.channels(), a.eps, a.checkpoint())?.forward(&a.x))
                }),
                ("BatchNorm::new", Batch { center: true, affine: true, momentum: Default }, |a| {
                    let ((m, v), w, b) = (a.running.clone(), a.weight.clone(), a.bias.clone());
                    batch(BatchNorm::new(a.channels(), m, v, w, b, a.eps)?, a)
                }),
                ("BatchNorm::new_no_bias", Batch { center: true, affine: false, momentum: Default }, |a| {
                    let (m, v) = a.running.clone();
                    batch(BatchNorm::new_no_bias(a.channels(), m, v, a.eps)?, a)
                }),
                (
                    "BatchNorm::new_with_momentum",
                    Batch { center: true, affine: true, momentum: Given },
                    |a| {
                        let ((m, v), w, b) = (a.running.clone(), a.weight.clone(), a.bias.clone());
                        batch(BatchNorm::new_with_momentum(a.channels(), m, v, w, b, a.eps, a.momentum)?, a)
                    },
                ),
                (
                    "BatchNorm::new_no_bias_with_momentum",
                    Batch { center: true, affine: false, momentum: Given },
                    |a| {
                        let ((m, v), c) = (a.running.clone(), a.channels());
                        batch(BatchNorm::new_no_bias_with_momentum(c, m, v, a.eps, a.momentum)?, a)
                    },
                ),
                ("BatchNorm::forward_train", Batch { center: true, affine: true, momentum: Given }, |a| {
                    let ((m, v), w, b) = (a.running.clone(), a.weight.clone(), a.bias.clone());
                    let norm = BatchNorm::new_with_momentum(a.channels(), m, v, w, b, a.eps, a.momentum)?;
                    if !a.train {
                        candle_core::bail!("forward_train only trains")
                    }
                    tensor(norm.forward_train(&a.x))
                }),
                ("batch_norm", Batch { center: true, affine: true, momentum: Given }, |a| {
                    from_config(a, true, true)
                }),
                ("batch_norm without affine", Batch { center: true, affine: false, momentum: Given }, |a| {
                    from_config(a, true, false)
                }),
                (
                    "batch_norm without remove_mean",
                    Batch { center: false, affine: true, momentum: Given },
                    |a| from_config(a, false, true),
                ),
                ("batch_norm without both", Batch { center: false, affine: false, momentum: Given }, |a| {
                    from_config(a, false, false)
                }),
            ];
        }
    };
}

side!(theirs, candle_nn);
side!(ours, candle_norm);
