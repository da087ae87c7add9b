//! Quantized models: random weights in four and eight bits, made as GGUF files in memory.

use crate::config::small;
use crate::{multimodal, text};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Module, Result};
use kit::{discover, Gguf, Model, VOCABULARY};
use serde_json::json;
use std::io::Cursor;
use zoo::models::*;
use zoo::quantized_var_builder::VarBuilder;

pub const MODELS: &[Model] = &[
    Model::new("quantized_blip", "BLIP, quantized", |run| {
        let config = small(multimodal::blip())?;
        let mut model = weights(|vb| quantized_blip::BlipForConditionalGeneration::new(&config, vb))?;
        let image = model.vision_model().forward(&run.noise((1, 3, 32, 32))?)?;
        model.text_decoder().forward(&run.tokens(5)?, &image)
    })
    .quantized(),
    Model::new("quantized_blip_text", "BLIP, its text decoder, quantized", |run| {
        let config = small(multimodal::blip()["text_config"].clone())?;
        let mut model = weights(|vb| quantized_blip_text::TextLMHeadModel::new(&config, vb))?;
        model.forward(&run.tokens(5)?, &run.noise((1, 7, 64))?)
    })
    .quantized(),
    Model::new("quantized_gemma3", "Gemma 3, quantized", |run| {
        let (content, mut file) = llama_cpp("gemma3", &[])?;
        quantized_gemma3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?
            .forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_glm4", "GLM-4, quantized", |run| {
        let (content, mut file) = llama_cpp("glm4", &[("ffn_up.weight", &[256, 64])])?;
        let model = quantized_glm4::ModelWeights::from_gguf(content, &mut file, &Device::Cpu, DType::F32);
        model?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_lfm2", "LFM2, quantized", |run| {
        let (content, mut file) = llama_cpp("lfm2", &[])?;
        quantized_lfm2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_llama", "Llama, quantized", |run| {
        let (content, mut file) = llama_cpp("llama", &[])?;
        quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?
            .forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_llama2_c", "llama2.c, quantized", |run| {
        let config = text::tiny_llama();
        let mut cache = llama2_c::Cache::new(false, &config, run.vb.pp("rot"))?;
        // Whose blocks panic over what they miss.
        let mut known = Gguf::default();
        for (name, shape) in [
            ("self_attn.q_proj", &[64, 64][..]),
            ("self_attn.k_proj", &[32, 64]),
            ("self_attn.v_proj", &[32, 64]),
            ("self_attn.o_proj", &[64, 64]),
            ("mlp.gate_proj", &[128, 64]),
            ("mlp.up_proj", &[128, 64]),
            ("mlp.down_proj", &[64, 128]),
            ("input_layernorm", &[64]),
            ("post_attention_layernorm", &[64]),
        ] {
            for layer in 0..2 {
                known = known.tensor(&format!("model.layers.{layer}.{name}.weight"), shape)?;
            }
        }
        let model = weights_and(known, |vb| quantized_llama2_c::QLlama::load(vb, text::tiny_llama()))?;
        model.forward(&run.tokens(9)?, 0, &mut cache)
    })
    .quantized(),
    Model::new("quantized_metavoice", "MetaVoice, first stage, quantized", |run| {
        let config = metavoice::transformer::Config {
            block_size: 32,
            vocab_size: VOCABULARY,
            n_layer: 2,
            n_head: 4,
            dim: 64,
            speaker_emb_dim: 32,
            intermediate_size: Some(128),
            n_local_heads: Some(2),
            norm_eps: 1e-5,
        };
        let mut model = weights(|vb| quantized_metavoice::transformer::Model::new(&config, vb))?;
        model.forward(&run.tokens(9)?, &run.noise((1, 32))?, 0)
    })
    .quantized(),
    Model::new("quantized_mistral", "Mistral, quantized", |run| {
        let config = small(json!({ "sliding_window": 4 }))?;
        weights(|vb| quantized_mistral::Model::new(&config, vb))?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_mixformer", "MixFormer (Phi 1.5), quantized", |run| {
        let config = small(text::phi_2())?;
        let model = weights(|vb| quantized_mixformer::MixFormerSequentialForCausalLM::new(&config, vb));
        model?.forward(&run.tokens(9)?)
    })
    .quantized(),
    Model::new("quantized_moondream", "Moondream, quantized", |run| {
        let config = small(multimodal::moondream())?;
        let mut model = weights(|vb| quantized_moondream::Model::new(&config, vb))?;
        let image = model.vision_encoder().forward(&run.noise((1, 3, 56, 56))?)?;
        model.text_model().forward_with_img(&run.tokens(1)?, &run.tokens(5)?, &image)
    })
    .quantized(),
    Model::new("quantized_mpt", "MPT (Replit code), quantized", |run| {
        let config = text::tiny_mpt();
        weights(|vb| quantized_mpt::Model::new(&config, vb))?.forward(&run.tokens(9)?)
    })
    .quantized(),
    Model::new("quantized_phi", "Phi 2, quantized", |run| {
        let (content, mut file) =
            llama_cpp("phi2", &[("attn_qkv.weight", &[192, 64]), ("attn_qkv.bias", &[192])])?;
        quantized_phi::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_phi3", "Phi 3, quantized", |run| {
        let (content, mut file) = llama_cpp("phi3", &[("ffn_up.weight", &[256, 64])])?;
        let model = quantized_phi3::ModelWeights::from_gguf(false, content, &mut file, &Device::Cpu);
        model?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_qwen2", "Qwen 2, quantized", |run| {
        let (content, mut file) = llama_cpp("qwen2", &[])?;
        quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?
            .forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_qwen3", "Qwen 3, quantized", |run| {
        let (content, mut file) = llama_cpp("qwen3", &[])?;
        quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?
            .forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_qwen3_moe", "Qwen 3 MoE, quantized, without experts", |run| {
        let (content, mut file) = llama_cpp("qwen3moe", &[])?;
        let model = quantized_qwen3_moe::GGUFQWenMoE::from_gguf(content, &mut file, &Device::Cpu, DType::F32);
        model?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_recurrent_gemma", "RecurrentGemma, quantized", |run| {
        let config = small(text::griffin())?;
        weights(|vb| quantized_recurrent_gemma::Model::new(&config, vb))?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_rwkv_v5", "RWKV 5, quantized", |run| {
        let config = small(text::rwkv())?;
        let mut state = rwkv_v5::State::new(1, &config, &Device::Cpu)?;
        let model = weights(|vb| quantized_rwkv_v5::Model::new(&config, vb))?;
        text::each_token(run, |token| model.forward(&token.unsqueeze(1)?, &mut state))
    })
    .quantized(),
    Model::new("quantized_rwkv_v6", "RWKV 6, quantized", |run| {
        let config = small(text::rwkv())?;
        let mut state = rwkv_v6::State::new(1, &config, &Device::Cpu)?;
        let model = weights(|vb| quantized_rwkv_v6::Model::new(&config, vb))?;
        text::each_token(run, |token| model.forward(&token.unsqueeze(1)?, &mut state))
    })
    .quantized(),
    Model::new("quantized_stable_lm", "StableLM, quantized", |run| {
        let config = small(json!({ "partial_rotary_factor": 0.5, "use_qkv_bias": true }))?;
        weights(|vb| quantized_stable_lm::Model::new(&config, vb))?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
    Model::new("quantized_t5", "T5, quantized", |run| {
        let config = small(text::t5())?;
        let mut model = weights(|vb| quantized_t5::T5ForConditionalGeneration::load(vb, &config))?;
        model.forward(&run.tokens(9)?, &run.tokens(5)?)
    })
    .quantized(),
    Model::new("smol", "SmolLM 3, quantized", |run| {
        // Whose rows it sorts by 128 at a time; from a path alone.
        let wide: [(&str, &[usize]); 4] = [
            ("attn_q.weight", &[256, 64]),
            ("attn_k.weight", &[256, 64]),
            ("attn_v.weight", &[256, 64]),
            ("attn_output.weight", &[64, 256]),
        ];
        let path = std::env::temp_dir().join(format!("smollm3-{}.gguf", std::process::id()));
        std::fs::write(&path, gguf("smollm3", &wide)?.bytes()?)?;
        let model = smol::quantized_smollm3::QuantizedModelForCausalLM::from_gguf(&path, &Device::Cpu, false);
        std::fs::remove_file(&path)?;
        model?.forward(&run.tokens(9)?, 0)
    })
    .quantized(),
];

/// A model of weights that are made as it asks for them.
pub fn weights<T>(build: impl Fn(VarBuilder) -> Result<T>) -> Result<T> {
    weights_and(Gguf::default(), build)
}

fn weights_and<T>(known: Gguf, build: impl Fn(VarBuilder) -> Result<T>) -> Result<T> {
    discover(known, |file| build(VarBuilder::from_gguf_buffer(file, &Device::Cpu)?))
}

fn llama_cpp(arch: &str, blocks: &[(&str, &[usize])]) -> Result<(Content, Cursor<Vec<u8>>)> {
    let mut file = Cursor::new(gguf(arch, blocks)?.bytes()?);
    Ok((Content::read(&mut file)?, file))
}

/// A file as llama.cpp writes them, with what any of the models looks for: two blocks of the common tensors,
/// with `blocks` in place of those that have another shape here.
fn gguf(arch: &str, blocks: &[(&str, &[usize])]) -> Result<Gguf> {
    // Phi 2 and SmolLM 3 have their own heads.
    let (key_heads, rotated) = match arch {
        "phi2" => (4, 16),
        "smollm3" => (4, 64),
        _ => (2, 16),
    };
    let mut file = Gguf::default().with("general.architecture", Value::String(arch.to_string()));
    let counts = [
        ("attention.head_count", 4),
        ("attention.head_count_kv", key_heads),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.sliding_window", 4),
        ("block_count", 2),
        ("context_length", 32),
        ("embedding_length", 64),
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("expert_feed_forward_length", 0),
        ("feed_forward_length", 128),
        ("rope.dimension_count", rotated),
        ("shortconv.l_cache", 3),
        ("vocab_size", VOCABULARY as u32),
    ];
    for (key, value) in counts {
        file = file.with(&format!("{arch}.{key}"), Value::U32(value));
    }
    let reals = [
        ("attention.layer_norm_rms_epsilon", 1e-6),
        ("attention.layer_norm_epsilon", 1e-6),
        ("rope.freq_base", 1e4),
    ];
    for (key, value) in reals {
        file = file.with(&format!("{arch}.{key}"), Value::F32(value));
    }
    for (name, shape) in [
        ("token_embd.weight", &[VOCABULARY, 64][..]),
        ("output_norm.weight", &[64]),
        ("output_norm.bias", &[64]),
        ("output.weight", &[VOCABULARY, 64]),
        ("output.bias", &[VOCABULARY]),
    ] {
        file = file.tensor(name, shape)?;
    }
    let common: [(&str, &[usize]); 22] = [
        ("attn_norm.weight", &[64]),
        ("attn_norm.bias", &[64]),
        ("attn_q.weight", &[64, 64]),
        ("attn_k.weight", &[32, 64]),
        ("attn_v.weight", &[32, 64]),
        ("attn_q.bias", &[64]),
        ("attn_k.bias", &[32]),
        ("attn_v.bias", &[32]),
        ("attn_q_norm.weight", &[16]),
        ("attn_k_norm.weight", &[16]),
        ("attn_qkv.weight", &[128, 64]),
        ("attn_qkv.bias", &[128]),
        ("attn_output.weight", &[64, 64]),
        ("attn_output.bias", &[64]),
        ("post_attention_norm.weight", &[64]),
        ("ffn_norm.weight", &[64]),
        ("ffn_gate.weight", &[128, 64]),
        ("ffn_up.weight", &[128, 64]),
        ("ffn_up.bias", &[128]),
        ("ffn_down.weight", &[64, 128]),
        ("ffn_down.bias", &[64]),
        ("post_ffw_norm.weight", &[64]),
    ];
    for block in 0..2 {
        for (name, shape) in common.iter().chain(blocks) {
            file = file.tensor(&format!("blk.{block}.{name}"), *shape)?;
        }
    }
    Ok(file)
}
