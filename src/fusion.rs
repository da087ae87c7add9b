//! What stands around a norm and is done in the same visit: plain values, and the activations' mathematics.
//!
//! Apart from `geometry`, which says where elements lie, and from the kernels, which compute all this in
//! vectors: here it is written once in candle's operations, for devices without kernels and for reading.
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

use candle_core::{DType, Result, Tensor};
use candle_nn::Activation as Named;
use std::f64::consts::{FRAC_1_SQRT_2, PI};

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
    /// dtype of the request's residual, and of the sum, which is added up in f32 (f64 where x or the residual
    /// is f64) and rounded once.
    pub residual: Option<DType>,
    /// Whether the request has a skip.
    pub skip: bool,
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

impl Activation {
    /// Every one, for tests.
    #[cfg(test)]
    pub const ALL: [Self; 8] = [
        Self::Relu,
        Self::Relu6,
        Self::LeakyRelu(0.1),
        Self::Silu,
        Self::Sigmoid,
        Self::HardSwish,
        Self::Gelu,
        Self::GeluTanh,
    ];

    /// The one that `named` is, if kernels compute it.
    pub fn of(named: Named) -> Option<Self> {
        Some(match named {
            Named::Relu => Self::Relu,
            Named::Relu6 => Self::Relu6,
            Named::LeakyRelu(slope) => Self::LeakyRelu(slope),
            Named::Silu | Named::Swish => Self::Silu,
            Named::Sigmoid => Self::Sigmoid,
            Named::HardSwish => Self::HardSwish,
            Named::Gelu => Self::Gelu,
            Named::NewGelu | Named::GeluPytorchTanh => Self::GeluTanh,
            _ => return None,
        })
    }

    /// In candle's own operations, differentiable any number of times.
    ///
    /// By selection where candle's own has another slope at a corner (its `relu` has 1 at zero, PyTorch's 0:
    /// behind a norm whose weight begins at zero that is every element), and by the formula where candle's own
    /// gradient has constants of six digits (both of its gelu).
    pub fn apply(self, z: &Tensor) -> Result<Tensor> {
        let zeros = || z.zeros_like();
        match self {
            Self::Relu => z.le(0f64)?.where_cond(&zeros()?, z),
            Self::Relu6 => {
                let above = z.ge(6f64)?.where_cond(&(zeros()? + 6.0)?, z)?;
                z.le(0f64)?.where_cond(&zeros()?, &above)
            }
            Self::LeakyRelu(slope) => z.gt(0f64)?.where_cond(z, &(z * slope)?),
            Self::Silu => z.silu(),
            Self::Sigmoid => candle_nn::ops::sigmoid(z),
            Self::HardSwish => {
                let between = (z * ((z + 3.0)? / 6.0)?)?;
                let below = z.le(-3f64)?.where_cond(&zeros()?, &between)?;
                z.ge(3f64)?.where_cond(z, &below)
            }
            Self::Gelu => (z * 0.5)?.mul(&((z * FRAC_1_SQRT_2)?.erf()? + 1.0)?),
            Self::GeluTanh => {
                let inner = ((z + (z.sqr()? * z)?.affine(0.044715, 0.0)?)? * (2.0 / PI).sqrt())?;
                (z * 0.5)?.mul(&(inner.tanh()? + 1.0)?)
            }
        }
    }
}
