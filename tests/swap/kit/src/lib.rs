//! What a model is to this test: its name, how to run it from seeded weights, and what it cannot do.
//!
//! Apart from the models, which are compiled twice: these types are the same on both sides.

mod gguf;
mod run;

pub use gguf::{discover, Gguf};
pub use run::{set_seed, Run, VOCABULARY};

use candle_core::{Result, Tensor};

pub const SLOW: &str = "take candle minutes";

#[derive(Clone, Copy)]
pub struct Model {
    /// Under `candle_transformers::models`.
    pub module: &'static str,
    pub name: &'static str,
    pub run: fn(&Run) -> Result<Tensor>,
    /// Why candle has no gradients for it.
    pub no_gradients: Option<&'static str>,
    /// Why it does not run in f64.
    pub no_f64: Option<&'static str>,
}

impl Model {
    pub const fn new(module: &'static str, name: &'static str, run: fn(&Run) -> Result<Tensor>) -> Self {
        Self { module, name, run, no_gradients: None, no_f64: None }
    }

    pub const fn no_gradients(mut self, why: &'static str) -> Self {
        self.no_gradients = Some(why);
        self
    }

    pub const fn no_f64(mut self, why: &'static str) -> Self {
        self.no_f64 = Some(why);
        self
    }

    /// With gradients that take candle minutes: not even that there are none is checked.
    pub const fn slow(mut self) -> Self {
        self.no_gradients = Some(SLOW);
        self
    }

    /// Of quantized weights: candle multiplies by them in f32 alone, and has no gradients for it.
    pub const fn quantized(self) -> Self {
        self.no_gradients("quantized").no_f64("quantized")
    }

    pub fn is_quantized(&self) -> bool {
        self.no_f64 == Some("quantized")
    }
}

/// A module of candle-transformers from which no model is made here.
pub struct Left {
    pub module: &'static str,
    pub why: &'static str,
}
