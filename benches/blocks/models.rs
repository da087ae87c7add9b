//! Whole models, written once as the blocks are: ResNet-50, ViT-B/16 and the UNet of Stable Diffusion 1.5.
//!
//! Apart from the blocks, because a model is put together of parts, and takes gigabytes. All has the biases that the
//! published models have. Weights are random: what is timed does not depend on them.

use super::blocks::{attend, heads, linear, Block, Maker, Part};
use super::norms::{Norms, Site};
use crate::cases::contenders::Outputs;
use candle_core::{Result, Tensor, D};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Module};

/// How much of a model's input: as much as a GPU is good for, or a little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    Large,
    Small,
}

impl Size {
    fn pick<T>(self, large: T, small: T) -> T {
        match self {
            Size::Large => large,
            Size::Small => small,
        }
    }
}

/// A model from the maker's numbers.
pub type Make = fn(Maker, Size) -> Result<Block>;

pub const ALL: [(&str, Make); 3] =
    [("ResNet-50", resnet_50), ("ViT-B/16", vit_b_16), ("UNet (SD 1.5)", stable_diffusion)];

/// Parts that every model has.
impl Maker {
    fn dense(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Part> {
        let weight = self.weight(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.make(&format!("{name}.bias"), &[outputs], 0.0, 0.1)?;
        Ok(Box::new(move |n, x| Linear::new(n.var(&weight), Some(n.var(&bias))).forward(&x)))
    }

    fn dense_no_bias(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Part> {
        let weight = self.weight(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(Box::new(move |n, x| linear(n, &x, &weight)))
    }

    /// A convolution of `[outputs, inputs, kernel]`, padded by half the kernel.
    fn conv(&mut self, name: &str, shape: [usize; 3], stride: usize, bias: bool) -> Result<Part> {
        let [outputs, inputs, kernel] = shape;
        let padding = if stride == kernel { 0 } else { kernel / 2 };
        let config = Conv2dConfig { padding, stride, ..Default::default() };
        let weight = self.weight(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel])?;
        let bias = bias.then(|| self.make(&format!("{name}.bias"), &[outputs], 0.0, 0.1)).transpose()?;
        Ok(Box::new(move |n, x| {
            Conv2d::new(n.var(&weight), bias.as_ref().map(|bias| n.var(bias)), config).forward(&x)
        }))
    }

    fn batch_norm(&mut self, name: &str, channels: usize, relu: bool) -> Result<Skip> {
        let ([weight, bias], [mean, var]) = (self.affine(name, channels)?, self.running(channels)?);
        Ok(Box::new(move |n, x, skip| {
            let site = if relu { Site::BatchRelu } else { Site::Batch };
            let mut args = vec![x, n.var(&weight), n.var(&bias)];
            args.extend(skip);
            Ok(n.at(site(mean.clone(), var.clone()), &args)?.y)
        }))
    }

    fn group_norm(&mut self, name: &str, channels: usize, site: fn(usize) -> Site) -> Result<Part> {
        let [weight, bias] = self.affine(name, channels)?;
        Ok(Box::new(move |n, x| Ok(n.at(site(32), &[x, n.var(&weight), n.var(&bias)])?.y)))
    }

    /// Layer norm of a stream to which the branch before it is added.
    fn layer_norm(&mut self, name: &str, width: usize) -> Result<Join> {
        let [weight, bias] = self.affine(name, width)?;
        Ok(Box::new(move |n, branch, stream| {
            let (weight, bias) = (n.var(&weight), n.var(&bias));
            let Some(branch) = branch else {
                return Ok((n.at(Site::Layer, &[stream.clone(), weight, bias])?.y, stream));
            };
            let Outputs { y, sum } = n.at(Site::AddLayer, &[branch, stream, weight, bias])?;
            Ok((y, sum.expect("a sum is an output of this norm")))
        }))
    }
}

/// Takes x and perhaps a skip.
type Skip = Box<dyn Fn(&Norms, Tensor, Option<Tensor>) -> Result<Tensor>>;
/// Takes a branch and the stream; gives what is normalized of their sum, and the sum.
type Join = Box<dyn Fn(&Norms, Option<Tensor>, Tensor) -> Result<(Tensor, Tensor)>>;
/// Takes x and what it is conditioned on.
type Conditioned = Box<dyn Fn(&Norms, Tensor, &Tensor) -> Result<Tensor>>;

/// torchvision's, but for the pool behind the stem: candle's `max_pool2d` has a gradient only where windows do not
/// overlap, so it is 2x2 instead of 3x3.
fn resnet_50(mut m: Maker, size: Size) -> Result<Block> {
    let images = size.pick(32, 2);
    let x = m.constant(&[images, 3, 224, 224])?;
    let stem = m.conv("conv1", [64, 3, 7], 2, false)?;
    let stem_norm = m.batch_norm("bn1", 64, true)?;
    let mut blocks = vec![];
    let mut inputs = 64;
    for (stage, count) in [3, 4, 6, 3].into_iter().enumerate() {
        let inner = 64 << stage;
        for i in 0..count {
            let stride = if i == 0 && stage > 0 { 2 } else { 1 };
            blocks.push(bottleneck(&mut m, &format!("layer{}.{i}", stage + 1), [inputs, inner], stride)?);
            inputs = 4 * inner;
        }
    }
    let head = m.dense("fc", inputs, 1000)?;
    let forward = move |n: &Norms| {
        let x = stem_norm(n, stem(n, x.clone())?, None)?.max_pool2d(2)?;
        let x = blocks.iter().try_fold(x, |x, block| block(n, x))?;
        head(n, x.mean((2, 3))?).map(Outputs::one)
    };
    let block = m.block(
        size.pick("ResNet-50, 32 images", "ResNet-50, 2 images"),
        images * 112 * 112,
        Box::new(forward),
    );
    Ok(Block { corners: true, ..block })
}

fn bottleneck(m: &mut Maker, name: &str, [inputs, inner]: [usize; 2], stride: usize) -> Result<Part> {
    let outer = 4 * inner;
    let conv_1 = m.conv(&format!("{name}.conv1"), [inner, inputs, 1], 1, false)?;
    let conv_2 = m.conv(&format!("{name}.conv2"), [inner, inner, 3], stride, false)?;
    let conv_3 = m.conv(&format!("{name}.conv3"), [outer, inner, 1], 1, false)?;
    let norm_1 = m.batch_norm(&format!("{name}.bn1"), inner, true)?;
    let norm_2 = m.batch_norm(&format!("{name}.bn2"), inner, true)?;
    let norm_3 = m.batch_norm(&format!("{name}.bn3"), outer, true)?;
    let down = match inputs == outer {
        true => None,
        false => Some((
            m.conv(&format!("{name}.downsample.0"), [outer, inputs, 1], stride, false)?,
            m.batch_norm(&format!("{name}.downsample.1"), outer, false)?,
        )),
    };
    Ok(Box::new(move |n, x| {
        let skip = match &down {
            Some((conv, norm)) => norm(n, conv(n, x.clone())?, None)?,
            None => x.clone(),
        };
        let x = norm_1(n, conv_1(n, x)?, None)?;
        let x = norm_2(n, conv_2(n, x)?, None)?;
        norm_3(n, conv_3(n, x)?, Some(skip))
    }))
}

/// torchvision's, pre-norm: 196 patches and a class token.
fn vit_b_16(mut m: Maker, size: Size) -> Result<Block> {
    const WIDTH: usize = 768;
    const PATCHES: usize = 14 * 14;
    let images = size.pick(32, 2);
    let x = m.constant(&[images, 3, 224, 224])?;
    let patches = m.conv("conv_proj", [WIDTH, 3, 16], 16, true)?;
    let class = m.make("class_token", &[1, 1, WIDTH], 0.0, 0.2)?;
    let position = m.make("pos_embedding", &[1, PATCHES + 1, WIDTH], 0.0, 0.2)?;
    let blocks =
        (0..12).map(|i| vit_block(&mut m, &format!("layer{i}"), WIDTH)).collect::<Result<Vec<_>>>()?;
    let last = m.layer_norm("ln", WIDTH)?;
    let head = m.dense("head", WIDTH, 1000)?;
    let forward = move |n: &Norms| {
        let x = patches(n, x.clone())?.flatten_from(2)?.transpose(1, 2)?;
        let class = n.var(&class).broadcast_as((images, 1, WIDTH))?;
        let mut stream = Tensor::cat(&[&class, &x], 1)?.broadcast_add(&n.var(&position))?;
        let mut branch = None;
        for block in &blocks {
            let (next, sum) = block(n, branch, stream)?;
            (branch, stream) = (Some(next), sum);
        }
        let (x, _) = last(n, branch, stream)?;
        head(n, x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?).map(Outputs::one)
    };
    Ok(m.block(
        size.pick("ViT-B/16, 32 images", "ViT-B/16, 2 images"),
        images * (PATCHES + 1),
        Box::new(forward),
    ))
}

fn vit_block(m: &mut Maker, name: &str, width: usize) -> Result<Join> {
    const HEADS: usize = 12;
    let norm_1 = m.layer_norm(&format!("{name}.ln_1"), width)?;
    let norm_2 = m.layer_norm(&format!("{name}.ln_2"), width)?;
    let qkv = m.dense(&format!("{name}.in_proj"), width, 3 * width)?;
    let out = m.dense(&format!("{name}.out_proj"), width, width)?;
    let fc_1 = m.dense(&format!("{name}.mlp.0"), width, 4 * width)?;
    let fc_2 = m.dense(&format!("{name}.mlp.3"), 4 * width, width)?;
    Ok(Box::new(move |n, branch, stream| {
        let (x, stream) = norm_1(n, branch, stream)?;
        let parts = qkv(n, x)?.chunk(3, D::Minus1)?;
        let parts = [heads(&parts[0], HEADS)?, heads(&parts[1], HEADS)?, heads(&parts[2], HEADS)?];
        let (x, stream) = norm_2(n, Some(out(n, attend(n, parts, None)?)?), stream)?;
        Ok((fc_2(n, fc_1(n, x)?.gelu_erf()?)?, stream))
    }))
}

/// Latents of 64x64 are images of 512x512; text of 77 tokens. Three of four levels have spatial transformers.
fn stable_diffusion(mut m: Maker, size: Size) -> Result<Block> {
    const CHANNELS: [usize; 4] = [320, 640, 1280, 1280];
    let side = size.pick(64, 16);
    let x = m.constant(&[1, 4, side, side])?;
    let text = m.constant(&[1, 77, TEXT])?;
    let time = m.constant(&[1, CHANNELS[0]])?;
    let time_1 = m.dense("time_embedding.linear_1", CHANNELS[0], TIME)?;
    let time_2 = m.dense("time_embedding.linear_2", TIME, TIME)?;
    let first = m.conv("conv_in", [CHANNELS[0], 4, 3], 1, true)?;
    let mut skips = vec![CHANNELS[0]];
    let mut down = vec![];
    let mut inputs = CHANNELS[0];
    for (level, channels) in CHANNELS.into_iter().enumerate() {
        let name = format!("down_blocks.{level}");
        for i in 0..2 {
            down.push(layer(&mut m, &format!("{name}.{i}"), [inputs, channels], level < 3)?);
            inputs = channels;
            skips.push(channels);
        }
        if level < 3 {
            let conv = m.conv(&format!("{name}.downsample"), [channels, channels, 3], 2, true)?;
            down.push(Box::new(move |n, x, _| conv(n, x)));
            skips.push(channels);
        }
    }
    let middle = layer(&mut m, "mid_block.0", [inputs, inputs], true)?;
    let middle_2 = layer(&mut m, "mid_block.1", [inputs, inputs], false)?;
    let mut up = vec![];
    for (level, channels) in CHANNELS.into_iter().enumerate().rev() {
        for i in 0..3 {
            let name = format!("up_blocks.{}.{i}", 3 - level);
            let skip = skips.pop().expect("as many as were kept");
            let part = layer(&mut m, &name, [inputs + skip, channels], level < 3)?;
            let wider = match i == 2 && level > 0 {
                true => Some(m.conv(&format!("{name}.upsample"), [channels, channels, 3], 1, true)?),
                false => None,
            };
            up.push((part, wider));
            inputs = channels;
        }
    }
    let last_norm = m.group_norm("conv_norm_out", inputs, Site::GroupSilu)?;
    let last = m.conv("conv_out", [4, inputs, 3], 1, true)?;
    let forward = move |n: &Norms| {
        let time = time_2(n, time_1(n, time.clone())?.silu()?)?.silu()?;
        let condition = Condition { time: &time, text: &text };
        let mut x = first(n, x.clone())?;
        let mut kept = vec![x.clone()];
        for part in &down {
            x = part(n, x, condition)?;
            kept.push(x.clone());
        }
        x = middle_2(n, middle(n, x, condition)?, condition)?;
        for (part, wider) in &up {
            x = part(n, Tensor::cat(&[&x, &kept.pop().expect("one for each")], 1)?, condition)?;
            if let Some(conv) = wider {
                x = conv(n, twice(&x)?)?;
            }
        }
        last(n, last_norm(n, x)?).map(Outputs::one)
    };
    let name = size.pick("UNet (SD 1.5), 64x64", "UNet (SD 1.5), 16x16");
    Ok(m.block(name, (side * side).max(2 * 1280 * 9), Box::new(forward)))
}

const TEXT: usize = 768;
const TIME: usize = 1280;

/// The time's embedding behind its SiLU, and the text's.
#[derive(Clone, Copy)]
struct Condition<'a> {
    time: &'a Tensor,
    text: &'a Tensor,
}

type Layer = Box<dyn Fn(&Norms, Tensor, Condition) -> Result<Tensor>>;

/// A residual block, and a spatial transformer where the level has them.
fn layer(m: &mut Maker, name: &str, channels: [usize; 2], transformer: bool) -> Result<Layer> {
    let residual = residual(m, &format!("{name}.resnet"), channels)?;
    let transformer =
        transformer.then(|| spatial_transformer(m, &format!("{name}.attention"), channels[1])).transpose()?;
    Ok(Box::new(move |n, x, condition| {
        let x = residual(n, x, condition.time)?;
        match &transformer {
            Some(transformer) => transformer(n, x, condition.text),
            None => Ok(x),
        }
    }))
}

fn residual(m: &mut Maker, name: &str, [inputs, outputs]: [usize; 2]) -> Result<Conditioned> {
    let norm_1 = m.group_norm(&format!("{name}.norm1"), inputs, Site::GroupSilu)?;
    let norm_2 = m.group_norm(&format!("{name}.norm2"), outputs, Site::GroupSilu)?;
    let conv_1 = m.conv(&format!("{name}.conv1"), [outputs, inputs, 3], 1, true)?;
    let conv_2 = m.conv(&format!("{name}.conv2"), [outputs, outputs, 3], 1, true)?;
    let project = m.dense(&format!("{name}.time_emb_proj"), TIME, outputs)?;
    let shortcut = (inputs != outputs)
        .then(|| m.conv(&format!("{name}.conv_shortcut"), [outputs, inputs, 1], 1, true))
        .transpose()?;
    Ok(Box::new(move |n, x, time| {
        let time = project(n, time.clone())?.unsqueeze(D::Minus1)?.unsqueeze(D::Minus1)?;
        let inner = conv_1(n, norm_1(n, x.clone())?)?.broadcast_add(&time)?;
        let inner = conv_2(n, norm_2(n, inner)?)?;
        let skip = shortcut.as_ref().map_or(Ok(x.clone()), |conv| conv(n, x.clone()))?;
        skip + inner
    }))
}

/// Attention of the pixels, then to the text, then a GEGLU.
fn spatial_transformer(m: &mut Maker, name: &str, width: usize) -> Result<Conditioned> {
    let norm = m.group_norm(&format!("{name}.norm"), width, Site::Group)?;
    let input = m.conv(&format!("{name}.proj_in"), [width, width, 1], 1, true)?;
    let norms = [
        m.layer_norm(&format!("{name}.norm1"), width)?,
        m.layer_norm(&format!("{name}.norm2"), width)?,
        m.layer_norm(&format!("{name}.norm3"), width)?,
    ];
    let itself = attention(m, &format!("{name}.attn1"), [width, width])?;
    let to_text = attention(m, &format!("{name}.attn2"), [width, TEXT])?;
    let gated = m.dense(&format!("{name}.ff.0"), width, 8 * width)?;
    let down = m.dense(&format!("{name}.ff.2"), 4 * width, width)?;
    let output = m.conv(&format!("{name}.proj_out"), [width, width, 1], 1, true)?;
    Ok(Box::new(move |n, image, text| {
        let (batch, _, height, columns) = image.dims4()?;
        let x = input(n, norm(n, image.clone())?)?;
        let stream = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let (x, stream) = norms[0](n, None, stream)?;
        let (x, stream) = norms[1](n, Some(itself(n, x.clone(), &x)?), stream)?;
        let (x, stream) = norms[2](n, Some(to_text(n, x, text)?), stream)?;
        let parts = gated(n, x)?.chunk(2, D::Minus1)?;
        let stream = (stream + down(n, (&parts[0] * parts[1].gelu_erf()?)?)?)?;
        let x = stream.transpose(1, 2)?.reshape((batch, width, height, columns))?;
        image + output(n, x)?
    }))
}

/// Queries of one width, keys and values from tokens of another.
fn attention(m: &mut Maker, name: &str, [width, from]: [usize; 2]) -> Result<Conditioned> {
    const HEADS: usize = 8;
    let q = m.dense_no_bias(&format!("{name}.to_q"), width, width)?;
    let k = m.dense_no_bias(&format!("{name}.to_k"), from, width)?;
    let v = m.dense_no_bias(&format!("{name}.to_v"), from, width)?;
    let out = m.dense(&format!("{name}.to_out"), width, width)?;
    Ok(Box::new(move |n, x, from| {
        let parts = [
            heads(&q(n, x)?, HEADS)?,
            heads(&k(n, from.clone())?, HEADS)?,
            heads(&v(n, from.clone())?, HEADS)?,
        ];
        out(n, attend(n, parts, None)?)
    }))
}

/// Each pixel four times. The gradient of candle's own `upsample_nearest2d` is a convolution for each channel.
fn twice(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    x.reshape((batch, channels, height, 1, width, 1))?
        .broadcast_as((batch, channels, height, 2, width, 2))?
        .reshape((batch, channels, 2 * height, 2 * width))
}
