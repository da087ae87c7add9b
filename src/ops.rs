//! candle-nn's `ops` with its norms replaced: the same names, signatures and meaning, differentiable, for
//! any memory order (the output is contiguous) and for weights of another dtype than the input's.
//!
//! The weight and the bias broadcast against the input, as in candle-nn's `_slow` functions. A weight `[n]`
//! is the fast one, with any number of ones before. PyTorch's arguments are those of
//! [`functional`]. The rest of candle-nn's `ops` is passed on, so that
//! `use candle_norm::ops` can stand for `use candle_nn::ops`.

use crate::functional;
use candle_core::{Result, Tensor};

#[doc(no_inline)]
pub use candle_nn::ops::*;

/// Layer normalization over the last dimension: `alpha` is the weight, `beta` the bias.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * alpha + beta
/// ```
///
/// # Errors
/// `alpha` or `beta` that does not broadcast against the input, a negative `eps`, a scalar input.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let (ones, zeros) = (Tensor::new(&[1f32, 1.], &Device::Cpu)?, Tensor::new(&[0f32, 0.], &Device::Cpu)?);
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let y = candle_norm::ops::layer_norm(&x, &ones, &zeros, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., 1.]]);
/// # Ok(()) }
/// ```
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    functional::last_dim("layer-norm", xs, Some(alpha), Some(beta), eps.into(), true, None)
}

/// [`layer_norm`] under the name of candle-nn's differentiable one.
///
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_slow(x: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    layer_norm(x, alpha, beta, eps)
}

/// RMS normalization over the last dimension: `alpha` is the weight.
///
/// ```text
/// y = x / sqrt(mean(x^2) + eps) * alpha
/// ```
///
/// # Errors
/// `alpha` that does not broadcast against the input, a negative `eps`, a scalar input.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let ones = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// assert_eq!(candle_norm::ops::rms_norm(&x, &ones, 0.0)?.to_vec2::<f32>()?, [[0.2, 1.4]]);
/// # Ok(()) }
/// ```
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    functional::last_dim("rms-norm", xs, Some(alpha), None, eps.into(), false, None)
}

/// [`rms_norm`] under the name of candle-nn's differentiable one.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_slow(x: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    rms_norm(x, alpha, eps)
}
