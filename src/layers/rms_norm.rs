//! Root-mean-square normalization.
//!
//! ```text
//! y = x / sqrt(mean(x^2) + eps) * weight
//! ```
//!
//! over the last dimensions of each sample, `normalized_shape`; the same in training and evaluation.
//! Zhang and Sennrich, [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467);
//! arguments and meaning are those of
//! [`torch.nn.RMSNorm`](https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_norm::{Module, RmsNorm};
//! # fn main() -> candle_core::Result<()> {
//! let norm = RmsNorm::new(Tensor::new(&[1f32, 10.], &Device::Cpu)?, 0.0);
//! let y = norm.forward(&Tensor::new(&[[1f32, 7.]], &Device::Cpu)?)?;
//! assert_eq!(y.to_vec2::<f32>()?, [[0.2, 14.]]);
//! # Ok(()) }
//! ```

use super::layer_norm::LayerNorm;
use super::options::options;
use crate::functional::check_eps;
use candle_core::{bail, Result, Shape, Tensor};
use candle_nn::{Module, VarBuilder};
use std::fmt;

options! {
    /// PyTorch's arguments of RMS normalization.
    ///
    /// ```
    /// use candle_norm::rms_norm::RmsNormOptions;
    /// assert_eq!(RmsNormOptions::default().eps, None);
    /// assert_eq!(RmsNormOptions::from(1e-6).eps, Some(1e-6));
    /// ```
    pub struct RmsNormOptions {
        /// Added to the mean square. Default `None`: the machine epsilon of the dtype that the input
        /// is accumulated in, which is f64 for f64 and f32 for all else.
        eps: Option<f64> = None,
        /// Whether there is a weight; default true.
        elementwise_affine: bool = true,
        /// Added to the weight, in the dtype of accumulation: 1 for the checkpoints of Gemma and Qwen3-Next, whose
        /// weights are kept as differences from 1; default 0. A weight that is created begins at
        /// `1 - weight_offset`.
        weight_offset: f64 = 0.0,
    }
}

/// RMS normalization over the last dimensions: see the [module](self).
///
/// The input is f16, bf16, f32 or f64, whatever of these the weight is, and of any memory order; the
/// output has the input's shape and dtype, and is contiguous.
///
/// # Errors
/// The forward fails on an input whose last dimensions are not `normalized_shape`, or against which the
/// weight does not broadcast.
#[derive(Debug, Clone)]
pub struct RmsNorm(pub(super) LayerNorm);

impl RmsNorm {
    /// A layer with PyTorch's arguments over the last dimensions `normalized_shape`; the `weight` (or
    /// `gamma`) comes from `vb`.
    ///
    /// # Errors
    /// An empty `normalized_shape`, a tensor that `vb` lacks or has in another shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_norm::{rms_norm::RmsNormOptions, RmsNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = RmsNorm::with_options((3, 4), RmsNormOptions::default().elementwise_affine(false), vb)?;
    /// assert_eq!(norm.to_string(), "RMSNorm((3, 4), eps=None, elementwise_affine=False)");
    /// # Ok(()) }
    /// ```
    pub fn with_options(
        normalized_shape: impl Into<Shape>,
        options: impl Into<RmsNormOptions>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let RmsNormOptions { eps, elementwise_affine, weight_offset } = options.into();
        check_eps("rms-norm", eps.unwrap_or(0.0))?;
        let shape = normalized_shape.into();
        check_offset(weight_offset)?;
        LayerNorm::get(&shape, elementwise_affine, false, false, eps, weight_offset, vb)?
            .over(shape)
            .map(Self)
    }

    /// A layer of a tensor that comes from elsewhere than a `VarBuilder`: a GGUF file, a shard.
    ///
    /// The weight is what is given, whatever the options say about it.
    ///
    /// # Errors
    /// An empty `normalized_shape`, a tensor of another shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{Module, RmsNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = RmsNorm::from_tensors(2, None, 0.0)?;
    /// let y = norm.forward(&Tensor::new(&[[1f32, 7.]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 1.4]]);
    /// # Ok(()) }
    /// ```
    pub fn from_tensors(
        normalized_shape: impl Into<Shape>,
        weight: Option<Tensor>,
        options: impl Into<RmsNormOptions>,
    ) -> Result<Self> {
        let RmsNormOptions { eps, weight_offset, .. } = options.into();
        check_offset(weight_offset)?;
        let mut norm = LayerNorm::of_tensors(normalized_shape.into(), weight, None, false, eps)?;
        norm.weight_offset = weight_offset;
        Ok(Self(norm))
    }

    /// candle-nn's layer of this tensor, over the last dimension, of length `n`: it has shape `[n]`, or any
    /// other that broadcasts against the input ([`LayerNorm::new`]).
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The same layer as a [`LayerNorm`] that does not subtract the mean.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The dimensions normalized over; the weight's last one where a constructor of candle-nn named none.
    pub fn normalized_shape(&self) -> &[usize] {
        self.0.normalized_shape()
    }

    /// Whether there is a weight.
    pub fn elementwise_affine(&self) -> bool {
        self.0.elementwise_affine()
    }

    /// The weight; ones of `normalized_shape` where the layer has none, since candle-nn's signature has no
    /// `Option` here.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square of an input that is not f64.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The forward, under the name that candle-nn's differentiable one has; here all are.
    ///
    /// # Errors
    /// As the layer's.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }

    /// Sets the weight to 1.
    ///
    /// # Errors
    /// A weight that is not a variable.
    pub fn reset_parameters(&self) -> Result<()> {
        self.0.reset_parameters()
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// PyTorch's notation.
impl fmt::Display for RmsNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt_as("RMSNorm", f)
    }
}

/// candle-nn's constructor over the last dimension, of length `size`: `weight` (or `gamma`) from `vb`.
///
/// # Errors
/// A tensor that `vb` lacks or has in another shape, a negative `eps`.
///
/// ```
/// use candle_core::{DType, Device};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_norm::rms_norm(16, 1e-6, vb)?;
/// assert_eq!(norm.weight().dims(), [16]);
/// # Ok(()) }
/// ```
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    check_eps("rms-norm", eps)?;
    LayerNorm::get(&size.into(), true, false, false, Some(eps), 0.0, vb).map(RmsNorm)
}

fn check_offset(weight_offset: f64) -> Result<()> {
    if !weight_offset.is_finite() {
        bail!("rms-norm: weight_offset must be finite, got {weight_offset}")
    }
    Ok(())
}
