//! A residual network for 8×8 images of digits.
//!
//! Written for one process: batch norms are `BatchNorm`, and a `batch_norms!` line per struct says where.

use candle_core::{Result, Tensor};
use candle_nn::{conv2d_no_bias, linear, Conv2d, Conv2dConfig, Linear, Module, ModuleT, VarBuilder};
use candle_norm::batch_norm::{batch_norm2d, BatchNormOptions};
use candle_norm::{batch_norms, BatchNorm};

pub struct ResNet {
    stem: (Conv2d, BatchNorm),
    stages: Vec<Vec<Block>>,
    head: Linear,
}
batch_norms!(ResNet { stem, stages });

struct Block {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    downsample: Option<(Conv2d, BatchNorm)>,
}
batch_norms!(Block { bn1, bn2, downsample });

fn conv(from: usize, to: usize, kernel: usize, stride: usize, vb: VarBuilder) -> Result<Conv2d> {
    let config = Conv2dConfig { padding: kernel / 2, stride, ..Default::default() };
    conv2d_no_bias(from, to, kernel, config, vb)
}

fn norm(channels: usize, vb: VarBuilder) -> Result<BatchNorm> {
    batch_norm2d(channels, BatchNormOptions::default(), vb)
}

impl Block {
    fn new(from: usize, to: usize, stride: usize, vb: VarBuilder) -> Result<Self> {
        let downsample = if from == to && stride == 1 {
            None
        } else {
            let vb = vb.pp("downsample");
            Some((conv(from, to, 1, stride, vb.pp("0"))?, norm(to, vb.pp("1"))?))
        };
        Ok(Self {
            conv1: conv(from, to, 3, stride, vb.pp("conv1"))?,
            bn1: norm(to, vb.pp("bn1"))?,
            conv2: conv(to, to, 3, 1, vb.pp("conv2"))?,
            bn2: norm(to, vb.pp("bn2"))?,
            downsample,
        })
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let y = self.bn1.forward_t(&self.conv1.forward(x)?, train)?.relu()?;
        let y = self.bn2.forward_t(&self.conv2.forward(&y)?, train)?;
        let shortcut = match &self.downsample {
            Some((conv, bn)) => bn.forward_t(&conv.forward(x)?, train)?,
            None => x.clone(),
        };
        (y + shortcut)?.relu()
    }
}

impl ResNet {
    /// Stages of `blocks` blocks with 8 and 16 channels.
    pub fn new(blocks: usize, vb: VarBuilder) -> Result<Self> {
        let stem = (conv(1, 8, 3, 1, vb.pp("conv1"))?, norm(8, vb.pp("bn1"))?);
        let stage = |name: &str, from: usize, to: usize, stride: usize| {
            let block = |i| {
                let vb = vb.pp(name).pp(i);
                if i == 0 {
                    Block::new(from, to, stride, vb)
                } else {
                    Block::new(to, to, 1, vb)
                }
            };
            (0..blocks).map(block).collect::<Result<Vec<_>>>()
        };
        let stages = vec![stage("layer1", 8, 8, 1)?, stage("layer2", 8, 16, 2)?];
        Ok(Self { stem, stages, head: linear(16, 10, vb.pp("fc"))? })
    }
}

impl ModuleT for ResNet {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let (conv, bn) = &self.stem;
        let mut x = bn.forward_t(&conv.forward(x)?, train)?.relu()?;
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, train)?;
        }
        self.head.forward(&x.mean((2, 3))?)
    }
}
