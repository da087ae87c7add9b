//! The network: convolutions, each with the norm that was asked for, and a linear classifier.

use anyhow::Result;
use candle_core::{Device, Module, ModuleT, Tensor};
use candle_nn::{conv2d, linear, Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap};
use candle_norm::instance_norm::{instance_norm2d, InstanceNormOptions};
use candle_norm::layer_norm::LayerNormOptions;
use candle_norm::rms_norm::RmsNormOptions;
use candle_norm::{batch_norm, group_norm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RmsNorm};
use clap::ValueEnum;
use rand::{rngs::StdRng, Rng};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NormKind {
    Batch,
    Group,
    Layer,
    Rms,
    Instance,
    None,
}

impl NormKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Group => "group",
            Self::Layer => "layer",
            Self::Rms => "RMS",
            Self::Instance => "instance",
            Self::None => "none",
        }
    }
}

/// Any of the norms, after a convolution with `channels` outputs of `size` x `size`.
enum Norm {
    Batch(BatchNorm),
    Group(GroupNorm),
    Layer(LayerNorm),
    Rms(RmsNorm),
    Instance(InstanceNorm),
    None,
}

impl Norm {
    fn new(kind: NormKind, channels: usize, size: usize, vb: VarBuilder) -> Result<Self> {
        let shape = (channels, size, size);
        Ok(match kind {
            NormKind::Batch => Self::Batch(batch_norm(channels, 1e-5, vb)?),
            NormKind::Group => Self::Group(group_norm(8, channels, 1e-5, vb)?),
            NormKind::Layer => Self::Layer(LayerNorm::with_options(shape, LayerNormOptions::default(), vb)?),
            NormKind::Rms => Self::Rms(RmsNorm::with_options(shape, RmsNormOptions::default(), vb)?),
            NormKind::Instance => {
                Self::Instance(instance_norm2d(channels, InstanceNormOptions::default().affine(true), vb)?)
            }
            NormKind::None => Self::None,
        })
    }
}

impl ModuleT for Norm {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        match self {
            Self::Batch(norm) => norm.forward_t(x, train),
            Self::Group(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
            Self::Instance(norm) => norm.forward(x),
            Self::None => Ok(x.clone()),
        }
    }
}

pub struct Net {
    blocks: Vec<(Conv2d, Norm)>,
    classifier: Linear,
}

impl Net {
    /// Three blocks take 8 x 8 pixels to 2 x 2, four to a single one.
    pub fn new(kind: NormKind, blocks: usize, vb: VarBuilder) -> Result<Self> {
        let (channels, sizes) = ([1, 16, 32, 64, 64], [8, 8, 4, 2, 1]);
        let block = |i: usize| -> Result<_> {
            let vb = vb.pp(format!("block{i}"));
            let config = Conv2dConfig { padding: 1, stride: sizes[i] / sizes[i + 1], ..Default::default() };
            let conv = conv2d(channels[i], channels[i + 1], 3, config, vb.pp("conv"))?;
            Ok((conv, Norm::new(kind, channels[i + 1], sizes[i + 1], vb.pp("norm"))?))
        };
        let features = channels[blocks] * sizes[blocks] * sizes[blocks];
        let classifier = linear(features, 10, vb.pp("classifier"))?;
        Ok(Self { blocks: (0..blocks).map(block).collect::<Result<_>>()?, classifier })
    }
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for (conv, norm) in &self.blocks {
            x = norm.forward_t(&conv.forward(&x)?, train)?.relu()?;
        }
        self.classifier.forward(&x.flatten_from(1)?)
    }
}

/// candle's CPU generator takes no seed, so the weights are drawn here: He's normal distribution.
pub fn draw_weights(vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    let vars = vars.data().lock().expect("no thread panicked with the lock");
    let mut weights: Vec<_> = vars.iter().filter(|(name, _)| !name.contains("norm")).collect();
    weights.sort_by_key(|(name, _)| name.as_str());
    for (name, var) in weights {
        let fan_in: usize = var.dims()[1..].iter().product();
        let scale = if name.ends_with("bias") { 0. } else { (2. / fan_in as f64).sqrt() };
        let normal = |_| {
            // Box and Muller's transform of two uniform numbers.
            let (u, v): (f64, f64) = (1. - rng.random::<f64>(), rng.random());
            (scale * (-2. * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        let values: Vec<f32> = (0..var.elem_count()).map(normal).collect();
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
    }
    Ok(())
}
