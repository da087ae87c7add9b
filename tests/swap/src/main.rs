//! Models of candle-transformers with candle-norm's norms and with candle-nn's, side by side.
//!
//! Each is built twice from the same values; outputs and the gradients of every variable are compared.
//! See run.sh for where the two copies of candle-transformers come from.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

/// Rounding differs between the two in every norm and grows through tens of layers; a wrong formula
/// is off by parts in ten at once. Relative, in the L2 norm.
const OUTPUT: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;

macro_rules! models {
    ($name:ident, $zoo:ident) => {
        mod $name {
            use super::image;
            use candle_core::{DType, Device, Module, Result, Tensor};
            use candle_nn::VarBuilder;
            use $zoo::models::*;

            type Model = fn(VarBuilder) -> Result<Tensor>;

            pub const MODELS: [(&str, Model); 10] = [
                // Whose max pooling candle cannot differentiate: the output alone.
                ("ResNet-18 (batch norm), no gradients", |vb| {
                    Ok(resnet::resnet18(10, vb)?.forward(&image(64)?)?.detach())
                }),
                ("MobileNetV4 small (batch norm)", |vb| {
                    mobilenetv4::mobilenetv4(&mobilenetv4::Config::small(), 10, vb)?.forward(&image(64)?)
                }),
                ("EfficientNet-B0 (batch norm)", |vb| {
                    let config = efficientnet::MBConvConfig::b0();
                    efficientnet::EfficientNet::new(vb, config, 10)?.forward(&image(64)?)
                }),
                ("ConvNeXt atto (layer norm)", |vb| {
                    convnext::convnext(&convnext::Config::atto(), 10, vb)?.forward(&image(64)?)
                }),
                ("BERT (layer norm)", bert),
                ("Llama (RMS norm)", llama),
                ("Whisper (layer norm)", whisper),
                ("Stable Diffusion VAE (group norm)", vae),
                ("Stable Diffusion UNet (group and layer norm)", unet),
                ("SegFormer (layer and batch norm)", segformer),
            ];

            fn tokens(n: u32) -> Result<Tensor> {
                Tensor::arange(1u32, n + 1, &Device::Cpu)?.reshape((1, n as usize))
            }

            fn bert(vb: VarBuilder) -> Result<Tensor> {
                let config = bert::Config {
                    vocab_size: 50,
                    hidden_size: 64,
                    num_hidden_layers: 2,
                    num_attention_heads: 4,
                    intermediate_size: 128,
                    ..Default::default()
                };
                let tokens = tokens(9)?;
                bert::BertModel::load(vb, &config)?.forward(&tokens, &tokens.zeros_like()?, None)
            }

            fn llama(vb: VarBuilder) -> Result<Tensor> {
                let config = llama::Config {
                    hidden_size: 64,
                    intermediate_size: 128,
                    vocab_size: 50,
                    num_hidden_layers: 2,
                    num_attention_heads: 4,
                    num_key_value_heads: 2,
                    use_flash_attn: false,
                    rms_norm_eps: 1e-6,
                    rope_theta: 1e4,
                    bos_token_id: None,
                    eos_token_id: None,
                    rope_scaling: None,
                    max_position_embeddings: 32,
                    tie_word_embeddings: false,
                };
                let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
                llama::Llama::load(vb, &config)?.forward(&tokens(9)?, 0, &mut cache)
            }

            fn whisper(vb: VarBuilder) -> Result<Tensor> {
                let config = whisper::Config {
                    num_mel_bins: 16,
                    max_source_positions: 32,
                    d_model: 64,
                    encoder_attention_heads: 4,
                    encoder_layers: 2,
                    vocab_size: 50,
                    max_target_positions: 16,
                    decoder_attention_heads: 4,
                    decoder_layers: 2,
                    suppress_tokens: vec![],
                };
                let mut model = whisper::model::Whisper::load(&vb, config)?;
                let mel = image(32)?.narrow(1, 0, 1)?.squeeze(1)?.narrow(1, 0, 16)?.narrow(0, 0, 1)?;
                let audio = model.encoder.forward(&mel, true)?;
                let hidden = model.decoder.forward(&tokens(9)?, &audio, true)?;
                model.decoder.final_linear(&hidden)
            }

            fn vae(vb: VarBuilder) -> Result<Tensor> {
                let config = stable_diffusion::vae::AutoEncoderKLConfig {
                    block_out_channels: vec![32, 64],
                    norm_num_groups: 8,
                    ..Default::default()
                };
                let vae = stable_diffusion::vae::AutoEncoderKL::new(vb, 3, 3, config)?;
                let latent = Tensor::cat(&[image(8)?, image(8)?], 1)?.narrow(1, 0, 4)?;
                vae.decode(&latent)
            }

            fn unet(vb: VarBuilder) -> Result<Tensor> {
                use stable_diffusion::unet_2d::{
                    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
                };
                let block = |out_channels, use_cross_attn| BlockConfig {
                    out_channels,
                    use_cross_attn,
                    attention_head_dim: 4,
                };
                let config = UNet2DConditionModelConfig {
                    blocks: vec![block(32, Some(1)), block(64, None)],
                    layers_per_block: 1,
                    norm_num_groups: 8,
                    cross_attention_dim: 16,
                    ..Default::default()
                };
                let unet = UNet2DConditionModel::new(vb, 3, 3, false, config)?;
                let text = image(16)?.narrow(1, 0, 1)?.squeeze(1)?;
                unet.forward(&image(16)?, 10.0, &text)
            }

            fn segformer(vb: VarBuilder) -> Result<Tensor> {
                let config = segformer::Config {
                    id2label: Default::default(),
                    num_channels: 3,
                    num_encoder_blocks: 2,
                    depths: vec![1, 1],
                    sr_ratios: vec![2, 1],
                    hidden_sizes: vec![16, 32],
                    patch_sizes: vec![7, 3],
                    strides: vec![4, 2],
                    num_attention_heads: vec![1, 2],
                    mlp_ratios: vec![2, 2],
                    hidden_act: candle_nn::Activation::Gelu,
                    layer_norm_eps: 1e-6,
                    decoder_hidden_size: 32,
                };
                segformer::SemanticSegmentationModel::new(&config, 5, vb)?.forward(&image(32)?)
            }
        }
    };
}

models!(ours, ours);
models!(reference, reference);

/// Two images `[2, 3, size, size]` of smooth, different values.
fn image(size: usize) -> Result<Tensor> {
    let n = 6 * size * size;
    (Tensor::arange(0f32, n as f32, &Device::Cpu)? * 0.37)?.sin()?.reshape((2, 3, size, size))
}

fn norm(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar()
}

struct Compared {
    output: f64,
    gradient: f64,
    with_gradient: usize,
    variables: usize,
}

type Model = fn(VarBuilder) -> Result<Tensor>;

fn compare(ours: Model, reference: Model) -> Result<Compared> {
    let maps = [VarMap::new(), VarMap::new()];
    let [our_vb, their_vb] = [0, 1].map(|i| VarBuilder::from_varmap(&maps[i], DType::F32, &Device::Cpu));
    // The first run creates the variables.
    ours(our_vb.clone())?;
    reference(their_vb.clone())?;
    let [a, b] = [0, 1].map(|i| maps[i].data().lock().unwrap().clone());
    let mut names: Vec<&String> = b.keys().collect();
    names.sort();
    if a.len() != b.len() || names.iter().any(|name| !a.contains_key(*name)) {
        candle_core::bail!("the two have variables of other names")
    }
    for name in &names {
        // Off the initial values, which hide a forgotten weight; a variance stays positive.
        let moved = (b[*name].as_detached_tensor() + (b[*name].randn_like(0.0, 1.0)? * 0.05)?)?;
        let value = if name.ends_with("running_var") { (moved.abs()? + 0.5)? } else { moved };
        a[*name].set(&value)?;
        b[*name].set(&value)?;
    }
    let (y, expected) = (ours(our_vb)?, reference(their_vb)?);
    let output = norm(&(&y - &expected)?)? / norm(&expected)?;
    if !y.track_op() {
        return Ok(Compared { output, gradient: 0.0, with_gradient: 0, variables: names.len() });
    }
    // Weights in the loss, so that no norm's gradient vanishes by symmetry.
    let dy =
        (Tensor::arange(0f32, y.elem_count() as f32, &Device::Cpu)? * 0.73)?.cos()?.reshape(y.shape())?;
    let (g, h) = ((y * &dy)?.sum_all()?.backward()?, (expected * &dy)?.sum_all()?.backward()?);
    let mut largest = 0f64;
    for name in &names {
        largest = h.get(&b[*name]).map_or(Ok(largest), |t| norm(t).map(|n| n.max(largest)))?;
    }
    let (mut gradient, mut with_gradient) = (0f64, 0);
    for name in &names {
        match (g.get(&a[*name]), h.get(&b[*name])) {
            (Some(got), Some(expected)) => {
                // A gradient that is zero but for rounding has no relative error of its own.
                let scale = norm(expected)? + 1e-4 * largest;
                gradient = gradient.max(norm(&(got - expected)?)? / scale);
                with_gradient += 1;
            }
            (None, None) => {}
            (got, _) => candle_core::bail!(
                "{name}: only {} has a gradient",
                if got.is_some() { "ours" } else { "theirs" }
            ),
        }
    }
    Ok(Compared { output, gradient, with_gradient, variables: names.len() })
}

fn main() -> Result<()> {
    println!("| model | variables | with a gradient | output, relative error | gradients, largest |");
    println!("|---|---|---|---|---|");
    let mut failed = 0;
    for ((name, ours), (_, reference)) in ours::MODELS.into_iter().zip(reference::MODELS) {
        match compare(ours, reference) {
            Ok(Compared { output, gradient, with_gradient, variables }) => {
                println!("| {name} | {variables} | {with_gradient} | {output:.1e} | {gradient:.1e} |");
                // Written so that NaN fails too.
                if !(output < OUTPUT && gradient < GRADIENT) {
                    failed += 1;
                }
            }
            Err(error) => {
                println!("| {name} | failed: {error} |");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        candle_core::bail!("{failed} models differ")
    }
    Ok(())
}
