//! One block each of four models, with the sizes that the models have: written once, whoever does the norms.

use super::norms::{Norms, Site};
use crate::cases::contenders::{Mode, Outputs};
use crate::cases::inputs::Random;
use candle_core::{DType, Device, Result, Tensor, Var, D};
use candle_nn::{ops, rotary_emb, Module};

pub type Forward = Box<dyn Fn(&Norms) -> Result<Outputs>>;

pub struct Block {
    pub name: &'static str,
    pub forward: Forward,
    /// Inputs and weights, by name: all that is trained.
    pub vars: Vec<(String, Var)>,
    /// Terms of the longest sum, in the forward or the backward.
    pub longest: usize,
    /// Has a ReLU, whose gradient is all or nothing at a corner.
    pub corners: bool,
}

/// A part of a model.
pub type Part = Box<dyn Fn(&Norms, Tensor) -> Result<Tensor>>;

/// A block from the maker's numbers.
pub type Make = fn(Maker) -> Result<Block>;

pub const ALL: [(&str, Make); 4] = [
    ("Llama 3.2 1B, 128 tokens", llama),
    ("UNet (SD 1.5), 320 channels, 32x32", unet),
    ("ResNet-50 bottleneck, 8 images, 28x28", bottleneck),
    ("DiT-XL/2, 2 images of 256 tokens", dit),
];

/// Makes inputs and weights: the same numbers for each dtype and device.
pub struct Maker {
    random: Random,
    dtype: DType,
    device: Device,
    vars: Vec<(String, Var)>,
}

impl Maker {
    pub fn new(dtype: DType, device: &Device) -> Self {
        Self { random: Random::new(14), dtype, device: device.clone(), vars: vec![] }
    }

    fn tensor(&mut self, shape: &[usize], mean: f32, std: f32) -> Result<Tensor> {
        self.random.tensor(shape, mean, std)?.to_device(&self.device)?.to_dtype(self.dtype)
    }

    /// An input that is not trained.
    pub fn constant(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, 0.1, 1.0)
    }

    pub fn make(&mut self, name: &str, shape: &[usize], mean: f32, std: f32) -> Result<Var> {
        let var = Var::from_tensor(&self.tensor(shape, mean, std)?)?;
        self.vars.push((name.into(), var.clone()));
        Ok(var)
    }

    fn input(&mut self, name: &str, shape: &[usize]) -> Result<Var> {
        self.make(name, shape, 0.1, 1.0)
    }

    /// Of a matrix or a convolution: as large as training starts with.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Var> {
        let inputs: usize = shape[1..].iter().product();
        self.make(name, shape, 0.0, (inputs as f32).powf(-0.5))
    }

    /// Weight and bias of a norm.
    pub fn affine(&mut self, name: &str, channels: usize) -> Result<[Var; 2]> {
        Ok([
            self.make(&format!("{name}.weight"), &[channels], 1.0, 0.2)?,
            self.make(&format!("{name}.bias"), &[channels], 0.1, 0.2)?,
        ])
    }

    /// A batch norm's running mean and variance, which are not trained.
    pub fn running(&mut self, channels: usize) -> Result<[Var; 2]> {
        let mut of = |mean, std| Var::from_tensor(&self.tensor(&[channels], mean, std)?);
        Ok([of(0.1, 0.1)?, of(1.0, 0.1)?])
    }

    pub fn block(self, name: &'static str, longest: usize, forward: Forward) -> Block {
        Block { name, forward, vars: self.vars, longest, corners: false }
    }
}

pub fn linear(n: &Norms, x: &Tensor, weight: &Var) -> Result<Tensor> {
    candle_nn::Linear::new(n.var(weight), None).forward(x)
}

/// `[batch, tokens, heads * width]` as `[batch, heads, tokens, width]`.
pub fn heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    x.reshape((batch, tokens, heads, width / heads))?.transpose(1, 2)?.contiguous()
}

/// Softmax and rotary embedding are candle-nn's fused ones where no graph is wanted: those end it.
pub fn attend(n: &Norms, [q, k, v]: [Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, heads, tokens, width) = q.dims4()?;
    let scores = (q.matmul(&k.t()?)? / (width as f64).sqrt())?;
    let scores = mask.map_or(Ok(scores.clone()), |mask| scores.broadcast_add(mask))?;
    let scores = match n.mode {
        Mode::Forward => ops::softmax_last_dim(&scores),
        Mode::ForwardBackward => ops::softmax(&scores, D::Minus1),
    }?;
    scores.matmul(&v)?.transpose(1, 2)?.reshape((batch, tokens, heads * width))
}

/// Pre-norm: attention and MLP read the norm of the stream, whose additions come from the branches before.
fn llama(mut m: Maker) -> Result<Block> {
    const TOKENS: usize = 128;
    const WIDTH: usize = 2048;
    const HEADS: usize = 32;
    const KV_HEADS: usize = 8;
    const INNER: usize = 8192;
    let [branch, stream] = [m.input("branch", &[1, TOKENS, WIDTH])?, m.input("stream", &[1, TOKENS, WIDTH])?];
    let norm_1 = m.make("input_layernorm", &[WIDTH], 1.0, 0.2)?;
    let norm_2 = m.make("post_attention_layernorm", &[WIDTH], 1.0, 0.2)?;
    let kv_width = WIDTH / HEADS * KV_HEADS;
    let [q, o] = [m.weight("q_proj", &[WIDTH, WIDTH])?, m.weight("o_proj", &[WIDTH, WIDTH])?];
    let [k, v] = [m.weight("k_proj", &[kv_width, WIDTH])?, m.weight("v_proj", &[kv_width, WIDTH])?];
    let [gate, up] = [m.weight("gate_proj", &[INNER, WIDTH])?, m.weight("up_proj", &[INNER, WIDTH])?];
    let down = m.weight("down_proj", &[WIDTH, INNER])?;
    let (cos, sin) = angles(&m, TOKENS, WIDTH / HEADS)?;
    let mask = causal(&m, TOKENS)?;
    let forward = move |n: &Norms| {
        let Outputs { y: x, sum } = n.at(Site::AddRms, &[n.var(&branch), n.var(&stream), n.var(&norm_1)])?;
        let rotate = |x: Tensor| match n.mode {
            Mode::Forward => rotary_emb::rope(&x, &cos, &sin),
            Mode::ForwardBackward => rotary_emb::rope_slow(&x, &cos, &sin),
        };
        // Each key and value serves some heads.
        let repeat = |x: Tensor| {
            let (batch, kv, tokens, width) = x.dims4()?;
            Tensor::cat(&vec![&x; HEADS / kv], 2)?.reshape((batch, HEADS, tokens, width))
        };
        let q = rotate(heads(&linear(n, &x, &q)?, HEADS)?)?;
        let k = repeat(rotate(heads(&linear(n, &x, &k)?, KV_HEADS)?)?)?;
        let v = repeat(heads(&linear(n, &x, &v)?, KV_HEADS)?)?;
        let x = linear(n, &attend(n, [q, k, v], Some(&mask))?, &o)?;
        let stream = sum.expect("a sum is an output of this norm");
        let Outputs { y: x, sum } = n.at(Site::AddRms, &[x, stream, n.var(&norm_2)])?;
        let x = (linear(n, &x, &gate)?.silu()? * linear(n, &x, &up)?)?;
        Ok(Outputs { y: linear(n, &x, &down)?, sum })
    };
    Ok(m.block(ALL[0].0, INNER, Box::new(forward)))
}

fn angles(m: &Maker, tokens: usize, width: usize) -> Result<(Tensor, Tensor)> {
    let inverse: Vec<f32> = (0..width).step_by(2).map(|i| 5e5f32.powf(-(i as f32) / width as f32)).collect();
    let inverse = Tensor::from_vec(inverse, (1, width / 2), &Device::Cpu)?;
    let angles = Tensor::arange(0f32, tokens as f32, &Device::Cpu)?.reshape((tokens, 1))?.matmul(&inverse)?;
    let place = |t: Tensor| t.to_device(&m.device)?.to_dtype(m.dtype);
    Ok((place(angles.cos()?)?, place(angles.sin()?)?))
}

fn causal(m: &Maker, tokens: usize) -> Result<Tensor> {
    let mask = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 });
    Tensor::from_vec(mask.collect(), (tokens, tokens), &m.device)?.to_dtype(m.dtype)
}

/// As `stable_diffusion/resnet.rs` of candle-transformers has it, with a time embedding.
fn unet(mut m: Maker) -> Result<Block> {
    const BATCH: usize = 2;
    const CHANNELS: usize = 320;
    const SIZE: usize = 32;
    const GROUPS: usize = 32;
    const TIME: usize = 1280;
    let x = m.input("x", &[BATCH, CHANNELS, SIZE, SIZE])?;
    let time = m.input("time", &[BATCH, TIME])?;
    let project = m.weight("time_emb_proj", &[CHANNELS, TIME])?;
    let [norm_1, norm_2] = [m.affine("norm1", CHANNELS)?, m.affine("norm2", CHANNELS)?];
    let kernel = [CHANNELS, CHANNELS, 3, 3];
    let [conv_1, conv_2] = [m.weight("conv1", &kernel)?, m.weight("conv2", &kernel)?];
    let forward = move |n: &Norms| {
        let silu = |x, [w, b]: &[Var; 2]| n.at(Site::GroupSilu(GROUPS), &[x, n.var(w), n.var(b)]);
        let skip = n.var(&x);
        let x = silu(skip.clone(), &norm_1)?.y.conv2d(&n.var(&conv_1), 1, 1, 1, 1)?;
        let time = linear(n, &n.var(&time).silu()?, &project)?.unsqueeze(D::Minus1)?.unsqueeze(D::Minus1)?;
        let x = silu(x.broadcast_add(&time)?, &norm_2)?.y.conv2d(&n.var(&conv_2), 1, 1, 1, 1)?;
        Ok(Outputs::one((skip + x)?))
    };
    Ok(m.block(ALL[1].0, CHANNELS * 9, Box::new(forward)))
}

/// Of the second stage: 512 channels, 128 inside.
fn bottleneck(mut m: Maker) -> Result<Block> {
    const BATCH: usize = 8;
    const OUTER: usize = 512;
    const INNER: usize = 128;
    const SIZE: usize = 28;
    let x = m.input("x", &[BATCH, OUTER, SIZE, SIZE])?;
    let convolutions = [
        m.weight("conv1", &[INNER, OUTER, 1, 1])?,
        m.weight("conv2", &[INNER, INNER, 3, 3])?,
        m.weight("conv3", &[OUTER, INNER, 1, 1])?,
    ];
    let affine = [m.affine("bn1", INNER)?, m.affine("bn2", INNER)?, m.affine("bn3", OUTER)?];
    let running = [m.running(INNER)?, m.running(INNER)?, m.running(OUTER)?];
    let forward = move |n: &Norms| {
        let identity = n.var(&x);
        let mut x = identity.clone();
        for (i, conv) in convolutions.iter().enumerate() {
            let ([w, b], [mean, var]) = (&affine[i], &running[i]);
            let mut args = vec![x.conv2d(&n.var(conv), i % 2, 1, 1, 1)?, n.var(w), n.var(b)];
            args.extend((i == 2).then(|| identity.clone()));
            x = n.at(Site::BatchRelu(mean.clone(), var.clone()), &args)?.y;
        }
        Ok(Outputs::one(x))
    };
    let block = m.block(ALL[2].0, BATCH * SIZE * SIZE, Box::new(forward));
    Ok(Block { corners: true, ..block })
}

/// AdaLN-Zero: scale, shift and gate of attention and MLP come from the condition.
fn dit(mut m: Maker) -> Result<Block> {
    const BATCH: usize = 2;
    const TOKENS: usize = 256;
    const WIDTH: usize = 1152;
    const HEADS: usize = 16;
    let x = m.input("x", &[BATCH, TOKENS, WIDTH])?;
    let condition = m.input("condition", &[BATCH, WIDTH])?;
    let modulation = m.weight("adaLN_modulation", &[6 * WIDTH, WIDTH])?;
    let [qkv, out] = [m.weight("qkv", &[3 * WIDTH, WIDTH])?, m.weight("proj", &[WIDTH, WIDTH])?];
    let [fc1, fc2] = [m.weight("fc1", &[4 * WIDTH, WIDTH])?, m.weight("fc2", &[WIDTH, 4 * WIDTH])?];
    let forward = move |n: &Norms| {
        let parts = linear(n, &n.var(&condition).silu()?, &modulation)?.unsqueeze(1)?.chunk(6, D::Minus1)?;
        let norm = |x: &Tensor, [shift, scale]: [usize; 2]| {
            n.at(Site::Modulate, &[x.clone(), parts[scale].contiguous()?, parts[shift].contiguous()?])
        };
        let x = n.var(&x);
        let qkv = linear(n, &norm(&x, [0, 1])?.y, &qkv)?.chunk(3, D::Minus1)?;
        let qkv = [heads(&qkv[0], HEADS)?, heads(&qkv[1], HEADS)?, heads(&qkv[2], HEADS)?];
        let attention = linear(n, &attend(n, qkv, None)?, &out)?;
        let x = (x + attention.broadcast_mul(&parts[2])?)?;
        let inner = linear(n, &norm(&x, [3, 4])?.y, &fc1)?.gelu()?;
        let x = (&x + linear(n, &inner, &fc2)?.broadcast_mul(&parts[5])?)?;
        Ok(Outputs::one(x))
    };
    Ok(m.block(ALL[3].0, 4 * WIDTH, Box::new(forward)))
}
