//! Models of images and text together.

use crate::config::small;
use candle_core::{Device, IndexOp, Module, Result, Tensor};
use kit::{Model, VOCABULARY};
use serde_json::{json, Value};
use zoo::models::*;

/// Which fails where it adds fewer rows than there are.
const SCATTER: &str = "candle's gradient of scatter_add";

pub const MODELS: &[Model] = &[
    Model::new("blip", "BLIP", |run| {
        let config: blip::Config = small(blip())?;
        let mut model = blip::BlipForConditionalGeneration::new(&config, run.vb.clone())?;
        let image = model.vision_model().forward(&run.noise((1, 3, 32, 32))?)?;
        model.text_decoder().forward(&run.tokens(5)?, &image)
    }),
    Model::new("blip_text", "BLIP, its text decoder", |run| {
        let mut model = blip_text::TextLMHeadModel::new(&small(blip()["text_config"].clone())?, run.vb.clone())?;
        model.forward(&run.tokens(5)?, &run.noise((1, 7, 64))?)
    }),
    Model::new("chinese_clip", "Chinese CLIP", |run| {
        use chinese_clip::{text_model::ChineseClipTextConfig, vision_model::ChineseClipVisionConfig};
        let config = chinese_clip::ChineseClipConfig {
            text_config: ChineseClipTextConfig {
                vocab_size: VOCABULARY,
                hidden_size: 64,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                intermediate_size: 128,
                ..Default::default()
            },
            vision_config: ChineseClipVisionConfig {
                hidden_size: 64,
                intermediate_size: 128,
                projection_dim: 32,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                image_size: 32,
                patch_size: 8,
                ..Default::default()
            },
            projection_dim: 32,
            ..chinese_clip::ChineseClipConfig::clip_vit_base_patch16()
        };
        run.has("vision_model.embeddings.class_embedding", 64)?;
        let model = chinese_clip::ChineseClipModel::new(run.vb.clone(), &config)?;
        let text = model.get_text_features(&run.tokens(9)?, None, None)?;
        pair(model.get_image_features(&run.noise((1, 3, 32, 32))?)?, text)
    }),
    Model::new("clip", "CLIP", |run| {
        let base = clip::ClipConfig::vit_base_patch32();
        let config = clip::ClipConfig {
            text_config: clip::text_model::ClipTextConfig {
                vocab_size: VOCABULARY,
                embed_dim: 64,
                intermediate_size: 128,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                projection_dim: 32,
                ..base.text_config
            },
            vision_config: tower(),
            ..base
        };
        run.has("vision_model.embeddings.class_embedding", 64)?;
        let model = clip::ClipModel::new(run.vb.clone(), &config)?;
        let text = model.get_text_features(&run.tokens(9)?)?;
        pair(model.get_image_features(&run.noise((1, 3, 32, 32))?)?, text)
    }),
    Model::new("colpali", "ColPali", |run| {
        let mut model = colpali::Model::new(&paligemma()?, run.vb.clone())?;
        model.forward_images(&run.noise((1, 3, 32, 32))?, &run.tokens(5)?)
    }),
    Model::new("gemma4", "Gemma 4, text and images", |run| {
        let config = small(json!({
            "image_token_id": 7, "audio_token_id": 8, "video_token_id": 9, "audio_config": null,
            "text_config": with(json!({
                "sliding_window": 4, "query_pre_attn_scalar": 16, "global_head_dim": 32, "sliding_window_pattern": 2,
                "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": null,
                "final_logit_softcapping": 30.0,
            })),
            "vision_config": with(json!({
                "num_key_value_heads": 4, "position_embedding_size": 64, "pooling_kernel_size": 2,
                "default_output_length": 4, "standardize": false, "rope_parameters": null,
            })),
        }))?;
        let mut model = gemma4::Model::new(&config, run.vb.clone())?;
        let tokens = Tensor::new(&[[3u32, 7, 7, 7, 7, 11, 20]], &Device::Cpu)?;
        model.forward_multimodal(&tokens, Some(&[run.noise((1, 3, 32, 32))?]), None, None, 0)
    })
    .no_gradients(SCATTER),
    Model::new("gemma4", "Gemma 4, audio", |run| {
        let config = small(json!({
            "input_feat_size": 32, "output_proj_dims": 48, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": [16, 8], "conf_attention_chunk_size": 4, "conf_attention_context_left": 5,
            "num_attention_heads": null, "num_hidden_layers": null,
        }))?;
        let mask = Tensor::zeros((1, 32), run.dtype, &Device::Cpu)?;
        Ok(gemma4::audio::AudioModel::new(&config, run.vb.clone())?.forward(&run.noise((1, 32, 32))?, &mask)?.0)
    }),
    Model::new("llava", "LLaVA", |run| {
        let config = small(json!({
            "architectures": ["llava"], "image_aspect_ratio": "square", "image_crop_resolution": 32,
            "image_grid_pinpoints": [], "image_split_resolution": 32, "mm_hidden_size": 64,
            "mm_patch_merge_type": "flat", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": false,
            "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "model_type": "llava_llama",
            "torch_dtype": "float32", "image_token_index": 7, "hf": true, "tie_word_embeddings": false,
        }))?;
        run.has("vision_tower.vision_model.embeddings.class_embedding", 64)?;
        let model = llava::LLaVA::load(run.vb.clone(), &config, Some(tower()))?;
        let image = model.encode_images(&run.noise((1, 3, 32, 32))?)?;
        let words = model.llama.embed(&run.tokens(5)?)?;
        let config = config.to_llama_config();
        let mut cache = llama::Cache::new(false, run.dtype, &config, &Device::Cpu)?;
        model.forward(&Tensor::cat(&[image, words], 1)?, 0, &mut cache)
    }),
    Model::new("mobileclip", "MobileCLIP-S1", |run| {
        run.without(crate::image::no_fastvit);
        let s1 = mobileclip::MobileClipConfig::s1();
        let config = mobileclip::MobileClipConfig { text_config: openclip_text(512), ..s1 };
        let model = mobileclip::MobileClipModel::new(run.vb.clone(), &config)?;
        let text = model.get_text_features(&run.tokens(9)?)?;
        pair(model.get_image_features(&run.images(64)?.i(..1)?)?, text)
    }),
    Model::new("moondream", "Moondream", |run| {
        let mut model = moondream::Model::new(&small(moondream())?, run.vb.clone())?;
        let image = model.vision_encoder().forward(&run.noise((1, 3, 56, 56))?)?;
        model.text_model().forward_with_img(&run.tokens(1)?, &run.tokens(5)?, &image)
    }),
    Model::new("openclip", "OpenCLIP, text", |run| {
        let model = openclip::text_model::OpenClipTextTransformer::new(run.vb.clone(), &openclip_text(32))?;
        model.forward(&run.tokens(9)?)
    }),
    Model::new("paddleocr_vl", "PaddleOCR-VL", |run| {
        let config: paddleocr_vl::Config = small(json!({
            "use_bias": false, "image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9,
            "vision_end_token_id": 10, "tokens_per_second": 25, "head_dim": 16, "rms_norm_eps": null,
            "rope_scaling": { "mrope_section": [2, 3, 3], "rope_type": "default" },
            "vision_config": with(json!({ "hidden_act": "gelu", "attention_dropout": 0.0, "spatial_merge_size": 2 })),
        }))?;
        let grid = Tensor::new(&[[1u32, 4, 4]], &Device::Cpu)?;
        let tokens = Tensor::new(&[[3u32, 9, 7, 7, 7, 7, 10, 20]], &Device::Cpu)?;
        let mut model = paddleocr_vl::PaddleOCRVLModel::new(&config, run.vb.clone())?;
        model.forward(&tokens, Some(&run.noise((1, 3, 32, 32))?), Some(&grid), 0)
    }),
    Model::new("paligemma", "PaliGemma", |run| {
        let mut model = paligemma::Model::new(&paligemma()?, run.vb.clone())?;
        model.setup(&run.noise((1, 3, 32, 32))?, &run.tokens(5)?)
    }),
    Model::new("pixtral", "Pixtral, vision", |run| {
        pixtral::vision_model::Model::new(&small(json!({}))?, run.vb.clone())?.forward(&run.noise((1, 3, 32, 32))?)
    }),
    Model::new("pixtral", "Pixtral", |run| {
        let config = small(json!({
            "projector_hidden_act": "gelu", "image_token_index": 7, "image_seq_length": 16,
            "text_config": with(json!({ "sliding_window": null })), "vision_config": with(json!({})),
        }))?;
        let mut model = pixtral::llava::Model::new(&config, run.vb.clone())?;
        let image = model.encode_image(&run.noise((1, 3, 32, 32))?)?;
        let words = model.language_model.embed_tokens().forward(&run.tokens(5)?)?;
        model.language_model.forward_embeds(&Tensor::cat(&[image, words], 1)?, None, 0)
    }),
    Model::new("qwen3_vl", "Qwen 3 VL", |run| {
        let config = small(json!({
            "image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10,
            "text_config": with(json!({ "sliding_window": null })),
            "vision_config": with(json!({
                "depth": 2, "out_hidden_size": 64, "hidden_act": "gelu", "num_heads": 4, "in_chans": 3,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            })),
        }))?;
        let model = qwen3_vl::Qwen3VLModel::new(&config, run.vb.clone())?;
        let grid = Tensor::new(&[[1u32, 4, 4]], &Device::Cpu)?;
        let tokens = Tensor::new(&[[3u32, 9, 7, 7, 7, 7, 10, 20]], &Device::Cpu)?;
        let pixels = run.noise((16, 3 * 2 * 8 * 8))?;
        model.forward(&tokens, Some(pixels), None, Some(grid), None, vec![8], vec![vec![(2, 6)]], vec![vec![]], &[0])
    })
    .no_gradients(SCATTER),
    Model::new("siglip", "SigLIP", |run| {
        let config = small(json!({ "text_config": with(gelu()), "vision_config": with(gelu()) }))?;
        let model = siglip::Model::new(&config, run.vb.clone())?;
        let text = model.get_text_features(&run.tokens(9)?)?;
        pair(model.get_image_features(&run.noise((1, 3, 32, 32))?)?, text)
    }),
    Model::new("trocr", "TrOCR", |run| {
        let image = small(json!({ "hidden_act": "gelu", "qkv_bias": true }))?;
        let text = small(json!({
            "d_model": 64, "cross_attention_hidden_size": 64, "decoder_layers": 2, "decoder_attention_heads": 4,
            "decoder_ffn_dim": 128, "activation_function": "gelu", "dropout": 0.0, "attention_dropout": 0.0,
            "activation_dropout": 0.0, "decoder_start_token_id": 1, "init_std": 0.02, "decoder_layerdrop": 0.0,
            "scale_embedding": false, "use_learned_position_embeddings": true,
        }))?;
        let mut model = trocr::TrOCRModel::new(&image, &text, run.vb.clone())?;
        let encoded = model.encoder().forward(&run.noise((1, 3, 32, 32))?)?;
        // Its mask is of the tokens, and it lays it over the image too: one token.
        model.decode(&run.tokens(1)?, &encoded, 0)
    }),
];

/// The common sizes, for a configuration inside another.
pub fn with(fields: Value) -> Value {
    small(fields).expect("an object")
}

pub fn gelu() -> Value {
    json!({ "hidden_act": "gelu_pytorch_tanh" })
}

pub fn blip() -> Value {
    json!({
        "projection_dim": 32, "image_text_hidden_size": 32,
        "text_config": with(json!({
            "hidden_act": "gelu", "encoder_hidden_size": 64, "projection_dim": 32, "is_decoder": true,
        })),
        "vision_config": with(json!({ "hidden_act": "gelu", "projection_dim": 32 })),
    })
}

/// With patches of 1152 numbers, which the model does not leave to its configuration.
pub fn moondream() -> Value {
    json!({
        "phi_config": with(crate::text::phi_2()),
        "vision_config": {
            "image_embedding_dim": 1152, "model_dim": 64, "hidden_dim": 128, "hidden_features": 128, "embed_len": 16,
            "embed_dim": 1152, "num_blocks": 1, "num_heads": 4, "act": "gelu_pytorch_tanh",
        },
    })
}

fn openclip_text(projection_dim: usize) -> openclip::text_model::Config {
    openclip::text_model::Config {
        vocab_size: VOCABULARY,
        embed_dim: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        projection_dim,
        ..openclip::text_model::Config::vit_base_patch32()
    }
}

fn paligemma() -> Result<paligemma::Config> {
    Ok(paligemma::Config {
        vision_config: small(gelu())?,
        text_config: small(json!({ "hidden_act": null }))?,
        projection_dim: 64,
    })
}

/// The features of both, in one row.
fn pair(image: Tensor, text: Tensor) -> Result<Tensor> {
    Tensor::cat(&[image, text], 1)
}

fn tower() -> clip::vision_model::ClipVisionConfig {
    clip::vision_model::ClipVisionConfig {
        embed_dim: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        projection_dim: 32,
        image_size: 32,
        patch_size: 8,
        ..clip::vision_model::ClipVisionConfig::vit_base_patch32()
    }
}
