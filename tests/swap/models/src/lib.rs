//! The models of candle-transformers, each small and ready to run. Compiled twice: `zoo` is one copy or the other.

mod audio;
mod config;
mod diffusion;
mod image;
mod multimodal;
mod quantized;
mod text;

use kit::{Left, Model};

/// Every model that is run.
pub fn models() -> Vec<Model> {
    let all = [
        text::MODELS,
        image::MODELS,
        multimodal::MODELS,
        diffusion::MODELS,
        audio::MODELS,
        quantized::MODELS,
    ];
    all.into_iter().flat_map(|list| list.iter().copied()).collect()
}

/// Modules without a model here, with the reason.
pub const LEFT: &[Left] = &[
    Left { module: "llama2_c_weights", why: "a reader of files, no model" },
    Left { module: "persimmon", why: "a configuration without a model" },
    Left { module: "vgg", why: "no norm, and 133 million parameters in the smallest" },
    Left { module: "with_tracing", why: "layers that the models use, no model" },
];
