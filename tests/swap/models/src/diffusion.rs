//! Diffusion models, their autoencoders and text encoders.

use crate::config::small;
use candle_core::{Module, Result, Tensor};
use kit::{Model, Run};
use serde_json::json;
use zoo::models::*;

pub const MODELS: &[Model] = &[
    Model::new("flux", "Flux", |run| {
        use flux::WithForward;
        flux_forward(run, |inputs| {
            let model = flux::model::Flux::new(&flux_config(), run.vb.clone())?;
            let [img, img_ids, txt, txt_ids, t, y, guidance] = inputs;
            model.forward(img, img_ids, txt, txt_ids, t, y, Some(guidance))
        })
    }),
    Model::new("flux", "Flux, quantized", |run| {
        use flux::WithForward;
        flux_forward(run, |inputs| {
            let model = crate::quantized::weights(|vb| flux::quantized_model::Flux::new(&flux_config(), vb))?;
            let [img, img_ids, txt, txt_ids, t, y, guidance] = inputs;
            model.forward(img, img_ids, txt, txt_ids, t, y, Some(guidance))
        })
    })
    .quantized(),
    Model::new("flux", "Flux, decoder", |run| {
        flux::autoencoder::Decoder::new(&flux_autoencoder(), run.vb.clone())?
            .forward(&run.noise((1, 4, 8, 8))?)
    }),
    Model::new("flux", "Flux, encoder", |run| {
        flux::autoencoder::Encoder::new(&flux_autoencoder(), run.vb.clone())?
            .forward(&run.noise((1, 3, 16, 16))?)
    }),
    Model::new("mmdit", "Stable Diffusion 3 (MMDiT)", |run| mmdit(run, false)),
    Model::new("mmdit", "Stable Diffusion 3.5 (MMDiT-X)", |run| mmdit(run, true)),
    Model::new("stable_diffusion", "Stable Diffusion, UNet", |run| {
        use stable_diffusion::unet_2d::{BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig};
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
        let unet = UNet2DConditionModel::new(run.vb.clone(), 3, 3, false, config)?;
        unet.forward(&run.images(16)?, 10.0, &run.noise((2, 9, 16))?)
    }),
    Model::new("stable_diffusion", "Stable Diffusion, VAE decoder", |run| {
        vae(run)?.decode(&run.noise((2, 4, 8, 8))?)
    }),
    Model::new("wuerstchen", "Wuerstchen, prior", |run| {
        let prior = wuerstchen::prior::WPrior::new(16, 64, 32, 16, 2, 4, false, run.vb.clone())?;
        prior.forward(&run.noise((1, 16, 6, 6))?, &run.noise(1)?, &run.noise((1, 5, 32))?)
    }),
    Model::new("wuerstchen", "Wuerstchen, Paella VQ decoder", |run| {
        wuerstchen::paella_vq::PaellaVQ::new(run.vb.clone())?.decode(&run.noise((1, 4, 8, 8))?)
    }),
    Model::new("wuerstchen", "Wuerstchen, stage B block", |run| {
        let block = wuerstchen::diffnext::ResBlockStageB::new(32, 16, 3, run.vb.clone())?;
        block.forward(&run.noise((1, 32, 8, 8))?, Some(&run.noise((1, 16, 8, 8))?))
    }),
    Model::new("z_image", "Z-Image", |run| {
        let config = small(json!({
            "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 4, "dim": 64, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5, "qk_norm": true,
            "cap_feat_dim": 32, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32], "use_accelerated_attn": false,
        }))?;
        let model = z_image::transformer::ZImageTransformer2DModel::new(&config, run.vb.clone())?;
        let (latent, t) = (run.noise((1, 4, 1, 8, 8))?, (run.noise(1)? * 0.1)?);
        model.forward(&latent, &t.abs()?, &run.noise((1, 5, 32))?, &run.noise((1, 5))?.ones_like()?)
    }),
    Model::new("z_image", "Z-Image, text encoder", |run| {
        z_image::text_encoder::ZImageTextEncoder::new(&small(json!({}))?, run.vb.clone())?
            .forward(&run.tokens(9)?)
    }),
    Model::new("z_image", "Z-Image, decoder", |run| {
        let config = small(json!({
            "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [32, 64],
            "layers_per_block": 1, "scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 8,
        }))?;
        z_image::vae::AutoEncoderKL::new(&config, run.vb.clone())?.decode(&run.noise((1, 4, 8, 8))?)
    }),
];

fn flux_config() -> flux::model::Config {
    flux::model::Config {
        in_channels: 16,
        vec_in_dim: 32,
        context_in_dim: 32,
        hidden_size: 64,
        mlp_ratio: 2.0,
        num_heads: 4,
        depth: 1,
        depth_single_blocks: 2,
        axes_dim: vec![4, 6, 6],
        ..flux::model::Config::dev()
    }
}

/// `img`, `img_ids`, `txt`, `txt_ids`, `timesteps`, `y`, `guidance`.
fn flux_forward(run: &Run, forward: impl Fn([&Tensor; 7]) -> Result<Tensor>) -> Result<Tensor> {
    let places = |n: usize| -> Result<Tensor> {
        let place = Tensor::arange(0u32, n as u32, run.vb.device())?.to_dtype(run.dtype)?;
        Tensor::stack(&[place.zeros_like()?, (&place / 4.0)?.floor()?, place], 1)?.unsqueeze(0)
    };
    let (img, txt) = (run.noise((1, 16, 16))?, run.noise((1, 5, 32))?);
    let txt_ids = places(5)?.zeros_like()?;
    let (t, y) = ((run.noise(1)?.ones_like()? * 0.5)?, run.noise((1, 32))?);
    forward([&img, &places(16)?, &txt, &txt_ids, &t, &y, &(&t * 4.0)?])
}

fn flux_autoencoder() -> flux::autoencoder::Config {
    flux::autoencoder::Config {
        resolution: 16,
        ch: 32,
        ch_mult: vec![1, 2],
        num_res_blocks: 1,
        z_channels: 4,
        ..flux::autoencoder::Config::dev()
    }
}

fn mmdit(run: &Run, two_attentions: bool) -> Result<Tensor> {
    let config = mmdit::model::Config {
        patch_size: 2,
        in_channels: 4,
        out_channels: 4,
        depth: 2,
        head_size: 32,
        adm_in_channels: 32,
        pos_embed_max_size: 8,
        context_embed_size: 32,
        frequency_embedding_size: 32,
    };
    if two_attentions {
        // By whose weights the model tells the two apart, and whether it has norms in its attention.
        run.has("joint_blocks.0.x_block.attn2.qkv.weight", (192, 64))?;
        for attention in ["0.x_block.attn", "0.x_block.attn2", "0.context_block.attn", "1.x_block.attn"] {
            run.has(&format!("joint_blocks.{attention}.ln_q.weight"), 32)?;
            run.has(&format!("joint_blocks.{attention}.ln_k.weight"), 32)?;
        }
    }
    let model = mmdit::model::MMDiT::new(&config, false, run.vb.clone())?;
    let (x, t) = (run.noise((1, 4, 8, 8))?, (run.noise(1)?.ones_like()? * 500.0)?);
    model.forward(&x, &t, &run.noise((1, 32))?, &run.noise((1, 5, 32))?, None)
}

fn vae(run: &Run) -> Result<stable_diffusion::vae::AutoEncoderKL> {
    let config = stable_diffusion::vae::AutoEncoderKLConfig {
        block_out_channels: vec![32, 64],
        norm_num_groups: 8,
        ..Default::default()
    };
    stable_diffusion::vae::AutoEncoderKL::new(run.vb.clone(), 3, 3, config)
}
