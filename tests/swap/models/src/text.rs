//! Language models.

use crate::config::small;
use candle_core::{DType, Device, Result, Tensor};
use kit::{Model, Run, VOCABULARY};
use serde_json::json;
use zoo::models::*;

pub const MODELS: &[Model] = &[
    Model::new("based", "Based", |run| {
        let config = small(json!({
            "n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4, "alt_mixer_layers": [1], "alt_mixer_2_layers": [2],
            "alt_mixer": { "num_heads": 4, "feature_dim": 8, "feature_map": { "input_dim": 8 } },
            "alt_mixer_2": { "num_heads": 4, "window_size": 8 },
        }))?;
        based::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("bert", "BERT", |run| {
        let config = small(json!({ "hidden_act": "gelu", "position_embedding_type": "absolute" }))?;
        let tokens = run.tokens(9)?;
        bert::BertModel::load(run.vb.clone(), &config)?.forward(&tokens, &tokens.zeros_like()?, None)
    }),
    Model::new("bigcode", "BigCode (StarCoder)", |run| {
        let config = bigcode::Config {
            vocab_size: VOCABULARY,
            max_position_embeddings: 32,
            num_hidden_layers: 2,
            hidden_size: 64,
            layer_norm_epsilon: 1e-5,
            n_inner: Some(128),
            num_attention_heads: 4,
            multi_query: true,
            use_cache: false,
        };
        bigcode::GPTBigCode::load(run.vb.clone(), config)?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("chatglm", "ChatGLM3", |run| {
        let config = chatglm::Config {
            num_layers: 2,
            padded_vocab_size: VOCABULARY,
            hidden_size: 64,
            ffn_hidden_size: 128,
            kv_channels: 16,
            num_attention_heads: 4,
            seq_length: 32,
            multi_query_group_num: 2,
            ..chatglm::Config::glm3_6b()
        };
        chatglm::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?)
    }),
    Model::new("codegeex4_9b", "CodeGeeX4", |run| {
        codegeex4_9b::Model::new(&small(glm())?, run.vb.clone())?.forward(&run.tokens(9)?)
    }),
    Model::new("debertav2", "DeBERTa v2", |run| {
        let config = small(json!({
            "hidden_act": "gelu", "relative_attention": true, "max_relative_positions": -1, "position_buckets": 8,
            "position_biased_input": false, "pos_att_type": "p2c|c2p", "share_att_key": true,
            "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
        }))?;
        debertav2::DebertaV2Model::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, None, None)
    }),
    Model::new("deepseek2", "DeepSeek v2", |run| {
        let config = small(json!({
            "moe_intermediate_size": 32, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
        }))?;
        deepseek2::DeepSeekV2::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("distilbert", "DistilBERT", |run| {
        let config = small(json!({
            "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "activation": "gelu",
            "position_embedding_type": "absolute",
        }))?;
        let mask = Tensor::zeros((9, 9), DType::U8, &Device::Cpu)?;
        distilbert::DistilBertModel::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, &mask)
    }),
    Model::new("falcon", "Falcon", |run| {
        let config = small(json!({
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "n_head_kv": null, "alibi": false,
            "new_decoder_architecture": false, "multi_query": true, "parallel_attn": true, "bias": false,
        }))?;
        falcon::Falcon::load(run.vb.clone(), config)?.forward(&run.tokens(9)?)
    }),
    Model::new("gemma", "Gemma", |run| {
        gemma::Model::new(false, &small(json!({ "hidden_act": null }))?, run.vb.clone())?
            .forward(&run.tokens(9)?, 0)
    }),
    Model::new("gemma2", "Gemma 2", |run| {
        let config = small(json!({
            "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 16,
            "sliding_window": 4,
        }))?;
        gemma2::Model::new(false, &config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("gemma3", "Gemma 3", |run| {
        let config = small(json!({
            "rope_local_base_freq": 1000.0, "query_pre_attn_scalar": 16, "sliding_window": 16,
            "sliding_window_pattern": 2, "final_logit_softcapping": null, "attn_logit_softcapping": null,
            // Its cache takes several heads of one token alone.
            "num_key_value_heads": 1,
        }))?;
        gemma3::Model::new(false, &config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("gemma4", "Gemma 4, text", |run| {
        let config = small(json!({
            "sliding_window": 4, "query_pre_attn_scalar": 16, "global_head_dim": 32, "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": null,
            "final_logit_softcapping": 30.0,
        }))?;
        gemma4::text::TextModel::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("glm4", "GLM-4", |run| {
        glm4::Model::new(&small(glm())?, run.vb.clone())?.forward(&run.tokens(9)?)
    }),
    Model::new("glm4_new", "GLM-4 0414", |run| {
        let config = small(json!({ "partial_rotary_factor": 0.5, "attention_bias": true }))?;
        glm4_new::ModelForCausalLM::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("granite", "Granite", |run| {
        let config: granite::GraniteConfig = small(json!({ "rope_scaling": null }))?;
        let config = config.into_config(false);
        let mut cache = granite::Cache::new(false, run.dtype, &config, &Device::Cpu)?;
        granite::Granite::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("granitemoehybrid", "Granite MoE hybrid", |run| {
        let config: granitemoehybrid::GraniteMoeHybridConfig =
            small(json!({ "layer_types": ["attention", "attention"], "shared_intermediate_size": 96 }))?;
        let config = config.into_config(false);
        let mut cache =
            granitemoehybrid::GraniteMoeHybridCache::new(false, run.dtype, &config, &Device::Cpu)?;
        let model = granitemoehybrid::GraniteMoeHybrid::load(run.vb.clone(), &config)?;
        model.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("helium", "Helium", |run| {
        let config = small(json!({ "mlp_bias": false }))?;
        helium::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("jina_bert", "Jina BERT", |run| {
        use candle_core::Module;
        let config = small(json!({ "hidden_act": "gelu", "position_embedding_type": "alibi" }))?;
        jina_bert::BertModel::new(run.vb.clone(), &config)?.forward(&run.tokens(9)?)
    }),
    Model::new("lfm2", "LFM2", |run| {
        let config: lfm2::Lfm2Config = small(json!({ "layer_types": ["conv", "full_attention"] }))?;
        let config = config.into_config(false);
        let mut cache = lfm2::Cache::new(false, run.dtype, &config, &Device::Cpu)?;
        lfm2::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("llama", "Llama", |run| {
        let config: llama::LlamaConfig = small(json!({}))?;
        let config = config.into_config(false);
        let mut cache = llama::Cache::new(false, run.dtype, &config, &Device::Cpu)?;
        llama::Llama::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("llama2_c", "llama2.c", |run| {
        let config = tiny_llama();
        let mut cache = llama2_c::Cache::new(false, &config, run.vb.pp("rot"))?;
        llama2_c::Llama::load(run.vb.clone(), config)?.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("mamba", "Mamba", |run| {
        let config = small(json!({ "d_model": 64, "n_layer": 2, "pad_vocab_size_multiple": 8 }))?;
        let mut state = mamba::State::new(1, &config, run.dtype, &Device::Cpu)?;
        let model = mamba::Model::new(&config, run.vb.clone())?;
        each_token(run, |token| model.forward(token, &mut state))
    }),
    Model::new("mamba2", "Mamba 2", |run| {
        let config = small(json!({
            "hidden_size": 64, "d_state": 16, "expand": 2, "ngroups": 1, "pad_vocab_size_multiple": 8,
        }))?;
        let mut state = mamba2::State::new(1, &config, run.dtype, &Device::Cpu)?;
        mamba2::Model::new(&config, run.vb.clone())?.forward_prefill(&run.tokens(8)?, &mut state, 4)
    }),
    Model::new("marian", "Marian", |run| {
        let config = small(json!({
            "encoder_layers": 2, "encoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_layers": 2,
            "decoder_ffn_dim": 128, "decoder_attention_heads": 4, "is_encoder_decoder": true,
            "activation_function": "silu", "d_model": 64, "decoder_start_token_id": 1, "scale_embedding": true,
            "forced_eos_token_id": 2, "share_encoder_decoder_embeddings": true,
        }))?;
        let mut model = marian::MTModel::new(&config, run.vb.clone())?;
        let encoded = model.encoder().forward(&run.tokens(9)?, 0)?;
        model.decode(&run.tokens(5)?, &encoded, 0)
    }),
    Model::new("mistral", "Mistral", |run| {
        mistral::Model::new(&small(json!({ "sliding_window": 4 }))?, run.vb.clone())?
            .forward(&run.tokens(9)?, 0)
    }),
    Model::new("mixformer", "MixFormer (Phi 1.5)", |run| {
        let model = mixformer::MixFormerSequentialForCausalLM::new(&small(phi_2())?, run.vb.clone());
        model?.forward(&run.tokens(9)?)
    }),
    Model::new("mixtral", "Mixtral", |run| {
        let config =
            small(json!({ "sliding_window": 4096, "num_experts_per_tok": 2, "num_local_experts": 4 }))?;
        mixtral::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("modernbert", "ModernBERT", |run| {
        let config = small(json!({
            "global_attn_every_n_layers": 2, "global_rope_theta": 160000.0, "local_attention": 4,
            "local_rope_theta": 10000.0,
        }))?;
        let mask = Tensor::ones((1, 9), DType::U32, &Device::Cpu)?;
        modernbert::ModernBertForMaskedLM::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, &mask)
    }),
    Model::new("mpt", "MPT (Replit code)", |run| {
        mpt::Model::new(&tiny_mpt(), run.vb.clone())?.forward(&run.tokens(9)?)
    }),
    Model::new("nomic_bert", "Nomic BERT", |run| {
        let config = small(json!({
            "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "n_positions": 32,
        }))?;
        nomic_bert::NomicBertModel::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, None, None)
    }),
    Model::new("nvembed_v2", "NV-Embed v2, the embedding model", |run| {
        let mask = Tensor::ones((1, 9), run.dtype, &Device::Cpu)?;
        let mut model = nvembed_v2::embedding::Model::new(&small(json!({}))?, run.vb.clone())?;
        model.forward(&mask, &run.tokens(9)?, run.dtype)
    }),
    Model::new("olmo", "OLMo", |run| {
        olmo::Model::new(&small(json!({}))?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("olmo2", "OLMo 2", |run| {
        olmo2::Model::new(&small(json!({}))?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("phi", "Phi", |run| {
        let config = small(json!({ "partial_rotary_factor": 0.5, "qk_layernorm": false }))?;
        phi::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?)
    }),
    Model::new("phi3", "Phi 3", |run| {
        phi3::Model::new(&small(json!({}))?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("qwen2", "Qwen 2", |run| {
        qwen2::ModelForCausalLM::new(&small(qwen())?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("qwen2_moe", "Qwen 2 MoE", |run| {
        qwen2_moe::Model::new(&small(qwen())?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("qwen3", "Qwen 3", |run| {
        qwen3::ModelForCausalLM::new(&small(qwen())?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    })
    .no_f64("its attention on the CPU is for f32 alone"),
    Model::new("qwen3_moe", "Qwen 3 MoE", |run| {
        qwen3_moe::ModelForCausalLM::new(&small(qwen())?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    })
    .no_f64("its attention on the CPU is for f32 alone"),
    Model::new("recurrent_gemma", "RecurrentGemma", |run| {
        recurrent_gemma::Model::new(&small(griffin())?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("rwkv_v5", "RWKV 5", |run| {
        let config = small(rwkv())?;
        let mut state = rwkv_v5::State::new(1, &config, &Device::Cpu)?;
        let model = rwkv_v5::Model::new(&config, run.vb.clone())?;
        each_token(run, |token| model.forward(&token.unsqueeze(1)?, &mut state))
    }),
    Model::new("rwkv_v6", "RWKV 6", |run| {
        let config = small(rwkv())?;
        let mut state = rwkv_v6::State::new(1, &config, &Device::Cpu)?;
        let model = rwkv_v6::Model::new(&config, run.vb.clone())?;
        each_token(run, |token| model.forward(&token.unsqueeze(1)?, &mut state))
    }),
    Model::new("rwkv_v7", "RWKV 7", |run| {
        let config = small(json!({ "version": "V7", "head_size": 16 }))?;
        // Whose ranks the model reads off these.
        for (name, rank) in [("w1", 8), ("a1", 8), ("v1", 8), ("g1", 16)] {
            run.has(&format!("blocks.0.att.{name}"), (64, rank))?;
        }
        let mut state = rwkv_v7::State::new_with_dtype(&config, &Device::Cpu, run.dtype)?;
        rwkv_v7::Model::new(&config, run.vb.clone())?.forward_seq(&[3, 10, 17, 24], &mut state)
    }),
    Model::new("smol", "SmolLM 3", |run| {
        smol::smollm3::ModelForCausalLM::new(&small(json!({}))?, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("stable_lm", "StableLM", |run| {
        let config = small(json!({ "partial_rotary_factor": 0.5, "use_qkv_bias": true }))?;
        stable_lm::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("starcoder2", "StarCoder 2", |run| {
        let config = small(json!({ "norm_epsilon": 1e-5, "use_bias": true, "sliding_window": 4 }))?;
        starcoder2::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
    Model::new("stella_en_v5", "Stella 1.5B", |run| stella(run, stella_en_v5::Config::new_1_5_b_v5)),
    Model::new("stella_en_v5", "Stella 400M", |run| stella(run, stella_en_v5::Config::new_400_m_v5)),
    Model::new("t5", "T5", |run| {
        let config = small(t5())?;
        let mut model = t5::T5ForConditionalGeneration::load(run.vb.clone(), &config)?;
        model.forward(&run.tokens(9)?, &run.tokens(5)?)
    }),
    Model::new("xlm_roberta", "XLM-RoBERTa", |run| {
        let config = small(json!({ "hidden_act": "gelu", "position_embedding_type": "absolute" }))?;
        let tokens = run.tokens(9)?;
        let mask = Tensor::ones((1, 9), DType::U32, &Device::Cpu)?;
        let model = xlm_roberta::XLMRobertaModel::new(&config, run.vb.clone())?;
        model.forward(&tokens, &mask, &tokens.zeros_like()?, None, None, None)
    }),
    Model::new("yi", "Yi", |run| {
        let config = yi::Config {
            vocab_size: VOCABULARY,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 32,
            ..yi::Config::config_6b()
        };
        yi::Model::new(&config, run.vb.clone())?.forward(&run.tokens(9)?, 0)
    }),
];

/// What the model says to the last of three tokens, given one by one.
pub fn each_token(run: &Run, mut step: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let tokens = run.tokens(3)?;
    let outputs: Result<Vec<Tensor>> = (0..3).map(|i| step(&tokens.narrow(1, i, 1)?.squeeze(1)?)).collect();
    Tensor::cat(&outputs?, 0)
}

fn glm() -> serde_json::Value {
    json!({
        "num_layers": 2, "padded_vocab_size": VOCABULARY, "ffn_hidden_size": 128, "kv_channels": 16,
        "seq_length": 32, "layernorm_epsilon": 1e-5, "rmsnorm": true,
        "apply_residual_connection_post_layernorm": false, "post_layer_norm": true, "add_bias_linear": false,
        "add_qkv_bias": true, "bias_dropout_fusion": true, "multi_query_attention": true,
        "multi_query_group_num": 2, "apply_query_key_layer_scaling": true, "attention_softmax_in_fp32": true,
        "fp32_residual_connection": false, "rope_ratio": 1,
    })
}

pub fn griffin() -> serde_json::Value {
    json!({
        "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 8, "conv1d_width": 4, "logits_soft_cap": 30.0, "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1, "max_seq_len": 32, "lru_width": 64,
    })
}

pub fn phi_2() -> serde_json::Value {
    json!({
        "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_inner": 128, "n_head": 4, "rotary_dim": 8,
        "activation_function": "gelu_new", "pad_vocab_size_multiple": 8,
    })
}

fn qwen() -> serde_json::Value {
    json!({
        "sliding_window": 4096, "max_window_layers": 2, "use_sliding_window": false, "decoder_sparse_step": 1,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2,
        "num_experts": 4, "norm_topk_prob": true,
    })
}

pub fn rwkv() -> serde_json::Value {
    json!({ "attention_hidden_size": 64, "num_attention_heads": 16, "head_size": 16, "rescale_every": 6 })
}

fn stella(run: &Run, preset: fn(stella_en_v5::EmbedDim) -> stella_en_v5::Config) -> Result<Tensor> {
    let mut config = stella_en_v5::Config {
        vocab_size: VOCABULARY,
        hidden_size: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        max_position_embeddings: 32,
        ..preset(stella_en_v5::EmbedDim::Dim256)
    };
    config.num_key_value_heads = config.num_key_value_heads.min(2);
    config.embed_head.in_features = 64;
    let mut model = stella_en_v5::EmbeddingModel::new(&config, run.vb.pp("base"), run.vb.pp("head"))?;
    model.forward(&run.tokens(9)?, &Tensor::ones((1, 9), DType::U32, &Device::Cpu)?)
}

pub fn t5() -> serde_json::Value {
    json!({
        "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu", "is_decoder": false, "is_encoder_decoder": true,
        "decoder_start_token_id": 0,
    })
}

pub fn tiny_mpt() -> mpt::Config {
    mpt::Config {
        d_model: 64,
        n_heads: 4,
        n_layers: 2,
        expansion_ratio: 2,
        max_seq_len: 32,
        vocab_size: VOCABULARY,
        kv_n_heads: 2,
        ..mpt::Config::replit_code_v1_5_3b()
    }
}

pub fn tiny_llama() -> llama2_c::Config {
    llama2_c::Config {
        dim: 64,
        hidden_dim: 128,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        vocab_size: VOCABULARY,
        seq_len: 32,
        norm_eps: 1e-5,
    }
}
