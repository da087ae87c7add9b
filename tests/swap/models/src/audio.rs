//! Models of sound.

use crate::config::small;
use candle_core::{DType, Device, Module, Tensor};
use kit::{Model, VOCABULARY};
use serde_json::json;
use zoo::models::*;

/// candle has no gradient of this convolution.
const TRANSPOSED: &str = "conv-transpose1d";

pub const MODELS: &[Model] = &[
    Model::new("csm", "CSM, backbone", |run| {
        let config = csm::LlamaConfig {
            vocab_size: VOCABULARY,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            embed_dim: 64,
            max_seq_len: 32,
            intermediate_dim: 128,
            ..csm::LlamaConfig::from_flavor(csm::Flavor::Llama100M)
        };
        csm::LlamaModel::new(&config, run.vb.clone())?.forward(&run.noise((1, 9, 64))?, 0)
    }),
    Model::new("dac", "DAC, encoder", |run| {
        dac::Encoder::new(8, &[2, 4], 16, run.vb.clone())?.forward(&run.noise((1, 1, 256))?)
    }),
    Model::new("encodec", "EnCodec, group norm, decoder", |run| {
        let config = encodec::Config {
            target_bandwidths: vec![30.0],
            hidden_size: 32,
            num_filters: 8,
            upsampling_ratios: vec![4, 2],
            norm_type: encodec::NormType::TimeGroupNorm,
            use_causal_conv: false,
            codebook_size: VOCABULARY,
            codebook_dim: Some(32),
            ..Default::default()
        };
        let model = encodec::Model::new(&config, run.vb.clone())?;
        let codes = run.tokens(6)?.unsqueeze(0)?;
        model.decode(&codes)
    })
    .no_gradients(TRANSPOSED),
    Model::new("metavoice", "MetaVoice, first stage", |run| {
        let config = metavoice::transformer::Config {
            block_size: 32,
            vocab_size: VOCABULARY,
            n_layer: 2,
            n_head: 4,
            dim: 64,
            speaker_emb_dim: 16,
            intermediate_size: Some(128),
            n_local_heads: Some(2),
            norm_eps: 1e-5,
        };
        let mut model = metavoice::transformer::Model::new(&config, run.vb.clone())?;
        model.forward(&run.tokens(9)?, &run.noise((1, 16))?, 0)
    }),
    Model::new("metavoice", "MetaVoice, second stage", |run| {
        let config = metavoice::gpt::Config {
            block_size: 32,
            vocab_sizes: vec![VOCABULARY, VOCABULARY],
            target_vocab_sizes: vec![VOCABULARY; 2],
            n_layer: 2,
            n_head: 4,
            n_embd: 64,
            ..metavoice::gpt::Config::cfg1b_v0_1()
        };
        let model = metavoice::gpt::Model::new(config, run.vb.clone())?;
        let tokens = run.tokens(9)?;
        Tensor::cat(&model.forward(&Tensor::stack(&[&tokens, &tokens], 1)?)?, 0)
    }),
    Model::new("mimi", "Mimi, transformer", |run| {
        let config = mimi::transformer::Config { norm: mimi::NormType::LayerNorm, ..mimi_transformer() };
        mimi::transformer::StreamingTransformer::new(&config, run.vb.clone())?
            .forward(&run.noise((1, 9, 64))?)
    }),
    Model::new("mimi", "Mimi, transformer with RMS norms", |run| {
        let config = mimi::transformer::Config { norm: mimi::NormType::RmsNorm, ..mimi_transformer() };
        mimi::transformer::StreamingTransformer::new(&config, run.vb.clone())?
            .forward(&run.noise((1, 9, 64))?)
    }),
    Model::new("parler_tts", "Parler-TTS, decoder", |run| {
        let config = small(json!({
            "ffn_dim": 128, "num_cross_attention_key_value_heads": null, "activation_function": "gelu",
            "scale_embedding": false, "num_codebooks": 2, "rope_embeddings": false,
        }))?;
        let mut model = parler_tts::Decoder::new(&config, run.vb.clone())?;
        let tokens = run.tokens(6)?.reshape((1, 2, 3))?;
        let prompt = run.noise((1, 4, 64))?;
        let logits = model.forward(&tokens, Some(&prompt), None, &run.noise((1, 5, 64))?, None, 0)?;
        Tensor::cat(&logits, 0)
    }),
    Model::new("snac", "SNAC, decoder", |run| {
        let config = small(json!({
            "sampling_rate": 24000, "encoder_dim": 8, "encoder_rates": [2, 4], "decoder_dim": 32,
            "decoder_rates": [4, 2], "attn_window_size": 4, "codebook_size": VOCABULARY, "codebook_dim": 8,
            "vq_strides": [2, 1], "noise": false, "depthwise": false,
        }))?;
        let model = snac::Model::new(&config, run.vb.clone())?;
        model.decode(&[&run.tokens(4)?, &run.tokens(8)?])
    })
    .no_gradients(TRANSPOSED),
    Model::new("voxtral", "Voxtral, encoder", |run| {
        let config = voxtral::VoxtralEncoderConfig {
            vocab_size: VOCABULARY,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 4,
            head_dim: 16,
            num_mel_bins: 16,
            max_source_positions: 16,
            ..Default::default()
        };
        voxtral::VoxtralEncoder::new(&config, run.vb.clone())?.forward(&run.noise((1, 16, 32))?)
    }),
    Model::new("voxtral", "Voxtral, language model", |run| {
        let config = small(json!({}))?;
        let mut cache = voxtral::VoxtralLlamaCache::new(false, run.dtype, &config, &Device::Cpu)?;
        voxtral::VoxtralLlama::load(run.vb.clone(), &config)?.forward(&run.tokens(9)?, 0, &mut cache)
    }),
    Model::new("whisper", "Whisper", |run| {
        let mut model = whisper::model::Whisper::load(&run.vb, small(whisper())?)?;
        let audio = model.encoder.forward(&run.noise((1, 16, 32))?, true)?;
        let hidden = model.decoder.forward(&run.tokens(9)?, &audio, true)?;
        model.decoder.final_linear(&hidden)
    }),
    Model::new("whisper", "Whisper, quantized", |run| {
        let mut model =
            crate::quantized::weights(|vb| whisper::quantized_model::Whisper::load(&vb, small(whisper())?))?;
        let audio = model.encoder.forward(&run.noise((1, 16, 32))?.to_dtype(DType::F32)?, true)?;
        let hidden = model.decoder.forward(&run.tokens(9)?, &audio, true)?;
        model.decoder.final_linear(&hidden)
    })
    .quantized(),
];

fn mimi_transformer() -> mimi::transformer::Config {
    mimi::transformer::Config {
        d_model: 64,
        num_heads: 4,
        num_layers: 2,
        causal: true,
        norm_first: true,
        bias_ff: false,
        bias_attn: false,
        layer_scale: Some(0.01),
        positional_embedding: mimi::transformer::PositionalEmbedding::Rope,
        use_conv_block: false,
        cross_attention: false,
        conv_kernel_size: 5,
        use_conv_bias: true,
        gating: None,
        norm: mimi::NormType::LayerNorm,
        context: 32,
        max_period: 10000,
        max_seq_len: 32,
        kv_repeat: 1,
        dim_feedforward: 128,
        conv_layout: false,
    }
}

fn whisper() -> serde_json::Value {
    json!({
        "num_mel_bins": 16, "max_source_positions": 32, "d_model": 64, "encoder_attention_heads": 4,
        "encoder_layers": 2, "max_target_positions": 16, "decoder_attention_heads": 4, "decoder_layers": 2,
        "suppress_tokens": [],
    })
}
