//! The two models of `make.py`, with the names that PyTorch gives their tensors.
//!
//! Apart, so that the example shows what is done with a model rather than the model.

use candle_core::{Module, ModuleT, Result, Tensor, D};
use candle_nn::{conv2d_no_bias, linear, Conv2d, Conv2dConfig, Linear, VarBuilder};
use candle_norm::{batch_norm, layer_norm, BatchNorm, FoldBatchNorm, LayerNorm};

/// A convolution followed by batch norm, which folding takes away.
struct ConvNorm {
    conv: Conv2d,
    norm: Option<BatchNorm>,
}

impl ConvNorm {
    fn new(
        (inputs, outputs): (usize, usize),
        (kernel, stride): (usize, usize),
        conv: VarBuilder,
        norm: VarBuilder,
    ) -> Result<Self> {
        let config = Conv2dConfig { padding: kernel / 2, stride, ..Default::default() };
        let conv = conv2d_no_bias(inputs, outputs, kernel, config, conv)?;
        Ok(Self { conv, norm: Some(batch_norm(outputs, 1e-5, norm)?) })
    }

    fn fold(&self) -> Result<Self> {
        let conv = match &self.norm {
            Some(norm) => self.conv.fold_batch_norm(norm)?,
            None => self.conv.clone(),
        };
        Ok(Self { conv, norm: None })
    }
}

impl ModuleT for ConvNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let x = self.conv.forward(x)?;
        match &self.norm {
            Some(norm) => norm.forward_t(&x, train),
            None => Ok(x),
        }
    }
}

struct Block {
    first: ConvNorm,
    second: ConvNorm,
    downsample: Option<ConvNorm>,
}

impl Block {
    fn new(inputs: usize, outputs: usize, stride: usize, vb: VarBuilder) -> Result<Self> {
        let first = ConvNorm::new((inputs, outputs), (3, stride), vb.pp("conv1"), vb.pp("bn1"))?;
        let second = ConvNorm::new((outputs, outputs), (3, 1), vb.pp("conv2"), vb.pp("bn2"))?;
        let downsample = if stride == 1 && inputs == outputs {
            None
        } else {
            let vb = vb.pp("downsample");
            Some(ConvNorm::new((inputs, outputs), (1, stride), vb.pp("0"), vb.pp("1"))?)
        };
        Ok(Self { first, second, downsample })
    }
}

impl ModuleT for Block {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let y = self.second.forward_t(&self.first.forward_t(x, train)?.relu()?, train)?;
        match &self.downsample {
            Some(downsample) => (y + downsample.forward_t(x, train)?)?.relu(),
            None => (y + x)?.relu(),
        }
    }
}

pub struct ResNet {
    stem: ConvNorm,
    blocks: [Block; 2],
    classifier: Linear,
}

impl ResNet {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            stem: ConvNorm::new((3, 8), (3, 1), vb.pp("conv1"), vb.pp("bn1"))?,
            blocks: [Block::new(8, 8, 1, vb.pp("layer1"))?, Block::new(8, 16, 2, vb.pp("layer2"))?],
            classifier: linear(16, 10, vb.pp("fc"))?,
        })
    }

    pub fn batch_norms_mut(&mut self) -> impl Iterator<Item = &mut BatchNorm> {
        let blocks = self.blocks.iter_mut();
        let in_blocks =
            blocks.flat_map(|b| [&mut b.first, &mut b.second].into_iter().chain(&mut b.downsample));
        std::iter::once(&mut self.stem).chain(in_blocks).flat_map(|layer| &mut layer.norm)
    }

    /// The same network without batch norms.
    pub fn fold(&self) -> Result<Self> {
        let fold = |b: &Block| -> Result<Block> {
            let downsample = b.downsample.as_ref().map(ConvNorm::fold).transpose()?;
            Ok(Block { first: b.first.fold()?, second: b.second.fold()?, downsample })
        };
        let blocks = [fold(&self.blocks[0])?, fold(&self.blocks[1])?];
        Ok(Self { stem: self.stem.fold()?, blocks, classifier: self.classifier.clone() })
    }
}

impl ModuleT for ResNet {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = self.stem.forward_t(x, train)?.relu()?;
        for block in &self.blocks {
            x = block.forward_t(&x, train)?;
        }
        self.classifier.forward(&x.mean((2, 3))?)
    }
}

const HEADS: usize = 4;

/// `torch.nn.TransformerEncoderLayer` with `norm_first=True`, in evaluation mode.
pub struct Transformer {
    norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    norm2: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Transformer {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        let attention = vb.pp("self_attn");
        let qkv_weight = attention.get((96, 32), "in_proj_weight")?;
        Ok(Self {
            norm1: layer_norm(32, 1e-5, vb.pp("norm1"))?,
            qkv: Linear::new(qkv_weight, Some(attention.get(96, "in_proj_bias")?)),
            projection: linear(32, 32, attention.pp("out_proj"))?,
            norm2: layer_norm(32, 1e-5, vb.pp("norm2"))?,
            up: linear(32, 64, vb.pp("linear1"))?,
            down: linear(64, 32, vb.pp("linear2"))?,
        })
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, length, width) = x.dims3()?;
        let qkv = self.qkv.forward(x)?.reshape((batch, length, 3, HEADS, width / HEADS))?;
        let qkv = qkv.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let scale = ((width / HEADS) as f64).sqrt();
        let scores = (qkv.get(0)?.matmul(&qkv.get(1)?.t()?)? / scale)?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&qkv.get(2)?)?;
        self.projection.forward(&mixed.transpose(1, 2)?.reshape((batch, length, width))?)
    }
}

impl Module for Transformer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?)?)?;
        let inner = self.up.forward(&self.norm2.forward(&x)?)?.gelu_erf()?;
        &x + self.down.forward(&inner)?
    }
}
