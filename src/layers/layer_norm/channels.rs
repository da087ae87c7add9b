//! Layer normalization over the channels of images, where they lie.
//!
//! Apart from `LayerNorm`, whose normalized dimensions are the last: SAM's and ConvNeXt's `LayerNorm2d`.

use crate::functional;
use crate::functional::check_eps;
use crate::layers::params;
use crate::layers::repr::Float;
use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::fmt;

const OP: &str = "layer-norm-channels";

/// Layer normalization of `[N, C, ..]` over the channels of each sample and place.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// `weight` and `bias` have shape `[C]`. Nothing is permuted or copied on the way; the output has the input's
/// shape and dtype and is contiguous. [`layer_norm2d`] makes it.
///
/// # Errors
/// The forward fails on an input of one dimension or with other channels.
#[derive(Debug, Clone)]
pub struct LayerNorm2d {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm2d {
    /// A layer of these tensors of shape `[C]`.
    ///
    /// # Errors
    /// Tensors that are not of one shape `[C]`, a negative `eps`.
    pub fn from_tensors(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        check_eps(OP, eps)?;
        params::check_shape(OP, "weight", Some(&weight), &[weight.elem_count()])?;
        params::check_shape(OP, "bias", Some(&bias), weight.dims())?;
        Ok(Self { weight, bias, eps })
    }

    /// The weight, `[C]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `[C]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }
}

impl Module for LayerNorm2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        params::contiguous(functional::layer_norm_channels(
            x,
            Some(&self.weight),
            Some(&self.bias),
            self.eps,
        )?)
    }
}

impl fmt::Display for LayerNorm2d {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerNorm2d({}, eps={})", self.weight.elem_count(), Float(self.eps))
    }
}

/// [`LayerNorm2d`] over `channels`: `weight` and `bias` from `vb`.
///
/// # Errors
/// A tensor that `vb` lacks or has in another shape, a negative `eps`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_norm::{layer_norm2d, Module};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = layer_norm2d(2, 0.0, vb)?;
/// let x = Tensor::new(&[1f32, 30., 3., 10.], &Device::Cpu)?.reshape((1, 2, 1, 2))?;
/// assert_eq!(norm.forward(&x)?.flatten_all()?.to_vec1::<f32>()?, [-1., 1., 1., -1.]);
/// # Ok(()) }
/// ```
pub fn layer_norm2d(channels: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm2d> {
    check_eps(OP, eps)?;
    let (weight, bias) =
        (params::weight(OP, &vb, channels, "weight")?, params::bias(OP, &vb, channels, "bias")?);
    Ok(LayerNorm2d { weight, bias, eps })
}
