//! Small configurations: one set of sizes under all the names that the models have for them.

use candle_core::{Error, Result};
use kit::VOCABULARY;
use serde_json::{json, Value};

/// `fields` over the sizes below, read as a model's configuration. What a model does not know, it ignores.
pub fn small<T: serde::de::DeserializeOwned>(fields: Value) -> Result<T> {
    let mut config = json!({
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "rms_norm_eps": 1e-6,
        "layer_norm_eps": 1e-6,
        "norm_eps": 1e-6,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "hidden_activation": "gelu",
        "attention_bias": false,
        "tie_word_embeddings": false,
        "use_cache": false,
        "use_flash_attn": false,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
    });
    let Value::Object(fields) = fields else { candle_core::bail!("fields of a configuration: {fields}") };
    let all = config.as_object_mut().unwrap();
    // Null: a name that the model does not want.
    for (name, value) in fields {
        match value {
            Value::Null => drop(all.remove(&name)),
            value => drop(all.insert(name, value)),
        }
    }
    serde_json::from_value(config).map_err(Error::wrap)
}
