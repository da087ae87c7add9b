//! candle-nn's `ops` with its norms replaced: the same names and signatures, differentiable, for any
//! memory order (the output is contiguous) and for weights of another dtype than the input's.
//!
//! Apart from `functional`, whose functions take PyTorch's arguments. The rest of candle-nn's `ops` is
//! passed on, so that `use candle_norm::ops` can stand for `use candle_nn::ops`.

use crate::functional;
use candle_core::{bail, Result, Tensor};

#[doc(no_inline)]
pub use candle_nn::ops::*;

/// Layer normalization over the last dimension: `alpha` is the weight, `beta` the bias.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * alpha + beta
/// ```
///
/// # Errors
/// `alpha` or `beta` that is not `[n]` for an input `[.., n]`.
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
    let last = last_dim("layer-norm", xs)?;
    functional::layer_norm(xs, &[last], Some(alpha), Some(beta), eps.into())?.contiguous()
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
/// `alpha` that is not `[n]` for an input `[.., n]`.
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
    let last = last_dim("rms-norm", xs)?;
    functional::rms_norm(xs, &[last], Some(alpha), eps.into())?.contiguous()
}

/// [`rms_norm`] under the name of candle-nn's differentiable one.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_slow(x: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    rms_norm(x, alpha, eps)
}

fn last_dim(op: &str, xs: &Tensor) -> Result<usize> {
    match xs.dims().last() {
        Some(&last) => Ok(last),
        None => bail!("{op}: input is a scalar, expected at least one dimension"),
    }
}
