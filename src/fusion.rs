//! What stands around a norm and is done in the same visit: plain values, and the activations' mathematics.
//!
//! Apart from `geometry`, which says where elements lie, and from the kernels, which compute all this in
//! vectors: here it is written once in f64, for oracles and for reading.
//!
//! ```text
//! s    = round(x + residual)      or x * silu(gate), not rounded
//! xhat = (s - mean) * rstd
//! z    = xhat * (weight + weight_offset) + bias
//! z    = z + skip                 not rounded
//! y    = activation(z)            or z * silu(gate)
//! ```
//!
//! Any of them may be absent.

/// What is fused, besides the tensors that a request has or has not.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Fusion {
    /// Added to every weight in the accumulation type: 1 for Gemma's RMS norm, and for modulation.
    pub weight_offset: f64,
    /// Blocks (`outer`) one behind the other that share a weight and a bias; weight and bias then have
    /// an entry for every column of every `outer / tokens` sample. `None`: one weight for all.
    pub tokens: Option<usize>,
    pub activation: Option<Activation>,
    /// Where the request's gate stands.
    pub gate: Option<Gate>,
}

/// Where `silu(gate)` is multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// `x * silu(gate)` is normalized (Mamba 2).
    Before,
    /// `y = z * silu(gate)` (Qwen3-Next).
    After,
}

/// Activations that kernels compute; others run behind the norm as candle's own operations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Activation {
    Relu,
    Relu6,
    /// With its slope below zero.
    LeakyRelu(f64),
    Silu,
    Sigmoid,
    HardSwish,
    /// With the error function.
    Gelu,
    /// With the hyperbolic tangent.
    GeluTanh,
}
